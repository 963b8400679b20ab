"""What is told of prepared data: counts, an audit of the facts that decide whether a model learns to stop, warnings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import printable
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from peftcli.data.encoder import Notes
    from peftcli.data.tokens import TokenDataset


@dataclass
class SourceReport:
    """One file, folder or hub data set.

    Args:
        path: as the recipe names it.
        format: named or detected.
        templated: whether its rows went through the tokenizer's chat template, rather than being plain text.
        ignored_columns: columns that were not looked at.
        rows: read.
        samples: kept; a row becomes several by `overflow: split`, or if the template rewrites earlier turns.
        blank: rows without a visible character to learn, left out.
        too_long: samples left out by `overflow: drop`.
        truncated: samples cut by `overflow: truncate` or `split`.
        unlabelled: samples (parts of samples) left out as no learnt token was left after cutting.
    """

    path: str
    format: str = ""
    templated: bool = False
    ignored_columns: list[str] = field(default_factory=list)
    rows: int = 0
    samples: int = 0
    blank: int = 0
    too_long: int = 0
    truncated: int = 0
    unlabelled: int = 0


@dataclass(frozen=True)
class PartReport:
    """The training or the evaluation samples.

    Args:
        samples: in one epoch, repeats by `weight` included.
        tokens: of all samples.
        supervised_tokens: those the loss is on.
        longest: tokens of the longest sample.
        lengths: samples by length: `{"64": 10}` are ten samples of 33 to 64 tokens.
        duplicates: rows that are the same, token by token, as an earlier one.
        sources: where they came from; those of a held-out part are the training data's.
    """

    samples: int
    tokens: int
    supervised_tokens: int
    longest: int
    lengths: dict[str, int]
    duplicates: int
    sources: list[SourceReport]

    @classmethod
    def of(cls, dataset: TokenDataset, duplicates: int, sources: list[SourceReport]) -> PartReport:
        lengths = dataset.lengths
        edges, counts = np.unique(2 ** np.ceil(np.log2(lengths)).astype(np.int64), return_counts=True)
        return cls(
            samples=len(dataset),
            tokens=len(dataset.input_ids),
            supervised_tokens=int(dataset.supervised.sum()),
            longest=int(lengths.max()),
            lengths={str(edge): int(count) for edge, count in zip(edges, counts, strict=True)},
            duplicates=duplicates,
            sources=sources,
        )


@dataclass(frozen=True)
class Fact:
    """One line of the audit: what was looked at, whether it is as it should be, and what was seen."""

    name: str
    ok: bool
    seen: str


@dataclass(frozen=True)
class DataReport:
    """All that is known about prepared data; `report.json` in the run folder.

    Args:
        train, eval: counts.
        overlap: evaluation rows that are also training rows, token by token.
        pad_token_id: what short samples of a batch are filled with.
        audit: facts about BOS, end of turn, pad and template.
        warnings: sentences a user should read before training.
        labels: the classes in their order, where the task has classes.
    """

    train: PartReport
    eval: PartReport | None
    overlap: int
    pad_token_id: int
    audit: list[Fact]
    warnings: list[str]
    labels: list[str] | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def choose_pad(tokenizer: Any) -> int:
    """The id that fills up short samples. Which one does not matter: padding is told by position, never by id."""
    return next(index for index in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if index is not None)


def audit(notes: Notes, tokenizer: Any, pad_token_id: int, sources: list[SourceReport]) -> list[Fact]:
    """The facts that decide whether a model trains on what it sees later, and learns to stop."""
    return [_bos(notes, tokenizer), _end_of_turn(notes), _pad(tokenizer, pad_token_id), _template(sources)]


def _bos(notes: Notes, tokenizer: Any) -> Fact:
    bos, none, one = tokenizer.bos_token, notes.beginnings[0], notes.beginnings[1]
    several = sum(count for leading, count in notes.beginnings.items() if leading > 1)
    if several:
        return Fact("one BOS", False, f"samples that begin with {bos} twice: {several}")
    if not one:
        return Fact("one BOS", True, "no sample begins with one, as the tokenizer and its template write none")
    without = f", without: {none}" if none else ""
    return Fact("one BOS", not none, f"samples that begin with {bos}: {one}{without}")


def _end_of_turn(notes: Notes) -> Fact:
    ends = ", ".join(f"{token} ({count})" for token, count in notes.terminators.most_common() if token)
    without = notes.terminators[None]
    if without:
        return Fact("end of turn is learnt", False, f"answers that end without a control token to stop at: {without}")
    return Fact("end of turn is learnt", True, f"answers end with {ends}" if ends else "every token is learnt")


def _pad(tokenizer: Any, pad_token_id: int) -> Fact:
    token = tokenizer.convert_ids_to_tokens(pad_token_id)
    if tokenizer.pad_token_id is None:
        return Fact("pad", True, f"the tokenizer has none: {token} fills up, its labels stay")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return Fact("pad", True, f"{token}, also the end of sequence: told apart by position, its labels stay")
    return Fact("pad", True, f"{token}, not an end of sequence")


def _template(sources: list[SourceReport]) -> Fact:
    seen = {"the tokenizer's own" if source.templated else "none: plain text" for source in sources}
    return Fact("chat template", True, " and ".join(sorted(seen, reverse=True)))


def warnings(notes: Notes, sources: list[SourceReport], duplicates: int, overlap: int) -> Iterator[str]:
    """Sentences a user should read before training."""

    for source in sources:
        for kind, what in (
            ("blank", "rows with nothing but blanks to learn, left out"),
            ("too_long", "samples longer than data.max_length, left out"),
            ("truncated", "samples longer than data.max_length, cut"),
            ("unlabelled", "samples without a learnt token once cut, left out"),
        ):
            if count := getattr(source, kind):
                yield f"{source.path}: {what}: {count}"
    if notes.control_tokens:
        found = ", ".join(f"{printable(token)} ({count})" for token, count in notes.control_tokens.most_common(5))
        yield (
            f"the data holds control tokens as text, which the tokenizer reads as control tokens: {found} "
            f"(first: {notes.first['control_tokens']})"
        )
    for kind, what in (
        ("unprompted", "answers that do not begin with the template's generation prompt, as they will later"),
        ("rewritten", "samples added, as the template writes earlier turns differently later"),
        ("merged", "answers that share their first token with the end of the prompt"),
        ("openings", "assistant turns that open a conversation: they answer nothing and are not learnt"),
        ("blanks", "blank answers, not learnt"),
    ):
        if count := getattr(notes, kind):
            yield f"{what}: {count} (first: {notes.first[kind]})"
    if duplicates:
        yield f"duplicate rows: {duplicates}"
    if overlap:
        yield f"evaluation rows that are also training rows: {overlap}; the evaluation will look better than it is"
