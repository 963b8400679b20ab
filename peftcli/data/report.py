"""What is told of prepared data: counts, the audit, warnings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.data.audit import Fact
from peftcli.errors import printable
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from peftcli.data.encoder import Notes
    from peftcli.data.part import Part
    from peftcli.data.tokens import Sample, TaskSample


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
        lost_tokens: what was cut off, or left out for its length.
        lost_supervised_tokens: those of them that would have been learnt.
        lost_answers: samples that were left out, or lost learnt tokens: cutting takes the end of turn first.
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
    lost_tokens: int = 0
    lost_supervised_tokens: int = 0
    lost_answers: int = 0

    def note_loss(self, sample: Sample | TaskSample, kept: Sequence[Sample | TaskSample], split: bool) -> None:
        """Count what `sample` lost by becoming the pieces `kept`; in one that was split, no answer lacks its end."""
        learnt = max(int(sample[1].sum()) - sum(int(piece[1].sum()) for piece in kept), 0)
        self.lost_tokens += max(len(sample[0]) - sum(len(piece[0]) for piece in kept), 0)  # pieces may share tokens
        self.lost_supervised_tokens += learnt
        self.lost_answers += not kept or (learnt > 0 and not split)


@dataclass(frozen=True)
class PartReport:
    """The training or the evaluation samples.

    Args:
        samples: in one epoch, repeats by `weight` included.
        tokens: of all samples.
        supervised_tokens: those the loss is on.
        longest: tokens of the longest sample.
        lengths: samples by length: `{"64": 10}` are ten samples of 33 to 64 tokens.
        rows: different rows and repeated ones, those of which no sample was kept left out.
        duplicates: rows that are the same, token by token, as an earlier one.
        sources: where they came from; those of a held-out part are the training data's.
    """

    samples: int
    tokens: int
    supervised_tokens: int
    longest: int
    lengths: dict[str, int]
    rows: int
    duplicates: int
    sources: list[SourceReport]

    @classmethod
    def of(cls, part: Part) -> PartReport:
        dataset = part.dataset
        lengths = dataset.lengths
        edges, counts = np.unique(2 ** np.ceil(np.log2(lengths)).astype(np.int64), return_counts=True)
        return cls(
            samples=len(dataset),
            tokens=len(dataset.input_ids),
            supervised_tokens=int(dataset.supervised.sum()),
            longest=int(lengths.max()),
            lengths={str(edge): int(count) for edge, count in zip(edges, counts, strict=True)},
            rows=len(part.digests),
            duplicates=part.duplicates,
            sources=part.sources,
        )


@dataclass(frozen=True)
class DataReport:
    """All that is known about prepared data; `data/audit.json` in the run folder.

    Args:
        train, eval: counts.
        overlap: evaluation rows that are also training rows, token by token.
        pad_token_id: what short samples of a batch are filled with.
        audit: facts a run is refused for, or could have been.
        warnings: sentences a user should read before training, beyond the audit's.
        labels: the classes in their order, where the task has classes.
        streamed: whether only the first training rows were looked at, as they are a stream.
    """

    train: PartReport
    eval: PartReport | None
    overlap: int
    pad_token_id: int
    audit: list[Fact]
    warnings: list[str]
    labels: list[str] | None = None
    streamed: bool = False

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> DataReport:
        """Read what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["audit"] = [Fact(**fact) for fact in values["audit"]]
        for name in ("train", "eval"):
            if part := values[name]:
                values[name] = PartReport(**{**part, "sources": [SourceReport(**source) for source in part["sources"]]})
        return cls(**values)


def choose_pad(tokenizer: Any) -> int:
    """The id that fills up short samples. Which one does not matter: padding is told by position, never by id."""
    return next(index for index in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if index is not None)


def warnings(notes: Notes, sources: list[SourceReport]) -> Iterator[str]:
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
        ("tokenless", "words that stand for no token, whose class is not learnt"),
    ):
        if count := getattr(notes, kind):
            yield f"{what}: {count} (first: {notes.first[kind]})"
