"""What a merge came to: `merge.json`, the card, and rows for the screen."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from peftcli import __version__
from peftcli.errors import printable
from peftcli.merging.algebra import SAMPLED_COLUMNS, SAMPLED_ROWS
from peftcli.recipe.redact import redact

if TYPE_CHECKING:
    from peftcli.merging.settings import MergeSettings
    from peftcli.merging.source import Source

REPORT = "merge.json"


@dataclass(frozen=True)
class ParentReport:
    """One of the merged adapters.

    Attributes:
        name: its folder's name.
        sha256: of its weights' file.
        peft_type: its method.
        weight, density: what it was merged with.
    """

    name: str
    sha256: str
    peft_type: str
    weight: float
    density: float | None


@dataclass(frozen=True)
class ModuleReport:
    """One merged module.

    Attributes:
        module: its path in the base.
        rank: of the result.
        norm: of the merged update, before its rank was cut.
        energy: share of the squared norm that the result holds.
        sign_conflicts: share of shared places where adapters pull apart, on a sample; None for one adapter.
        parents: norm of each adapter's update; None where it does not adapt the module.
    """

    module: str
    rank: int
    norm: float
    energy: float
    sign_conflicts: float | None
    parents: list[float | None]


@dataclass(frozen=True)
class MergeReport:
    """A merge.

    Attributes:
        method, space: how it was done.
        parents: the adapters.
        base: the base they name.
        peft_type, r: of the result.
        energy: share of the squared norm kept, all modules together.
        sign_conflicts: mean over the modules that several adapters adapt; None if there are none.
        cosines: between the adapters' updates, all modules together; [] for scales.
        settings: the other settings.
        modules: row by row.
    """

    method: str
    space: str
    parents: list[ParentReport]
    base: str | None
    peft_type: str
    r: int | None
    energy: float
    sign_conflicts: float | None
    cosines: list[list[float]]
    settings: dict[str, Any]
    modules: list[ModuleReport] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        sources: Sequence[Source],
        settings: MergeSettings,
        rows: list[ModuleReport],
        config: Any,
        *,
        cosines: list[list[float]],
    ) -> MergeReport:
        """The report of merged modules."""
        density = settings.density or (None,) * len(sources)
        parents = [
            ParentReport(source.name, source.sha256, source.what, weight, kept)
            for source, weight, kept in zip(sources, settings.weights, density, strict=True)
        ]
        total = sum(row.norm**2 for row in rows)
        conflicts = [row.sign_conflicts for row in rows if row.sign_conflicts is not None]
        rank = settings.rank
        return cls(
            method=settings.method,
            space=settings.space,
            parents=parents,
            base=config.base_model_name_or_path,
            peft_type=config.peft_type,
            r=getattr(config, "r", None),
            energy=sum(row.energy * row.norm**2 for row in rows) / total if total > 0 else 1.0,
            sign_conflicts=sum(conflicts) / len(conflicts) if conflicts else None,
            cosines=cosines,
            settings={
                "majority_sign_method": settings.majority_sign_method,
                "rank": None if rank is None else rank.number or rank.energy,
                "seed": settings.seed,
                "sign_conflict_sample": [SAMPLED_ROWS, SAMPLED_COLUMNS],
            },
            modules=rows,
        )


def write_report(folder: Path, report: MergeReport) -> None:
    """Write `merge.json`."""
    (folder / REPORT).write_text(redact(json.dumps(asdict(report), indent=2, allow_nan=False)) + "\n", encoding="utf-8")


def card(report: MergeReport, name: str) -> str:
    """The model card: parents by hash, and how they were merged. Equal merges give equal text."""
    rows = [
        f"| {_code(parent.name)} | {parent.peft_type} | {parent.weight:g} | {_shown(parent.density)} | `{parent.sha256}` |"
        for parent in report.parents
    ]
    facts = {
        "method": report.method,
        "space": report.space,
        **{key: value for key, value in report.settings.items() if value is not None},
        "energy kept": f"{report.energy:.2%}",
    }
    return redact(
        "\n".join(
            [
                front_matter(report.base, [report.peft_type.lower(), "merge"]),
                f"# {_code(name)}\n",
                f"{len(report.parents)} adapter{'s' if len(report.parents) > 1 else ''} of "
                f"{_code(base_label(report.base))} in one, made by `peft merge`.\n",
                "| adapter | method | weight | density | sha256 of its weights |",
                "|---|---|---|---|---|",
                *rows,
                "\n| | |\n|---|---|",
                *(f"| {key} | {_code(str(value))} |" for key, value in facts.items()),
                f"\n### Framework versions\n\n- peftcli {__version__}\n",
            ]
        )
    )


def front_matter(base: str | None, tags: Sequence[str], library: str = "peft") -> str:
    """A card's YAML; as JSON, so that no name from a file can add a key."""
    values: dict[str, Any] = {"library_name": library}
    if base:
        values["base_model"] = base_label(base)
    values["tags"] = [*tags, "peftcli"]
    return "\n".join(
        [
            "---",
            *(
                f"{key}: {json.dumps(printable(value) if isinstance(value, str) else value)}"
                for key, value in values.items()
            ),
            "---",
            "",
        ]
    )


def base_label(base: str | None) -> str:
    """The base as a card may name it: a hub name, or the last part of a path, which says nothing of the machine."""
    if not base:
        return "an unnamed base"
    return base if re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", base) else PurePath(base.replace("\\", "/")).name


def _code(text: str) -> str:
    """`text` as a code span, in which Markdown reads nothing; a bar would end a table's cell."""
    return "`" + " ".join(printable(text).split()).replace("`", "'").replace("|", "/") + "`"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
