"""The keys of a stage's `training:`, fields of `transformers.TrainingArguments`, each in one of three lists.

A key works, or it is set by this program, or it is refused; the last two are named with the way out, before anything is
loaded. A test holds the lists against the installed transformers: a field that a release adds has to be put into one.
"""

from __future__ import annotations

import typing
from typing import Any

from transformers import TrainingArguments

from .values import RecipeError, check_keys, numbers_within, takes_null, typed

ACCUMULATION = "gradient_accumulation_steps"
MICRO_BATCH = "per_device_train_batch_size"

# Works, and a model that was trained with another value is another model.
MODEL_KEYS = (
    *("num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16"),
    *("train_sampling_strategy", "data_seed", "dataloader_drop_last"),
)
# Works, and changes how a run is held, shared out, said and saved, but for rounding not what is learned. Of the first
# two only the product counts: the batch of an optimizer step.
RUN_KEYS = (
    *(MICRO_BATCH, ACCUMULATION),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),  # their names since transformers 5.20
    *("use_liger_kernel", "liger_kernel_config", "tf32", "use_cpu", "torch_empty_cache_steps", "full_determinism"),
    *("deepspeed", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_level", "log_level_replica"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("save_strategy", "save_steps", "save_total_limit"),
)
WORKING = (*MODEL_KEYS, *RUN_KEYS)

# Set by this program: the key, and where it is to be set instead.
OURS = {
    "output_dir": "the recipe's `output` says where a run is saved, each stage by its name",
    "seed": "the recipe's `seed` is the seed of every stage",
    "resume_from_checkpoint": "the same command goes on from a stage's last checkpoint by itself",
    "save_only_model": "a checkpoint holds all that a run needs to go on; the stage's folder holds the model alone",
    "enable_jit_checkpoint": "a run that gets SIGTERM saves the step in progress by itself",
    "restore_callback_states_from_checkpoint": "what a run needs to go on is restored by itself",
    "average_tokens_across_devices": "a step's loss is divided by its supervised tokens over all processes",
    "logging_nan_inf_filter": "a loss that is not a number ends the run",
    "disable_tqdm": "a stage shows a bar of its own in a terminal, and lines elsewhere",
    "remove_unused_columns": "the collator takes samples, which have no columns",
    "label_names": "the labels are those of the records' answers",
    "length_column_name": "lengths are known from the records",
    "ddp_find_unused_parameters": "every parameter that trains gets a gradient in every batch",
    "local_rank": "the launcher says which process this is",
    "accelerator_config": "how samples are ordered and shared among processes is what lets a stopped run go on",
    "log_on_each_node": "the first process of all writes the log",
    "save_on_each_node": "nodes share a disk, and the first process of all saves",
    "use_cache": "a training step keeps no cache",
}

_NO_EVALUATION = "stages train and do not evaluate; look at the checkpoints' answers when a stage is finished"
_NO_HUB = "`switchkd push` publishes a finished stage"
_NO_SCRIPT = "transformers' example scripts read it, and nothing here does"
_COMPILED = "the switch pass and the heads in chunks do not go through torch.compile"
_FSDP = "deepspeed: zero2 or zero3 shares a model out among GPUs"

# Does not work here: the key, and what to do instead.
REFUSED = {
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_do_concat_batches"), _NO_EVALUATION
    ),
    **dict.fromkeys(
        ("eval_use_gather_object", "eval_accumulation_steps", "per_device_eval_batch_size"), _NO_EVALUATION
    ),
    **dict.fromkeys(("prediction_loss_only", "include_for_metrics", "batch_eval_metrics"), _NO_EVALUATION),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), _NO_EVALUATION),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _NO_EVALUATION),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _NO_HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _NO_HUB),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _NO_SCRIPT),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILED),
    **dict.fromkeys(("fsdp", "fsdp_config", "parallelism_config"), _FSDP),
    "label_smoothing_factor": "the loss is the objective's; soft labels are a teacher's (objective: kd)",
    "neftune_noise_alpha": "noise on the embeddings would reach the visual tokens and the teacher's comparison too",
    "optim_target_modules": "GaLore and APOLLO look for layers by name, and the optimizers here take whole parts",
    "auto_find_batch_size": "it would change the batch of a step unseen; halve per_device_train_batch_size at the same "
    "global_batch, and the stopped stage goes on (`switchkd estimate` says what fits)",
    "ignore_data_skip": "a resumed run would see an epoch's first samples twice and its last ones never",
    "dataloader_in_order": "batches out of order could not be found again by a resumed run",
    "include_num_input_tokens_seen": "log.jsonl has `tokens` and `supervised_tokens`",
    "skip_memory_metrics": "log.jsonl has `memory_gib`",
    "debug": "a loss or a gradient that is not a number already ends the run and names the samples",
    "ddp_static_graph": "batches with and without accumulation are two graphs",
}

# Values of working keys that do not work.
_REFUSED_VALUES = {
    ("lr_scheduler_type", "reduce_lr_on_plateau"): _NO_EVALUATION,
    ("lr_scheduler_type", "greedy"): _NO_EVALUATION,
    ("save_strategy", "best"): _NO_EVALUATION,
    ("train_sampling_strategy", "batch_rebalance"): "group_by_length puts samples of one length together",
    ("dataloader_multiprocessing_context", "spawn"): "workers are forked, and share the list of records",
    ("dataloader_multiprocessing_context", "forkserver"): "workers are forked, and share the list of records",
}
_LAYERWISE = ("galore", "apollo", "lomo", "adalomo")  # optimizers that look for layers by name

_LEAST = {
    MICRO_BATCH: 1,
    ACCUMULATION: 1,
    "logging_steps": 0,
    "save_steps": 0,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
}


def check_training(given: Any, where: str) -> dict[str, Any]:
    """A stage's `training:` with every value as its field takes it; null gives a field its default.

    Raises RecipeError for a key that is set by this program or refused, and for a value that cannot be.
    """
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: expected keys and values, got {given!r}")
    _check_keys(given, where)
    kinds = typing.get_type_hints(TrainingArguments)
    values = {}
    for key, value in given.items():
        if key in OURS or key in REFUSED or (value is None and not takes_null(kinds[key])):
            continue  # null takes away what the recipe's base has
        values[key] = typed(numbers_within(value) if isinstance(value, dict) else value, kinds[key], f"{where}: {key}")
        _check_value(key, values[key], where)
    return values


def _check_keys(given: dict[str, Any], where: str) -> None:
    known = set(TrainingArguments.__dataclass_fields__)
    for key, value in given.items():
        if value is None and key in OURS | REFUSED:
            continue
        if key in OURS:
            raise RecipeError(f"{where}: {key} is not set here: {OURS[key]}; leave it out")
        if key in REFUSED:
            raise RecipeError(f"{where}: {key} does not work here: {REFUSED[key]}; leave it out")
        check_keys({key: value}, [name for name in WORKING if name in known], where)


def _check_value(key: str, value: Any, where: str) -> None:
    choices = TrainingArguments.__dataclass_fields__[key].metadata.get("choices")
    if choices is not None and value is not None and value not in choices:
        raise RecipeError(f"{where}: {key} is {value!r}, expected one of {', '.join(choices)}")
    refusal = _REFUSED_VALUES.get((key, value)) if isinstance(value, str) else None
    if refusal is not None:
        raise RecipeError(f"{where}: {key}: {value} does not work here: {refusal}")
    if key == "optim" and str(value).startswith(_LAYERWISE):
        raise RecipeError(f"{where}: optim: {value} does not work here: {REFUSED['optim_target_modules']}")
    if key in _LEAST and value is not None and value < _LEAST[key]:
        raise RecipeError(f"{where}: {key} is {value}, expected {_LEAST[key]} or more")
    if key == "max_steps" and value != -1 and value < 1:
        raise RecipeError(f"{where}: max_steps is {value}, expected 1 or more, or -1: as num_train_epochs says")
    if key == "num_train_epochs" and not value > 0:
        raise RecipeError(f"{where}: num_train_epochs is {value}, expected more than 0")
