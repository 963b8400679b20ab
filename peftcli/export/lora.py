"""Adapters as adapters: a clean copy, any update as LoRA, and the plain LoRA that every program reads."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli import __version__
from peftcli.adapters.audit import WEIGHTS_NAME
from peftcli.adapters.config import CONFIG_NAME
from peftcli.errors import InputError, InputErrors, printable
from peftcli.export.merged import KINDS, TOKENIZER_FILES
from peftcli.lazy import numpy, torch
from peftcli.merging.algebra import Compressed, LowRank, Rank, compress
from peftcli.merging.base_weights import BaseWeights
from peftcli.merging.copies import copy_fields
from peftcli.merging.lora_file import copy_key, lora_config, module_tensors, write_config
from peftcli.merging.output import new_folder, require_free
from peftcli.merging.report import base_label, front_matter
from peftcli.merging.source import Source
from peftcli.merging.tensors import TensorWriter

CARD = "README.md"
NEGLIGIBLE = 1e-9
"""Lost energy that is rounding."""


@dataclass(frozen=True)
class Exported:
    """An adapter that was written.

    Attributes:
        modules: how many it adapts.
        ranks: the smallest and largest rank; None where there is none.
        energy: share of the updates' squared norm it holds, all modules together.
        is_exact: whether it is the same update, rounding apart.
    """

    modules: int
    ranks: tuple[int, int] | None
    energy: float
    is_exact: bool


def export_peft(adapter: Path, output: Path, *, overwrite: bool = False) -> Exported:
    """A clean copy: safetensors, keys and config as PEFT writes them, tokenizer and card; nothing else.

    Raises:
        InputErrors: what is wrong with the adapter.
    """
    require_free(output, inputs=[adapter], overwrite=overwrite)
    source = Source(adapter)
    with new_folder(output, inputs=[adapter], overwrite=overwrite, size=2 * source.audit.file.size) as folder:
        with TensorWriter(folder / WEIGHTS_NAME) as writer:
            for _, info in sorted(source.audit.file.tensors.items()):
                writer.copy(info, source.audit.file.path)
        write_config(folder, source.config)
        _copy_beside(adapter, folder, card=True)
    return Exported(len(source.paths), None, 1.0, True)


def export_lora(
    adapter: Path,
    output: Path,
    *,
    portable: bool,
    rank: Rank | None = None,
    base: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Any adapter with an update as LoRA whose scaling is 1.

    Args:
        adapter: its folder.
        output: the folder to write.
        portable: one rank for all modules, filled up with zeros, and nothing beside A and B, so that PEFT from 0.13.0,
            vLLM, SGLang and llama.cpp all read it and mean the same.
        rank: cut the update to it; by default products stay exact, and other updates get their method's rank.
        base: the base model's folder, for methods whose update depends on it.
        dtype: of the tensors; float32 by default.
        overwrite: replace an earlier result.

    Raises:
        InputErrors: naming what LoRA, or portable LoRA, can't hold.
    """
    inputs = [adapter, *([base] if base else [])]
    require_free(output, inputs=inputs, overwrite=overwrite)
    if dtype is not None and dtype not in KINDS:
        raise InputError(f"{dtype!r} is no dtype to write", field="--dtype", allowed=", ".join(KINDS))
    source = Source(adapter, BaseWeights(base) if base else None)
    _refuse(source, portable=portable)
    factors, energy, is_exact = _factors(source, rank)
    ranks = {module: max(pair.rank for pair in pairs) for module, pairs in factors.items()}
    if portable:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    size = 8 * sum(pair.a.size + pair.b.size for pairs in factors.values() for pair in pairs)
    with new_folder(output, inputs=inputs, overwrite=overwrite, size=size) as folder:
        with TensorWriter(folder / WEIGHTS_NAME) as writer:
            for module, pairs in factors.items():
                shape = source.adapter(module).shape
                for key, tensor in module_tensors(shape, pairs, ranks[module], factors).items():
                    writer.add(key, tensor if dtype is None else torch.from_numpy(tensor).to(getattr(torch, dtype)))
            for name, info in sorted(source.copies.items()):
                writer.add(copy_key(name, factors), source.read(info))
        fields: dict[str, Any] = copy_fields([source])
        write_config(folder, lora_config([source.config], ranks, **fields))
        _copy_beside(adapter, folder, card=False)
        (folder / CARD).write_text(_card(source, output.resolve().name), encoding="utf-8")
    return Exported(len(factors), (min(ranks.values()), max(ranks.values())), energy, is_exact)


def plain_factors(source: Source, rank: Rank | None) -> tuple[dict[str, LowRank], float, bool]:
    """`_factors` of an adapter that is nothing but updates of matrices, as other programs than PEFT want it."""
    _refuse(source, portable=True)
    factors, energy, is_exact = _factors(source, rank)
    return {module: pairs[0] for module, pairs in factors.items()}, energy, is_exact


def _factors(source: Source, rank: Rank | None) -> tuple[dict[str, list[LowRank]], float, bool]:
    """Each module's update as a product (of fused experts one each), the share of the squared norm they hold, and whether
    that is all of it."""
    factors: dict[str, list[LowRank]] = {}
    kept = total = 0.0
    generator = numpy.random.default_rng(0)
    for module in source.paths:
        factors[module] = []
        for update in source.updates(module):
            if isinstance(update, LowRank) and rank is None:
                made = Compressed(update, 1.0, update.norm())
            else:
                made = compress(update, rank or Rank(number=update.rank), generator)
            factors[module].append(made.factors)
            kept, total = kept + made.energy * made.norm**2, total + made.norm**2
    if not factors:
        raise InputError("adapts no module", place=source.folder)
    energy = kept / total if total > 0 else 1.0
    return factors, energy, energy > 1 - NEGLIGIBLE


def _refuse(source: Source, *, portable: bool) -> None:
    """What is no update of a weight matrix, by name."""
    if source.part is None:
        kind = "a prompt" if source.config.is_prompt_learning else "a gate over adapters"
        raise InputError(f"{source.what} is {kind}, which LoRA can't hold", place=source.folder)
    problems = [
        f"{printable(module)} has trainable tokens, which are rows and no update"
        for part in source.companions
        for module in part.modules
    ]
    if portable:
        problems += [f"{printable(name)} is trained in full" for name in source.copies]
        if getattr(source.config, "layer_replication", None):
            problems.append("layer_replication: no other program knows it")
        problems += [
            f"{printable(module)} is a parameter of fused experts, which few programs read"
            for module in source.paths
            if source.adapter(module).shape.kind == "parameter"
        ]
    fix = "merge it into the base: peft export --to merged"
    if problems:
        raise InputErrors(InputError(problem, place=source.folder, fix=fix) for problem in problems)


def _copy_beside(source: Path, folder: Path, *, card: bool) -> None:
    """The tokenizer an adapter was trained with, and its card if it still fits."""
    for path in sorted(source.iterdir()):
        wanted = re.fullmatch(TOKENIZER_FILES, path.name) or (card and path.name == CARD)
        if wanted and path.is_file():
            shutil.copyfile(path, folder / path.name)


def _card(source: Source, name: str) -> str:
    base = source.config.base_model_name_or_path
    return "\n".join(
        [
            front_matter(base, ["lora"]),
            f"# `{printable(name).replace('`', '')}`\n",
            f"LoRA for `{printable(base_label(base)).replace('`', '')}`, made by `peft export` from a {source.what} adapter:",
            f"{CONFIG_NAME} and weights of sha256 `{source.sha256}`.\n",
            f"### Framework versions\n\n- peftcli {__version__}\n",
        ]
    )
