"""A bundle opens when it is whole, and is refused in one line when it is not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from switchkd.export.contract.bundle import (
    DECODER,
    EMBED_TOKENS,
    GRAPHS,
    MANIFEST,
    VISION_ENCODER,
    Bundle,
    BundleError,
    Manifest,
)
from switchkd.export.folders.digests import sha256


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    change(content)
    (bundle / MANIFEST).write_text(json.dumps(content))


def test_opens(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check_hashes=True)
    assert bundle.precision == "fp32"
    assert bundle.manifest.precisions == ("fp32", "int8")
    assert bundle.chat_template == (tiny_checkpoint / "chat_template.jinja").read_text()
    assert bundle.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert bundle.preprocessing.output_size == (24, 24)
    assert bundle.tokenizer_path.is_file()
    model = bundle.model
    assert (model.tokens_per_picture, model.hidden_size, model.vocab_size) == (16, 32, 300)
    assert (model.image_token, model.image_token_id, model.eos_token_ids) == ("<image>", 3, (2,))
    assert (model.cache.layers, model.cache.kv_heads, model.cache.head_dim) == (2, 2, 8)


@pytest.mark.parametrize(("precision", "suffix"), [("fp32", ""), ("int8", "_int8")])
def test_graph_paths(tiny_bundle: Path, precision: str, suffix: str) -> None:
    bundle = Bundle.open(tiny_bundle, precision)
    for name in GRAPHS:
        assert bundle.graph_path(name) == tiny_bundle / "onnx" / f"{name}{suffix}.onnx"
        assert bundle.graph_path(name).is_file()
    assert [tensor.name for tensor in bundle.graph(VISION_ENCODER).inputs] == ["pixel_values"]
    assert [tensor.name for tensor in bundle.graph(EMBED_TOKENS).outputs] == ["inputs_embeds"]
    assert [tensor.name for tensor in bundle.graph(DECODER).outputs] == ["logits", *bundle.model.cache.present_names()]


def test_manifest_survives_writing(tiny_bundle: Path) -> None:
    text = (tiny_bundle / MANIFEST).read_text()
    assert Manifest.from_json(text).to_json() == text


def test_every_file_is_listed(tiny_bundle: Path) -> None:
    files = {file.relative_to(tiny_bundle).as_posix() for file in tiny_bundle.rglob("*") if file.is_file()}
    assert set(Bundle.open(tiny_bundle).manifest.files) == files - {MANIFEST}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "onnx/vision_encoder.onnx", MANIFEST])
def test_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refused(bundle, f"{bundle / name}: missing")


def test_cut_file(bundle: Path) -> None:
    file = bundle / "onnx/decoder_model_merged.onnx"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    refused(bundle, f"{file}: {size - 1:,} bytes, the manifest says {size:,}")


def test_altered_file(bundle: Path) -> None:
    file = bundle / "onnx/embed_tokens.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    Bundle.open(bundle)  # sizes alone do not tell
    refused(bundle, f"{file}: its SHA-256", check_hashes=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "onnx/../../secret", "onnx\\secret"])
def test_path_outside_the_folder(bundle: Path, name: str) -> None:
    secret = bundle.parent / "secret"
    secret.write_text("x")
    rewrite(bundle, lambda content: content["files"].update({name: {"bytes": 1, "sha256": sha256(secret)}}))
    refused(bundle, "outside the bundle")


def test_link_outside_the_folder(bundle: Path) -> None:
    file = bundle / "tokenizer.json"
    file.rename(bundle.parent / "tokenizer.json")
    file.symlink_to(bundle.parent / "tokenizer.json")
    refused(bundle, "links to outside")


def test_a_hub_cache_keeps_its_files_elsewhere(hub_snapshot: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    there, here = Bundle.open(hub_snapshot, check_hashes=True), Bundle.open(tiny_bundle)
    assert (there.manifest, there.chat_template) == (here.manifest, here.chat_template)
    behind = tmp_path / "a link"
    behind.symlink_to(hub_snapshot)
    Bundle.open(behind, check_hashes=True)


@pytest.mark.parametrize("leads", ["out of the cache", "to another repository", "beside the blobs", "on from a blob"])
@pytest.mark.parametrize("name", ["tokenizer.json", MANIFEST])
def test_links_out_of_a_hub_cache(hub_snapshot: Path, tmp_path: Path, leads: str, name: str) -> None:
    copy = Path(shutil.copytree(hub_snapshot.parents[1], tmp_path / "models--a--b", symlinks=True))
    snapshot = copy / "snapshots" / hub_snapshot.name
    content = (snapshot / name).read_bytes()
    blob = (snapshot / name).resolve()
    elsewhere = {
        "out of the cache": tmp_path / "secret",
        "to another repository": tmp_path / "models--c--d" / "blobs" / blob.name,
        "beside the blobs": copy / "refs" / "main",
        "on from a blob": tmp_path / "secret",
    }[leads]
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    elsewhere.write_bytes(content)
    link = blob if leads == "on from a blob" else snapshot / name
    link.unlink()
    link.symlink_to(elsewhere)
    refused(snapshot, f"{name}: links to outside the bundle")


def test_blobs_that_are_a_link_themselves(hub_snapshot: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(hub_snapshot.parents[1], tmp_path / "models--a--b", symlinks=True))
    (copy / "blobs").rename(tmp_path / "elsewhere")
    (copy / "blobs").symlink_to(tmp_path / "elsewhere")
    refused(copy / "snapshots" / hub_snapshot.name, "links to outside the bundle")


@pytest.mark.parametrize("name", ["Bündel für zwölf Bilder", "a b", "%20 #1 [x] 'y'", "模型"])
def test_any_name_will_do(bundle: Path, name: str) -> None:
    Bundle.open(bundle.rename(bundle.parent / name), check_hashes=True)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    refused(tmp_path / ("a" * 300), r"cannot be read \(File name too long\)")
    refused(Path(os.fsdecode(b"/tmp/B\xfcndel")), "not a name in UTF-8, by which onnxruntime opens files")


def remove_model_field(content: dict[str, Any]) -> None:
    del content["model"]["image_token_id"]


def spoil_count(content: dict[str, Any]) -> None:
    content["model"]["cache"]["layers"] = "two"


def remove_decoder(content: dict[str, Any]) -> None:
    content["graphs"] = [graph for graph in content["graphs"] if graph["name"] != DECODER]


def remove_listed_file(content: dict[str, Any]) -> None:
    del content["files"]["generation_config.json"]


def unlist_graph_file(content: dict[str, Any]) -> None:
    content["graphs"][0]["file"] = "onnx/other.onnx"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove_model_field, "model: image_token_id is missing, expected a number"),
        (spoil_count, "cache: layers is text, expected a number"),
        (remove_decoder, "lists no decoder_model_merged in fp32"),
        (remove_listed_file, "does not list generation_config.json"),
        (unlist_graph_file, "does not list onnx/other.onnx"),
        (lambda content: content.update(format_version=1), "format_version is 1, this switchkd reads 3"),
        (lambda content: content.update(format="zip"), "format is 'zip'"),
        (lambda content: content.update(graphs=[]), "holds no graphs"),
        (lambda content: content.update(graphs=[3]), r"graphs\[0\]: is 3, expected an object"),
    ],
)
def test_incomplete_manifest(bundle: Path, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    rewrite(bundle, change)
    refused(bundle, reason)


def test_not_json(bundle: Path) -> None:
    (bundle / MANIFEST).write_text("{")
    refused(bundle, "not valid JSON")


def test_not_a_bundle(bundle: Path, tiny_checkpoint: Path) -> None:
    refused(bundle / "none", "no such folder")
    refused(bundle / MANIFEST, "is a file")
    refused(tiny_checkpoint, "run `switchkd export` on it")
    with pytest.raises(BundleError, match="holds no graphs in 'q4', only fp32, int8"):
        Bundle.open(bundle, "q4")


def refused(bundle: Path, reason: str, *, check_hashes: bool = False) -> None:
    with pytest.raises(BundleError, match=reason) as caught:
        Bundle.open(bundle, check_hashes=check_hashes)
    assert "\n" not in str(caught.value)
    assert str(bundle) in str(caught.value)


def test_the_contract_needs_no_torch() -> None:
    code = (
        "import sys, switchkd.export.contract, switchkd.export.folders\n"
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnxruntime', 'optimum') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
