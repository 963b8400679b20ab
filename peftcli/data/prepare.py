"""Data sources to tokenised data sets in the run folder: done once, in the front process, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.data.audit import all_sources, audit
from peftcli.data.encoder import Encoder
from peftcli.data.part import Part
from peftcli.data.part_reader import PartReader, Progress
from peftcli.data.report import DataReport, PartReport, choose_pad, warnings
from peftcli.data.sources import first_rows
from peftcli.data.task_encoders import ENCODERS, TaskEncoder
from peftcli.data.tokens import TokenDataset
from peftcli.errors import InputError, printable
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from peftcli.recipe.schema import DataSection

TRAIN, EVAL, AUDIT = WRITTEN = ("train.safetensors", "eval.safetensors", "audit.json")
"""What `prepare` writes; the second only where there is evaluation data."""


@dataclass(frozen=True)
class Prepared:
    """Tokenised data and what is known about it.

    Args:
        train, eval: the samples.
        report: the audit and all counts.
        cache: what was done with the cache of tokenised data, for people.
    """

    train: TokenDataset
    eval: TokenDataset | None
    report: DataReport
    cache: str = ""

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        """Read what `prepare` wrote."""
        train, held_out, audit = (folder / name for name in WRITTEN)
        return cls(
            TokenDataset.load(train),
            TokenDataset.load(held_out) if held_out.exists() else None,
            DataReport.load(audit),
        )


def prepare(
    data: DataSection,
    tokenizer: Any,
    *,
    folder: Path,
    seed: int,
    task: str = "CAUSAL_LM",
    labels: Sequence[str] | None = None,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Read, check and tokenise everything; write the files of `WRITTEN`.

    Args:
        data: the recipe's section, paths absolute; of a stream only the first rows are looked at.
        tokenizer: a transformers tokenizer with a fast backend.
        folder: an existing folder; nothing is written to it unless all is well.
        seed: decides which samples are held out, and which are taken by a fractional `weight`.
        task: a key of `formats.TASK_FORMATS`: a task type, or `preference`.
        labels: the classes in their order; None: those of the training data.
        vocab_size: rows of the model's embedding; a token beyond them is refused.
        progress: is told how far it got.

    Raises:
        InputError: the first row or file that can't be used as it is, or data of which nothing is left to learn.
    """
    encoder = make_encoder(task, tokenizer, data, labels)
    read = PartReader(data, task, encoder, bool(tokenizer.chat_template), progress).read
    generator = np.random.default_rng(seed)
    train, held_out = read("train", first_rows(data.train) if data.streaming else data.train), None
    if isinstance(data.eval, tuple):
        if encoder.labels:
            encoder.labels.close()
        held_out = read("eval", data.eval)
    elif data.eval is not None:
        train, held_out = train.split(data.eval.split, generator)
    names = settle_classes([part for part in (train, held_out) if part], encoder, tokenizer)
    for part in (train, held_out):
        if part is not None:
            part.repeat_by_weight(generator)
            check_ids(part.dataset, tokenizer, vocab_size)
    prepared = Prepared(
        train.dataset,
        held_out.dataset if held_out else None,
        _report(train, held_out, encoder, tokenizer, names, data.streaming),
    )
    _write(prepared, folder)
    return prepared


def make_encoder(task: str, tokenizer: Any, data: DataSection, labels: Sequence[str] | None) -> Encoder | TaskEncoder:
    """The encoder of a task, a key of `formats.TASK_FORMATS`."""
    if task == "CAUSAL_LM":
        return Encoder(tokenizer, data.loss_on)
    return ENCODERS[task](tokenizer, labels, data.loss_on)


def settle_classes(parts: list[Part], encoder: Encoder | TaskEncoder, tokenizer: Any) -> list[str] | None:
    """Bring the classes into their final order, and return their names."""
    for part in parts:
        if "token_type_ids" not in tokenizer.model_input_names:
            part.dataset.segment = None
    if encoder.labels is None:
        return None
    names, final = encoder.labels.settle()
    for dataset in (part.dataset for part in parts):
        if dataset.targets is not None:
            dataset.targets = final[dataset.targets]
        if dataset.tags is not None:
            dataset.tags = final[dataset.tags].astype(np.int32)
    return names


def check_ids(dataset: TokenDataset, tokenizer: Any, vocab_size: int | None) -> None:
    """Raises:
    InputError: a token the model has no embedding for.
    """
    highest = int(dataset.input_ids.max())
    if vocab_size is not None and highest >= vocab_size:
        raise InputError(
            f"the data holds the token {printable(tokenizer.convert_ids_to_tokens(highest))!r} with id {highest}, but "
            f"the model embeds only {vocab_size} tokens",
            field="model.name_or_path",
            fix="use the tokenizer the model was trained with, or leave the token out of the data",
        )


def _report(
    train: Part,
    held_out: Part | None,
    encoder: Encoder | TaskEncoder,
    tokenizer: Any,
    labels: list[str] | None,
    streamed: bool,
) -> DataReport:
    pad_token_id = choose_pad(tokenizer)
    known = set(train.digests)
    overlap = sum(digest in known for digest in held_out.digests) if held_out else 0
    told, told_held_out = PartReport.of(train), PartReport.of(held_out) if held_out else None
    return DataReport(
        train=told,
        eval=told_held_out,
        overlap=overlap,
        labels=labels,
        pad_token_id=pad_token_id,
        audit=audit(encoder.notes, tokenizer, pad_token_id, told, told_held_out, overlap),
        streamed=streamed,
        warnings=list(warnings(encoder.notes, all_sources(told, told_held_out))),
    )


def _write(prepared: Prepared, folder: Path) -> None:
    prepared.train.save(folder / TRAIN)
    (folder / EVAL).unlink(missing_ok=True)  # of an earlier run that this one overwrites
    if prepared.eval is not None:
        prepared.eval.save(folder / EVAL)
    prepared.report.save(folder / AUDIT)
