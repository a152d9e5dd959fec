"""Fetches the public sets that LLaVA's data is made of: interrupted downloads go on, and what arrived is checked.

No publisher states a hash. The first download's is written down, and every later one has to be the same.
"""

from __future__ import annotations

import http.client
import json
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from tqdm.auto import tqdm

from switchkd.export.folders.digests import sha256

from ..data.conversations import DataError

RECEIPTS = "downloads.json"  # what arrived, with its hash
TRIES = 5  # one after the other without a byte
WAIT = 2.0  # seconds after the first, more after each one more
CHUNK = 2**20
_LOST = (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException)


@dataclass(frozen=True)
class Download:
    """One file of a public set: where it is from, where it goes below the data's folder, where it is unpacked.

    From `url`, or `file` of the hub's dataset `repository`; with neither it can only be fetched by hand, as `by_hand`
    says. `size` is what its publisher says, for people.
    """

    name: str
    what: str
    page: str
    path: str = ""
    url: str | None = None
    repository: str | None = None
    size: str = ""
    unpack: str | None = None
    sha256: str | None = None
    by_hand: str | None = None


_PRETRAIN, _INSTRUCT = "liuhaotian/LLaVA-Pretrain", "liuhaotian/LLaVA-Instruct-150K"
_HUB = "https://huggingface.co/datasets/"
_GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/"

PUBLIC = (
    Download(
        "pretrain-records",
        "LLaVA-Pretrain: 558k captions (LCS)",
        _HUB + _PRETRAIN,
        "blip_laion_cc_sbu_558k.json",
        repository=_PRETRAIN,
        size="181 MB",
    ),
    Download(
        "pretrain-pictures",
        "LLaVA-Pretrain: their pictures",
        _HUB + _PRETRAIN,
        "llava_558k/images.zip",
        repository=_PRETRAIN,
        unpack="llava_558k",
    ),
    Download(
        "mix-records",
        "LLaVA-1.5's mix of 665k conversations",
        _HUB + _INSTRUCT,
        "llava_v1_5_mix665k.json",
        repository=_INSTRUCT,
        size="1 GB",
    ),
    Download(
        "coco",
        "COCO train2017: VQAv2, OKVQA, A-OKVQA, RefCOCO, LLaVA",
        "https://cocodataset.org/#termsofuse",
        "coco/train2017.zip",
        url="http://images.cocodataset.org/zips/train2017.zip",
        size="18 GB",
        unpack="coco",
    ),
    Download(
        "gqa",
        "GQA",
        "https://cs.stanford.edu/people/dorarad/gqa/download.html",
        "gqa/images.zip",
        url="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        size="20.3 GB",
        unpack="gqa",
    ),
    Download(
        "textvqa",
        "TextVQA: TextCaps",
        "https://textvqa.org/dataset/",
        "textvqa/train_val_images.zip",
        url="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        size="6.6 GB",
        unpack="textvqa",
    ),
    Download(
        "vg-1",
        "Visual Genome, part 1",
        _GENOME,
        "vg/images.zip",
        url="https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
        size="9 GB",
        unpack="vg",
    ),
    Download(
        "vg-2",
        "Visual Genome, part 2",
        _GENOME,
        "vg/images2.zip",
        url="https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
        size="5 GB",
        unpack="vg",
    ),
    Download(
        "ocr-vqa",
        "OCR-VQA: book covers",
        "https://ocr-vqa.github.io",
        "ocr_vqa/images",
        by_hand="its page has the terms and a list of addresses with a script that loads them; save every picture as "
        ".jpg in ocr_vqa/images",
    ),
)


class Receipts:
    """What arrived in a folder, by path below it: bytes, hash, and whether it is unpacked."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECEIPTS
        self._rows: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def __getitem__(self, path: str) -> dict[str, Any]:
        """A file's row; empty where it never arrived."""
        return dict(self._rows.get(path, {}))

    def write(self, path: str, **values: Any) -> None:
        """Add to a file's row."""
        self._rows[path] = self[path] | values
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._rows, indent=1) + "\n")
        partial.replace(self._path)


def fetch(
    download: Download, folder: Path, *, remove_archive: bool = False, verify: bool = False, endpoint: str | None = None
) -> str:
    """Fetch, check and unpack one download below `folder`, going on where it stopped; says what was done.

    `verify` hashes what is already there once more. Raises DataError naming the file, the reason and the way out.
    """
    if download.by_hand is not None:
        return f"{download.name}: by hand, from {download.page}: {download.by_hand}"
    path = folder / download.path
    path.parent.mkdir(parents=True, exist_ok=True)
    receipts = Receipts(folder)
    row, done = receipts[download.path], "already there"
    expected = download.sha256 or row.get("sha256")
    if not path.is_file() and not row.get("unpacked"):
        arrived = _from_web(download.url, path) if download.url else _from_hub(download, path, endpoint)
        found = sha256(arrived)
        if expected is not None and found != expected:
            arrived.unlink()
            raise DataError(_mismatch(download, found, expected) + "what arrived is deleted")
        arrived.replace(path)
        _stamp(arrived).unlink(missing_ok=True)
        receipts.write(download.path, sha256=found, bytes=path.stat().st_size)
        done = "fetched"
    elif path.is_file() and (verify or expected is None):
        found = sha256(path)
        if expected is not None and found != expected:
            raise DataError(_mismatch(download, found, expected) + f"delete {path} and run the same command again")
        receipts.write(download.path, sha256=found, bytes=path.stat().st_size)
    if download.unpack is not None and not row.get("unpacked"):
        _unpack(path, folder / download.unpack)
        receipts.write(download.path, unpacked=True)
        done += ", unpacked"
    if remove_archive and download.unpack is not None:
        path.unlink(missing_ok=True)
    return f"{download.name}: {done}: {folder / (download.unpack or download.path)}"


def _mismatch(download: Download, found: str, expected: str) -> str:
    return (
        f"{download.name}: its SHA-256 is {found}, expected {expected}, as it was when it first arrived here; it was "
        f"changed on its way, or at its source ({download.page}); "
    )


def _from_hub(download: Download, path: Path, endpoint: str | None) -> Path:
    try:
        arrived = hf_hub_download(
            str(download.repository), path.name, repo_type="dataset", local_dir=path.parent, endpoint=endpoint
        )
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{download.name}: cannot be fetched from {download.page}: {reason}") from None
    return Path(arrived)


def _from_web(url: str, path: Path) -> Path:
    """Load `url` beside `path`, from where an earlier attempt stopped. Raises DataError."""
    part = path.with_name(path.name + ".part")
    failures, most = 0, -1
    while True:
        try:
            if _load(url, part):
                return part
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise DataError(f"{url}: the server says {error.code} {error.reason}; has it moved?") from None
            reason = f"the server says {error.code} {error.reason}"
        except _LOST as error:
            reason = str(getattr(error, "reason", error))
        arrived = part.stat().st_size if part.is_file() else 0
        failures, most = (1 if arrived > most else failures + 1), max(arrived, most)
        if failures >= TRIES:
            raise DataError(f"{url}: {reason}; {arrived:,} bytes have arrived, and the same command goes on from there")
        time.sleep(WAIT * failures)


def _stamp(part: Path) -> Path:
    """Where the version that a server gave the beginning of a file is kept."""
    return part.with_name(part.name + ".version")


def _load(url: str, part: Path) -> bool:
    """One connection; whether the file is whole at its end."""
    stamp = _stamp(part)
    offset = part.stat().st_size if part.is_file() and stamp.is_file() else 0
    headers = {"User-Agent": "switchkd"}
    if offset:
        # Only if it still is the file that the beginning is from; else the server sends it whole.
        headers |= {"Range": f"bytes={offset}-", "If-Range": stamp.read_text()}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            whole = error.headers.get("Content-Range", "").rpartition("/")[2] == str(offset)
            if not whole:
                part.unlink()
            return whole
        raise
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        offset = offset if resumed else 0
        length = response.headers.get("Content-Length")
        tag = response.headers.get("ETag", "W/")  # a weak one says alike, not the same
        version = response.headers.get("Last-Modified") if tag.startswith("W/") else tag
        stamp.unlink(missing_ok=True)
        if version is not None:
            stamp.write_text(version)
        _check_room(part, None if length is None else int(length))
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(
                desc=part.name.removesuffix(".part"),
                total=None if length is None else offset + int(length),
                initial=offset,
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return length is None or part.stat().st_size == offset + int(length)


def _check_room(part: Path, needed: int | None) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed is not None and needed > free:
        raise DataError(f"{part.parent}: {needed:,} bytes are to come and {free:,} are free; make room, or choose --to")


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file; what is there in its full size already is left. Raises DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            missing = [member for member in packed.infolist() if not _is_there(folder / member.filename, member)]
            _check_room(folder / archive.name, sum(member.file_size for member in missing))
            for member in tqdm(missing, desc=f"unpacking {archive.name}", unit="file", disable=None):
                packed.extract(member, folder)  # keeps what would lead out of the folder in it
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); delete it and run the same command again") from None


def _is_there(path: Path, member: zipfile.ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == member.file_size
