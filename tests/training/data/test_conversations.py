"""Conversations: only assistant turns are supervised, pictures take their tokens, broken records say why."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import LlavaProcessor

from switchkd.export.contract.pixels import Preprocessing
from switchkd.training.data.conversations import BrokenRecord, DataError, Reason, picture_of, to_messages
from switchkd.training.data.dataset import ConversationDataset, Sample, collator
from switchkd.training.data.label_mask import ConversationEncoder
from switchkd.training.models.alignment import IGNORED
from switchkd.training.models.vlm import load_tokenizer, load_vlm
from switchkd.training.world.vocabulary import IMAGE_TOKEN, train_tokenizer

TOKENS = 4
TURNS = [("What colour is it?", "Red and blue."), ("How many?", "12"), ("Why?", "Two\nlines.")]


def record(image: str | None = "a.png", turns: list[tuple[str, str]] | None = None) -> dict[str, Any]:
    """A LLaVA record of several turns."""
    conversations = []
    for number, (question, answer) in enumerate(turns or TURNS):
        preface = "<image>\n" if image and number == 0 else ""
        conversations += [{"from": "human", "value": preface + question}, {"from": "gpt", "value": answer}]
    return {"id": "r1", "conversations": conversations} | ({"image": image} if image else {})


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    """An encoder over a small ChatML tokenizer, four tokens a picture."""
    texts = [text for turn in TURNS for text in turn] + ["user\nassistant\n"]
    return ConversationEncoder(train_tokenizer(texts, 300), IMAGE_TOKEN, TOKENS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The same tokenizer as the encoder's."""
    return train_tokenizer([text for turn in TURNS for text in turn] + ["user\nassistant\n"], 300)


@pytest.mark.parametrize("image", ["a.png", None])
def test_supervised_text_is_every_answer_and_its_end(encoder: ConversationEncoder, tokenizer: Any, image: str) -> None:
    ids, labels = encoder.encode(to_messages(record(image)))
    supervised = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(supervised) == "".join(f"{answer}<|im_end|>" for _, answer in TURNS)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_number_of_supervised_tokens_is_an_independent_count(encoder: ConversationEncoder, tokenizer: Any) -> None:
    _, labels = encoder.encode(to_messages(record()))
    expected = sum(len(tokenizer(answer)["input_ids"]) + 1 for _, answer in TURNS)
    assert sum(label != IGNORED for label in labels) == expected


def test_picture_takes_its_tokens_where_the_template_puts_it(encoder: ConversationEncoder, tokenizer: Any) -> None:
    ids, labels = encoder.encode(to_messages(record()))
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    places = [place for place, token in enumerate(ids) if token == image]
    assert len(places) == TOKENS
    assert places == list(range(places[0], places[0] + TOKENS))
    assert all(labels[place] == IGNORED for place in places)


def test_prompt_is_the_beginning_of_the_whole(encoder: ConversationEncoder) -> None:
    messages = to_messages(record())
    ids, labels = encoder.encode(messages)
    prompt = encoder.encode_prompt(messages[:-1])
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt)] != IGNORED


def test_the_processor_sees_the_same_ids(tiny_checkpoint: Path) -> None:
    processor = LlavaProcessor.from_pretrained(tiny_checkpoint, backend="pil")
    encoder = ConversationEncoder(processor.tokenizer, processor.image_token, 16)
    messages = to_messages(record(turns=TURNS[:1]))[:1]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(text=text, images=Image.new("RGB", (24, 24)))["input_ids"][0]
    assert encoder.encode_prompt(messages) == list(expected)


def test_padding_and_truncation_saved_in_a_tokenizer_are_forgotten(tiny_checkpoint: Path, tmp_path: Path) -> None:
    cutting, messages = tmp_path / "cutting", to_messages(record(turns=TURNS))
    shutil.copytree(tiny_checkpoint, cutting)
    tokenizer = Tokenizer.from_file(str(cutting / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(cutting / "tokenizer.json"))
    (whole, cut) = (load_vlm(path) for path in (tiny_checkpoint, cutting))
    (expected, got) = (ConversationEncoder(vlm.tokenizer, "<image>", 16) for vlm in (whole, cut))
    assert got.encode(messages) == expected.encode(messages)
    assert got.encode_prompt(messages[:1]) == expected.encode_prompt(messages[:1])
    assert load_tokenizer(cutting)("a b" * 90)["input_ids"] == whole.tokenizer("a b" * 90)["input_ids"]
    # Nor does what is saved afterwards cut: transformers' processor would.
    cut.processor.save_pretrained(tmp_path / "saved")
    assert len(LlavaProcessor.from_pretrained(tmp_path / "saved", backend="pil")(text="a b" * 90)["input_ids"][0]) > 90


def test_max_length_cuts_ids_and_labels(tokenizer: Any) -> None:
    whole, labels = ConversationEncoder(tokenizer, IMAGE_TOKEN, TOKENS).encode(to_messages(record()))
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    encoder = ConversationEncoder(tokenizer, IMAGE_TOKEN, TOKENS, max_length=first + 2)
    assert encoder.encode(to_messages(record())) == (whole[: first + 2], labels[: first + 2])
    assert encoder.measure(to_messages(record())) == (len(whole), 2)


@pytest.mark.parametrize("turns", [TURNS, [("What is it?" * 9, "Red.")], [("One?", "Two."), ("<image>Why?", "So.")]])
def test_what_the_cut_leaves_nothing_of_is_refused(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    broken = record(turns=turns)
    if "<image>" in turns[-1][0]:
        broken["conversations"][0]["value"] = turns[0][0]
    length = len(ConversationEncoder(tokenizer, IMAGE_TOKEN, TOKENS).encode(to_messages(broken))[0])
    cut = length - 20 if "<image>" in turns[-1][0] else 9
    encoder = ConversationEncoder(tokenizer, IMAGE_TOKEN, TOKENS, max_length=cut)
    with pytest.raises(DataError, match="loses every answer, or part of its picture"):
        encoder.encode(to_messages(broken))
    assert encoder.measure(to_messages(broken)) == (length, 0)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"conversations": [{"from": "bird", "value": "tweet"}]}, "'bird'"),
        ({"conversations": record()["conversations"]}, "1 <image> placeholders for 0 pictures"),
        ({"image": "a.png", "conversations": record(None)["conversations"]}, "0 <image> placeholders for 1 pictures"),
        ({"conversations": [{"from": "human", "value": "hello"}]}, "no assistant turn"),
        ({"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": ""}]}, "an answer is empty"),
        ({"conversations": [{"from": "gpt", "value": "Hello."}]}, "no assistant turn"),
        ({"image": ["a.png", "b.png"], "conversations": record()["conversations"]}, "names 2 pictures"),
        ({}, "conversations is not a list"),
    ],
)
def test_broken_records_name_themselves_and_the_reason(broken: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"r7: .*{reason}"):
        to_messages({"id": "r7"} | broken)


def test_template_that_rewrites_history_is_refused() -> None:
    tokenizer = train_tokenizer(["user assistant"], 300)
    tokenizer.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)
    with pytest.raises(DataError, match="only appends"):
        ConversationEncoder(tokenizer, IMAGE_TOKEN, TOKENS).encode(to_messages(record()))


def test_a_greeting_of_the_assistant_is_left_out_as_llava_does(encoder: ConversationEncoder) -> None:
    greeting = {"from": "gpt", "value": "Hello!"}
    greeted = record(None) | {"conversations": [greeting, *record(None)["conversations"]]}
    assert encoder.encode(to_messages(greeted)) == encoder.encode(to_messages(record(None)))


def test_a_list_of_one_picture_is_that_picture() -> None:
    assert picture_of(record() | {"image": ["a.png"]}) == picture_of(record()) == "a.png"
    assert picture_of(record(None) | {"image": []}) is None


def test_dataset_gives_pixels_and_names_a_missing_picture(tmp_path: Path, encoder: ConversationEncoder) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    settings = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    rows = [record("a.png"), record(None), record("gone.png")]
    dataset = ConversationDataset(rows, tmp_path, encoder, Preprocessing.from_config(settings))
    assert len(dataset) == 3
    pixels = dataset[0].pixels_CHW
    assert pixels is not None
    assert pixels.shape == (3, 8, 8)
    assert pixels[0].min() > 0.9
    assert dataset[1].pixels_CHW is None
    with pytest.raises(DataError, match=r"r1: .*gone.png"):
        dataset[2]
    assert [length > 0 for length in dataset.lengths()] == [True, False, True]


def test_collation_pads_right_and_keeps_pictures_in_order() -> None:
    rng = torch.Generator().manual_seed(0)
    pixels = [torch.rand(3, 2, 2, generator=rng).numpy() for _ in range(2)]
    samples = [Sample([5, 6, 7], [IGNORED, 6, 7], pixels[0]), Sample([8], [8], None), Sample([9], [9], pixels[1])]
    batch = collator(0)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED], [9, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert torch.equal(batch["pixel_values"], torch.stack([torch.from_numpy(row) for row in pixels]))
    assert "pixel_values" not in collator(0)(samples[1:2])


CONTROL = ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>"]


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_in_a_text_are_text(encoder: ConversationEncoder, tokenizer: Any, token: str) -> None:
    answer = f"Write {token}at the end."
    ids, labels = encoder.encode(to_messages(record(turns=[(f"What is {token}?", answer), ("And?", "12")])))
    # The whole of the answer is supervised up to the template's own end, and no turn is ended or begun in it.
    supervised = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(supervised) == f"{answer}<|im_end|>12<|im_end|>"
    plain = ConversationEncoder(tokenizer, IMAGE_TOKEN, TOKENS).encode(to_messages(record(turns=[("?", "1")] * 2)))[0]
    for control in tokenizer.all_special_ids:
        assert ids.count(control) == plain.count(control)
    # The prompt is spelled as it is in training.
    messages = to_messages(record(turns=[(f"What is {token}?", answer)]))
    assert encoder.encode_prompt(messages[:-1]) == ids[: labels.index(supervised[0])]


def test_a_key_for_the_system_becomes_its_turn(encoder: ConversationEncoder) -> None:
    turn = {"from": "system", "value": "Be brief."}
    whole = record() | {"conversations": [turn, *record()["conversations"]]}
    assert to_messages(whole)[0] == {"role": "system", "content": "Be brief."}
    for key in ("system", "system_prompt"):
        assert (
            to_messages(record() | {key: "Be brief."}) == to_messages(whole) == to_messages(whole | {key: "Be brief."})
        )
        assert to_messages(record() | {key: ""}) == to_messages(record())
        with pytest.raises(DataError, match=f"r1: {key} says otherwise"):
            to_messages(whole | {key: "Be long."})
        with pytest.raises(DataError, match=f"r1: {key} is .*expected text"):
            to_messages(record() | {key: ["Be brief."]})


CONTENT = {
    "video": "a.mp4",
    "videos": ["a.mp4"],
    "audio": "a.wav",
    "images": ["b.png"],
    "image_url": "http://x/a.png",
    "messages": [{"role": "user", "content": "?"}],
    "query": "?",
    "response": "!",
    "history": [["a", "b"]],
    "tools": "[]",
    "objects": {"bbox": [[1, 2, 3, 4]]},
    "Video": "a.mp4",
}
METADATA = {
    "source": "x",
    "data_source": "y",
    "width": 3,
    "height": 4,
    "model": "m",
    "dataset": "d",
    "image_id": 7,
    "turns": 2,
}


@pytest.mark.parametrize("key", CONTENT)
def test_content_under_a_key_that_is_not_read_breaks_the_record(key: str) -> None:
    with pytest.raises(BrokenRecord, match=rf"r1: the record has content under {key}, which is not read") as raised:
        to_messages(record() | {key: CONTENT[key]})
    assert raised.value.reason == Reason.KEY
    assert to_messages(record() | {key: None}) == to_messages(record() | METADATA) == to_messages(record())


@pytest.mark.parametrize(
    ("place", "more", "named"),
    [
        (0, {"image": "b.png"}, "image"),
        (0, {"weight": 1}, "weight"),
        (1, {"tool_calls": [{"name": "f"}]}, "tool_calls"),
        (1, {"reasoning_content": "hm"}, "reasoning_content"),
        (1, {"loss": False}, "loss"),
        (1, {"weight": 0}, "weight"),
        (1, {"role": "assistant", "content": "12"}, "role, content"),
    ],
)
def test_content_in_a_turn_that_is_not_read_breaks_the_record(place: int, more: dict[str, Any], named: str) -> None:
    turns = record()["conversations"]
    turns[place] |= more
    with pytest.raises(BrokenRecord, match=rf"r1: a turn has content under {named}, which is not read"):
        to_messages(record() | {"conversations": turns})
    turns[place] |= dict.fromkeys(more)
    turns[1] |= {"weight": 1, "loss": True, "name": "Bob"}
    assert to_messages(record() | {"conversations": turns}) == to_messages(record())


@pytest.mark.parametrize(
    "other", [{"messages": [1]}, {"question": "?", "answer": "!"}, {"role": "user", "content": "?"}]
)
def test_a_record_of_another_format_names_its_keys(other: dict[str, Any]) -> None:
    with pytest.raises(
        BrokenRecord, match=f"r1: the record has content under {', '.join(other)}.*switchkd data convert"
    ):
        to_messages({"id": "r1"} | other)
