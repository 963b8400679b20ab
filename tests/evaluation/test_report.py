"""Reports of an evaluation: what is in them, and that nothing that comes from data is obeyed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from peftcli.cli import eval_screens
from peftcli.errors import InputError
from peftcli.evaluation.comparison import Comparison, Item, make_row
from peftcli.evaluation.estimates import mean
from peftcli.evaluation.metrics import METRICS
from peftcli.report.evaluation import write_report
from peftcli.report.folder import require_usable

EVIL = "<script>alert(1)</script>\n```\n# title | cell\n\x1b[31m\u202e</pre><img src=x onerror=alert(2)>"


def item(number: int, base: float, tuned: float) -> Item:
    return Item(
        sample=number,
        prompt=EVIL,
        question=f"question {number} {EVIL}",
        expected=[EVIL],
        answers={"base": EVIL, "a": f"{EVIL} a", "b$1": "b"},
        scores={"base": {"exact_match": base}, "a": {"exact_match": tuned}, "b$1": {"exact_match": base}},
        writing={"base": {}, "a": {}, "b$1": {}},
    )


@pytest.fixture
def comparison() -> Comparison:
    base, tuned = [1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0, 1.0]
    metric = METRICS["exact_match"]
    rows = [make_row("exact_match", metric, {"base": mean(base), "a": mean(tuned), "b$1": mean(base)})]
    losses = {name: np.arange(5) / 7 + shift for name, shift in (("base", 2.0), ("a", 1.0), ("b$1", 0.0))}
    items = [item(number, *pair) for number, pair in enumerate(zip(base, tuned, strict=True))]
    return Comparison(("a", "b$1"), rows, items, losses, ["a <note>"])


@pytest.fixture
def results(comparison: Comparison) -> dict:
    facts = {"base": "org/<b>ase", "adapters": {"a": "out/a|b", "b$1": "out/b"}, "data": "file.jsonl", "samples": 5}
    return {**facts, **comparison.to_dict()}


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_html_is_one_file_and_obeys_nothing(comparison: Comparison, results: dict, tmp_path: Path) -> None:
    page = write_report(tmp_path / "new" / "report", comparison, results, {"exact_match": METRICS["exact_match"]})
    text = page.read_text(encoding="utf-8")
    tags = Tags(text)
    assert not {"script", "iframe", "link"} & {tag for tag, _ in tags.seen}
    images = [attributes for tag, attributes in tags.seen if tag == "img"]
    assert len(images) == 2 and all((image["src"] or "").startswith("data:image/png;base64,") for image in images)
    assert not any(name.startswith("on") for _, attributes in tags.seen for name in attributes)
    assert "alert(1)" in tags.text and "org/<b>ase" in tags.text
    assert "\x1b" not in text and "\u202e" not in text
    for shown in (
        "0.4000",
        "0.8000",
        "+0.4000 ±",
        "The base had right and a has wrong: 1 (the other way: 3)",
        "a <note>",
    ):
        assert shown in tags.text, shown


def test_markdown_keeps_foreign_text_in_code(comparison: Comparison, results: dict, tmp_path: Path) -> None:
    write_report(tmp_path, comparison, results, {"exact_match": METRICS["exact_match"]})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        if re.search(r"<script|```|onerror|# title", line):
            assert line.startswith("    "), line
    assert "out/a\\|b" in text and "| exact\\_match | 5 |" in text
    for name in re.findall(r"!\[\w+\]\(([^)]+)\)", text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    beside = numbers["metrics"][0]["adapters"]["a"]
    [between] = numbers["metrics"][0]["between"]
    assert between["adapters"] == ["a", "b$1"] and (between["gained"], between["lost"]) == (3, 1)
    assert (beside["delta"], beside["gained"], beside["lost"], beside["p"]) == (pytest.approx(0.4), 3, 1, 0.625)


def test_equal_results_give_equal_reports(comparison: Comparison, results: dict, tmp_path: Path) -> None:
    for name in "xy":
        write_report(tmp_path / name, comparison, results, {"exact_match": METRICS["exact_match"]})
    for path in (tmp_path / "x").iterdir():
        assert path.read_bytes() == (tmp_path / "y" / path.name).read_bytes()


def test_only_a_reports_own_folder_is_written_to(comparison: Comparison, results: dict, tmp_path: Path) -> None:
    write_report(tmp_path, comparison, results, {"exact_match": METRICS["exact_match"]})
    require_usable(tmp_path)
    without = Comparison(comparison.columns, comparison.rows, comparison.items)
    write_report(tmp_path, without, results, {"exact_match": METRICS["exact_match"]})
    assert not (tmp_path / "losses.png").exists(), "a picture of an earlier report would be taken for this one's"
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match=r"mine\.txt is no part of a report"):
        require_usable(tmp_path)


def test_the_screen_shows_every_adapter_and_no_control_characters(comparison: Comparison, capsys) -> None:
    eval_screens.show(comparison)
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["metric", "n", "base", "a", "b$1"] in lines
    assert ["exact_match", "5", "0.4000", "0.8000", "0.4000"] in lines
    assert ["p", "0.6250", "1.0000"] in lines
    assert ["exact_match", "a", "-", "b$1", "+0.4000", "±", "0.4000", "0.6250"] in lines
    assert "a has wrong: 1 (the other way: 3)" in shown
    assert "\x1b" not in shown and "\u202e" not in shown
