"""Git-LFS pointers: the few lines of text that a clone without Git LFS has in place of a model's large files."""

from pathlib import Path

_BEGINNING = b"version https://git-lfs.github.com/spec/"
_LONGEST = 1024  # bytes of a pointer, as its specification bounds them
_BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".txt")


def pointer_fault(*folders: Path) -> str | None:
    """Say which file of the folders is a pointer and how to get what it points to; None where there is none.

    What no model is read from may be one: weights of other libraries, pickled ones beside safetensors, pictures.
    """
    for folder in folders:
        for path in _read_files(folder):
            if path.stat().st_size <= _LONGEST and path.read_bytes().startswith(_BEGINNING):
                return (
                    f"{path}: is a Git-LFS pointer of {path.stat().st_size} bytes, not the file that it stands for; "
                    f"fetch that with `git lfs install` and then `git lfs pull` in {folder}"
                )
    return None


def _read_files(folder: Path) -> list[Path]:
    weights = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    others = sorted(path for path in folder.glob("*") if path.suffix in _BESIDE_WEIGHTS)
    return [path for path in weights + others if path.is_file()]
