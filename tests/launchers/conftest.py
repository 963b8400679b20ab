"""The user's folder of the command line's tests."""

from __future__ import annotations

from cli.conftest import place

__all__ = ["place"]
