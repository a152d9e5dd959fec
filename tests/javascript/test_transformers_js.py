"""A bundle in transformers.js, in Node and in a headless browser: the same greedy tokens as PyTorch's."""

import contextlib
import functools
import json
import queue
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from switchkd.export.assembly import export_checkpoint
from switchkd.export.contract.bundle import Bundle
from switchkd.export.contract.pixels import to_pixels
from switchkd.export.quantisation.precisions import dtype_of
from switchkd.export.search.mix_options import MixOptions
from switchkd.export.verification.graph_runner import GraphRunner
from switchkd.export.verification.reference import TorchReference
from switchkd.serve import Engine

HERE = Path(__file__).parent
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUESTION = "How many red circles are there?"
NEW_TOKENS = 20

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here"),
    pytest.mark.skipif(
        not (HERE / "node_modules").is_dir(), reason="transformers.js is not installed: `make javascript` does it"
    ),
]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the model's size: the runtimes' resizing differs, and is not what is compared here."""
    file = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.random.default_rng(7).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, picture: Path) -> dict[str, Any]:
    """What plain transformers answers, and the ids of its prompt."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint, backend="pil")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=Image.open(picture), text=prompt, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    ids = inputs["input_ids"][0].tolist()
    answer = written[0, len(ids) :].tolist()
    return {"prompt": ids, "answer": answer, "text": processor.decode(answer, skip_special_tokens=True)}


def request(bundle: str, dtype: str | None, picture: str, tokens_per_picture: int = 16) -> dict[str, Any]:
    """What answer.mjs is asked."""
    settings = {"question": QUESTION, "tokensPerPicture": tokens_per_picture, "newTokens": NEW_TOKENS}
    return {"bundle": bundle, "dtype": dtype, "picture": picture, **settings}


def in_node(bundle: Path, dtype: str | None, picture: Path, tokens_per_picture: int = 16) -> dict[str, Any]:
    asked = json.dumps(request(bundle.name, dtype, str(picture), tokens_per_picture))
    command: Sequence[str] = ["node", "node.mjs", str(bundle.parent), asked]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


class _Page(SimpleHTTPRequestHandler):
    """Serves this folder, a bundle and a picture on localhost, and takes the page's result."""

    results: "queue.Queue[dict[str, Any]]"
    files: dict[str, Path]
    asked: bytes

    def translate_path(self, path: str) -> str:
        for prefix, place in self.files.items():
            if path.startswith(prefix):
                return str(place / path.removeprefix(prefix)) if place.is_dir() else str(place)
        return super().translate_path(path)

    def do_GET(self) -> None:
        if self.path != "/request.json":
            super().do_GET()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.asked)

    def do_POST(self) -> None:
        self.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Keep pytest's output to itself."""


@contextlib.contextmanager
def serving(bundle: Path, dtype: str | None, picture: Path) -> Iterator[tuple[str, "queue.Queue[dict[str, Any]]"]]:
    """A server on localhost for one request; yields the page's address and where its result arrives."""
    results: queue.Queue[dict[str, Any]] = queue.Queue()
    files = {"/bundles/bundle/": bundle, "/picture.png": picture}
    asked = json.dumps(request("bundle", dtype, "/picture.png")).encode()
    handler = type("Page", (_Page,), {"results": results, "files": files, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(HERE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/browser.html", results
    finally:
        server.shutdown()
        server.server_close()


def in_browser(bundle: Path, dtype: str | None, picture: Path) -> dict[str, Any]:
    assert BROWSER is not None
    # Processes of the browser may write to its profile a little longer than the first of them lives.
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with serving(bundle, dtype, picture) as (address, results), folder as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        browser = subprocess.Popen([BROWSER, *flags, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return results.get(timeout=200)
        finally:
            browser.terminate()
            browser.wait(30)


@pytest.fixture(scope="module")
def int8_tokens(tiny_bundle: Path, picture: Path, expected: dict[str, Any]) -> list[int]:
    """What onnxruntime answers with the bundle's 8-bit graphs."""
    return by_onnxruntime(Bundle.open(tiny_bundle, "int8"), picture, expected["prompt"])


def by_onnxruntime(bundle: Bundle, picture: Path, prompt: list[int]) -> list[int]:
    pixels = to_pixels(Image.open(picture), bundle.preprocessing)[None]
    return GraphRunner(bundle).greedy(prompt, pixels, NEW_TOKENS).tokens


def test_node_answers_as_pytorch_does(tiny_bundle: Path, picture: Path, expected: dict[str, Any]) -> None:
    assert in_node(tiny_bundle, "fp32", picture) == expected


def test_node_answers_in_8_bit_as_onnxruntime_does(tiny_bundle: Path, picture: Path, int8_tokens: list[int]) -> None:
    assert in_node(tiny_bundle, "int8", picture)["answer"] == int8_tokens


def test_node_answers_with_pooled_pictures(ldpv2_checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    export_checkpoint(ldpv2_checkpoint, tmp_path / "bundle", precisions=["fp32"], pairs=6)
    got = in_node(tmp_path / "bundle", "fp32", picture, tokens_per_picture=9)
    assert got["answer"] == by_onnxruntime(Bundle.open(tmp_path / "bundle"), picture, got["prompt"])


@pytest.fixture(scope="module")
def fused(wide_heads_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose one decoder is the fused one; the default has the vision encoder of another precision."""
    bundle = tmp_path_factory.mktemp("fused") / "bundle"
    precisions = ["q4", "fp32"]
    export_checkpoint(wide_heads_checkpoint, bundle, precisions=precisions, prefill="int8", decoder="fused", pairs=6)
    return bundle


@pytest.mark.parametrize("dtype", ["fp32", None])
def test_node_answers_with_the_fused_decoder(
    fused: Path, wide_heads_checkpoint: Path, picture: Path, dtype: str | None
) -> None:
    got = in_node(fused, dtype, picture)
    assert got["answer"] == by_onnxruntime(Bundle.open(fused, dtype), picture, got["prompt"])
    if dtype == "fp32":
        model = LlavaForConditionalGeneration.from_pretrained(wide_heads_checkpoint)
        pixels = to_pixels(Image.open(picture), Bundle.open(fused).preprocessing)[None]
        assert got["answer"] == TorchReference(model, [2]).greedy(got["prompt"], pixels, NEW_TOKENS).tokens


OTHERS = ("mixed", "fp16", "uint8", "q4", "q4f16", "bnb4")


@pytest.fixture(scope="module")
def others(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in the other precisions; its default is a mix of 8 and 4 bit, which goes by the dtype q8."""
    bundle = tmp_path_factory.mktemp("others") / "bundle"
    parts = {"vision_encoder": "int8", "projector": "q4", "embeddings": "q4", "decoder": "q4", "lm_head": "int8"}
    export_checkpoint(tiny_checkpoint, bundle, precisions=OTHERS, mix=MixOptions(parts=parts, pairs=4), pairs=6)
    return bundle


def test_node_answers_in_the_precision_that_comes_first(others: Path, picture: Path) -> None:
    """Without a dtype transformers.js takes the one in config.json: its own default is not in the bundle."""
    got = in_node(others, None, picture)
    assert got["answer"] == by_onnxruntime(Bundle.open(others), picture, got["prompt"])


@needs_browser
@pytest.mark.parametrize("precision", OTHERS)
def test_the_browser_runs_the_operators_of_every_precision(others: Path, picture: Path, precision: str) -> None:
    got = in_browser(others, dtype_of(precision), picture)
    assert "answer" in got, got
    assert got["answer"] == by_onnxruntime(Bundle.open(others, precision), picture, got["prompt"])


@needs_browser
def test_the_browser_answers_with_the_fused_decoder(fused: Path, picture: Path) -> None:
    got = in_browser(fused, "fp32", picture)
    assert got["answer"] == by_onnxruntime(Bundle.open(fused, "fp32"), picture, got["prompt"])


@needs_browser
def test_the_browser_answers_as_pytorch_does(tiny_bundle: Path, picture: Path, expected: dict[str, Any]) -> None:
    assert in_browser(tiny_bundle, "fp32", picture) == expected


@needs_browser
def test_the_browser_answers_in_8_bit_as_onnxruntime_does(
    tiny_bundle: Path, picture: Path, int8_tokens: list[int]
) -> None:
    assert in_browser(tiny_bundle, "int8", picture)["answer"] == int8_tokens


def test_script_of_the_card_answers_as_the_engine(
    tokenizer_kind: tuple[Path, Path], picture: Path, tmp_path: Path
) -> None:
    _, bundle = tokenizer_kind
    script = re.search(r"```js\n(.*?)```", (bundle / "README.md").read_text(), re.DOTALL)
    assert script is not None
    (tmp_path / "script.mjs").write_text(script[1])
    (tmp_path / "bundle").symlink_to(bundle)
    (tmp_path / "picture.png").symlink_to(picture)
    (tmp_path / "node_modules").symlink_to(HERE / "node_modules")
    done = subprocess.run(["node", "script.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    answer = Engine.open(bundle, threads=1).answer("What is in the picture?", [picture], max_new_tokens=64)
    assert len(answer.text) > 1
    assert done.stdout.rstrip("\n\N{REPLACEMENT CHARACTER}") == answer.text.rstrip("\n")
