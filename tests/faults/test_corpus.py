"""The shared corpus of hostile and broken files, judged by its own script: real processes, within their time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftcli.cli import main

OLD_MATHS_IS_KNOWN = {"oft_old_format"}
"""To be refused or read with the old equation, says its note; we do the latter."""
LOADED_RIGHT = {"c_init_pissa"}
"""Files can't say what the adapter started from; with the base at hand the start is computed and taken out of it."""


def judge(corpus: Path, report: Path, *arguments: str) -> list[str]:
    """What the script has against us."""
    command = [sys.executable, str(corpus / "run_corpus.py"), "--jobs", "1", "--json", str(report), *arguments]
    subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    results = json.loads(report.read_text())
    assert results
    return [
        f"{result['id']}: {result['bad']} {result['cmd']}"
        for result in results
        if result["bad"] and result["id"] not in OLD_MATHS_IS_KNOWN
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_corpus_as_its_script_judges_it(shared: Path, tmp_path: Path) -> None:
    corpus = shared / "corpus"
    peft = f"{sys.executable} -m peftcli"
    good = corpus / "bases" / "good_base"
    wrong = judge(corpus, tmp_path / "report.json", "--kind", "recipe", "--recipe", f"{peft} train --check {{path}}")
    look = ["--adapter", f"{peft} inspect --base {good} {{path}}"]
    merge = ["--merge", f"{peft} merge --base {{base}} -o {{tmp}}/m {{path}}"]
    wrong += judge(corpus, tmp_path / "report.json", "--kind", "adapter", *look, *merge)
    wrong += judge(corpus, tmp_path / "report.json", "--train", f"{peft} train --dry-run {{recipe}}")
    assert not wrong


@pytest.mark.filterwarnings("ignore::UserWarning")  # adapters may deserve one; here it is about the verdict
def test_adapters_are_judged_alike_by_merge_export_and_loading(shared: Path, tmp_path: Path, capsys) -> None:
    """In this process, so that it is quick: what `inspect` refuses, nothing else takes."""
    from peftcli import PeftModel
    from peftcli.errors import InputError
    from peftcli.recipe.schema import ModelSection
    from peftcli.training.model import load_base

    corpus = shared / "corpus"
    base = corpus / "bases" / "good_base"
    rows = [row for row in json.loads((corpus / "index.json").read_text()) if row["kind"] == "adapter"]
    wrong = {}
    for row in rows:
        path, must = corpus / row["path"], row["must"]
        if row["id"] in OLD_MATHS_IS_KNOWN or must == "either" or row["cls"] in ("terminal", "card"):
            continue
        verdicts = {
            name: main([*command, "-o", str(tmp_path / f"{name}-{row['id']}"), "--base", str(base)])
            for name, command in {
                "merge": ["merge", str(path)],
                "export": ["export", str(path), "--to", "merged"],
            }.items()
        }
        try:
            PeftModel.from_pretrained(load_base(ModelSection(name_or_path=str(base))), path, allow_pickle=True)
            verdicts["load"] = 0
        except InputError:
            verdicts["load"] = 2
        if must == "reject":
            wrong.update({(row["id"], name): code for name, code in verdicts.items() if code != 2})
            if row["id"] in LOADED_RIGHT:
                del wrong[row["id"], "load"]
        elif verdicts["load"] or verdicts["merge"]:
            wrong[row["id"], "refused"] = verdicts
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert not wrong
