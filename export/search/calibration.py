"""Questions about pictures and their answers: some to calibrate quantised graphs on, others to score them on.

Shapes in names: C channels, H height, W width, P pictures, D hidden size, T tokens.
"""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from ..contract.bundle import DECODER, EMBED_TOKENS, NUM_LOGITS_TO_KEEP, Bundle
from ..contract.pixels import PictureError, read_pixels
from ..contract.prompt import read_tokenizer
from ..graphs.tracing import ExportError
from ..verification.graph_runner import REMEMBERED, Array, GraphRunner, Greedy
from ..verification.parity import Answer, Difference, SamplePrompt, make_prompt

PAIRS = 200  # half to calibrate on, half to score on
MAX_ANSWER = 64  # tokens; a longer reference answer is compared as far as this
_PLACEHOLDER = "<image>"  # in LLaVA's JSON, whatever the tokenizer's own image token is
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")


class CalibrationError(ExportError):
    """A calibration file that cannot be used: file, record, reason and remedy in one line."""


@dataclass(frozen=True)
class Pair:
    """A question ready for the model, its reference answer as text and as tokens, with an end token if it ends."""

    prompt: SamplePrompt
    answer: str
    tokens: list[int]


@dataclass(frozen=True)
class Calibration:
    """Pairs to calibrate on and pairs to score on, none of them both; `source` names where they are from."""

    source: str
    calibrate: list[Pair]
    score: list[Pair]

    @classmethod
    def of(cls, source: str, pairs: Sequence[Pair]) -> Self:
        """Every other pair calibrates, the rest score."""
        return cls(source, list(pairs[::2]), list(pairs[1::2]))


# --- a file of pairs ---


def read_calibration(bundle: Bundle, file: Path, picture_root: Path | None = None, pairs: int = PAIRS) -> Calibration:
    """Take so many pairs from LLaVA JSON or JSONL, evenly spread over the file and the same every time.

    A pair is a record's first human turn and the first answer after it; other turns are left out. Pictures lie under
    `picture_root`, by default beside the file. Raises CalibrationError.
    """
    records = _read_records(file)
    if len(records) < 2:
        raise CalibrationError(f"{file}: holds {len(records)} records; at least 2 are needed, better some hundred")
    root = picture_root or file.parent
    if not root.is_dir():
        raise CalibrationError(f"{root}: no such folder of pictures; give --picture-root")
    tokenizer = read_tokenizer(bundle.tokenizer_path)
    chosen = np.unique(np.linspace(0, len(records) - 1, pairs).astype(np.int64)).tolist()
    found = [_read_pair(bundle, tokenizer, records[index], f"{file}: record {index + 1}", root) for index in chosen]
    calibration = Calibration.of(file.name, found)
    if all(pair.prompt.pixels_PCHW is None for pair in calibration.calibrate):
        raise CalibrationError(f"{file}: none of {len(calibration.calibrate)} records has a picture; add some that do")
    return calibration


def _read_records(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CalibrationError(f"{file}: no such file; give --calibration a LLaVA JSON or JSONL file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file}: cannot be read ({error}); give a LLaVA JSON or JSONL file") from error
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{file}: not valid JSON ({error}); write the file again") from error
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{file}: line {number} is not valid JSON ({error}); mend it") from error
    return records


def _read_pair(bundle: Bundle, tokenizer: Tokenizer, record: Any, where: str, root: Path) -> Pair:
    question, answer = _first_turns(record, where)
    image = record.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image is not None and not isinstance(image, str):
        raise CalibrationError(f"{where}: image is {image!r}, expected the path of one picture; leave the record out")
    pixels_PCHW = None
    if image:
        try:
            pixels_PCHW = read_pixels(root / image, bundle.preprocessing)[None]
        except PictureError as error:
            raise CalibrationError(f"{where}: {error}; or give another --picture-root") from error
    prompt = make_prompt(bundle, tokenizer, question.replace(_PLACEHOLDER, ""), pixels_PCHW)
    tokens = tokenizer.encode(answer, add_special_tokens=False).ids
    if len(tokens) < MAX_ANSWER:
        pair = Pair(prompt, answer, [*tokens, bundle.model.eos_token_ids[0]])
    else:
        pair = Pair(prompt, _text(tokenizer, tokens[:MAX_ANSWER]), tokens[:MAX_ANSWER])
    return _check_length(bundle, pair, where)


def _first_turns(record: Any, where: str) -> tuple[str, str]:
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise CalibrationError(f"{where}: conversations is no list of turns with from and value; mend the record")
    question = None
    for turn in turns:
        speaker, text = turn.get("from"), turn.get("value")
        if speaker in (*_HUMAN, *_MODEL) and not isinstance(text, str):
            raise CalibrationError(f"{where}: a turn's value is {text!r}, expected text; mend the record")
        if question is None and speaker in _HUMAN:
            question = str(text)
        elif question is not None and speaker in _MODEL and str(text).strip():
            return question, str(text).strip()
    raise CalibrationError(f"{where}: no answer (gpt) after a question (human); leave the record out")


def _check_length(bundle: Bundle, pair: Pair, where: str) -> Pair:
    length = len(pair.prompt.ids) + len(pair.tokens)
    if length >= bundle.model.max_positions:
        raise CalibrationError(
            f"{where}: question and answer have {length} tokens, the model has room for "
            f"{bundle.model.max_positions}; leave the record out"
        )
    return pair


# --- pairs without a file ---


def answered_by(runner: GraphRunner, prompts: Sequence[SamplePrompt], max_new_tokens: int) -> Calibration:
    """Pairs of prompts and a model's own greedy answers, for where nobody has given better ones."""
    tokenizer = read_tokenizer(runner.bundle.tokenizer_path)
    answers = _answers(runner, [(prompt, max_new_tokens) for prompt in prompts])
    pairs = [
        Pair(prompt, _text(tokenizer, greedy.tokens), greedy.tokens)
        for prompt, (greedy, _) in zip(prompts, answers, strict=True)
    ]
    return Calibration.of("generated prompts, answered by the float32 model", pairs)


# --- what a graph's float32 activations are recorded on ---


def feeds(runner: GraphRunner, name: str, pairs: Sequence[Pair]) -> Iterator[dict[str, Array]]:
    """Inputs of a graph: pictures, tokens of questions, or questions and answers with the runner's features in them."""
    if name == EMBED_TOKENS:
        for pair in pairs:
            yield {runner.bundle.graph(name).inputs[0].name: np.array([pair.prompt.ids], dtype=np.int64)}
        return
    if name != DECODER:
        for pixels_PCHW in pictures(pairs):
            yield {runner.bundle.graph(name).inputs[0].name: pixels_PCHW}
        return
    for pair in pairs:
        question_1TD = runner.merge(pair.prompt.ids, pair.prompt.pixels_PCHW)
        embeds_1TD = np.concatenate([question_1TD, runner.embed(np.array([pair.tokens]))], axis=1)
        given: dict[str, Array] = {
            "inputs_embeds": embeds_1TD,
            "attention_mask": np.ones(embeds_1TD.shape[:2], dtype=np.int64),
            "position_ids": np.arange(embeds_1TD.shape[1])[None],
            NUM_LOGITS_TO_KEEP: np.array(0, dtype=np.int64),
            **dict(zip(runner.bundle.model.cache.past_names(), runner.empty_cache(), strict=True)),
        }
        yield {spec.name: given[spec.name] for spec in runner.bundle.graph(name).inputs}


def pictures(pairs: Sequence[Pair]) -> list[Array]:
    """Every prompt's pictures once: files often ask several questions about one."""
    found = (pair.prompt.pixels_PCHW for pair in pairs)
    return list({picture_key(pixels): pixels for pixels in found if pixels is not None}.values())


def picture_key(pixels_PCHW: Array) -> bytes:
    """What tells a prompt's pictures from another's."""
    return sha256(pixels_PCHW.tobytes()).digest()


# --- scores ---


@dataclass(frozen=True)
class Score:
    """How a precision answers pairs: shares between 0 and 1, and the error of logits while the answers are the same."""

    pairs: int
    accuracy: float  # answers whose text is the reference's
    agreement: float  # answers whose tokens are the float32 model's
    mean_first_divergence: float | None  # of those that are not: the token at which they part
    relative_rms: float  # of likely tokens' logits in an answer, up to where it parts from the float32 model's
    seconds: float  # median of one answer, its picture's included

    def drop(self, reference: Self) -> float:
        """Percentage points of accuracy that were lost; negative where some were won."""
        return 100 * (reference.accuracy - self.accuracy)


@dataclass(frozen=True)
class Reference:
    """The float32 model's answers to pairs, and its own score."""

    answers: list[Answer]
    score: Score


def ask(runner: GraphRunner, pairs: Sequence[Pair]) -> Reference:
    """Let the float32 model answer every pair; raises what `GraphRunner.run` raises."""
    tokenizer = read_tokenizer(runner.bundle.tokenizer_path)
    answers, seconds, right = [], [], 0
    for pair, (greedy, took) in zip(pairs, _answers(runner, _asked(runner, pairs)), strict=True):
        answers.append(Answer.of(greedy))
        seconds.append(took)
        right += _text(tokenizer, greedy.tokens) == pair.answer
    return Reference(answers, Score(len(pairs), right / len(pairs), 1.0, None, 0.0, statistics.median(seconds)))


def score(runner: GraphRunner, pairs: Sequence[Pair], reference: Reference) -> Score:
    """Compare greedy answers with the pairs' own, by exact match of stripped texts, and with the float32 model's.

    Raises what `GraphRunner.run` raises.
    """
    tokenizer = read_tokenizer(runner.bundle.tokenizer_path)
    difference, partings, seconds, right = Difference(), [], [], 0
    answers = _answers(runner, _asked(runner, pairs))
    for pair, expected, (got, took) in zip(pairs, reference.answers, answers, strict=True):
        shorter = min(len(got.tokens), len(expected.tokens))
        same = next((i for i in range(shorter) if got.tokens[i] != expected.tokens[i]), shorter)
        if got.tokens != expected.tokens:
            partings.append(same)
        places = slice(min(same + 1, shorter))  # what was read before the place where they part is still the same
        likely_TK = np.take_along_axis(got.logits_TV[places], expected.likely_TK[places], axis=1)
        difference.add(likely_TK, expected.logits_TK[places])
        seconds.append(took)
        right += _text(tokenizer, got.tokens) == pair.answer
    return Score(
        pairs=len(pairs),
        accuracy=right / len(pairs),
        agreement=1 - len(partings) / len(pairs),
        mean_first_divergence=statistics.mean(partings) if partings else None,
        relative_rms=difference.relative_rms,
        seconds=statistics.median(seconds),
    )


def _asked(runner: GraphRunner, pairs: Sequence[Pair]) -> list[tuple[SamplePrompt, int]]:
    """Prompts, and how long an answer may become: one that goes on after the reference's end is no match."""
    ends = runner.bundle.model.eos_token_ids
    return [(pair.prompt, len(pair.tokens) + (pair.tokens[-1] in ends)) for pair in pairs]


def _answers(runner: GraphRunner, asked: Sequence[tuple[SamplePrompt, int]]) -> Iterator[tuple[Greedy, float]]:
    """Greedy answers to prompts of so many tokens at most, and the seconds of each with its pictures."""
    encoding: dict[bytes | None, float] = {None: 0.0}
    for start in range(0, len(asked), REMEMBERED):
        block = [(prompt, _picture_key(prompt), tokens) for prompt, tokens in asked[start : start + REMEMBERED]]
        for prompt, key, _ in block:  # first, so that encoder and decoder need not be open together
            if prompt.pixels_PCHW is not None:
                begun = time.perf_counter()
                runner.encode(prompt.pixels_PCHW)
                encoding.setdefault(key, time.perf_counter() - begun)
        for prompt, key, tokens in block:
            begun = time.perf_counter()
            greedy = runner.greedy(prompt.ids, prompt.pixels_PCHW, tokens)
            yield greedy, time.perf_counter() - begun + encoding[key]


def _picture_key(prompt: SamplePrompt) -> bytes | None:
    return None if prompt.pixels_PCHW is None else picture_key(prompt.pixels_PCHW)


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
