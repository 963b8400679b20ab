"""Run the benchmarks and write RESULTS.md with its picture: `python -m benchmarks.run --rival .venv-rival/bin/python`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import gradients, merging, serving, startup, training
from benchmarks.harness import Machine, run_all, verdict
from benchmarks.results import write

SUBJECTS = [*training.SUBJECTS, *gradients.SUBJECTS, *serving.SUBJECTS, *merging.SUBJECTS, *startup.SUBJECTS]
"""Every subject's rows. A new file of benchmarks is added here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rival", type=Path, required=True, help="Python of a venv with peft and transformers")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="folder for models and runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--quick", action="store_true", help="only the rows that matter most")
    parser.add_argument("--only", help="subjects whose title contains this")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where RESULTS.md goes")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    machine = Machine(options.work.resolve(), options.rival.absolute(), options.threads)
    subjects = [s for s in SUBJECTS if (options.only or "").lower() in s.title.lower()]
    measured = list(run_all(subjects, machine, repeats=options.repeats, quick=options.quick))
    runs = [
        {"subject": subject.title, "side": command.side, "arguments": command.arguments, "runs": found}
        for subject, results in measured
        for command, found in results.items()
    ]
    (options.work / "runs.json").write_text(json.dumps(runs, indent=1))
    tables = [(s, [v for row in s.rows if (v := verdict(row, results))]) for s, results in measured]
    write(tables, options.output, machine, repeats=options.repeats)


if __name__ == "__main__":
    main()
