"""`switchkd push FOLDER REPO`: look a model folder or bundle over and upload it to the Hugging Face hub.

Nothing leaves the machine without `--yes`. What could hurt whoever publishes or downloads it is refused either way:
pickles, code, training states, places of this machine, tokens, and folders that do not load.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

CARD = "README.md"
WEIGHTS = (".safetensors", ".onnx", ".onnx_data")
TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja")
OTHERS = (".model", ".png", ".jpg", ".svg")  # a sentencepiece tokenizer, and pictures of the card
BARE_NAMES = ("LICENSE", "NOTICE")
TRAINING_STATES = ("trainer_state.json", "optimizer*", "scheduler*", "rng_state*")
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")  # hold any text there is
# A path from the root, or from a Windows drive; not the path of an address, an API's route, or a closing tag.
PLACE = re.compile(r"(?<![\w.:/<~$}\])-])/(?!v\d+/)(?:[\w.@+-]+/)+[\w.@+-]*|\b[A-Za-z]:\\+\w[^\s\"']*")
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")


class PushError(ValueError):
    """A folder that may not be published, or an upload that did not happen; the message says why and the way out."""


ERRORS: tuple[type[Exception], ...] = (PushError,)


@dataclass(frozen=True)
class Parcel:
    """What would be uploaded: the folder, its files by their names in the repository, and what kind of folder it is."""

    folder: Path
    files: tuple[str, ...]
    kind: str
    notes: tuple[str, ...] = ()

    def bytes(self, name: str) -> int:
        """The size of one file."""
        return (self.folder / name).stat().st_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", type=Path, help="a checkpoint folder, or a bundle")
    parser.add_argument("repo", help="the repository on the hub, as owner/name; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--yes", action="store_true", help="upload; without it nothing leaves this machine")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave files out, such as log.jsonl"
    )


def run(args: argparse.Namespace) -> int:
    """Look the folder over, say what would be uploaded, and with `--yes` upload it; 0 when that went well."""
    _check_repo(args.repo)
    parcel = pack(args.folder, tuple(args.exclude))
    visibility = "private" if args.private else "public"
    total = sum(parcel.bytes(name) for name in parcel.files)
    sys.stdout.write(
        f"{parcel.kind} {parcel.folder} -> {args.repo} ({visibility}): {len(parcel.files)} files, {_size(total)}\n"
    )
    for name in parcel.files:
        sys.stdout.write(f"  {_size(parcel.bytes(name)):>9}  {name}\n")
    for note in parcel.notes:
        sys.stdout.write(f"note: {note}\n")
    if not args.yes:
        sys.stdout.write("nothing was uploaded; the folder can be published, and --yes does it\n")
        return 0
    sys.stdout.flush()
    sys.stdout.write(f"uploaded: {upload(parcel, args.repo, private=args.private)}\n")
    return 0


def pack(folder: Path, exclude: tuple[str, ...] = ()) -> Parcel:
    """Look a folder over for publishing. Raises PushError with everything that is in the way."""
    if not folder.is_dir():
        raise PushError(f"{folder}: no such folder; give a checkpoint folder or a bundle")
    files = tuple(
        name
        for name in sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
        )
        if not name.startswith(".") and "/." not in name and not any(fnmatch(name, pattern) for pattern in exclude)
    )
    problems = [problem for name in files for problem in _problems(folder, name)]
    if CARD not in files:
        problems.append(f"there is no {CARD}, the card that says what the model is, from what and under which licence")
    if problems:
        raise PushError(f"{folder} cannot be published: {'; '.join(problems)}")
    kind, notes = _load(folder)
    if "\nlicense" not in (folder / CARD).read_text(encoding="utf-8"):
        notes = (*notes, f"{CARD} names no license in its metadata")
    return Parcel(folder, files, kind, notes)


def _problems(folder: Path, name: str) -> list[str]:
    path = folder / name
    if path.is_symlink():
        return [f"{name} is a link; put the file there, or --exclude it"]
    if any(fnmatch(path.name, state) for state in TRAINING_STATES):
        return [f"{name} is a training state; remove it, or --exclude it"]
    if path.suffix not in WEIGHTS + TEXTS + OTHERS and path.name not in BARE_NAMES:
        return [f"{name} is neither safetensors or ONNX nor a text (pickles and code can run); remove it"]
    if path.suffix not in TEXTS:
        return []
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else None
    except ValueError as error:
        return [f"{name} cannot be read ({error})"]
    problems = []
    if SECRET.search(text):
        problems.append(f"{name} holds what looks like a token of the hub; revoke it and take it out")
    if isinstance(content, dict) and "auto_map" in content:
        problems.append(f"{name} names code that would have to run (auto_map)")
    if path.name not in VOCABULARIES and (place := PLACE.search(text)):
        problems.append(f"{name} names a place of this machine ({place.group()}); take it out, or --exclude {name}")
    return problems


def _load(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Load the folder as whoever downloads it would; returns its kind, and notes. Raises PushError."""
    from switchkd.export.contract.bundle import MANIFEST, Bundle, BundleError, read_manifest

    if (folder / MANIFEST).is_file():
        try:
            for precision in read_manifest(folder).precisions:
                Bundle.open(folder, precision, check_hashes=True)
        except BundleError as error:
            raise PushError(f"{folder} cannot be published: {error}") from None
        return "bundle", ()
    import torch

    from switchkd.training.models.vlm import ModelError, load_vlm
    from switchkd.training.process.terminal import quiet_libraries

    quiet_libraries()
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        vlm = load_vlm(folder, dtype=dtype)
    except FileNotFoundError:
        raise PushError(f"{folder}: neither config.json nor {MANIFEST}; give a checkpoint folder or a bundle") from None
    except (ModelError, ValueError) as error:
        raise PushError(f"{folder} cannot be published, it does not load: {error}") from None
    if vlm.processor.chat_template is None:
        raise PushError(f"{folder} cannot be published: it has no chat template, so that nobody could ask it")
    if "projector_type" in config:
        return "model", (
            f"plain transformers does not know its projector ({config['projector_type']}); its bundle runs",
        )
    return "model", ()


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, loaded lazily

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(f"{repo!r} is no repository id ({error}); expected owner/name") from None
    if "/" not in repo:
        raise PushError(f"{repo!r} is no repository id; expected owner/name")


def upload(parcel: Parcel, repo: str, *, private: bool) -> str:
    """Make the repository if it is not there and upload the parcel in one commit; returns its address.

    A public repository that is there already takes nothing that was asked to be private. Raises PushError.
    """
    import huggingface_hub
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # which of its releases the library speaks

    token = huggingface_hub.get_token()
    if token is None:
        raise PushError("there is no token of the hub; run `hf auth login`, or set HF_TOKEN to one that may write")
    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise PushError(f"{repo} is there and public; make it private in its settings, or leave --private out")
        done = api.upload_folder(
            repo_id=repo,
            folder_path=parcel.folder,
            allow_patterns=list(parcel.files),
            commit_message=f"Upload a {parcel.kind} with switchkd",
        )
    except (httpx.HTTPError, OSError, ValueError) as error:
        if isinstance(error, PushError):
            raise
        raise PushError(_reason(error, repo, api.endpoint)) from None
    return str(done.commit_url)


def _reason(error: Exception, repo: str, endpoint: str) -> str:
    response = getattr(error, "response", None)
    said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if response is None:
        return f"{endpoint} cannot be reached, nothing was uploaded ({type(error).__name__}: {said})"
    if response.status_code == 401:
        return f"the hub does not know the token (401); run `hf auth login` again ({said})"
    if response.status_code == 403:
        return f"the token may not write to {repo} (403); take one with write access, or another owner ({said})"
    return f"the hub refused the upload to {repo} ({response.status_code}): {said}"


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
