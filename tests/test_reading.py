"""Files that a person wrote or a crash has damaged: YAML of plain values, regular files."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from scratch_det.errors import ConfigError, DataError
from scratch_det.reading import MOST_BYTES, read_json, read_lines, read_yaml

LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: &b [*b]", r":2: \*b refers to what it is in"),
        ("a: &a {b: *a}", r":1: \*a refers to what it is in"),
        (LAUGHS, ":5: more than 100,000 values"),
        ("a: " + "[" * 60 + "]" * 60, ":1: more than 40 lists and sections"),
        ("a: " + "[" * 99_999, ":1: "),
        ("".join(" " * number + "a:\n" for number in range(99)), ":40: more than 40 lists and sections"),
        ("a: x" + "y" * MOST_BYTES, "it has 1,048,580 bytes"),
        ("a: 1\nb: !!python/object/apply:os.system [true]", ":2: the tag .* no Python objects"),
        ("a: !own 1", ":1: the tag !own is not allowed"),
        ("a: !!binary aGk=", ":1: the tag .*binary is not allowed"),
        ("a: {b: 1, c: 2,\nb: 3}", ":2: b is already in line 1"),
        ("? [a]\n: 1", ":1: a key is a list or a section"),
        ("a: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("a: 0b_", "not valid YAML: invalid literal"),
        ("a: *b", ":1: not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2", ":2: not valid YAML: but found another document"),
        ("a: \0", "not valid YAML: "),
    ],
    ids=range(17),
)
def test_what_is_no_plain_yaml(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/a.yaml:?.*{message}") as caught:
        read_yaml(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", None),
        ("a: 2020-01-01", {"a": "2020-01-01"}),  # PyYAML makes a date of it
        ("2017: {yes: no}", {"2017": {"yes": False}}),  # and a number and a truth of the keys
        ("a: &a {b: 1}\nc: {<<: *a, d: [*a, *a]}", {"a": {"b": 1}, "c": {"b": 1, "d": [{"b": 1}, {"b": 1}]}}),
    ],
)
def test_plain_yaml(text: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == content


def test_our_own_files_mean_the_same_to_pyyaml() -> None:
    paths = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "scratch_det").rglob("*.yaml")]
    assert len(paths) > 50
    for path in paths:
        assert read_yaml(path) == yaml.safe_load(path.read_text()), path


@pytest.mark.parametrize("read", [read_yaml, read_json, lambda path: list(read_lines(path))])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file(read: Any, kind: str, tmp_path: Path) -> None:
    """It would be waited for."""
    path = tmp_path / "a.yaml"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} is a folder, a pipe or a device, expected a file"):
        read(path)
