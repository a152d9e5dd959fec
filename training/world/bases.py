"""Makes the embedded default's stored parts: tokenizer, encoder, two language models and the teacher.

A vision encoder is pretrained with region phrases; the student's small language model and the teacher learn to
see and to speak at once from it, on captions and then on questions. All of it runs
through the recipes in `recipes/world`, the same trainer and objective that full-size runs use; only the encoder's
region contrast is the world's own.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, SiglipVisionModel, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback

from ..models.vlm import Vlm, load_vlm
from ..recipe.arguments import plain_arguments
from ..recipe.recipe import Recipe, load_recipe
from ..runs.progress import StageProgress
from ..runs.stages import run_recipe
from .encoder_pretraining import RegionDataset, RegionTextModel, encoder_config, region_phrases, write_image_processor
from .vocabulary import train_tokenizer, world_texts

STORED = ("encoder", "student_language_model", "teacher")
# width, layers, heads, key-value heads
LANGUAGE_MODELS = {
    "student_language_model": (128, 3, 4, 2),
    "teacher_language_model": (192, 4, 6, 3),
}


def stored_parts() -> Path:
    """The folder of the parts that come with switchkd."""
    return Path(str(resources.files("switchkd.training.world"))) / "pretrained"


def copy_parts(source: Path, folder: Path) -> None:
    """Copy stored parts to where a run works; what is there already stays."""
    for name in STORED:
        if not (folder / name / "config.json").is_file():
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)


def make_parts(folder: Path, *, announce: Callable[[str], None], max_steps: int | None = None) -> None:
    """Make all parts from nothing under `folder`, whose `world` must be there; finished steps are reused.

    `max_steps` cuts every training short (tests the road, not the models). Takes some 45 minutes on two cores.
    """
    tokenizer = world_tokenizer()
    _pretrain_encoder(folder, tokenizer, announce, max_steps)
    for name in LANGUAGE_MODELS:
        _start_language_model(folder / "start" / name, name, tokenizer)
    run_recipe(_recipe("world/teacher", folder, max_steps), announce=announce)
    results = run_recipe(_recipe("world/student_language_model", folder, max_steps), announce=announce)
    _extract_language_model(load_vlm(results[-1].folder), folder / "student_language_model")


def _recipe(name: str, folder: Path, max_steps: int | None) -> Recipe:
    recipe = load_recipe(name, [f"root={folder}"])
    return recipe if max_steps is None else recipe.with_max_steps(max_steps)


def world_tokenizer() -> PreTrainedTokenizerBase:
    """The world's tokenizer, trained on its text; the same every time."""
    return train_tokenizer(region_phrases() + world_texts(random.Random(0), 4000))


def store(source: Path, target: Path) -> None:
    """Write the parts that switchkd carries, in half precision."""
    for name in STORED:
        shutil.rmtree(target / name, ignore_errors=True)
    SiglipVisionModel.from_pretrained(source / "encoder", dtype=torch.float16).save_pretrained(target / "encoder")
    write_image_processor(target / "encoder")
    vlm = load_vlm(source / "teacher", dtype=torch.float16)
    vlm.save(target / "teacher")
    language_model = Qwen2ForCausalLM.from_pretrained(source / "student_language_model", dtype=torch.float16)
    language_model.save_pretrained(target / "student_language_model")
    vlm.tokenizer.save_pretrained(target / "student_language_model")


def _pretrain_encoder(
    folder: Path, tokenizer: PreTrainedTokenizerBase, announce: Callable[[str], None], max_steps: int | None
) -> None:
    target = folder / "encoder"
    if (target / "preprocessor_config.json").is_file():
        return
    announce("encoder: region-text contrast")
    set_seed(0)
    model = RegionTextModel(SiglipVisionModel(encoder_config()), tokenizer)
    settings = yaml.safe_load((Path(__file__).parent / "encoder_pretraining.yaml").read_text(encoding="utf-8"))
    work = folder / ".encoder.checkpoints"
    training = settings["training"] | ({} if max_steps is None else {"max_steps": max_steps})
    trainer = Trainer(model=model, args=plain_arguments(training, work), train_dataset=RegionDataset(folder / "world"))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StageProgress("encoder"))
    trainer.train()
    model.encoder.save_pretrained(target)
    write_image_processor(target)
    shutil.rmtree(work, ignore_errors=True)


def _start_language_model(target: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if (target / "config.json").is_file():
        return
    width, layers, heads, kv_heads = LANGUAGE_MODELS[name]
    set_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        # The usual 0.02 suits widths near a thousand; at these widths attention would start flat and stay so for long.
        initializer_range=width**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(target)
    Qwen2ForCausalLM(config).save_pretrained(target)


def _extract_language_model(vlm: Vlm, target: Path) -> None:
    """Save a VLM's language model alone, as a plain Qwen2ForCausalLM folder."""
    model = vlm.model
    config = model.config.text_config
    assert isinstance(config, Qwen2Config)
    causal = Qwen2ForCausalLM(config)
    causal.model.load_state_dict(model.model.language_model.state_dict())
    causal.lm_head.load_state_dict(model.lm_head.state_dict())
    causal.save_pretrained(target)
    vlm.tokenizer.save_pretrained(target)
