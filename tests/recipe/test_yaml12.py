"""Scalars as YAML 1.2 reads them, and everything that is not a plain value refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from peftcli.errors import InputError
from peftcli.recipe import yaml12
from peftcli.recipe.nodes import Node, Origin

HERE = Origin("r.yaml", Path())


def value_of(text: str) -> object:
    node = yaml12.parse(text, HERE)
    assert isinstance(node, Node)
    return node.plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3.25e+2", -325.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("7", 7),
        ("+7", 7),
        ("-0", 0),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2024-01-31", "2024-01-31"),
        ("1e", "1e"),
        ("=", "="),
        ('"1e-4"', "1e-4"),
        ("'true'", "true"),
        ("tRUE", "tRUE"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    for document, expected in ((f"x: {text}", {"x": value}), (f"x: [{text}]", {"x": [value]})):
        found = value_of(document)
        assert found == expected
        assert repr(found) == repr(expected)  # 1 is not True, 1.0 not 1


def test_nan_is_a_float() -> None:
    found = value_of(".nan")
    assert isinstance(found, float) and math.isnan(found)


@pytest.mark.parametrize("text", ["010", "-08", "00"])
def test_leading_zeros_mean_two_things(text: str) -> None:
    with pytest.raises(InputError, match=r"r.yaml:2:6: a.b: .*octal in YAML 1.1"):
        value_of(f"a:\n  b: {text}")


REFUSED = {
    "duplicate key": ("a: 1\nb: 2\na: 3", r"r.yaml:3:1: a: duplicate key \(first r.yaml:1:1\)"),
    "nested duplicate": ("a: {b: 1, b: 1}", "r.yaml:1:11: a.b: duplicate key"),
    "alias": ("a: &x 1\nb: [*x, *x]\nc: *x", r"r.yaml:2:5: b, c: an alias"),
    "recursive alias": ("a: &x [*x]", "a: an alias"),
    "merge key": ("a: 1\n<<: {b: 1}", "r.yaml:2:1: merge keys"),
    "tag": ("a: !!python/object/apply:os.system [x]", "r.yaml:1:4: a: the tag .*python"),
    "harmless tag": ("a: !!str 5", "a: the tag"),
    "non-specific tag": ('a: ! "x"', "a: the tag"),
    "directive": ("%YAML 1.1\n---\na: 1", "directives"),
    "two documents": ("a: 1\n---\nb: 2", "r.yaml:2:1: holds several documents"),
    "number as key": ("a: {1: x}", "r.yaml:1:5: a: the key 1 is not a name"),
    "null as key": ("? \n: x", "is not a name"),
    "list as key": ("? [a]\n: x", "the key a map, list or alias"),
    "map as key": ("{{a: 1}: 2}", "the key a map, list or alias"),
    "empty map as key": ("a: {{}: 1, b: 2}", "a: the key a map, list or alias"),
    "map as key, cut off": ("{{}", "is not YAML on line"),
    "tab": ("a:\n\tb: 1", "line 2"),
    "open quote": ('a: "x', "line"),
    "bad indentation": ("a:\n    b: 1\n  c: 2", r"r.yaml:3:\d: is not YAML on line 3"),
    "depth": ("a: " + "[" * 20_000, "nested more than 24 levels"),
    "long number": ("a: " + "9" * 5000, "a number of 5000 characters"),
    "escape sequence": ('a: "\\e[31m"', r"a: .*U\+001B"),
    "NUL": ('a: "\\0"', r"a: .*U\+0000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        value_of(text)
    assert "\x1b" not in str(error.value) and "\0" not in str(error.value)


def test_every_problem_is_told() -> None:
    with pytest.raises(InputError) as error:
        value_of("a: 010\nb: !x y\nb: 1\nc: *z\nd: &z 1")
    for field in ("a:", "b: the tag", "b: duplicate", "c: an alias"):
        assert field in str(error.value)


def test_the_python_parser_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libyaml the same texts are taken and refused."""
    monkeypatch.setattr(yaml12, "LOADER", yaml.SafeLoader)
    assert value_of("a: [1e-4, no, {b: '~'}]") == {"a": [1e-4, "no", {"b": "~"}]}
    for text, _ in REFUSED.values():
        with pytest.raises(InputError):
            value_of(text)


class TestFiles:
    def write(self, tmp_path: Path, raw: bytes) -> Path:
        path = tmp_path / "r.yaml"
        path.write_bytes(raw)
        return path

    def test_places(self, tmp_path: Path) -> None:
        root = yaml12.read(self.write(tmp_path, b"\xef\xbb\xbfa: 1\r\nb:\r\n  - x\r\n"))
        item = root.nearest(("b", 0))
        assert item.plain() == "x" and item.place.endswith("r.yaml:3:5")

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (b"", "empty"),
            (b"# nothing\n", "empty"),
            (b"a: \xe9\n", "r.yaml:1: is not UTF-8: byte 0xe9 at offset 3"),
            ("a: 1".encode("utf-16"), "not UTF-8"),
            (b"a: 1\nb: \x00", r"r.yaml:2:4: character U\+0000 is not allowed on line 2"),
            (b"a: \x1b[0m", r"U\+001B"),
            (b"x: " + b"y" * (1 << 20), "larger than 1 MB"),
            (b"#" * (17 << 20), "larger than"),
        ],
    )
    def test_refused(self, tmp_path: Path, raw: bytes, message: str) -> None:
        with pytest.raises(InputError, match=message):
            yaml12.read(self.write(tmp_path, raw))

    def test_comments_do_not_count(self, tmp_path: Path) -> None:
        assert yaml12.read(self.write(tmp_path, b"#" + b"x" * (8 << 20) + b"\na: 1\n")).plain() == {"a": 1}

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "loop").symlink_to("loop")
        for name in (tmp_path, tmp_path / "none", tmp_path / "loop", Path("/dev/zero"), Path("a\0b")):
            with pytest.raises(InputError):
                yaml12.read(name)
