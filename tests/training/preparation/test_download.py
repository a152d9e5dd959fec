"""Downloads from a real server: cut connections go on, changed files start anew, a wrong hash is refused."""

import hashlib
import http.server
import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from switchkd.cli.main import main
from switchkd.training.data.conversations import DataError
from switchkd.training.preparation import download as data_download
from switchkd.training.preparation.download import Download, fetch

DATA = bytes(range(256)) * 400


@dataclass
class Site:
    """What the server answers with, and what it was asked."""

    content: bytes = DATA
    tag: str | None = '"one"'
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # bytes after which the next connections end
    status: int | None = None
    asked: list[str | None] = field(default_factory=list)
    address: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file at every path, with ranges as RFC 9110 has them; and the hub's headers."""

    site: Site

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        site, wanted = self.site, self.headers.get("Range")
        if body:
            site.asked.append(wanted)
        if site.status is not None:
            self.send_error(site.status)
            return
        content, start, total = site.content, 0, len(site.content)
        same = self.headers.get("If-Range") in (None, site.tag)
        found = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        if found and site.ranges and same:
            start = int(found[1])
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(total - start))
        self.send_header("X-Repo-Commit", "0" * 40)
        if site.tag is not None:
            self.send_header("ETag", site.tag)
        self.end_headers()
        if body:
            cut = site.cuts.pop(0) if site.cuts else total
            self.wfile.write(content[start : start + cut])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that the library gives it
        """Say nothing."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server on this machine."""
    monkeypatch.setattr(data_download, "WAIT", 0.0)
    served = Site()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"site": served}))
    served.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def thing(site: Site, **changes: Any) -> Download:
    given: dict[str, Any] = {"path": "sub/thing.bin", "url": f"{site.address}/thing.bin"}
    return Download("thing", "a thing", "https://example.org", **(given | changes))


def receipt(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "downloads.json").read_text())["sub/thing.bin"]  # type: ignore[no-any-return]


def test_a_cut_connection_goes_on_where_it_was(site: Site, tmp_path: Path) -> None:
    site.cuts = [30_000, 1, 40_000]
    assert "thing: fetched" in fetch(thing(site), tmp_path)
    assert (tmp_path / "sub" / "thing.bin").read_bytes() == DATA
    assert site.asked == [None, "bytes=30000-", "bytes=30001-", "bytes=70001-"]
    assert receipt(tmp_path) == {"sha256": hashlib.sha256(DATA).hexdigest(), "bytes": len(DATA)}
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["thing.bin"]
    assert "already there" in fetch(thing(site), tmp_path)
    assert len(site.asked) == 4


def test_an_attempt_that_gave_up_is_taken_up_by_the_next(site: Site, tmp_path: Path) -> None:
    site.cuts = [500, 0, 0, 0, 0]
    with pytest.raises(DataError, match=r"500 bytes have arrived, and the same command goes on"):
        fetch(thing(site), tmp_path)
    assert not (tmp_path / "sub" / "thing.bin").exists()
    fetch(thing(site), tmp_path)
    assert site.asked[-1] == "bytes=500-"
    assert (tmp_path / "sub" / "thing.bin").read_bytes() == DATA
    # Killed when all of it had arrived: nothing is left to ask for.
    (tmp_path / "sub" / "thing.bin").rename(tmp_path / "sub" / "thing.bin.part")
    (tmp_path / "sub" / "thing.bin.part.version").write_text('"one"')
    fetch(thing(site), tmp_path)
    assert site.asked[-1] == f"bytes={len(DATA)}-"


@pytest.mark.parametrize("case", ["changed", "no ranges", "no version"])
def test_beginnings_of_another_file_are_not_gone_on_with(site: Site, tmp_path: Path, case: str) -> None:
    site.tag = None if case == "no version" else site.tag
    site.cuts = [500, 0, 0, 0, 0]
    with pytest.raises(DataError, match="goes on"):
        fetch(thing(site), tmp_path)
    site.content, site.ranges = DATA[::-1], case != "no ranges"
    site.tag = '"two"' if case == "changed" else site.tag
    fetch(thing(site), tmp_path)
    assert (tmp_path / "sub" / "thing.bin").read_bytes() == DATA[::-1]


def test_a_wrong_hash_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"SHA-256 is .*what arrived is deleted"):
        fetch(thing(site, sha256="0" * 64), tmp_path)
    assert not list((tmp_path / "sub").glob("thing.bin*[!n]"))
    fetch(thing(site), tmp_path)
    # The first hash is remembered: the same file has to come again.
    (tmp_path / "sub" / "thing.bin").unlink()
    site.content = DATA[:-1] + b"!"
    with pytest.raises(DataError, match="as it was when it first arrived here"):
        fetch(thing(site), tmp_path)
    site.content = DATA
    fetch(thing(site), tmp_path)
    (tmp_path / "sub" / "thing.bin").write_bytes(b"damaged since")
    with pytest.raises(DataError, match=r"delete .*thing\.bin"):
        fetch(thing(site), tmp_path, verify=True)


@pytest.mark.parametrize(("status", "reason"), [(404, "says 404"), (503, "says 503")])
def test_a_server_that_refuses_is_named(site: Site, tmp_path: Path, status: int, reason: str) -> None:
    site.status = status
    with pytest.raises(DataError, match=reason):
        fetch(thing(site), tmp_path)
    assert len(site.asked) == (1 if status == 404 else data_download.TRIES)


def test_an_archive_is_unpacked_inside_its_folder_once(site: Site, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("images/a.jpg", b"a" * 100)
        archive.writestr("../../outside.jpg", b"b")
    site.content = packed.getvalue()
    download = thing(site, unpack="unpacked")
    data = tmp_path / "data"
    assert "fetched, unpacked" in fetch(download, data, remove_archive=True)
    assert (data / "unpacked" / "images" / "a.jpg").read_bytes() == b"a" * 100
    assert (data / "unpacked" / "outside.jpg").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert not (data / "sub" / "thing.bin").exists()
    assert "already there" in fetch(download, data)
    site.content = b"no archive"
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch(replace(download, path="sub/other.bin"), data)


def test_a_file_of_the_hub_comes_through_its_own_client(site: Site, tmp_path: Path) -> None:
    hub = thing(site, url=None, repository="someone/some-data", path="some/records.json")
    assert "fetched" in fetch(hub, tmp_path, endpoint=site.address)
    assert (tmp_path / "some" / "records.json").read_bytes() == DATA
    site.status = 404
    with pytest.raises(DataError, match=r"cannot be fetched from https://example\.org"):
        fetch(replace(hub, path="some/other.json"), tmp_path, endpoint=site.address)


def test_the_command_lists_what_there_is_and_what_needs_a_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "download"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{download.name} " in listed for download in data_download.PUBLIC)
    assert main(["data", "download", "ocr-vqa", "--to", str(tmp_path)]) == 0
    assert "ocr-vqa: by hand, from https://ocr-vqa.github.io" in capsys.readouterr().out
    assert main(["data", "download", "cocoa", "--to", str(tmp_path)]) == 2
    assert "there is no public set 'cocoa'" in capsys.readouterr().err
