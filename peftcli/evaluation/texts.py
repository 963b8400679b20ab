"""Scores of one generated answer, 0 to 1, against an expected one."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from peftcli.errors import InputError, printable

REPEATED = 4  # words in a row, as in rep-4
MAX_SECONDS = 2.0  # for a pattern in one answer

_WORD = re.compile(r"[^\W_]+")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(generated: str, expected: str) -> float:
    """Whether the answer is the expected one, blanks around it aside."""
    return float(generated.strip() == expected.strip())


def contains(generated: str, expected: str) -> float:
    """Whether the expected answer stands somewhere in the generated one."""
    return float(expected.strip() in generated)


def rouge_l(generated: str, expected: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004), as `rouge_score` has it without stemming.

    Words are runs of letters and digits, in lower case. `rouge_score` knows ASCII letters only; here every script counts.
    """
    ours, theirs = words(generated), words(expected)
    return _f1(_common_subsequence(ours, theirs), len(ours), len(theirs))


def token_f1(generated: str, expected: str) -> float:
    """F1 of the words two texts share, in any order; words are those of `rouge_l`."""
    return _bag_f1(words(generated), words(expected))


def qa_em(generated: str, expected: str) -> float:
    """SQuAD's exact match: case, punctuation, articles and blanks aside."""
    return float(_squad(generated) == _squad(expected))


def qa_f1(generated: str, expected: str) -> float:
    """SQuAD's F1 of words. No answer (2.0) is right only where none is expected."""
    ours, theirs = _squad(generated).split(), _squad(expected).split()
    return _bag_f1(ours, theirs) if ours and theirs else float(ours == theirs)


def pattern_match(pattern: str, field: str) -> Callable[[str, str], float]:
    """A score by a regular expression: whether it is found in the answer and, if it has a group, whether the group
    holds there what it holds in the expected answer.

    Raises:
        InputError: it is none; naming `field`.
    """
    import regex  # has a timeout: a pattern may take for ever

    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise InputError(f"{printable(repr(pattern))} is no regular expression: {error}", field=field) from None

    def found(text: str) -> str | None:
        try:
            match = compiled.search(text, timeout=MAX_SECONDS)
        except TimeoutError:
            problem = f"{printable(repr(pattern))} takes more than {MAX_SECONDS:g} s for one answer"
            raise InputError(problem, field=field, fix="write it without repetitions inside repetitions") from None
        return None if match is None else (match[1] or "").strip() if compiled.groups else ""

    def score(generated: str, expected: str) -> float:
        caught = found(generated)
        return float(caught is not None and (not compiled.groups or caught == found(expected)))

    return score


def repetition(tokens: Sequence[int]) -> float:
    """The share of an answer's runs of four tokens that came before: rep-4 (Welleck et al. 2020, arXiv:1908.04319)."""
    runs = [tuple(tokens[start : start + REPEATED]) for start in range(len(tokens) - REPEATED + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return _WORD.findall(text.lower())


def _squad(text: str) -> str:
    """Text as SQuAD's script compares it."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _bag_f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2.0 * common / (ours + theirs) if common else 0.0


def _common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Its length, row by row."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for index, other in enumerate(theirs, start=1):
            above = row[index]
            row[index] = diagonal + 1 if word == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]
