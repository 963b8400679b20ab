"""Run by torchrun in side_by_side.py: several runs of the worker, one after another, in two processes that import once."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from peftcli.errors import PeftCliError
from peftcli.training import worker


def main(folder: Path) -> None:
    """Run every folder that `folder/runs.json` lists; errors go to `<run>/error.txt`."""
    Accelerator.end_training = lambda self: None  # it would end the connection that the next run needs
    for name, resume in json.loads((folder / "runs.json").read_text()):
        try:
            with contextlib.redirect_stdout(io.StringIO()) as screen:
                worker.run(folder / name, resume=resume)
        except PeftCliError as error:
            (folder / name / "error.txt").write_text(str(error))
        if screen.getvalue():
            (folder / name / "screen.txt").write_text(screen.getvalue())
        torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    worker.leave(0)
