"""Picture settings and chat templates where transformers finds them: class defaults, older files, named templates."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from switchkd.export.contract.pixels import Preprocessing, complete, to_pixels
from switchkd.export.graphs.checkpoint import open_checkpoint
from switchkd.export.graphs.tracing import ExportError

SMALL: dict[str, Any] = {"size": {"height": 24, "width": 24}}


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "SiglipImageProcessor"} | SMALL,
        {"image_processor_type": "SiglipImageProcessor"},
        {"image_processor_type": "SiglipImageProcessorFast", "image_std": [0.1, 0.2, 0.3]} | SMALL,
        {"image_processor_type": "SiglipImageProcessor", "size": 24, "do_center_crop": True, "crop_size": 20},
        {"image_processor_type": "CLIPImageProcessor"},
        {"image_processor_type": "CLIPImageProcessor", "size": 30, "crop_size": 24, "do_center_crop": None},
        {"image_processor_type": "CLIPImageProcessorFast", "do_center_crop": False} | SMALL,
        {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 2},
        {"image_processor_type": "LlavaImageProcessor", "do_normalize": False},
    ],
)
def test_what_a_file_leaves_out_is_as_the_class_has_it(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 37, 3), dtype=np.uint8))
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(to_pixels(image, Preprocessing.from_config(settings)), expected)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


def test_a_preprocessor_without_means_is_accepted_and_written_out(checkpoint: Path) -> None:
    settings = {"image_processor_type": "SiglipImageProcessor"} | SMALL
    change(checkpoint / "processor_config.json", image_processor=settings)
    opened = open_checkpoint(checkpoint)
    # What reads the bundle's files need not know the class.
    bare = {name: value for name, value in opened.image_processor.items() if name != "image_processor_type"}
    assert Preprocessing.from_config(bare) == Preprocessing.from_config(settings)
    assert complete(bare)["image_mean"] == [0.5, 0.5, 0.5]
    change(checkpoint / "processor_config.json", image_processor=SMALL)
    with pytest.raises(ExportError, match="image_mean is None, expected one number or three"):
        open_checkpoint(checkpoint)


FIRST, SECOND, THIRD = (f"{{{{ '{word}' }}}}" for word in ("first", "second", "third"))


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({"processor_config.json": FIRST, "chat_template.json": SECOND, "chat_template.jinja": THIRD}, FIRST),
        ({"processor_config.json": FIRST}, FIRST),
        ({"chat_template.json": SECOND, "tokenizer_config.json": THIRD}, SECOND),
        ({"chat_template.jinja": SECOND, "tokenizer_config.json": THIRD}, SECOND),
        (
            {
                "tokenizer_config.json": [
                    {"name": "rag", "template": FIRST},
                    {"name": "default", "template": THIRD},
                ]
            },
            THIRD,
        ),
        ({"processor_config.json": {"default": SECOND, "rag": FIRST}, "tokenizer_config.json": THIRD}, SECOND),
    ],
)
def test_a_chat_template_is_found_where_transformers_finds_it(
    checkpoint: Path, templates: dict[str, Any], expected: str
) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    for name, template in templates.items():
        if name.endswith(".jinja"):
            (checkpoint / name).write_text(template)
        else:
            change(checkpoint / name, chat_template=template)
    opened = open_checkpoint(checkpoint)
    assert opened.chat_template == expected
    assert "chat_template" not in opened.processor_config
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    owner = processor if processor.chat_template else processor.tokenizer
    found = owner.chat_template
    assert (found["default"] if isinstance(found, dict) else found) == expected


def test_named_templates_without_a_default_are_refused_by_name(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    change(checkpoint / "tokenizer_config.json", chat_template=[{"name": "rag", "template": FIRST}])
    with pytest.raises(ExportError, match=r"tokenizer_config\.json: of its chat templates \('rag'\) none is named"):
        open_checkpoint(checkpoint)
