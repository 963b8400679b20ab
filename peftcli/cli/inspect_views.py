"""How `peft inspect` looks: blocks of facts and tables, each cut where it would run over the screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peftcli.cli import console
from peftcli.errors import printable

MAX_ROWS = 100
MAX_PROBLEMS = 30


def show(summary: dict[str, Any]) -> None:
    """An adapter, a model, a file of tensors or a recipe."""
    title = f"{summary['kind']} {summary['path']}"
    views = {"adapter": _adapter, "model": _model, "tensors": _file, "recipe": lambda recipe: recipe["lines"]}
    lines = views[summary["kind"]](summary)
    console.facts(printable(title), [(name, printable(value)) for name, value in lines.items() if value])
    if summary.get("targets"):
        _rows(
            "adapted modules",
            summary["targets"],
            ("module", "kind", "count", "in", "out", "r", "scaling", "parameters"),
        )
    if "rows" in summary:
        _rows("tensors", summary["rows"], ("name", "dtype", "shape", "bytes"))
    if "norms" in summary:
        _rows("norms", [_norms(row) for row in summary["norms"]], ("module", "update", "tensors"))
    if "svd" in summary:
        _rows(
            "singular values of the updates",
            summary["svd"],
            ("module", "r", "norm", "largest", "effective_rank", "rank_99"),
        )
    for doubt in summary.get("doubts", [])[:MAX_PROBLEMS]:
        console.say(f"warning: {printable(doubt, 600)}", style="yellow")


def show_check(result: dict[str, Any]) -> None:
    """The problems, then what other programs make of the adapter."""
    for problem in result["problems"][:MAX_PROBLEMS]:
        console.say(f"problem: {printable(problem, 600)}", style="red")
    if len(result["problems"]) > MAX_PROBLEMS:
        console.say(f"... and {len(result['problems']) - MAX_PROBLEMS} more")
    if result["consumers"]:
        console.facts("in other programs", result["consumers"].items())
    if not result["problems"]:
        console.say("no problems found", style="green")


def show_diff(diff: dict[str, Any]) -> None:
    """Fields, then tensors."""
    console.say(printable(" -> ".join(diff["paths"]), 600), style="bold")
    for name, (first, second) in diff["config"].items():
        console.say(f"  {printable(name)}: {printable(first)} -> {printable(second)}")
    for title, key in (("only in the first", "only_first"), ("only in the second", "only_second")):
        for name in _cut(diff[key]):
            console.say(f"  {title}: {printable(name)}")
    if diff["tensors"]:
        _rows(
            "tensors that differ",
            [_change(row) for row in diff["tensors"]],
            ("name", "shape", "dtype", "change", "cosine"),
        )
    console.say(f"{diff['equal']} tensors equal, {len(diff['tensors'])} differ")


def _adapter(summary: dict[str, Any]) -> dict[str, Any]:
    full = summary["trained_in_full"]
    return {
        "method": summary["method"],
        "base": _base(summary["base"]),
        "task": summary["task_type"],
        "rank": _rank(summary),
        "options": ", ".join(f"{name} {value}" for name, value in summary["options"].items()),
        "targets": _targets(summary["target_modules"]),
        "adapted": f"{summary['modules']} modules in {summary['layers']} layers" if summary["modules"] else None,
        "in full": f"{len(full)} tensors: {', '.join(full[:5])}" if full else None,
        **_file(summary),
        "training": _training(summary["training"]),
    }


def _model(summary: dict[str, Any]) -> dict[str, Any]:
    classes = summary["architectures"]
    return {
        "model": summary["model_type"],
        "class": ", ".join(map(str, classes)) if isinstance(classes, list) else None,
        "trained": f"in full, from {summary['base']}" if summary["base"] else None,
        **_file(summary),
        "training": _training(summary["training"]),
    }


def _targets(targets: list[str] | str | None) -> str | None:
    """Names as given, or, where whole paths are given, their last parts."""
    if not isinstance(targets, list):
        return targets
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    return ", ".join(leaves) + (f" ({len(targets)} paths)" if len(leaves) < len(targets) else "")


def _base(base: dict[str, Any]) -> str:
    revision = f" at {base['revision']}" if base["revision"] else ""
    known = (
        f", {base['model_type']}, found in {base['folder']}"
        if base["folder"]
        else ", not found as a folder or in the hub's cache"
    )
    return f"{base['name']}{revision}{known}" if base["name"] else "not named" + (known if base["folder"] else "")


def _rank(summary: dict[str, Any]) -> str | None:
    """`r 8, lora_alpha 16, scaling 2`, with what patterns make of it."""
    if summary["r"] is None:
        return None
    alpha = f", lora_alpha {summary['lora_alpha']:g}" if summary["lora_alpha"] is not None else ""
    scaling = summary["scaling"]
    shown = f"{scaling[0]:.6g}" if len(scaling) == 1 else f"{scaling[0]:.6g} to {scaling[-1]:.6g}" if scaling else "?"
    ranks = sorted({row["r"] for row in summary["targets"] if row["r"] is not None} - {summary["r"]})
    others = f" (by rank_pattern also r {', '.join(map(str, ranks))})" if ranks else ""
    return f"r {summary['r']}{alpha}, scaling {shown}{others}"


def _file(summary: dict[str, Any]) -> dict[str, Any]:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in summary["dtypes"].items())
    return {
        "parameters": f"{summary['parameters']:,}",
        "file": f"{summary['file']}, {console.size(summary['bytes'])}, {summary['tensors']:,} tensors ({dtypes})",
        "metadata": ", ".join(f"{name}: {value}" for name, value in summary["metadata"].items() if name != "format"),
    }


def _training(facts: dict[str, Any]) -> str | None:
    parts = [
        f"{name} {facts[name]}" for name in ("step", "epoch", "tokens", "best_step") if facts.get(name) is not None
    ]
    for name in ("loss", "eval_loss"):
        if name in facts:
            parts.append(f"{name} " + " -> ".join(dict.fromkeys(f"{value:.4g}" for value in facts[name])))
    if "unreadable" in facts:
        parts.append(facts["unreadable"])
    return ", ".join(parts) or None


def _norms(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "tensors": ", ".join(f"{name} {norm:.4g}" for name, norm in row["tensors"].items())}


def _change(row: dict[str, Any]) -> dict[str, Any]:
    pairs = {
        "shape": " -> ".join(dict.fromkeys(map(str, row["shapes"]))),
        "dtype": " -> ".join(dict.fromkeys(row["dtypes"])),
    }
    return {"change": None, "cosine": None, **row, **pairs}


def _rows(title: str, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """A titled table of the first rows."""
    console.say(title, style="bold")
    console.table(columns, [[_cell(row[name]) for name in columns] for row in rows[:MAX_ROWS]])
    if len(rows) > MAX_ROWS:
        console.say(f"... and {len(rows) - MAX_ROWS:,} more; --json lists all")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _cut(names: list[str]) -> Iterable[str]:
    return names if len(names) <= MAX_ROWS else [*names[:MAX_ROWS], f"... and {len(names) - MAX_ROWS:,} more"]
