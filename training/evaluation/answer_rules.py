"""How benchmarks read an answer: each rule as the code or paper it comes from has it, in our own words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# --- exact match ---


def normalise(answer: str) -> str:
    """Lower case, single spaces, no article in front and no full stop behind: switchkd's own rule for short answers."""
    words = answer.lower().strip().rstrip(".").split()
    return " ".join(words[1:] if words[:1] in (["a"], ["an"], ["the"]) else words)


# --- VQA: github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py ---

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = frozenset(("a", "an", "the"))
# Whatever of these lacks one apostrophe gets it. Words that are others without it (he'll, we're, I'll) are not there.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_WITH_APOSTROPHE = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round


def vqa_normalise(answer: str) -> str:
    """An answer as the VQA evaluation compares it: punctuation, number words, articles and contractions.

    A punctuation mark is taken out where it stands beside a space somewhere in the answer, and so are all where a comma
    stands between digits; otherwise it becomes a space. Full stops go unless a digit follows.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_digit_comma, marked = _DIGIT_COMMA_DIGIT.search(text) is not None, text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        marked = marked.replace(mark, "" if beside_space or has_digit_comma else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", marked).lower().split()]
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The share of min(1, matches / 3), averaged over leaving out one of the people at a time (Antol et al. 2015)."""
    said, theirs = vqa_normalise(answer), [vqa_normalise(person) for person in people]
    matches = sum(person == said for person in theirs)
    return sum(min(1.0, (matches - (person == said)) / 3) for person in theirs) / len(theirs)


# --- ChartQA: Masry et al. 2022 (arXiv 2203.10244), section 5.1; numbers as google-research/pix2struct reads them ---

TOLERANCE = 0.05


def relaxed_match(answer: str, target: str) -> bool:
    """Within 5 % of the target where both are numbers (a percentage is its hundredth), else equal but for case.

    A target of 0 has no 5 %: there the texts have to be equal.
    """
    said, wanted = _number(answer.strip()), _number(target.strip())
    if said is not None and wanted:
        return abs(said - wanted) / abs(wanted) <= TOLERANCE
    return answer.strip().lower() == target.strip().lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


# --- ST-VQA and DocVQA: Biten et al. 2019 (arXiv 1905.13648), equation 1 ---

ANLS_THRESHOLD = 0.5


def anls(answer: str, targets: Sequence[str]) -> float:
    """The best over the targets of 1 - NL where the normalised Levenshtein distance NL is below 0.5, else 0.

    Case does not count, nor do spaces beyond the first between words. NL is the distance by the longer text's length.
    """
    return max(_similarity(_folded(answer), _folded(target)) for target in targets)


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    distance = levenshtein(one, other) / longest if longest else 0.0
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def levenshtein(one: str, other: str) -> int:
    """How many letters have to be put in, taken out or changed."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for place, against in enumerate(other, 1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != against))
    return row[-1]


# --- yes and no ---


def pope_says_yes(answer: str) -> bool:
    """POPE's reading (Li et al. 2023, github.com/RUCAIBox/POPE, evaluate.py): yes unless the first sentence has a no.

    That is one of the words No, no and not, parted by spaces, commas left out.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def mme_label(answer: str) -> str:
    """MME's reading (Fu et al. 2023, arXiv 2306.13394, eval_tool): yes or no in the first four letters, else other."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


# --- multiple choice ---

_LETTER_ALONE = re.compile(r"^[(\[]?([A-Za-z])[)\]]?[.:]?$")
_LETTER_SAID = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*)(?:[(\[]([A-Za-z])[)\]]|([A-Z])\b)")
_LETTER_FIRST = re.compile(r"^(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])[.:)])\s*\S")
_LETTER_IN_BRACKETS = re.compile(r"[(\[]([A-Za-z])[)\]]")
_LETTER_WORD = re.compile(r"(?<![\w'])([A-Z])(?![\w'])")


def choice_letter(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses, or None where it chooses none or several; switchkd's own rules, in this order.

    1. The answer is a letter alone: B, (b), B. or B:
    2. It says so: "the answer is B", "option (B)".
    3. It begins with one: "B. a cat", "(B) a cat".
    4. It is the text of a choice, as exact match compares texts.
    5. One letter alone stands in brackets.
    6. One capital letter alone stands as a word, A and I in a sentence's words not among them.
    7. The text of one choice alone is in the answer, as words.
    """
    text = answer.strip()
    for rule in (_LETTER_ALONE, _LETTER_SAID, _LETTER_FIRST):
        found = rule.search(text)
        letter = "" if found is None else next(filter(None, found.groups())).upper()
        if letter in choices:
            return str(letter)
    same = {letter for letter, choice in choices.items() if normalise(choice) == normalise(text)}
    bracketed = {letter.upper() for letter in _LETTER_IN_BRACKETS.findall(text)} & choices.keys()
    words = (set(_LETTER_WORD.findall(text)) - {"A", "I"}) & choices.keys()
    within = {letter for letter, choice in choices.items() if _has_words(text, choice)}
    for found_letters in (same, bracketed, words, within):
        if found_letters:
            return found_letters.pop() if len(found_letters) == 1 else None
    return None


def _has_words(text: str, choice: str) -> bool:
    wanted = normalise(choice)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", " ".join(text.lower().split())) is not None
