"""`make demo` says what it promises, and its training leaves torch's global generator alone."""

from __future__ import annotations

import re

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
    rows = re.findall(r"^(MAP|[\w ]+, \w+ space) +([\d.]+)% +([\d.]+) +([\d.]+)% +([\d.]+)$", printed, re.M)
    scores = {name.strip(): [float(v) for v in values] for name, *values in rows}
    views = [f"{title}, {view} space" for title in ("last layer", "all weights") for view in ("function", "weight")]
    assert list(scores) == ["MAP", *views]
    map_scores, last, last_sampled, whole, _ = scores.values()
    assert last[0] == whole[0] == map_scores[0] > 80, "the linearised net has the MAP net's mean"
    assert last[1] < map_scores[1], "an overconfident net gains in NLL"
    assert whole[3] > map_scores[3], "all weights tell unknown digits apart better"
    assert last_sampled[1] == pytest.approx(last[1], abs=0.06), "a last layer is linear: two views of one posterior"
    for before, after in re.findall(r"log evidence (-?[\d.]+) -> (-?[\d.]+) nats", printed):
        assert float(after) >= float(before)


def test_the_unknown_digits_are_kept_from_the_net():
    (x, y), (x_test, y_test), other = demo.data(seed=1)
    assert y.max() == y_test.max() == 7
    assert len(x) + len(x_test) + len(other) == 1797
    rows = torch.cat([x, x_test, other])
    assert len(rows.unique(dim=0)) == 1797, "no image is in two groups"
