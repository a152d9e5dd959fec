"""The embedded default's picture world: scenes, questions, tiny base models and a tiny teacher."""
