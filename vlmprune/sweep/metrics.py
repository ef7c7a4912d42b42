"""Scores of one reply, in [0, 1], and intervals of their mean. Each metric is written from its published definition."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
"""(reply, accepted answers) -> score."""

_NUMBER_WORDS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = frozenset({"a", "an", "the"})
_LETTER = re.compile(
    r"^\W*((?i:[A-Z]))(?:[).:,]|$)"  # "B", "(b)", "B. a dog"
    r"|\b(?:answer|option|choice)(?: is)?\s*:?\s*\(?([A-Z])\b"  # "the answer is B"
    r"|\(([A-Z])\)",  # "it must be (B)"
)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def exact_match(reply: str, answers: Sequence[str]) -> float:
    """1 if the reply is one of the answers; case, runs of blanks and a full stop at the end do not count."""
    return float(_plain(reply) in {_plain(answer) for answer in answers})


def vqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """VQA accuracy (Antol et al., ICCV 2015, section 4; Goyal et al., CVPR 2017).

    min(matches / 3, 1), averaged over all ways to leave one annotator out. Replies and answers are lower case without
    punctuation and articles, number words as digits. With fewer than four answers, which cannot hold three votes beside
    the one left out, 1 if any of them matches.
    """
    said, given = _vqa_words(reply), [_vqa_words(answer) for answer in answers]
    same = sum(answer == said for answer in given)
    if len(given) < 4:
        return float(same > 0)
    # Leaving out one of the `same` annotators who agree costs a vote, any other none.
    without = same * min((same - 1) / 3, 1) + (len(given) - same) * min(same / 3, 1)
    return without / len(given)


def _vqa_words(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text).replace("'", "")
    text = text.translate({ord(mark): " " for mark in string.punctuation if mark != "."})
    return " ".join(_NUMBER_WORDS.get(word, word) for word in text.split() if word not in _ARTICLES)


def anls(reply: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity (Biten et al., ICCV 2019, equation 1), case and extra blanks ignored.

    1 - NL of the nearest answer, where NL is the edit distance over the longer length; 0 where NL >= `threshold`.
    """
    said = " ".join(reply.split()).lower()
    best = 0.0
    for answer in answers:
        truth = " ".join(answer.split()).lower()
        distance = _edit_distance(said, truth) / max(len(said), len(truth), 1)
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def multiple_choice(reply: str, answers: Sequence[str]) -> float:
    """1 if the reply names the right option's letter ("B", "(b)", "B. a dog", "The answer is B") or repeats its text.

    The rule-based first step of MMBench (Liu et al., ECCV 2024, section 4.3): a reply that names no letter is wrong.
    """
    if exact_match(reply, answers):
        return 1.0
    found = _LETTER.search(reply.strip())
    letter = next((group.upper() for group in found.groups() if group), None) if found else None
    return float(letter in {answer.strip().upper() for answer in answers})


def relaxed_numeric(reply: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """Relaxed accuracy (Methani et al., WACV 2020; Masry et al., ACL Findings 2022).

    Numbers may be off by 5 %, anything else must match exactly. Percent and dollar signs and thousands separators do
    not count; a true 0 must be met exactly.
    """
    said = _number(reply)
    for answer in answers:
        truth = _number(answer)
        if said is not None and truth is not None and abs(said - truth) <= tolerance * abs(truth):
            return 1.0
    return exact_match(reply, answers)


def _number(text: str) -> float | None:
    try:
        value = float(text.strip().rstrip(".").replace(",", "").strip("$% "))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "multiple_choice": multiple_choice,
    "relaxed_numeric": relaxed_numeric,
}


def wilson(mean: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (JASA 1927).

    For scores between 0 and 1 it is too wide rather than too narrow: their variance is at most mean * (1 - mean).
    """
    if total == 0:
        return 0.0, 1.0
    d = 1 + z * z / total
    centre = mean + z * z / (2 * total)
    half = z * math.sqrt(mean * (1 - mean) / total + z * z / (4 * total * total))
    return max(0.0, (centre - half) / d), min(1.0, (centre + half) / d)


def paired_difference(
    scores: Sequence[float], reference: Sequence[float], z: float = 1.959964
) -> tuple[float, tuple[float, float]]:
    """Mean of `scores - reference` over the same samples, and its 95 % interval (normal approximation)."""
    gaps = [a - b for a, b in zip(scores, reference, strict=True)]
    if not gaps:
        return 0.0, (0.0, 0.0)
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / max(len(gaps) - 1, 1) / len(gaps))
    return mean, (mean - z * spread, mean + z * spread)
