"""Greedy answers on many generated pairs: which pairs, what is kept of them, and that a wrong answer late is found."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import LlavaForConditionalGeneration

from switchkd.cli.main import main
from switchkd.export.contract.bundle import MANIFEST, Bundle
from switchkd.export.quantisation.precisions import PRECISIONS
from switchkd.export.verification.graph_runner import REMEMBERED, Array, GraphRunner, Greedy, TokensError
from switchkd.export.verification.parity import Answer, Pairs, compare, record, sample_prompts
from switchkd.export.verification.reference import TorchReference


@pytest.fixture(scope="module")
def pairs(tiny_bundle: Path) -> Pairs:
    return Pairs(Bundle.open(tiny_bundle), 200)


def test_pairs_are_the_same_each_time_and_all_different(tiny_bundle: Path, pairs: Pairs) -> None:
    once, again = list(pairs), list(pairs)
    assert len(once) == len(pairs) == 200
    contents = {(tuple(p.ids), b"" if p.pixels_PCHW is None else p.pixels_PCHW.tobytes()) for p in once}
    assert len(contents) == 200
    for prompt, other in zip(once, again, strict=True):
        assert prompt.ids == other.ids
        np.testing.assert_array_equal(prompt.pixels_PCHW, other.pixels_PCHW)
    first = sample_prompts(Bundle.open(tiny_bundle))
    assert [prompt.ids for prompt in once[:6]] == [prompt.ids for prompt in first]
    assert [prompt.closely for prompt in once] == [True] * 6 + [False] * 194
    pictures = [0 if prompt.pixels_PCHW is None else len(prompt.pixels_PCHW) for prompt in once]
    assert (pictures.count(0), pictures.count(1), pictures.count(2)) == (11, 168, 21)
    assert len({len(prompt.ids) for prompt in once}) > 25


def test_little_is_kept_of_a_pair(tiny_bundle: Path, pairs: Pairs) -> None:
    runner = GraphRunner(Bundle.open(tiny_bundle))
    few = [*pairs][:8]
    told: list[tuple[int, int]] = []
    expected = record(runner, few, lambda done, of: told.append((done, of)))
    assert told == [(number, 8) for number in range(1, 9)]
    assert [want.values is not None for want in expected] == [True] * 6 + [False] * 2
    assert all(want.answer.logits_TK.shape == (len(want.answer.tokens), 64) for want in expected)


def test_margins_are_those_of_all_logits() -> None:
    logits_TV = np.random.default_rng(0).standard_normal((3, 200)).astype(np.float32)
    answer = Answer.of(Greedy(logits_TV.argmax(1).tolist(), logits_TV))
    ranked_TV = np.argsort(-logits_TV, axis=1)
    for place in range(3):
        for rank in (0, 1, 63):
            token = int(ranked_TV[place, rank])
            assert answer.margin(place, token) == logits_TV[place].max() - logits_TV[place, token]
        # Of what is less likely than all that is kept, no more is said than that.
        assert answer.margin(place, int(ranked_TV[place, 150])) == answer.margin(place, int(ranked_TV[place, 63]))


def test_features_of_late_pictures_are_kept_alone(tiny_bundle: Path) -> None:
    runner = GraphRunner(Bundle.open(tiny_bundle))
    pictures = np.random.default_rng(0).standard_normal((REMEMBERED + 3, 1, 3, 24, 24)).astype(np.float32)
    for pixels_PCHW in pictures:
        runner.encode(pixels_PCHW)
    assert len(runner._features) == REMEMBERED
    runner.seconds = -1.0
    runner.encode(pictures[-1])
    assert runner.seconds == -1.0  # not run again
    runner.encode(pictures[0])
    assert runner.seconds > 0


class LaterContrary(TorchReference):
    """Answers as it should, but from the eighth prompt on another one."""

    asked = 0

    def greedy(self, ids: Sequence[int], pixels_PCHW: Array | None, max_new_tokens: int) -> Greedy:
        self.asked += 1
        return super().greedy(ids if self.asked < 8 else [*ids, *ids[-3:]], pixels_PCHW, max_new_tokens)


def test_a_wrong_answer_to_a_late_pair_is_found(tiny_bundle: Path, tiny_checkpoint: Path, pairs: Pairs) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    runner, few = GraphRunner(Bundle.open(tiny_bundle)), [*pairs][:9]
    expected = record(LaterContrary(model, runner.bundle.model.eos_token_ids), few)
    with pytest.raises(TokensError, match="fp32: greedy answers to pair 8 of 9 part at token") as caught:
        compare(runner, few, expected, PRECISIONS["fp32"].bounds)
    assert "\n" not in str(caught.value)


def test_verify_asks_as_many_as_the_export(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny_bundle)]) == 0
    assert "6 of 6 greedy answers equal" in capsys.readouterr().out
    assert main(["verify", str(tiny_bundle), "--pairs", "20"]) == 0
    assert "20 of 20 greedy answers equal" in capsys.readouterr().out
    assert main(["verify", str(tiny_bundle), "--pairs", "5"]) == 2
    assert capsys.readouterr().err == "switchkd: error: pairs is 5; give 6 or more, since so many are always compared\n"


def test_fewer_equal_answers_than_recorded_are_found(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    content = json.loads((copy / MANIFEST).read_text())
    content["verification"]["fp32"]["greedy"]["equal"] = 8  # of 6
    (copy / MANIFEST).write_text(json.dumps(content))
    assert main(["verify", str(copy)]) == 2
    assert "fp32: 6 of 6 greedy answers are equal, at export it was 8" in capsys.readouterr().err
    assert main(["verify", str(copy), "--pairs", "7"]) == 0  # other pairs, another count
