"""`switchkd import llava CHECKPOINT OUT` (or `tinyllava`): turn another project's checkpoint into a standard folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .models.vlm import ModelError
from .process.terminal import quiet_libraries

ERRORS: tuple[type[Exception], ...] = (ModelError,)
FORMATS = ("llava", "tinyllava")
# What an import reads; a hub repository often holds code and training states besides.
_WANTED = ["*.json", "*.txt", "*.model", "*.safetensors", "*.bin", "*.jinja"]
_UNWANTED = ["checkpoint-*", "training_args.bin", "*optimizer*", "*scheduler*"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "format",
        choices=FORMATS,
        help="llava: LLaVA-1.5's or LLaVA-NeXT's own code, SigLIP or CLIP with Llama, Qwen2 or 2.5; tinyllava: "
        "TinyLLaVA Factory, SigLIP or CLIP with Qwen2 or 2.5",
    )
    parser.add_argument("checkpoint", help="the checkpoint's folder, or its id on the hub")
    parser.add_argument("out", type=Path, help="the folder to write, new or empty")
    parser.add_argument(
        "--language-model",
        metavar="FOLDER",
        help="where the language model's config and tokenizer are, if the checkpoint lacks them and has no hub name",
    )
    parser.add_argument(
        "--encoder",
        "--vision-tower",
        metavar="FOLDER",
        help="where the vision encoder's config and image processor are, and its weights, if the checkpoint lacks them",
    )
    parser.add_argument(
        "--prompt",
        choices=("base", "instruct", "v1", "qwen"),
        help="tinyllava: its qwen2_base or qwen2_instruct prompt (default: by the tokenizer's end-of-sequence token); "
        "llava: its v1 or qwen prompt (default: by the language model)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when the folder is written."""
    quiet_libraries()
    from .importing.llava_original import import_llava
    from .importing.standard_folder import Sources
    from .importing.tinyllava import import_tinyllava

    run_import = {"llava": import_llava, "tinyllava": import_tinyllava}[args.format]
    done = run_import(
        _folder(args.checkpoint), args.out, Sources(args.language_model, args.encoder), prompt=args.prompt
    )
    sys.stderr.write(
        f"{done.folder}: {done.tensors} tensors in {done.dtype}, {done.tokens_per_picture} tokens a picture, "
        f"prompt {done.prompt}\n"
    )
    sys.stderr.write(
        "a student that learns from it should read its prompt: put its chat_template.jinja into the folder of the "
        "student's language model\n"
    )
    for note in done.notes:
        sys.stderr.write(f"{note}\n")
    if done.left_out:
        sys.stderr.write(
            f"left out, because LLaVA never reads them: {len(done.left_out)} tensors, the first is {done.left_out[0]}\n"
        )
    return 0


def _folder(checkpoint: str) -> Path:
    """The checkpoint's folder, fetched if it is an id on the hub. Raises ModelError."""
    path = Path(checkpoint)
    if path.is_dir() or path.is_absolute() or len(path.parts) != 2:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(checkpoint, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (OSError, HFValidationError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{checkpoint}: no such folder, and not to be had from the hub: {reason}") from None
