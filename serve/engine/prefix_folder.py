"""What a language model made of pictures, in files: a later process goes on where an earlier one was.

FOLDER/
  <bundle>-<key>.safetensors    keys and values of one prefix by the decoder's input names; metadata: length, and a
                                fingerprint of the graphs that made them
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onnxruntime import OrtValue
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from switchkd.export.contract.bundle import DECODER, EMBED_TOKENS, VISION_ENCODER, Bundle

from .kv_cache import Positions


class PrefixFolderError(ValueError):
    """A folder that cannot hold prefixes, or a file in it that is none."""


class PrefixFolder:
    """A folder of prefixes of one bundle in one precision; those of others may lie in it too, and are left alone."""

    def __init__(self, folder: Path, model: str, names: Sequence[str]) -> None:
        """Take the folder, made where there is none, for a model's `fingerprint` and its decoder's cache inputs.

        Raises PrefixFolderError.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PrefixFolderError(f"{folder}: cannot be made ({error.strerror}); choose another place") from error
        self._folder = folder
        self._model, self._names = model, names

    def read(self, key: bytes) -> Positions | None:
        """Return the prefix of this key, or None where there is none. Raises PrefixFolderError for a damaged file."""
        file = self._file(key)
        try:
            with safe_open(str(file), framework="numpy") as opened:
                facts = opened.metadata() or {}
                if facts.get("fingerprint") != self._model or set(opened.keys()) != set(self._names):
                    raise PrefixFolderError(f"{file}: is of another bundle; remove it")
                values = {name: opened.get_tensor(name) for name in self._names}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            raise PrefixFolderError(f"{file}: cannot be read ({error}); remove it") from error
        nbytes = sum(value.nbytes for value in values.values())
        tensors = {name: OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
        return Positions(int(facts["length"]), nbytes, tensors)

    def write(self, key: bytes, positions: Positions) -> None:
        """Write a prefix unless it is there: whole or not at all. Raises PrefixFolderError."""
        file = self._file(key)
        if file.exists():
            return
        handle, name = tempfile.mkstemp(dir=self._folder, prefix=".partial-")
        os.close(handle)
        try:
            facts = {"fingerprint": self._model, "length": str(positions.length)}
            save_file({each: value.numpy() for each, value in positions.values.items()}, name, metadata=facts)
            Path(name).replace(file)
        except (OSError, SafetensorError) as error:
            Path(name).unlink(missing_ok=True)
            raise PrefixFolderError(
                f"{file}: cannot be written ({error}); make room, or choose another place"
            ) from error

    def _file(self, key: bytes) -> Path:
        return self._folder / f"{self._model[:12]}-{key.hex()}.safetensors"


def fingerprint(bundle: Bundle, form: str, reader: Bundle) -> str:
    """Return what the values depend on: the files of the graphs that make them, in the form that runs.

    `reader` is the bundle in the precision that reads pictures and prompts.
    """
    graphs = [reader.graph(VISION_ENCODER), bundle.graph(EMBED_TOKENS), reader.in_form(form).graph(DECODER)]
    files = sorted({file for graph in graphs for file in (graph.file, *graph.data)})
    hashes = {file: bundle.manifest.files[file].sha256 for file in files}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
