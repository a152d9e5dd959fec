"""What a bundle's generation_config.json asks for is done as transformers does it, or told."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.generation import logits_process

from switchkd.export.contract.bundle import MANIFEST, FileFacts, read_manifest
from switchkd.export.contract.generation_settings import (
    NO_MATTER,
    NOT_OBEYED,
    OBEYED,
    GenerationError,
    GenerationSettings,
    not_obeyed,
)
from switchkd.export.folders.digests import sha256
from switchkd.serve import MAX_NEW_TOKENS, BundleError, Engine, Sampling
from switchkd.serve.engine.sampling import Sampler
from switchkd.serve.engine.token_rules import TokenRules

QUESTION = "What colour is the square on the left?"
NEW = 24
Open = Callable[..., Engine]


@pytest.fixture
def open_with(tiny_bundle: Path, tmp_path: Path) -> Open:
    """An engine over a copy of the tiny bundle whose generation_config.json holds these settings."""

    def opened(**settings: Any) -> Engine:
        path = tmp_path / "bundle"
        if not path.exists():
            shutil.copytree(tiny_bundle, path)
        manifest, file = read_manifest(path), path / "generation_config.json"
        file.write_text(json.dumps({"eos_token_id": [2], "pad_token_id": 0, **settings}))
        ends = tuple(settings.get("eos_token_id", manifest.model.eos_token_ids))
        files = {**manifest.files, file.name: FileFacts(file.stat().st_size, sha256(file))}
        manifest = replace(manifest, model=replace(manifest.model, eos_token_ids=ends), files=files)
        (path / MANIFEST).write_text(manifest.to_json())
        return Engine.open(path, "fp32", threads=1)

    return opened


@pytest.fixture(scope="module")
def generate(tiny_checkpoint: Path, pictures: list[Image.Image]) -> Callable[[Path], tuple[int, ...]]:
    """What transformers answers to QUESTION about the first picture, told by a bundle's generation_config.json."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    processor = LlavaProcessor.from_pretrained(tiny_checkpoint, backend="pil")
    message: Any = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=prompt, images=pictures[0], return_tensors="pt")

    def answer(bundle: Path) -> tuple[int, ...]:
        config = GenerationConfig.from_pretrained(bundle)
        with torch.inference_mode():
            ids = model.generate(**inputs, generation_config=config, max_new_tokens=NEW)
        written = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return tuple(token for token in written if token not in config.eos_token_id)

    return answer


@pytest.fixture(scope="module")
def free(tiny_bundle: Path, pictures: list[Image.Image]) -> tuple[int, ...]:
    """The answer that nothing changes."""
    return Engine.open(tiny_bundle, "fp32", threads=1).answer(QUESTION, pictures[:1], max_new_tokens=NEW).tokens


RULES: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "repetition": lambda _: {"repetition_penalty": 1.3},
    "repetition rewarded": lambda _: {"repetition_penalty": 0.8},
    "n-grams": lambda _: {"no_repeat_ngram_size": 2, "repetition_penalty": 0.8},
    "every token once": lambda _: {"no_repeat_ngram_size": 1},
    "suppressed": lambda free: {"suppress_tokens": [free[0], free[2], 9999]},
    "suppressed first": lambda free: {"begin_suppress_tokens": [free[0]]},
    "bad words": lambda free: {"bad_words_ids": [[free[1], free[2]], [free[4]], [2]]},
    "shortest answer": lambda free: {"eos_token_id": [2, free[3]], "min_new_tokens": 9},
    "shortest of all": lambda free: {"eos_token_id": [2, free[3]], "min_length": 60},
    "all": lambda free: {
        "eos_token_id": [2, free[3]],
        "min_new_tokens": 12,
        "min_length": 5,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [free[5]],
        "begin_suppress_tokens": [free[0]],
        "bad_words_ids": [[free[1], free[2]]],
    },
}


@pytest.mark.parametrize("name", RULES)
def test_answers_are_those_of_transformers(
    name: str,
    open_with: Open,
    generate: Callable[[Path], tuple[int, ...]],
    free: tuple[int, ...],
    pictures: list[Image.Image],
) -> None:
    engine = open_with(**RULES[name](free))
    got = engine.answer(QUESTION, pictures[:1], max_new_tokens=NEW)
    assert got.tokens == generate(engine.bundle.path)
    assert got.tokens != free


def test_logits_are_changed_as_transformers_changes_them() -> None:
    random = np.random.default_rng(0)
    size, ends = 40, [2, 7]
    for _ in range(200):
        prompt, written = (random.integers(0, size, count).tolist() for count in (9, random.integers(0, 9)))
        config = {
            "repetition_penalty": float(random.uniform(0.5, 2)),
            "no_repeat_ngram_size": int(random.integers(0, 4)),
            "min_length": int(random.integers(0, 20)),
            "suppress_tokens": random.integers(0, size, 2).tolist(),
            "begin_suppress_tokens": random.integers(0, size, 2).tolist(),
            "bad_words_ids": [[3], [7], [*(prompt + written)[-2:], 5], [1, 5]],
        }
        last = torch.tensor(ends)
        rules = [
            logits_process.RepetitionPenaltyLogitsProcessor(config["repetition_penalty"]),
            logits_process.NoBadWordsLogitsProcessor(config["bad_words_ids"], last),
            logits_process.MinLengthLogitsProcessor(config["min_length"], last),
            logits_process.SuppressTokensLogitsProcessor(config["suppress_tokens"]),
            logits_process.SuppressTokensAtBeginLogitsProcessor(config["begin_suppress_tokens"], len(prompt)),
        ]
        if config["no_repeat_ngram_size"]:
            rules.append(logits_process.NoRepeatNGramLogitsProcessor(config["no_repeat_ngram_size"]))
        logits_V = random.normal(0, 5, size).astype(np.float32)
        before = logits_V.copy()
        ours = TokenRules(GenerationSettings.from_config(config), prompt, ends, size)
        for place in range(len(written)):
            ours.apply(logits_V, written[:place])
        given: Any = torch.from_numpy(logits_V.copy())[None]
        expected = logits_process.LogitsProcessorList(rules)(torch.LongTensor([prompt + written]), given)
        np.testing.assert_array_equal(ours.apply(logits_V, written), expected[0].numpy())
        np.testing.assert_array_equal(logits_V, before)


def test_it_draws_where_the_bundle_does_and_nobody_says_otherwise(
    open_with: Open, free: tuple[int, ...], pictures: list[Image.Image]
) -> None:
    engine = open_with(do_sample=True, temperature=5.0, top_k=40, max_new_tokens=7)

    def ask(sampling: Sampling | None = None) -> tuple[int, ...]:
        return engine.answer(QUESTION, pictures[:1], sampling=sampling).tokens

    assert len(ask()) <= 7
    assert ask(Sampling(seed=1)) == ask(Sampling(seed=1)) != ask(Sampling(seed=2))
    assert ask(Sampling(temperature=0)) == ask(Sampling(top_k=1)) == free[:7]
    assert ask(Sampling(5.0, seed=1)) == ask(Sampling(seed=1))
    greedy = open_with(temperature=5.0, top_p=0.1)  # as many files hold them, and do_sample is false
    assert greedy.answer(QUESTION, pictures[:1], max_new_tokens=NEW).tokens == free
    assert Sampling().over(greedy.settings) == Sampling(0.0, 1.0, None, 0)
    assert greedy.settings.max_new_tokens is None
    assert len(greedy.answer(QUESTION, pictures[:1]).tokens) <= MAX_NEW_TOKENS


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7, "top_k": 4, "top_p": 0.8}, {"temperature": 1.5}, {"top_k": 0, "top_p": 0.5}, {"top_k": 1}],
)
def test_draws_are_as_likely_as_in_transformers(settings: dict[str, Any]) -> None:
    logits: Any = torch.tensor([[2.0, -1.0, 1.5, 1.4, 0.3, -0.2, 1.0, 0.9]])
    warpers = logits_process.LogitsProcessorList()
    warpers.append(logits_process.TemperatureLogitsWarper(settings.get("temperature", 1.0)))
    if top_k := settings.get("top_k", 50):
        warpers.append(logits_process.TopKLogitsWarper(top_k))
    warpers.append(logits_process.TopPLogitsWarper(settings.get("top_p", 1.0)))
    expected = torch.softmax(warpers(torch.LongTensor([[0]]), logits.clone()), dim=-1)[0].numpy()
    sampler = Sampler(Sampling(seed=3), GenerationSettings.from_config({"do_sample": True, **settings}))
    draws = [sampler.choose(logits[0].numpy()) for _ in range(2000)]
    found = np.bincount(draws, minlength=8) / len(draws)
    np.testing.assert_allclose(found, expected, atol=0.04)
    assert not found[expected == 0].any()


def test_what_is_not_done_is_named() -> None:
    config = {
        "eos_token_id": 2,
        "num_beams": 4,
        "max_length": 4096,
        "typical_p": 0.9,
        "repetition_penalty": 1.1,
        "output_scores": True,
        "stop_strings": ["."],
        "guidance_scale": None,
        "num_return_sequences": 1,
        "something_new": 3,
    }
    named = {"num_beams": 4, "max_length": 4096, "stop_strings": ["."], "something_new": 3}
    assert not_obeyed(config) == named
    assert not_obeyed({**config, "do_sample": True}) == {**named, "typical_p": 0.9}
    assert not_obeyed(GenerationConfig().to_dict()) == {}


def test_every_setting_of_transformers_is_in_one_list() -> None:
    lists = [OBEYED, NO_MATTER, NOT_OBEYED]
    assert len(frozenset().union(*lists)) == sum(map(len, lists))
    known = {**vars(GenerationConfig()), **GenerationConfig().to_dict()}
    assert sorted(set(known) - OBEYED - NO_MATTER - NOT_OBEYED) == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number above 0"),
        ({"repetition_penalty": "1.3"}, "repetition_penalty is '1.3'"),
        ({"do_sample": "yes"}, "do_sample is 'yes', expected true or false"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
        ({"do_sample": True, "temperature": 101}, "temperature is 101, expected a number above 0 and at most 100"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5, expected a number above 0 and at most 1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1, expected a whole number of 0 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of 1 or more"),
        ({"suppress_tokens": 3}, "suppress_tokens is 3, expected a list of token ids"),
        ({"bad_words_ids": [[]]}, "expected a list of lists of token ids"),
        ({"bad_words_ids": [3]}, "expected a list of lists of token ids"),
    ],
)
def test_settings_that_are_none_are_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(GenerationError, match=reason):
        GenerationSettings.from_config(config)


def test_the_engine_says_so_in_one_line(open_with: Open) -> None:
    with pytest.raises(BundleError, match=r"generation_config\.json: repetition_penalty is -1, .*export again"):
        open_with(repetition_penalty=-1)
