"""`switchkd demo` as a real server in a process of its own, driven by Gradio's client and over plain HTTP."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file  # type: ignore[import-untyped]
from gradio_client.exceptions import AppError  # type: ignore[import-untyped]
from PIL import Image

from switchkd.cli.main import main
from switchkd.demo.examples import DemoError, read_examples
from switchkd.serve import Engine

QUESTION = "What colour is the square on the left?"

# The real command, with a note of everything beyond this machine that it looks up or connects to.
WATCHED = """
import sys
def watch(event, args) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = args[0] if event == "socket.getaddrinfo" else args[1][0] if isinstance(args[1], tuple) else "localhost"
        if host not in ("127.0.0.1", "localhost", "::1", "0.0.0.0", None):
            print("BEYOND LOCALHOST:", event, host, file=sys.stderr, flush=True)
sys.addaudithook(watch)
from switchkd.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    Image.new("RGB", (24, 24), "teal").save(folder / "teal.png")
    (folder / "examples.json").write_text(
        json.dumps([{"picture": "teal.png", "question": "Which colour <b>is</b> it?"}])
    )
    return folder


@dataclass
class Demo:
    url: str
    process: subprocess.Popen[str]
    errors: Path


def start(tiny_bundle: Path, examples: Path, errors: Path, **environment: str) -> Demo:
    words = ["demo", str(tiny_bundle), "--port", "0", "--no-open", "--threads", "1", "--precision", "fp32"]
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, *words, "--examples", str(examples)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            cwd=errors.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.match(r"switchkd demo is open at (http://127\.0\.0\.1:\d+/) \(Ctrl-C stops it\)\n", line)
    assert found, line + errors.read_text()
    return Demo(found[1], process, errors)


@pytest.fixture(scope="module")
def demo(tiny_bundle: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    # Behind proxies, one of them of a kind that httpx has no code for: what is on this machine is reached without.
    proxies = {"http_proxy": "http://192.0.2.1:9", "ALL_PROXY": "socks5://192.0.2.1:9", "no_proxy": "", "NO_PROXY": ""}
    running = start(tiny_bundle, examples, tmp_path_factory.mktemp("demo") / "stderr.txt", **proxies)
    yield running
    running.process.terminate()
    assert running.process.wait(timeout=60) == 0  # as a service manager stops it


@pytest.fixture(scope="module")
def client(demo: Demo) -> Client:
    return Client(demo.url, verbose=False, analytics_enabled=False)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((30, 40)).save(path)
    return path


def test_the_answer_streams_and_is_the_engines(tiny_bundle: Path, client: Client, png: Path) -> None:
    job = client.submit(handle_file(png), QUESTION, api_name="/ask")
    text, speed = job.result(timeout=60)
    answer = Engine.open(tiny_bundle, "fp32", threads=1).answer(QUESTION, [png])
    assert text == answer.text
    streamed = [part[0] for part in job.outputs()]
    assert len(set(streamed)) > 3
    assert all(text.startswith(part) for part in streamed)
    assert re.search(r"First token</dt><dd>\d+ <small>ms.*Writing</dt><dd>\d+ <small>tokens/s", speed)


@pytest.mark.parametrize("content", [b"Dear diary", None])
def test_a_bad_picture_is_told_and_not_traced(demo: Demo, client: Client, png: Path, content: bytes | None) -> None:
    png.write_bytes(png.read_bytes()[:60] if content is None else content)
    with pytest.raises(AppError) as error:
        client.predict(handle_file(png), QUESTION, api_name="/ask")
    assert re.match(r"picture\.png: (not a picture|damaged|cannot be opened)", str(error.value))
    assert "Traceback" not in demo.errors.read_text()


def test_a_missing_question_or_picture_is_told(client: Client, png: Path) -> None:
    with pytest.raises(AppError, match="the question is empty"):
        client.predict(handle_file(png), " ", api_name="/ask")
    with pytest.raises(AppError, match="Drop in a picture first"):
        client.predict(None, QUESTION, api_name="/ask")


def test_files_outside_the_upload_folder_stay_private(client: Client, tiny_bundle: Path) -> None:
    secret = tiny_bundle / "config.json"
    with pytest.raises((AppError, ValueError)):
        client.predict({"path": str(secret), "meta": {"_type": "gradio.FileData"}}, "a", api_name="/ask")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{client.src}gradio_api/file={secret}")


def upload(demo: Demo, path: Path) -> str:
    """Send a picture as the page does; returns where the demo keeps it."""
    answer = httpx.post(f"{demo.url}gradio_api/upload", files={"files": path.read_bytes()}, trust_env=False)
    return str(answer.json()[0])


def asked(demo: Demo, picture: object, question: object = QUESTION) -> str:
    """What the API says to a payload of whatever form, as it comes over the wire."""
    body = json.dumps({"data": [picture, question]})
    with httpx.Client(
        base_url=demo.url, timeout=60, trust_env=False, headers={"Content-Type": "application/json"}
    ) as to:
        event = to.post("gradio_api/call/ask", content=body).json()["event_id"]
        return to.get(f"gradio_api/call/ask/{event}").text


def test_only_uploads_are_read_and_all_else_gets_one_answer(demo: Demo, png: Path, tmp_path: Path) -> None:
    sent = upload(demo, png)
    meta = {"_type": "gradio.FileData"}
    (refusal,) = re.findall(r'"error": "([^"]*)"', asked(demo, {"path": str(png)}))
    assert refusal == "Only an uploaded picture is taken."
    url = "http://127.0.0.1:9/a.png"
    for payload in (
        {"path": str(png), "meta": meta},  # somebody else's picture
        {"path": str(tmp_path / "none.png")},
        {"path": str(tmp_path / "none.png"), "meta": meta},
        {"path": "/etc/hostname"},
        {"path": f"{sent}.png", "meta": meta},
        {"path": str(Path(sent).parent)},
        {"path": os.path.relpath(png, Path(sent).parent)},
        {"path": f"{Path(sent).parent}/{os.path.relpath(png, Path(sent).parent)}", "meta": meta},
        {"path": url, "url": url, "meta": meta},
        {"url": url},
        {"url": "data:image/png;base64,AAAA"},
        {"path": "a\0b"},
        {"path": "a" * 5000},
        {"path": None},
        {"path": [sent]},
        sent,
        [sent],
        7,
    ):
        assert f'"error": "{refusal}"' in asked(demo, payload), payload
    for payload in ({"path": sent}, {"path": sent, "meta": meta, "url": url}):
        assert "event: complete" in asked(demo, payload)
    assert "Traceback" not in demo.errors.read_text()


def test_a_question_that_is_no_text_is_told(demo: Demo, png: Path) -> None:
    picture = {"path": upload(demo, png)}
    assert "the question is empty" in asked(demo, picture, None)
    assert "character 1 is none (U+D83D)" in asked(demo, picture, "\ud83d")
    assert "Traceback" not in demo.errors.read_text()


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return bytes(answer.read())


def test_examples_and_model_are_on_the_page(demo: Demo, tiny_bundle: Path, examples: Path) -> None:
    config = json.loads(get(f"{demo.url}config"))
    shown = json.dumps(config["components"])
    assert "Which colour <b>is</b> it?" in shown
    assert tiny_bundle.name in shown
    assert "fp32" in shown
    urls = re.findall(r'"url": "([^"]*teal\.png)"', shown)
    assert urls
    assert get(urls[0]) == (examples / "teal.png").read_bytes()


def test_the_page_asks_nothing_beyond_localhost(demo: Demo, client: Client) -> None:
    page = get(demo.url).decode() + get(f"{demo.url}theme.css").decode()
    loaded = re.findall(r"""(?:<script[^>]*src=|<link[^>]*href=|url\()["']?(https?://[^"')\s]+)""", page)
    assert [url for url in loaded if not url.startswith(demo.url)] == []
    assert "BEYOND LOCALHOST" not in demo.errors.read_text()


def test_ctrl_c_ends_it_frees_the_port_and_removes_the_uploads(
    tiny_bundle: Path, examples: Path, tmp_path: Path, png: Path
) -> None:
    place = tmp_path / "a place" / "for uploads"
    running = start(tiny_bundle, examples, tmp_path / "stderr.txt", GRADIO_TEMP_DIR=str(place))
    assert Path(upload(running, png)).is_relative_to(place)
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(timeout=30) == 0
    assert running.errors.read_text() == ""
    assert list(place.iterdir()) == []
    socket.create_server(("127.0.0.1", int(running.url.rsplit(":", 1)[1].strip("/")))).close()


def fails(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Run the command, check that it ends with exit code 2 and one line, and return the line."""
    assert main(["demo", "--no-open", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return str(said.err)


def test_a_port_in_use_is_told_with_the_remedy(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port} is in use; stop the program that listens there, or choose another with --port" in fails(
            capsys, tiny_bundle, "--port", str(port)
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "port 70000 does not exist"),
        (["--host", "192.0.2.1", "--port", "45678"], "cannot listen at 192.0.2.1:45678"),
        (["--precision", "q4", "--port", "0"], "'q4'"),
    ],
)
def test_an_address_or_precision_that_is_not_there_is_told(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in fails(capsys, tiny_bundle, *words)


def test_a_folder_that_takes_no_uploads_is_told(
    tiny_bundle: Path, png: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(png / "uploads"))
    assert "uploads: cannot take uploads (Not a directory); set GRADIO_TEMP_DIR to" in fails(
        capsys, tiny_bundle, "--port", "0"
    )
    assert os.environ["GRADIO_TEMP_DIR"] == str(png / "uploads")


def test_examples_of_a_bundle_in_the_hubs_cache(tmp_path: Path, examples: Path) -> None:
    """They are links to elsewhere, which the bundle's manifest answers for, and nobody else."""
    (tmp_path / "examples.json").write_text((examples / "examples.json").read_text())
    (tmp_path / "teal.png").symlink_to(examples / "teal.png")
    with pytest.raises(DemoError, match="is outside"):
        read_examples(tmp_path)
    (example,) = read_examples(tmp_path, {tmp_path / "teal.png"})
    assert example.picture == examples / "teal.png"


def test_a_missing_bundle_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in fails(capsys, tmp_path / "nowhere", "--port", "0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("[", "cannot be read"),
        ("{}", "expected a list"),
        ('[{"picture": "a.png"}]', "entry 1: expected"),
        ('["a"]', "entry 1: expected"),
        ('[{"picture": "a.png", "question": "?"}]', "a.png is not in"),
        ('[{"picture": "../a.png", "question": "?"}]', "../a.png is outside"),
    ],
)
def test_broken_examples_are_told(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "examples.json").write_text(content)
    line = fails(capsys, tiny_bundle, "--port", "0", "--examples", tmp_path)
    assert str(tmp_path / "examples.json") in line
    assert message in line
