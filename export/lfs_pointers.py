"""Git-LFS pointers: the few lines of text that a clone without Git LFS has in place of a model's large files."""

from pathlib import Path

_BEGINNING = b"version https://git-lfs.github.com/spec/"
_LONGEST = 1024  # bytes of a pointer, as its specification bounds them


def pointer_fault(*folders: Path) -> str | None:
    """Say which file of the folders is a pointer and how to get what it points to; None where there is none."""
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file() and path.stat().st_size <= _LONGEST and path.read_bytes().startswith(_BEGINNING):
                return (
                    f"{path}: is a Git-LFS pointer of {path.stat().st_size} bytes, not the file that it stands for; "
                    f"fetch that with `git lfs install` and then `git lfs pull` in {folder}"
                )
    return None
