"""A prompt has the same ids wherever it is made, and as transformers makes it, with three kinds of tokenizer."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor

from switchkd.export.contract.bundle import Bundle
from switchkd.export.contract.prompt import read_tokenizer
from switchkd.export.search.calibration import read_calibration
from switchkd.export.verification.parity import make_prompt
from switchkd.serve import Engine
from switchkd.training.data.label_mask import ConversationEncoder
from switchkd.training.models.vlm import load_vlm

# With the picture below this model answers otherwise where BOS is missing, or is there twice.
QUESTION = "How many red circles are there in the picture, and how many squares on the left?"
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]


def test_prompts_are_equal_wherever_they_are_made(tokenizer_kind: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, path = tokenizer_kind
    bundle, picture = Bundle.open(path), Image.new("RGB", (24, 24), "red")
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    expected = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": picture}, *MESSAGES[0]["content"][1:]]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"][0]
    assert len(expected) > 64
    engine = Engine.open(path, threads=1)
    assert engine.answer(QUESTION, [picture], max_new_tokens=1).prompt_tokens == len(expected)
    assert engine.prompt.encode(MESSAGES, 1) == expected
    # What is verified, and what is calibrated on.
    pixels_PCHW = np.zeros((1, 3, 24, 24), dtype=np.float32)
    assert make_prompt(bundle, read_tokenizer(bundle.tokenizer_path), QUESTION, pixels_PCHW).ids == expected
    picture.save(tmp_path / "a.png")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 2))
    assert read_calibration(bundle, tmp_path / "pairs.json").score[0].prompt.ids == expected
    # What a student is trained on, with the tokenizer of the folder and with that of the bundle.
    vlm = load_vlm(checkpoint)
    encoder = ConversationEncoder(vlm.tokenizer, "<image>", 16)
    assert encoder.encode_prompt(MESSAGES) == expected
    # And whoever else reads the bundle's own files.
    assert Tokenizer.from_file(str(bundle.tokenizer_path)).encode("one two three " * 20).ids[24:]
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    again = AutoProcessor.from_pretrained(path, backend="pil")(text=text, images=picture)["input_ids"][0]
    assert again[-len(expected) :] == expected


def test_script_of_the_card_answers_as_the_engine(tokenizer_kind: tuple[Path, Path], tmp_path: Path) -> None:
    _, path = tokenizer_kind
    script = re.search(r"```python\n(import sys.*?)```", (path / "README.md").read_text(), re.DOTALL)
    assert script is not None
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(picture)
    done = subprocess.run(
        [sys.executable, "-c", script[1], str(picture), QUESTION], cwd=path, capture_output=True, text=True, check=True
    )
    expected = Engine.open(path, threads=1).answer(QUESTION, [picture], max_new_tokens=64).text
    assert len(expected) > 10
    assert done.stdout.rstrip("\n\N{REPLACEMENT CHARACTER}") == expected.rstrip("\n")
