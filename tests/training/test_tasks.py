"""Every task, from a user's file to a verified adapter: learnable data are learnt, resumed runs are the same runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tasks import TASKS, make_run

from peftcli.cli import main
from peftcli.training.callbacks import read_log


@pytest.mark.parametrize("name", TASKS)
def test_learnable_data_are_learnt(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_run(name, tmp_path)
    assert main(["train", str(recipe), "--no-audit"]) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "run/result.json").read_text())
    losses = [row["loss"] for row in read_log(tmp_path / "run/log.jsonl") if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    metric = TASKS[name].metric
    assert result["metrics"][metric] > 0.7
    assert result["difference"] < 1e-5
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert config["task_type"] == (name if name.isupper() else "CAUSAL_LM")
