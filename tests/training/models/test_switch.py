"""The visual switch and the checks of a student with its teacher."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from switchkd.export.llava.projectors import tokens_per_picture
from switchkd.training.models.pathway import embed, last_hidden, visual_features, visual_tokens
from switchkd.training.models.switch import check_pair, check_tokenizers, switch_hidden

Make = Callable[..., Any]

MODELS: list[dict[str, Any]] = [
    {},
    {"encoder": "clip"},
    {"encoder": "clip", "strategy": "default"},
    {"feature_layer": [-2, -1]},
    {"tied": False, "feature_layer": -1},
]


@pytest.mark.parametrize("settings", MODELS, ids=str)
def test_pathway_in_parts_equals_transformers(settings: dict[str, Any], llava: Make, batch: Make) -> None:
    model = llava(0, **settings).eval()
    assert tokens_per_picture(model.config) == (5 if settings == {"encoder": "clip"} else 4)
    inputs = batch(0, [1, 0, 2], visual_tokens=tokens_per_picture(model.config))
    del inputs["labels"]
    tokens_PLD = visual_tokens(model, visual_features(model, inputs["pixel_values"]))
    assert tokens_PLD.shape[1] == tokens_per_picture(model.config)
    logits = model.lm_head(last_hidden(model, embed(model, inputs["input_ids"], tokens_PLD), inputs["attention_mask"]))
    torch.testing.assert_close(logits, model(**inputs).logits)


def test_switch_is_the_teacher_with_the_students_encoder(llava: Make, batch: Make) -> None:
    student, teacher = llava(0).eval(), llava(1, width=24, layers=3).eval()
    inputs = batch(0, [1, 1])
    features_PLE = visual_features(student, inputs["pixel_values"])
    got = switch_hidden(teacher, inputs["input_ids"], inputs["attention_mask"], features_PLE)
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    del inputs["labels"]
    torch.testing.assert_close(got, teacher.model(**inputs).last_hidden_state)


def test_a_fitting_pair_passes(llava: Make) -> None:
    check_pair(llava(0), llava(1, width=24, layers=3, vocabulary=70))


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"image_token": 5}, "image token is 4, the teacher's 5"),
        ({"image_size": 18}, "pictures of 12 pixels, the teacher of 18"),
        ({"patch": 4}, "gives 4 features a picture, the teacher's projector takes 9"),
        ({"encoder": "clip"}, "gives 4 features a picture, the teacher's projector takes 5"),
        ({"encoder_width": 24}, "features of width 16, the teacher's projector takes 24.*encoder_adapter: true"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_with_both_values(llava: Make, teacher: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_pair(llava(0), llava(1, **teacher))


def test_the_encoders_matter_to_the_switch_alone(llava: Make) -> None:
    check_pair(llava(0), llava(1, encoder_width=24), switch=False)
    check_pair(llava(0), llava(1, encoder_width=24), adapter=True)
    check_pair(llava(0), llava(1, patch=4), switch=False)


def test_visual_tokens_compared_one_by_one_must_be_as_many(llava: Make) -> None:
    with pytest.raises(ValueError, match=r"puts 4 visual tokens.*the teacher 9.*one by one"):
        check_pair(llava(0), llava(1, patch=4), switch=False, same_tokens=True)


def test_an_image_token_outside_one_vocabulary_is_refused(llava: Make) -> None:
    with pytest.raises(ValueError, match=r"50 \(student\) and 61 \(teacher\).*image token 55"):
        check_pair(llava(0, vocabulary=50, image_token=55), llava(1, image_token=55))


def tokenizer(letters: str, special: list[str]) -> PreTrainedTokenizerFast:
    words = {letter: i for i, letter in enumerate([*letters, "?"])}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", additional_special_tokens=special)


def byte_pairs(merges: list[tuple[str, str]], words: list[str]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def test_tokenizers_that_part_outside_the_probe_are_found() -> None:
    """The probe has neither a q nor a z."""
    words = ["?", "q", "z", "x", "qz", "zx", "qzx"]
    ours = byte_pairs([("q", "z"), ("z", "x"), ("qz", "x")], words)
    check_tokenizers(ours, byte_pairs([("q", "z"), ("z", "x"), ("qz", "x")], words))
    other = byte_pairs([("q", "z")], ["?", "q", "z", "y", "qz", "zx", "qzx"])
    with pytest.raises(ValueError, match="differ in 2 tokens: 'x' is 3 for the student and not there for the teacher"):
        check_tokenizers(ours, other)
    merged_otherwise = byte_pairs([("z", "x"), ("q", "z"), ("qz", "x")], words)
    with pytest.raises(ValueError, match=r"from token 0 on the text 'qzx' is \[6\] for the student and \[1, 5\]"):
        check_tokenizers(ours, merged_otherwise)


def test_tokenizers_are_compared_by_probe_and_special_tokens() -> None:
    ours = tokenizer("The red", ["<image>", "<|im_end|>"])
    check_tokenizers(ours, tokenizer("The red", ["<image>", "<|im_end|>"]))
    with pytest.raises(ValueError, match="the tokenizers differ: from token 0 "):
        check_tokenizers(ours, tokenizer("hTe red", ["<image>", "<|im_end|>"]))
    with pytest.raises(ValueError, match=r"\{'<image>': 7.*\} only in the student's, \{'<image>': 8"):
        check_tokenizers(ours, tokenizer("The red", ["<|im_end|>", "<image>"]))
