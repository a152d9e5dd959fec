"""How answers are read, against cases worked out by hand from the rules that each benchmark publishes."""

import pytest

from switchkd.training.evaluation.answer_rules import (
    anls,
    choice_letter,
    levenshtein,
    mme_label,
    normalise,
    pope_says_yes,
    relaxed_match,
    vqa_accuracy,
    vqa_normalise,
)


@pytest.mark.parametrize(
    ("answer", "same"),
    [(" The  Red circle. ", "red circle"), ("An apple", "apple"), ("a", ""), ("Anna", "anna"), ("3.5", "3.5")],
)
def test_exact_matchs_own_normal_form(answer: str, same: str) -> None:
    assert normalise(answer) == same


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("Yes", "yes"),
        (" a\ttable\nand the chair ", "table and chair"),
        ("two", "2"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("Dont", "don't"),
        ("couldntve", "couldntve"),  # lacks two apostrophes; the table knows those that lack one
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("hell", "hell"),
        ("somebody'd", "somebodyd"),
        ("red/blue", "red blue"),  # nothing beside a space: a space in its place
        ("red, blue", "red blue"),  # beside a space: taken out
        ("red ,blue-green", "red blue green"),
        ("well-known, or not", "well known or not"),  # each mark for itself
        ("1,000", "1000"),  # a comma between digits ...
        ("1,000-2", "10002"),  # ... takes every mark out
        ("3.5", "3.5"),
        ("mr. smith.", "mr smith"),
        ("$5:30", "$5:30"),  # neither is among the marks
        ("what?!", "what"),
    ],
)
def test_vqas_normal_form(answer: str, same: str) -> None:
    assert vqa_normalise(answer) == same


@pytest.mark.parametrize(
    ("matching", "accuracy"),
    # Leaving out one of ten: with m matching ones m times min(1, (m-1)/3), and 10-m times min(1, m/3), over 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_leaves_out_one_person_at_a_time(matching: int, accuracy: float) -> None:
    people = ["Two."] * matching + [f"other {number}" for number in range(10 - matching)]
    assert vqa_accuracy("2", people) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("105", "100", True),
        ("94.9", "100", False),
        ("-95", "-100", True),
        ("5%", "0.05", True),
        ("5", "5%", False),  # a percentage is its hundredth
        ("48%", "50%", True),
        ("0.0", "0", False),  # 0 has no 5 %: texts
        ("0", "0", True),
        (" Yes", "yes", True),
        ("1,000", "1000", False),  # the published rule knows no thousands
        ("2010", "2009", True),
    ],
)
def test_relaxed_accuracy(answer: str, target: str, right: bool) -> None:
    assert relaxed_match(answer, target) is right


def test_anls() -> None:
    assert levenshtein("kitten", "sitting") == 3
    assert levenshtein("", "abc") == levenshtein("abc", "") == 3
    assert anls("KITTEN", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("abcd", ["abxy"]) == 0  # exactly half is not below the threshold
    assert anls("abcde", ["abcxy", "nothing"]) == pytest.approx(0.6)
    assert anls(" two  words ", ["Two words"]) == 1
    assert anls("", ["a"]) == 0
    assert anls("", [""]) == 1


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is.", True),
        ("No", False),
        ("no, there is", False),
        ("There is not a dog", False),
        ("I see a dog. No cat.", True),  # the first sentence counts
        ("NO", True),  # the published list has No, no and not
        ("Nothing", True),
        ("", True),
    ],
)
def test_popes_reading(answer: str, yes: bool) -> None:
    assert pope_says_yes(answer) is yes


@pytest.mark.parametrize(
    ("answer", "label"),
    [("Yes.", "yes"), ("no", "no"), ("It is: yes", "other"), ("Not so", "no"), ("a no", "no"), ("", "other")],
)
def test_mmes_reading(answer: str, label: str) -> None:
    assert mme_label(answer) == label


CHOICES = {"A": "a cat", "B": "a dog", "C": "the dog house"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b).", "B"),
        ("c:", "C"),
        ("The answer is (C), not B", "C"),
        ("Answer: B", "B"),
        ("the answer is a dog", "B"),  # "a" is no capital there
        ("B. a cat", "B"),  # the letter comes before the text
        ("(A) cat", "A"),
        ("A dog", "B"),
        ("dog", "B"),
        ("I think (C) fits", "C"),
        ("either (A) or (B)", None),
        ("It must be B", "B"),
        ("A picture of I do not know", None),
        ("there is a cat here", "A"),
        ("dog house", "C"),
        ("D", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice(answer: str, letter: str | None) -> None:
    assert choice_letter(answer, CHOICES) == letter
