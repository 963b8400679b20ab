"""What a command costs before it does anything: `peft --help`, `inspect`, `train --check`. None of them imports torch."""

from __future__ import annotations

from benchmarks.harness import REPOSITORY, Command, Row, Subject
from benchmarks.merging import prepare


def _command(*arguments: str) -> Command:
    return Command("ours", ("-m", "peftcli", *arguments))


SUBJECTS = [
    Subject(
        "Start-up",
        [
            Row("peft --help (CPU s)", "cpu", _command("--help"), None, 0.15, "less", quick=True),
            Row(
                "peft inspect ADAPTER (CPU s)",
                "cpu",
                _command("inspect", "{work}/middle-adapter"),
                None,
                0.25,
                "less",
                True,
            ),
            Row(
                "peft train RECIPE --check (CPU s)",
                *("cpu", _command("train", str(REPOSITORY / "recipes/quickstart.yaml"), "--check")),
                *(None, 0.4, "less", True),
            ),
        ],
        prepare,
    )
]
