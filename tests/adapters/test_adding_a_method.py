"""CONTRIBUTING's worked example is true: a file, a line and a row make a method."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_properties as table
from sites import SITES, SiteCase

from peftcli.adapters import registry

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(autouse=True)
def outer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the line of the guide, in place."""
    text = GUIDE.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    line = re.search(r'`"(\w+)": Method\("(\w+)", "(\w+)", "(\w+)"\),`', text)
    assert code and line
    module = ModuleType(f"peftcli.adapters.methods.{line[2]}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code[1], str(GUIDE), "exec"), module.__dict__)
    monkeypatch.setitem(registry.METHODS, line[1], registry.Method(*line.groups()[1:]))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("site", [site for site in SITES if site.kind != "module"], ids=str)
def test_the_example_holds_every_promise(site: SiteCase, tmp_path: Path) -> None:
    row = table.Row("OUTER")
    table.test_fresh_adapter_changes_nothing(row, site)
    table.test_merged_is_adapted_and_unmerge_is_exact(row, site)
    table.test_switched_off_is_the_base(row, site)
    table.test_every_parameter_gets_a_gradient(row, site)
    table.test_saved_and_loaded_is_the_same(row, site, tmp_path)
    table.test_delete_leaves_no_trace(row, site)
    table.test_half_precision_base_keeps_its_dtype(row, site)


def test_a_recipe_accepts_it() -> None:
    assert "outer" in registry.method_names()
    assert registry.config_class("OUTER").from_dict({"target_modules": ["q_proj"]}).target_modules == {"q_proj"}
