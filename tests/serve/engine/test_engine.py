"""The engine on a tiny real bundle: the answers of torch, streams, chats, pictures, memory of pictures, limits."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from switchkd.export.contract.bundle import Bundle
from switchkd.serve import (
    BundleError,
    ConversationError,
    Engine,
    Message,
    PictureError,
    PromptError,
    Sampling,
    SamplingError,
)

TorchAnswer = Callable[[Any, list[Image.Image], int], tuple[int, ...]]

QUESTION = "What colour is the square on the left?"
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


CHATS: dict[str, tuple[list[Message], int]] = {
    "one picture": ([{"role": "user", "content": [IMAGE, text(QUESTION)]}], 1),
    "no picture": ([{"role": "user", "content": "Describe what you see, please."}], 0),
    "two pictures": ([{"role": "user", "content": [IMAGE, IMAGE, text("How many circles are there?")]}], 2),
    "two turns": (
        [
            {"role": "system", "content": "Yes, please."},
            {"role": "user", "content": [IMAGE, text(QUESTION)]},
            {"role": "assistant", "content": "red: 東京 😀"},
            {"role": "user", "content": [text("Is there a "), IMAGE, text(" too?")]},
        ],
        2,
    ),
}


@pytest.fixture(scope="session")
def torch_answer(tiny_checkpoint: Path) -> TorchAnswer:
    """Greedy token ids by transformers, from the very checkpoint that was exported."""
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    processor = LlavaProcessor.from_pretrained(tiny_checkpoint)

    def answer(messages: Any, pictures: list[Image.Image], new_tokens: int) -> tuple[int, ...]:
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=prompt, images=pictures or None, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        return tuple(ids[0, inputs["input_ids"].shape[1] :].tolist())

    return answer


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.open(tiny_bundle, "fp32", threads=1)


@pytest.mark.parametrize("chat", CHATS)
def test_greedy_tokens_are_those_of_torch(
    engine: Engine, torch_answer: TorchAnswer, pictures: list[Image.Image], chat: str
) -> None:
    messages, count = CHATS[chat]
    expected = torch_answer(messages, pictures[:count], 24)
    answer = engine.answer(messages, pictures[:count], max_new_tokens=24)
    eos = set(engine.bundle.model.eos_token_ids)
    assert answer.tokens == tuple(token for token in expected if token not in eos)
    assert answer.finish_reason == ("stop" if eos & set(expected) else "length")
    assert len(answer.tokens) > 1


def test_a_question_is_a_chat_with_all_pictures_in_front(engine: Engine, pictures: list[Image.Image]) -> None:
    messages, _ = CHATS["one picture"]
    assert engine.answer(QUESTION, pictures[:1]).tokens == engine.answer(messages, pictures[:1]).tokens
    assert engine.answer(QUESTION).prompt_tokens + 17 == engine.answer(QUESTION, pictures[:1]).prompt_tokens


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_streamed_pieces_join_to_the_answer(tiny_bundle: Path, pictures: list[Image.Image], precision: str) -> None:
    engine = Engine.open(tiny_bundle, precision, threads=1)
    stream = engine.stream(QUESTION, pictures[:1], max_new_tokens=40)
    first = next(stream)
    assert stream.answer.text == first
    assert stream.answer.finish_reason is None
    pieces = [first, *stream]
    assert len(pieces) > 1
    assert "".join(pieces) == stream.answer.text == engine.answer(QUESTION, pictures[:1], max_new_tokens=40).text
    assert stream.answer.finish_reason in ("stop", "length")


def test_an_end_token_ends_the_answer(tiny_bundle: Path, engine: Engine, pictures: list[Image.Image]) -> None:
    free = engine.answer(QUESTION, pictures[:1], max_new_tokens=8).tokens
    stopping = Engine.open(tiny_bundle, "fp32", threads=1)
    # The same model, told that the fourth token of its answer is an end token.
    object.__setattr__(stopping.bundle.model, "eos_token_ids", (free[3],))
    answer = stopping.answer(QUESTION, pictures[:1], max_new_tokens=8)
    assert answer.tokens == free[: free.index(free[3])]
    assert answer.finish_reason == "stop"


def test_the_default_precision_is_the_bundles_first(tiny_bundle: Path) -> None:
    engine = Engine.open(tiny_bundle)
    assert engine.bundle.precision == engine.bundle.manifest.precisions[0]


def test_int8_is_near_fp32(tiny_bundle: Path, engine: Engine, pictures: list[Image.Image]) -> None:
    other = Engine.open(tiny_bundle, "int8", threads=1)
    features = [one.encoder.encode(one.encoder.open(pictures[0])) for one in (engine, other)]
    assert np.abs(features[0] - features[1]).max() < 0.1 * np.abs(features[0]).max()


def test_a_known_picture_is_not_encoded_again(engine: Engine, pictures: list[Image.Image], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    pictures[0].save(path)
    encoder = engine.encoder
    first = encoder.encode(encoder.open(pictures[0]))
    assert encoder.encode(encoder.open(path)) is first
    assert encoder.encode(encoder.open(path.read_bytes())) is first
    assert encoder.encode(encoder.open(pictures[1])) is not first


def test_a_pillow_image_is_turned_and_refused_as_its_file_is(
    engine: Engine, pictures: list[Image.Image], tmp_path: Path
) -> None:
    turned, cut = tmp_path / "turned.jpg", tmp_path / "cut.jpg"
    note = Image.Exif()
    note[0x0112] = 6
    pictures[2].save(turned, exif=note)
    pixels_CHW = engine.encoder.open(turned).pixels_CHW
    assert not np.array_equal(pixels_CHW, engine.encoder.open(pictures[2]).pixels_CHW)
    np.testing.assert_array_equal(engine.encoder.open(Image.open(turned)).pixels_CHW, pixels_CHW)
    cut.write_bytes(turned.read_bytes()[:-300])
    for picture in (cut, Image.open(cut)):
        with pytest.raises(PictureError, match=r"cut\.jpg: damaged"):
            engine.stream(QUESTION, [picture])


def test_only_the_latest_pictures_are_remembered(tiny_bundle: Path, pictures: list[Image.Image]) -> None:
    from switchkd.serve.engine.picture_encoder import PictureEncoder

    encoder = PictureEncoder(Engine.open(tiny_bundle, "fp32").bundle, threads=1, remember=2)
    one, two, three = (encoder.open(picture) for picture in pictures)
    first, second = encoder.encode(one), encoder.encode(two)
    assert encoder.encode(one) is first  # used again, so the other one is the oldest now
    encoder.encode(three)
    assert encoder.encode(one) is first
    again = encoder.encode(two)
    assert again is not second
    np.testing.assert_array_equal(again, second)


def test_a_seed_repeats_an_answer(engine: Engine, pictures: list[Image.Image]) -> None:
    def ask(**settings: Any) -> tuple[int, ...]:
        sampling = Sampling(temperature=3.0, **settings)
        return engine.answer(QUESTION, pictures[:1], max_new_tokens=20, sampling=sampling).tokens

    assert ask(seed=1) == ask(seed=1)
    assert ask(seed=1) != ask(seed=2)
    assert ask(top_p=1e-9) == engine.answer(QUESTION, pictures[:1], max_new_tokens=20).tokens


def test_threads_may_share_an_engine(engine: Engine, pictures: list[Image.Image]) -> None:
    def ask(number: int) -> tuple[int, ...]:
        return engine.answer(QUESTION, [pictures[number % 3]], max_new_tokens=12).tokens

    alone = [ask(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone


def test_the_answer_ends_where_the_context_is_full(engine: Engine) -> None:
    limit = engine.bundle.model.max_positions
    answer = engine.answer("a " * (limit // 2 - 20), max_new_tokens=10_000)
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + len(answer.tokens) == limit


def test_a_prompt_beyond_the_context_is_refused(engine: Engine, pictures: list[Image.Image]) -> None:
    with pytest.raises(ConversationError, match=r"the prompt has \d+ tokens \(40 pictures of 16 each .* reads at most"):
        engine.stream(QUESTION, [pictures[0]] * 40)


@pytest.mark.parametrize(
    ("question", "count", "message"),
    [
        ("", 1, "the question is empty"),
        (" \n", 0, "the question is empty"),
        ([], 0, "there are no messages"),
        ([{"role": "user", "content": [IMAGE, text("a")]}], 0, "1 image parts and 0 pictures"),
        ([{"role": "user", "content": "a"}], 1, "0 image parts and 1 pictures"),
        ([{"content": "a"}], 0, "message 1: expected an object with role"),
        ([{"role": "user", "content": "a"}, "b"], 0, "message 2: expected an object"),
        ([{"role": "user", "content": None}], 0, "content is NoneType"),
        ([{"role": "user", "content": [{"type": "audio"}]}], 0, "a part is {'type': 'audio'}"),
        ("What is <image>?", 1, "holds <image> 2 times for 1 pictures"),
        ("f\udcfcr", 1, "the question: character 2 is none (U+DCFC)"),  # Latin-1 on a command line in UTF-8
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": [text("\ud83d")]}],
            0,
            "message 2: character 1",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(
    engine: Engine, pictures: list[Image.Image], question: str | list[Message], count: int, message: str
) -> None:
    with pytest.raises(ConversationError) as error:
        engine.stream(question, pictures[:count])
    assert message in str(error.value)


def test_settings_that_make_no_sense_are_refused(tiny_bundle: Path, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ConversationError, match="max_new_tokens is 0"):
        engine.stream(QUESTION, max_new_tokens=0)
    for threads in (0, 1025, 99_999_999_999):
        with pytest.raises(ConversationError, match=f"threads is {threads}, expected 1 to 1024"):
            Engine.open(tiny_bundle, threads=threads)
    with pytest.raises(BundleError, match="'q4'"):
        Engine.open(tiny_bundle, "q4")
    with pytest.raises(PictureError, match="no such file"):
        engine.stream(QUESTION, [tmp_path / "nowhere.png"])


def test_a_template_that_refuses_says_so(tiny_bundle: Path) -> None:
    bundle = replace(Bundle.open(tiny_bundle, "fp32"), chat_template="{{ raise_exception('users only') }}")
    engine = Engine(bundle, threads=1)
    with pytest.raises(PromptError, match="users only"):
        engine.stream(QUESTION)


def test_log_probabilities_belong_to_the_tokens(engine: Engine, pictures: list[Image.Image]) -> None:
    answer = engine.answer(QUESTION, pictures[:1], max_new_tokens=6, logprobs=3)
    assert answer.logprobs is not None
    assert [each.token for each in answer.logprobs] == list(answer.tokens)
    for each in answer.logprobs:  # a greedy answer
        assert each.top[0] == (each.token, each.logprob)
        assert len(each.top) == 3
        assert 0 > each.top[0][1] >= each.top[1][1] >= each.top[2][1]
    assert engine.answer(QUESTION, pictures[:1], max_new_tokens=6).logprobs is None
    drawn = engine.answer(QUESTION, max_new_tokens=6, logprobs=0, sampling=Sampling(temperature=5.0, seed=3))
    assert drawn.logprobs is not None
    assert [(each.token, each.top) for each in drawn.logprobs] == [(token, ()) for token in drawn.tokens]
    for wrong in (-1, 21):
        with pytest.raises(SamplingError, match=f"logprobs is {wrong}, expected 0 .* to 20"):
            engine.stream(QUESTION, logprobs=wrong)


def test_an_empty_picture_is_refused(engine: Engine) -> None:
    with pytest.raises(PictureError, match="0x0"):
        engine.stream(QUESTION, [Image.new("RGB", (0, 0))])
