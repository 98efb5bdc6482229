"""The frame of the reproductions: what is off is told, every folder is whole."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from paper_repro import frame


def test_the_check_tells_what_is_off():
    rules = {"a": {"value": 2.0, "rtol": 0.1}, "b": {"value": 0.0, "atol": 0.5}, "c": {"min": 1.0}, "d": {"max": 1.0}, "e": {"min": 0.0, "max": 1.0}}
    assert frame.check(rules, {"a": 2.19, "b": -0.5, "c": 1.0, "d": 1.0, "e": 0.5}) == []
    off = frame.check(rules, {"a": 2.21, "b": math.nan, "c": 0.9, "d": math.nan})
    assert [line.split(" is ")[0] for line in off[:4]] == ["a", "b", "c", "d"]
    assert "2 ± 10 %" in off[0] and "at least 1" in off[2] and off[4] == "e was not computed"


@pytest.mark.parametrize("rule", [{}, {"value": 1.0}, {"rtol": 0.1}, {"most": 1.0}])
def test_a_rule_that_says_nothing_is_refused(rule):
    with pytest.raises(ValueError, match="expected.json says"):
        frame.check({"a": rule}, {"a": 1.0})


@pytest.mark.parametrize("name", frame.names())
def test_every_reproduction_is_whole(name):
    folder = frame.HERE / name
    assert len(frame.title(name)) > 20 and (folder / "__init__.py").exists()
    assert frame.expected(name, quick=False) and frame.expected(name, quick=True)
    frame.check(frame.expected(name, True) | frame.expected(name, False), {})  # every rule can be read
    readme = (folder / "README.md").read_text()
    for figure in (folder / "figures").glob("*.png"):
        assert figure.name in readme, f"{figure.name} is shown nowhere in {name}/README.md"
        assert figure.stat().st_size < 300_000


def test_list():
    done = subprocess.run([sys.executable, "-m", "paper_repro", "list"], capture_output=True, text=True, cwd=frame.HERE.parent, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == frame.names()


def test_an_unknown_name_is_told():
    with pytest.raises(ValueError, match="there is no reproduction 'wilkins'; there are"):
        frame.run("wilkins", True, frame.HERE)
