"""The report of `peft eval`: a Markdown page with its pictures, one HTML file with everything in it, and the numbers.

Whatever comes from data or from models is shown, never obeyed: as text of code blocks in Markdown, escaped in HTML.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli import __version__
from peftcli.errors import printable
from peftcli.files import write_atomically
from peftcli.recipe.redact import redact
from peftcli.report.evaluation_plots import plot_losses, plot_metrics
from peftcli.report.folder import FILES, write_json
from peftcli.report.markdown import inline
from peftcli.report.numbers import difference, number, p_value, pairs

if TYPE_CHECKING:
    from peftcli.evaluation.comparison import Comparison, Item, Row
    from peftcli.evaluation.metrics import Metric

MAX_LOST, MAX_SAMPLES = 50, 20
MAX_TEXT = 4000  # characters of one text

EXPLANATION = (
    "± is one standard error. p is how often chance alone would make a difference at least as large: by the exact sign "
    "test (McNemar's) where answers are right or wrong, by the paired t test elsewhere; both two-sided and not corrected "
    "for the number of comparisons."
)

PAIRS = ("metric", "adapters", "difference", "p")

Cell = tuple[str, str]
"""A text, and the class it has in HTML."""


def write_report(folder: Path, comparison: Comparison, results: dict[str, Any], metrics: Mapping[str, Metric]) -> Path:
    """Write `report.html`, `report.md`, its pictures and `results.json`.

    Args:
        folder: as `folder.require_usable` allows it; made if it is not there.
        comparison: what was found.
        results: what goes into `results.json`; its facts head the pages.
        metrics: by name, for what they mean.

    Returns:
        the HTML file.
    """
    pictures = {"metrics.png": plot_metrics(comparison.rows)} if comparison.rows else {}
    if comparison.losses:
        pictures["losses.png"] = plot_losses(comparison.losses)
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(FILES) - set(pictures):
        (folder / name).unlink(missing_ok=True)  # of an earlier report
    for name, picture in pictures.items():
        write_atomically(folder / name, picture)
    write_json(folder / "results.json", results)
    facts = list(_facts(results))
    write_atomically(folder / "report.md", "\n".join(_markdown(comparison, facts, metrics, pictures)) + "\n")
    write_atomically(folder / "report.html", "\n".join(_html(comparison, facts, metrics, pictures)) + "\n")
    return folder / "report.html"


def _facts(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "base", _safe(results["base"])
    for column, adapter in results["adapters"].items():
        yield column, _safe(adapter)
    if results["samples"]:
        yield "data", f"{_safe(results['data'])}, {results['samples']:,} samples"
    for note in results["notes"]:
        yield "note", _safe(note)


def _table(comparison: Comparison) -> Iterator[tuple[Row, list[Cell]]]:
    """Each metric with its cells: n, base, then value and difference of each adapter."""
    for row in comparison.rows:
        cells = [(str(row.count), ""), (f"{number(row.base.value)} ± {number(row.base.standard_error)}", "")]
        for column, estimate in row.adapters.items():
            p, delta = row.test(column).p, row.delta(column).value
            better = (delta > 0) == row.higher_is_better and delta != 0
            verdict = ("better" if better else "worse") if p < 0.05 else ""
            cells += [(number(estimate.value), ""), (difference(row.delta(column)), verdict), (p_value(p), "")]
        yield row, cells


def _header(comparison: Comparison) -> list[str]:
    return ["metric", "n", "base", *(cell for name in comparison.columns for cell in (_safe(name), "difference", "p"))]


def _sections(comparison: Comparison) -> Iterator[tuple[str, list[Item], list[str]]]:
    """Title, items, and whose answers are shown."""
    for column in comparison.columns:
        lost, gained = comparison.lost(column), comparison.gained(column)
        if lost:
            title = f"The base had right and {_safe(column)} has wrong: {len(lost)} (the other way: {len(gained)})"
            yield title, lost[:MAX_LOST], ["base", column]
    if comparison.items:
        shown = comparison.items[:MAX_SAMPLES]
        yield f"Samples: {len(shown)} of {len(comparison.items)}", shown, ["base", *comparison.columns]


def _texts(item: Item, columns: list[str]) -> Iterator[tuple[str, str, str]]:
    """Label, text and, of answers, their scores."""
    yield "question", _safe(item.question), ""
    yield "expected", _safe("\n".join(item.expected)), ""
    for column in columns:
        scores = ", ".join(f"{name} {value:.3g}" for name, value in item.scores[column].items())
        yield _safe(column), _safe(item.answers[column]), scores


def _safe(text: str) -> str:
    return printable(redact(text), MAX_TEXT)


# -- Markdown -------------------------------------------------------------------------------------------------------


def _markdown(
    comparison: Comparison, facts: list[tuple[str, str]], metrics: Mapping[str, Metric], pictures: Mapping[str, bytes]
) -> Iterator[str]:
    yield "# Evaluation\n"
    yield from (f"- {inline(name)}: {inline(value)}" for name, value in facts)
    yield ""
    header = _header(comparison)
    yield "| " + " | ".join(map(inline, header)) + " |"
    yield "|---|" + "---:|" * (len(header) - 1)
    for row, cells in _table(comparison):
        yield f"| {inline(row.metric)} | " + " | ".join(text for text, _ in cells) + " |"
    yield f"\n{EXPLANATION}\n"
    if len(comparison.columns) > 1:
        yield "| " + " | ".join(PAIRS) + " |\n|---|---|---:|---:|"
        yield from ("| " + " | ".join(map(inline, cells)) + " |" for cells in pairs(comparison.rows))
        yield ""
    yield from (f"- {name}: {inline(metric.meaning)}" for name, metric in metrics.items())
    for name in pictures:
        yield f"\n![{name.removesuffix('.png')}]({name})"
    for title, items, columns in _sections(comparison):
        yield f"\n## {inline(title)}\n"
        for item in items:
            for label, text, scores in _texts(item, columns):
                yield f"**{inline(label)}** {scores}\n"
                yield "\n".join(f"    {line}" for line in text.splitlines() or [""]) + "\n"
            yield "---\n"


# -- HTML -----------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; } dt { color: #666; } dd { margin: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #888; }
td { font-variant-numeric: tabular-nums; } .better { color: #1a7f37; } .worse { color: #c62828; }
img { max-width: 100%; } small, .scores { color: #666; }
.item { border: 1px solid #ddd; border-radius: 6px; padding: .6rem 1rem; margin: .8rem 0; display: grid;
  grid-template-columns: max-content minmax(0, 1fr); gap: .3rem 1.2rem; }
.item b { color: #666; font-weight: 500; }
pre { margin: 0; font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #ddd; } img { background: #fff; }
  th, td, .item { border-color: #444; } .better { color: #57c26f; } .worse { color: #ff7b72; } }
"""


def _html(
    comparison: Comparison, facts: list[tuple[str, str]], metrics: Mapping[str, Metric], pictures: Mapping[str, bytes]
) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is fetched, nothing runs
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield f"<title>Evaluation</title><style>{STYLE}</style></head><body>\n<h1>Evaluation</h1>"
    yield "<dl>" + "".join(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in facts) + "</dl>"
    yield '<div class="wide"><table><thead><tr>' + "".join(f"<th>{_e(name)}</th>" for name in _header(comparison))
    yield "</tr></thead><tbody>"
    for row, cells in _table(comparison):
        numbers = "".join(f'<td class="{kind}">{_e(text)}</td>' for text, kind in cells)
        yield f"<tr><td>{_e(row.metric)}</td>{numbers}</tr>"
    yield f"</tbody></table></div>\n<small>{_e(EXPLANATION)} Coloured: p below 0.05.</small>"
    if len(comparison.columns) > 1:
        yield "<details open><summary>Between the adapters</summary><div class=wide><table><thead><tr>"
        yield "".join(f"<th>{_e(name)}</th>" for name in PAIRS) + "</tr></thead><tbody>"
        for line in pairs(comparison.rows):
            yield "<tr>" + "".join(f"<td>{_e(_safe(cell))}</td>" for cell in line) + "</tr>"
        yield "</tbody></table></div></details>"
    meanings = "".join(f"<dt>{_e(name)}</dt><dd>{_e(metric.meaning)}</dd>" for name, metric in metrics.items())
    yield f"<details><summary><small>What the metrics mean</small></summary><dl>{meanings}</dl></details>"
    for name, picture in pictures.items():
        yield f'<p><img alt="{_e(name)}" src="data:image/png;base64,{base64.b64encode(picture).decode("ascii")}"></p>'
    for title, items, columns in _sections(comparison):
        yield f"<h2>{_e(title)}</h2>"
        for item in items:
            texts = "".join(
                f'<b>{_e(label)}</b><div><pre>{_e(text)}</pre><span class="scores">{_e(scores)}</span></div>'
                for label, text, scores in _texts(item, columns)
            )
            yield f'<div class="item">{texts}</div>'
    yield f"<p><small>peftcli {_e(__version__)}</small></p></body></html>"


def _e(text: str) -> str:
    return html.escape(text, quote=True)
