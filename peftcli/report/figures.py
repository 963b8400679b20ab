"""Figures of our own, not pyplot's: no window system, no state shared with the caller's plots."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from peftcli.errors import InputError

PICTURES = (".png", ".pdf", ".svg", ".jpg")


def check_picture(path: Path) -> None:
    """Refuse a file no picture can be written to, before what it shows is computed.

    Raises:
        InputError: for another ending than `PICTURES`, or a folder that isn't there.
    """
    if path.suffix.lower() not in PICTURES:
        raise InputError("is no picture's name", place=path, field="--plot", allowed=", ".join(PICTURES))
    if not path.parent.is_dir() or path.is_dir():
        raise InputError("can't be written: no such folder", place=path, field="--plot")


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """Equal figures give equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
