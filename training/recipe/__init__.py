"""What is asked for, before anything is loaded: the recipe, its values, the Trainer's arguments, sizes of models."""

from .arguments import training_arguments
from .recipe import DataRecipe, ModelRecipe, Recipe, RecipeError, StageRecipe, TeacherRecipe, load_recipe

__all__ = [
    "DataRecipe",
    "ModelRecipe",
    "Recipe",
    "RecipeError",
    "StageRecipe",
    "TeacherRecipe",
    "load_recipe",
    "training_arguments",
]
