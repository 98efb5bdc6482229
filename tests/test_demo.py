"""`make demo` says what it promises, and its training leaves torch's global generator alone."""

from __future__ import annotations

import re

import pytest
import torch

from bayesgn import demo


def test_the_demo_prints_its_table_and_saves_its_figure(tmp_path, capsys):
    figure = tmp_path / "demo.png"
    state = torch.random.get_rng_state()
    demo.main(["--epochs", "15", "--output", str(figure)])
    assert torch.equal(torch.random.get_rng_state(), state)
    printed = capsys.readouterr().out
    assert str(figure) in printed and figure.stat().st_size > 10_000
    rows = re.findall(r"^(MAP|Laplace, \w+ space) +([\d.]+)% +([\d.]+) +([\d.]+)% +([\d.]+)$", printed, re.M)
    assert [row[0] for row in rows] == ["MAP", "Laplace, function space", "Laplace, weight space"]
    for _, accuracy, nll, ece, auroc in rows:
        assert float(accuracy) > 93 and float(nll) < 0.25 and float(ece) < 15 and float(auroc) > 0.85
    before, after = map(float, re.search(r"log evidence (-?[\d.]+) -> (-?[\d.]+) nats", printed).groups())
    assert after > before
    function, weight = float(rows[1][2]), float(rows[2][2])
    assert weight == pytest.approx(function, abs=0.03), "two views of one posterior"


def test_the_unknown_digits_are_kept_from_the_net():
    (x, y), (x_test, y_test), other = demo.data(seed=1)
    assert y.max() == y_test.max() == 7
    assert len(x) + len(x_test) + len(other) == 1797
    rows = torch.cat([x, x_test, other])
    assert len(rows.unique(dim=0)) == 1797, "no image is in two groups"
