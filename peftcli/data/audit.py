"""What decides, before any process starts, whether data is fit to train on: `peft train` refuses it unless told otherwise.

A few odd rows are normal; what is lost or blank in a large part is usually a mistake in the recipe or in how the file was
made. Repeated rows are told but never refused: people repeat what they want learnt more often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError

if TYPE_CHECKING:
    from peftcli.data.encoder import Notes
    from peftcli.data.report import DataReport, PartReport, SourceReport

TOLERATED_BLANK = 0.5
"""Share of the rows that may hold nothing to learn."""
TOLERATED_LOSS = 0.1
"""Share of the samples that may lose their answer, or its end, to data.max_length."""
TOLERATED_OVERLAP = 0.01
"""Share of the evaluation rows that may be training rows."""
NO_AUDIT = "--no-audit"


@dataclass(frozen=True)
class Fact:
    """One line of the audit: what was looked at, whether it is as it should be, and what was seen."""

    name: str
    ok: bool
    seen: str


def require_sound(report: DataReport) -> None:
    """Refuse data of which a fact of the audit is not as it should be.

    Raises:
        InputError: naming each such fact.
    """
    wrong = [f"{fact.name}: {fact.seen}" for fact in report.audit if not fact.ok]
    if wrong:
        raise InputError(
            "the audit found what spoils a training run: " + "; ".join(wrong),
            field="data",
            fix=f"correct the data or the recipe's data section, or train on it as it is: {NO_AUDIT}",
        )


def audit(
    notes: Notes, tokenizer: Any, pad_token_id: int, train: PartReport, held_out: PartReport | None, overlap: int
) -> list[Fact]:
    """The facts that decide whether a model trains on what it sees later, learns to stop, and is judged fairly.

    Args:
        notes: of the encoder that made both parts.
        tokenizer: a transformers tokenizer.
        pad_token_id: what short samples of a batch are filled with.
        train, held_out: counts; held_out is None without evaluation data.
        overlap: evaluation rows that are also training rows.
    """
    sources = all_sources(train, held_out)
    facts = [_pad(tokenizer, pad_token_id)]
    if notes.beginnings:  # what a language model learns; other tasks' samples are the tokenizer's own, from end to end
        facts = [_bos(notes, tokenizer), _end_of_turn(notes), *facts, _template(sources)]
    elif notes.terminators:  # of an encoder-decoder's targets
        facts = [_end_of_turn(notes), *facts]
    facts += [_blank(sources), _lengths(sources), _duplicates(train)]
    return [*facts, _apart(held_out, overlap)] if held_out else facts


def all_sources(train: PartReport, held_out: PartReport | None) -> list[SourceReport]:
    """Those of both parts, each once: a part that was split off has the sources of the other."""
    return [*train.sources] + (held_out.sources if held_out and held_out.sources is not train.sources else [])


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


def _blank(sources: list[SourceReport]) -> Fact:
    blank, rows = sum(source.blank for source in sources), sum(source.rows for source in sources)
    if not blank:
        return Fact("something to learn", True, "in every row")
    return Fact(
        "something to learn", blank <= TOLERATED_BLANK * rows, f"rows with nothing but blanks: {blank} of {rows}"
    )


def _lengths(sources: list[SourceReport]) -> Fact:
    samples = sum(source.samples + source.too_long + source.unlabelled for source in sources)
    shortened = sum(source.truncated + source.too_long for source in sources)
    if not shortened:
        return Fact("whole samples", True, "none is longer than data.max_length")
    hurt, tokens, learnt = (
        sum(getattr(source, name) for source in sources)
        for name in ("lost_answers", "lost_tokens", "lost_supervised_tokens")
    )
    return Fact(
        "whole samples",
        hurt <= TOLERATED_LOSS * samples,
        f"longer than data.max_length: {shortened} of {samples}, which lost {tokens} tokens, {learnt} of them learnt; "
        f"answers lost or without their end: {hurt}",
    )


def _duplicates(train: PartReport) -> Fact:
    if not train.duplicates:
        return Fact("duplicates", True, "none: every training row is another")
    return Fact("duplicates", True, f"training rows that repeat an earlier one: {train.duplicates} of {train.rows}")


def _apart(held_out: PartReport, overlap: int) -> Fact:
    if not overlap:
        return Fact("evaluation apart", True, "no evaluation row is a training row")
    return Fact(
        "evaluation apart",
        overlap <= TOLERATED_OVERLAP * held_out.rows,
        f"evaluation rows that are training rows: {overlap} of {held_out.rows}",
    )
