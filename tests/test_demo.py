"""`make demo` says what it promises, and its training leaves torch's global generator alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bayesgn import demo


def test_the_demo_prints_its_table_and_saves_its_figure(tmp_path, capsys):
    figure = tmp_path / "demo.png"
    state = torch.random.get_rng_state()
    demo.main(["--output", str(figure)])
    assert torch.equal(torch.random.get_rng_state(), state)
    printed = capsys.readouterr().out
    assert str(figure) in printed and figure.stat().st_size > 10_000
    rows = re.findall(r"^(MAP|[\w ]+, \w+, \w+ space) +([\d.]+)% +([\d.]+) +([\d.]+)% +([\d.]+)$", printed, re.M)
    scores = {name: [float(v) for v in values] for name, *values in rows}
    fits = ("last layer, evidence", "all weights, evidence", "all weights, validation")
    assert list(scores) == ["MAP", *(f"{fit}, {view} space" for fit in fits for view in ("function", "weight"))]
    plain, last, last_sampled, whole, _, tuned, _ = scores.values()
    accuracy, nll, ece, auroc = range(4)
    assert last[accuracy] == whole[accuracy] == plain[accuracy] > 80, "the linearised net's mean is the trained net"
    assert last[nll] < plain[nll] and tuned[nll] < plain[nll], "a net that is too sure gains"
    assert tuned[ece] < plain[ece] and tuned[auroc] > plain[auroc]
    readme = Path(__file__).parent.parent / "README.md"
    table = re.findall(r"^\| (?:MAP|Laplace|…)[^|]* \|(.*)\|$", readme.read_text(), re.M)
    told = [[float(re.sub(r"[ *%]", "", cell)) for cell in row.split("|")] for row in table]
    for row, found in zip(told, scores.values(), strict=True):
        assert row == pytest.approx(found, rel=0.05, abs=0.5), "README's table is not what the demo prints: run `make demo` and copy it"
    assert last_sampled[nll] == pytest.approx(last[nll], abs=0.06), "a last layer is linear: two views of one posterior"


def test_the_unknown_digits_are_kept_from_the_net():
    digits = demo.data(seed=1)
    assert all(y.max() == 7 for _, y in (digits.train, digits.validation, digits.test))
    rows = torch.cat([digits.train[0], digits.validation[0], digits.test[0], digits.unknown])
    assert len(rows) == 1797
    assert len(rows.unique(dim=0)) == 1797, "no image is in two groups"
