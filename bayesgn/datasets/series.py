"""Series over time, points in the plane, and texts."""

from __future__ import annotations

from datetime import date
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesgn._extras import require
from bayesgn.datasets.lookup import Series, Text, find, find_or_packaged, table


def motorcycle(dtype: torch.dtype = torch.float32) -> Series:
    """Head acceleration in a motorcycle accident (Silverman 1985): x [133] in ms after the impact, y [133] in g.

    From a data folder, or the package pydataset.
    """
    rows, source, whole = find_or_packaged("gp/mcycle.csv", "MASS/mcycle", ",")
    x, y = (rows if whole else rows[:, 1:]).to(dtype).unbind(-1)
    return Series(x, y, "motorcycle", source, "ms", "g")


def coal_mining(dtype: torch.dtype = torch.float32) -> Series:
    """Coal-mining disasters in Britain (Jarrett 1979): x [333] the year at each bin's centre, y [333] the disasters in the bin.

    From a data folder, or binned from the 191 dates in the package pydataset.
    """
    rows, source, events = find_or_packaged("gp/coal_binned.csv", "boot/coal")
    if events:
        x, y = histogram(rows[:, 0], 333, centred=True)
    else:
        x, y = rows.unbind(-1)
    return Series(x.to(dtype), y.to(dtype), "coal_mining", source, "year", "disasters")


def histogram(events: Tensor, bins: int, centred: bool = False) -> tuple[Tensor, Tensor]:
    """Centres [bins] of equal bins over the range of the events, and how many events lie in each; ``centred`` puts the first and the last
    event on the centres of the outermost bins.

    Example:
        >>> histogram(torch.tensor([0.0, 0.1, 1.0]), 2)
        (tensor([0.2500, 0.7500]), tensor([2., 1.]))
    """
    low, high = float(events.min()), float(events.max())
    if centred:
        half = (high - low) / (bins - 1) / 2
        low, high = low - half, high + half
    counts, edges = np.histogram(events.double().numpy(), bins, (low, high))
    centres = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
    return centres.to(events), torch.from_numpy(counts).to(events)


def aircraft_accidents(days: int = 1, dtype: torch.dtype = torch.float64) -> Series:
    """1,210 accidents of commercial aircraft, 1919 to 2017, counted over windows of ``days``: x [n] in days since the first, y [n] counts."""
    path = find("gp/aircraft_accidents.txt")
    when = np.array([date.fromisoformat(line.strip()).toordinal() for line in path.read_text().splitlines() if line.strip()])
    which = (when - when.min()) // days
    counts = np.bincount(which)
    x = (torch.arange(len(counts), dtype=torch.float64) * days + (days - 1) / 2).to(dtype)
    return Series(x, torch.from_numpy(counts).to(dtype), "aircraft_accidents", str(path), "day", "accidents")


def marathon(dtype: torch.dtype = torch.float32) -> Series:
    """Winning paces of the Olympic marathon: x [27] the year, y [27] in minutes per kilometre."""
    path = find("gp/olympicMarathonTimes.csv")
    x, y = table(path, ",").to(dtype).unbind(-1)
    return Series(x, y, "marathon", str(path), "year", "min / km")


def ligo(dtype: torch.dtype = torch.float64) -> Series:
    """The gravitational wave GW150914 as seen at Hanford: x [3441] in seconds, y [3441] the strain in units of 1e-21."""
    path = find("gp/ligo.txt", "gw-openscience.org has it.")
    x, y = table(path).to(dtype).unbind(-1)
    return Series(x, y, "ligo", str(path), "s", "strain / 1e-21")


def speech(dtype: torch.dtype = torch.float64) -> Series:
    """Half a second of a female voice at 44.1 kHz: x [22050] in ms, y [22050] the amplitude. Needs scipy."""
    path = find("gp/speech_female.mat")
    y = torch.from_numpy(require("scipy.io", "repro").loadmat(str(path))["y"][:, 0].astype(float)).to(dtype)
    return Series(torch.arange(len(y), dtype=dtype) / 44.1, y, "speech", str(path), "ms", "amplitude")


def rain_forest(cells: tuple[int, int] = (200, 100), dtype: torch.dtype = torch.float64) -> Series:
    """12,929 trees of one species on 1000 m × 500 m of Barro Colorado, counted in a grid: x [n 2] centres in metres, y [n] counts."""
    path = find("gp/TRI2TU-data.csv")
    trees = table(path, ",").numpy()
    counts, a, b = np.histogram2d(trees[:, 0], trees[:, 1], cells, ((0, 1000), (0, 500)))
    centres = np.stack(np.meshgrid((a[1:] + a[:-1]) / 2, (b[1:] + b[:-1]) / 2, indexing="ij"), -1).reshape(-1, 2)
    return Series(torch.from_numpy(centres).to(dtype), torch.from_numpy(counts.reshape(-1)).to(dtype), "rain_forest", str(path), "m", "trees")


# -- set-ups of published experiments ------------------------------------------------------------------------------------------------------


class Folds(NamedTuple):
    """A series with test folds: x [n], y [n …], and for each fold the indices held out.

    `extra` holds what belongs to the set besides: noise covariance, true functions, targets held out.
    """

    x: Tensor
    y: Tensor
    test: list[Tensor]
    name: str
    source: str
    extra: dict[str, Tensor]

    def fold(self, k: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """((x_train, y_train), (x_test, y_test)) of fold k; the training part is what the other folds hold, in order."""
        if not 0 <= k < len(self.test):
            raise ValueError(f"fold {k} of {self.name}; it has folds 0 to {len(self.test) - 1}")
        rest = torch.cat([t for j, t in enumerate(self.test) if j != k])
        held = self.test[k]
        return (self.x[rest], self.y[rest]), (self.x[held], self.y[held])


def _folds(path: str, name: str) -> Folds:
    found = find(path, "It belongs to the experiments of Wilkinson, Särkkä and Solin (2023).")
    with np.load(found) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    test = [arrays.pop(key) for key in sorted(arrays) if key.startswith("test_")]
    return Folds(arrays.pop("x"), arrays.pop("y"), test, name, str(found), arrays)


def motorcycle_folds() -> Folds:
    """The motorcycle data standardised, in four random folds of 33, as Wilkinson, Särkkä and Solin (2023) use them; float64."""
    return _folds("gp/mcycle_standardised.npz", "motorcycle_folds")


def product() -> Folds:
    """A product of two functions, y = f1 softplus(f2) + noise, 1,000 points in four folds; `extra["f_true"]` [1000 2]; float64."""
    return _folds("gp/product.npz", "product")


def regression_network() -> Folds:
    """Three outputs mixed from two latent functions by six weight functions: y [400 3] with NaN where held out, `extra["y_test"]` [400 3] (NaN
    where not), `extra["noise_cov"]` [3 3]; float64."""
    return _folds("gp/gprn_fold0.npz", "regression_network")


# -- texts ---------------------------------------------------------------------------------------------------------------------------------


def shakespeare() -> Text:
    """Twelve plays, 1.66 MB of text."""
    path = find("shakespeare_12plays.txt", "`python_docs()` is a text that every Python has.")
    return Text(path.read_text(encoding="utf-8"), "shakespeare", str(path))


def python_docs() -> Text:
    """The help topics that come with every Python, about 0.5 MB of technical English.

    Example:
        >>> len(python_docs().text) > 400_000
        True
    """
    topics = require("pydoc_data.topics", "demo").topics
    return Text("\n\n".join(topics[key] for key in sorted(topics)), "python_docs", "pydoc_data")
