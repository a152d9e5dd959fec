"""A stage's `training:` as `transformers.TrainingArguments`, with what every run here shares."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.training_args import OptimizerNames

from .recipe import RecipeError, StageRecipe, check_keys, find_recipe


def training_arguments(stage: StageRecipe, work: Path, seed: int) -> TrainingArguments:
    """The stage's `transformers.TrainingArguments`; keys of `training:` are its names. Raises RecipeError."""
    training = stage.training_on(int(os.environ.get("WORLD_SIZE", "1"))) | {"seed": seed}
    try:
        return plain_arguments({"run_name": f"{work.parent.name}/{stage.name}"} | training, work)
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: training: {error}") from None


def plain_arguments(training: dict[str, Any], work: Path) -> TrainingArguments:
    """`transformers.TrainingArguments` from their names, with what every run here shares. Raises ValueError."""
    check_keys(training, list(TrainingArguments.__dataclass_fields__), "training")
    shared: dict[str, Any] = {
        "output_dir": str(work),
        "remove_unused_columns": False,  # the collator takes samples, not columns
        "disable_tqdm": True,  # our own bar
        "save_total_limit": 2,
        "report_to": "tensorboard",
        "logging_nan_inf_filter": False,  # such a loss ends the run, and is not replaced by an average
        # Memory pinning is for a GPU, and warns without one.
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # Distillation gives every parameter a gradient in every batch
    }
    # The Trainer knows how to patch a PreTrainedModel alone: stage_models sees to Liger.
    given = training | {"deepspeed": deepspeed_config(training), "use_liger_kernel": False}
    if given["deepspeed"] is not None and (given.get("use_cpu") or os.environ.get("ACCELERATE_USE_CPU")):
        raise RecipeError(
            "deepspeed and use_cpu (or ACCELERATE_USE_CPU) are both given, and together silently train without "
            "DeepSpeed; leave use_cpu out: without a GPU, DeepSpeed takes the CPU (DS_ACCELERATOR=cpu says so)"
        )
    arguments = TrainingArguments(**(shared | given | _without_gpu(given)))
    # A process without a launcher takes one GPU, whatever else is there: the batch of a step is reckoned that way.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    load_whole_models()
    _check_reports(list(arguments.report_to or []))
    _check_optimizer(arguments)
    return arguments


def idle_gpus() -> str | None:
    """What to tell somebody whose one process leaves GPUs without work; None where it does not."""
    count = torch.cuda.device_count()
    if "WORLD_SIZE" in os.environ or count < 2:
        return None
    return (
        f"note: {count} GPUs are there and one process takes one of them; all of them: "
        f"torchrun --nproc_per_node {count} -m switchkd.cli.main ..."
    )


def _without_gpu(given: dict[str, Any]) -> dict[str, Any]:
    """What lets processes of a launcher meet over gloo where there is no GPU; on its own each would train alone."""
    if "WORLD_SIZE" not in os.environ or torch.accelerator.is_available():
        return {}
    if given["deepspeed"] is None:
        return {"use_cpu": True}
    # The Trainer asks accelerate for DeepSpeed in the same way, but names no backend, which here leaves one process.
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    return {"accelerator_config": (given.get("accelerator_config") or {}) | {"use_configured_state": True}}


def leave_other_ranks() -> None:
    """Part from a launcher's other processes, at the end of all work.

    A process that merely ends may be aborted by the threads of its connections, and the launcher calls that a failure.
    """
    if torch.distributed.is_initialized():
        # What DistributedDataParallel leaves in cycles would be the connections' last owner, and it ends them with
        # Python's lock held, for which their threads may wait: for ever (pytorch/pytorch#56297).
        gc.collect()
        torch.distributed.destroy_process_group()


def deepspeed_config(training: dict[str, Any]) -> dict[str, Any] | None:
    """DeepSpeed's configuration that `training:` names, a file or one of recipes/deepspeed. Raises RecipeError.

    None where no launcher started this process: alone, it has nobody to share weights and moments with.
    """
    given = training.get("deepspeed")
    if given is None or "WORLD_SIZE" not in os.environ:
        return None
    if find_spec("deepspeed") is None:
        raise RecipeError(
            f"deepspeed is {given!r} and the package is not installed; install it (pip install deepspeed), or train "
            "with plain DDP (deepspeed: null)"
        )
    return read_deepspeed(given)


def read_deepspeed(given: str | dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration as it is given: itself, a file, or a name in recipes/deepspeed. Raises RecipeError."""
    if isinstance(given, dict):
        return given
    path = Path(given) if Path(given).is_file() else find_recipe(f"deepspeed/{given}")
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    return config


def zero_stage(training: dict[str, Any]) -> int:
    """The ZeRO stage that `training:` asks for, 0 without DeepSpeed. Raises RecipeError."""
    config = deepspeed_config(training) or {}
    return int(config.get("zero_optimization", {}).get("stage", 0))


def load_whole_models() -> None:
    """Let transformers build and load models whole although ZeRO-3 is on, until accelerate reminds it.

    Else it takes each rank's share of a model, which cannot be put together or looked at. DeepSpeed shares models out
    when training begins, and nothing before or after has to know of it.
    """
    unset_hf_deepspeed_config()


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """While it lasts, parameters that ZeRO-3 has shared out are whole on every rank; others are anyway."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(parameters):
        yield


def _check_reports(names: list[str]) -> None:
    """Raise ValueError where a run could not report, before models are loaded."""
    for name in names:
        check_keys({name: None}, list(INTEGRATION_TO_CALLBACK), "report_to")
        if name not in get_available_reporting_integrations():
            raise ValueError(
                f"report_to names {name}, which is not installed; pip install {name}, or report_to: none (log.jsonl is "
                "always written)"
            )


def _check_optimizer(arguments: TrainingArguments) -> None:
    """Build optimizer and schedule over one number. Raises ValueError, before models are loaded."""
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        if arguments.optim_args:
            plain = copy.copy(arguments)
            plain.optim_args = None
            if settings == Trainer.get_optimizer_cls_and_kwargs(plain)[1]:
                raise ValueError("it takes no optim_args; leave them out")
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            kind([nn.Parameter(torch.zeros(1, device=arguments.device))], **settings)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"optim {OptimizerNames(arguments.optim).value}: {error}") from None
    given: Any = arguments.lr_scheduler_kwargs
    steps = arguments.max_steps if arguments.max_steps > 0 else 1_000_000
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate),
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=given,
        )
    except (TypeError, ValueError) as error:
        name = SchedulerType(arguments.lr_scheduler_type).value
        raise ValueError(f"lr_scheduler_type {name} with lr_scheduler_kwargs {given}: {error}") from None
