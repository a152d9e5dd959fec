"""Stop texts: whatever the pieces, the text is cut where the first one begins."""

import random

import pytest

from switchkd.serve.scheduling.stop_texts import StopTexts


def cut(text: str, stops: list[str]) -> str:
    """The readable reference: the text up to the stop text that is whole first, as it is read from the left."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@pytest.mark.parametrize(
    "stops", [[], ["aab"], ["ab", "ba"], ["aaa", "b"], ["abc", "bcd", "c"], ["abc", "b"], ["ää", "a\n"]]
)
def test_every_way_to_cut_a_text_into_pieces_gives_the_same(stops: list[str]) -> None:
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices("aabbc\nä", k=draw.randrange(12)))
        found, said, place = StopTexts(stops), "", 0
        while place < len(text) and not found.found:
            step = draw.randrange(1, 5)
            said += found.push(text[place : place + step])
            assert cut(text, stops).startswith(said)  # never more than may be said
            place += step
        said += found.finish()
        assert said == cut(text, stops)
        assert found.found == (said != text)


def test_nothing_is_held_back_without_need() -> None:
    found = StopTexts(["END"])
    assert [found.push(piece) for piece in ("a", "bE", "c", "EN", "E", "ND")] == ["a", "b", "Ec", "", "EN", ""]
