"""Whatever an adapter folder holds, looking at it and loading it give an adapter or an InputError, in bounded time."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from adapter_files import CONFIG, lora_tensors, safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training.tiny import tiny_llama

from peftcli import PeftModel
from peftcli.adapters.audit import audit_folder
from peftcli.adapters.config import config_fields, read_config
from peftcli.adapters.registry import METHODS, config_class
from peftcli.errors import InputError

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        [
            0,
            -1,
            1e308,
            2**63,
            "all-linear",
            "q_proj",
            ".*",
            "(a+)+$",
            "../..",
            "/dev/zero",
            "\0",
            "pissa",
            "lora_only",
            "",
        ]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
methods = st.sampled_from(sorted(METHODS))


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A method's config with some fields holding anything."""
    method = draw(methods)
    names = [item.name for item in config_fields(config_class(method))]
    changes = draw(st.dictionaries(st.sampled_from(names) | st.text(max_size=8), values, max_size=5))
    return {**CONFIG, "peft_type": method, **changes}


def write(folder: Path, config: bytes, weights: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)


GOOD = safetensors(lora_tensors())


@FUZZ
@given(config=configs())
def test_any_config_is_read_or_refused(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, json.dumps(config).encode(), GOOD)
        for look in (lambda: read_config(folder / "adapter_config.json"), lambda: audit_folder(folder)):
            try:
                look()
            except InputError as refused:
                assert str(refused)


@FUZZ
@given(config=configs())
def test_any_config_loads_or_is_refused(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, json.dumps(config).encode(), GOOD)
        base = tiny_llama()
        before = sorted(base.state_dict())
        try:
            PeftModel.from_pretrained(base, folder)
        except InputError:
            assert sorted(base.state_dict()) == before


@FUZZ
@given(
    changes=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, len(GOOD)) | st.just(len(GOOD)),
    more=st.binary(max_size=20),
)
def test_any_bytes_are_weights_or_refused(changes: list[tuple[int, int]], cut: int, more: bytes) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, json.dumps(CONFIG).encode(), bytes(data[:cut]) + more)
        try:
            audit_folder(folder)
            PeftModel.from_pretrained(tiny_llama(num_key_value_heads=1), folder)
        except InputError as refused:
            assert str(refused)


@FUZZ
@given(text=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_config_or_refused(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, text, GOOD)
        with pytest.raises(InputError):
            read_config(folder / "adapter_config.json")
