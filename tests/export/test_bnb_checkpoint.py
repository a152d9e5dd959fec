"""A checkpoint in bitsandbytes' 4 and 8 bit: only the language model's layers change, and it loads as it was saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from switchkd.cli.main import main
from switchkd.export import bnb_checkpoint
from switchkd.export.bnb_checkpoint import export_bnb
from switchkd.export.graphs.tracing import ExportError
from switchkd.export.verification.graph_runner import ValuesError


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with layers as wide as bitsandbytes' blocks are long."""
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("wide") / "checkpoint"))
    config: Any = LlavaConfig.from_pretrained(path)
    for part in (config.text_config, config.vision_config):
        part.update({"hidden_size": 64, "intermediate_size": 128})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(("bits", "layer"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_written_reloaded_compared(
    checkpoint: Path, tmp_path: Path, bits: int, layer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quantised"
    command = ["export", str(checkpoint), str(out), "--format", "bitsandbytes", "--bits", str(bits)]
    assert main(command) == 0
    assert "logits off by" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["quantised"]
    before, after = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    kept = [name for name in before if "vision_tower" in name or "projector" in name or "embed_tokens" in name]
    assert len(kept) > 20
    assert all(torch.equal(before[name], after[name]) for name in kept)
    changed = {name for name in before if name in after and before[name].dtype != after[name].dtype}
    assert len(changed) == 2 * 7  # every linear layer of the language model's two
    assert {after[name].dtype for name in changed} == {torch.uint8 if bits == 4 else torch.int8}
    model: Any = LlavaForConditionalGeneration.from_pretrained(out, device_map="cpu")
    kinds = {type(module).__name__ for module in model.model.language_model.modules()}
    assert layer in kinds
    assert type(model.lm_head) is torch.nn.Linear
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    prompt = processor.apply_chat_template([{"role": "user", "content": "How many?"}], add_generation_prompt=True)
    with torch.no_grad():
        answer = model.generate(**processor(text=prompt, return_tensors="pt"), max_new_tokens=4)
    assert answer.shape[1] > 4
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card
    assert json.loads((out / "config.json").read_text())["quantization_config"][f"load_in_{bits}bit"] is True


def test_what_differs_too_much_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bnb_checkpoint.LOGITS_RMS, 4, 1e-4)
    with pytest.raises(ValuesError, match="logits: differs from the reference"):
        export_bnb(checkpoint, tmp_path / "quantised", 4)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_changes_is_found(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As somebody would write it who did not know that names are matched from their beginning.
    monkeypatch.setattr(bnb_checkpoint, "KEPT", ["vision_tower", "multi_modal_projector", "lm_head"])
    with pytest.raises(ValuesError, match="what is kept"):
        export_bnb(checkpoint, tmp_path / "quantised", 4)


def test_places_that_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ExportError, match="exists already"):
        export_bnb(checkpoint, tmp_path / "taken", 4)


def test_layers_that_could_not_be_compared(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="hidden_size is 32, no multiple of 64"):
        export_bnb(tiny_checkpoint, tmp_path / "quantised", 4)
    assert list(tmp_path.iterdir()) == []
