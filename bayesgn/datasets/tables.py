"""Tables: classification and regression."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bayesgn._extras import require
from bayesgn.datasets.lookup import Dataset, find, floating, split, standardised, table

_SKLEARN = {"digits": "load_digits", "iris": "load_iris", "wine": "load_wine", "wdbc": "load_breast_cancer"}
_PRESPLIT = {"australian": "australian_presplit", "breast_cancer": "breast_cancer_scale_presplit"}
_TABLES = ("glass", "ionosphere", "satellite", "vehicle", "waveform")
_REGRESSION = ("concrete", "energy", "kin8nm", "naval_propulsion_plant", "power_plant", "wine_quality_red", "yacht")
_UCI = "It is in the UCI Machine Learning Repository."


def _known(name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"no set is called {name!r}; expected one of {', '.join(sorted(names))}")


def uci_classification(
    name: str,
    split_seed: int | None = 0,
    test_fraction: float = 0.3,
    standardize: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """A classification table: x [n d] standardised by its training part, y [n] int64 from 0; the split keeps the share of each class.

    Args:
        name: australian, breast_cancer (10 columns), glass, ionosphere, satellite, vehicle, waveform from a data folder; digits, iris, wine,
            wdbc (breast cancer, 30 columns) from scikit-learn.
        split_seed: seed of the split; None keeps the split that australian and breast_cancer ship.

    Example:
        >>> data = uci_classification("wine", split_seed=1)
        >>> data.x_train.shape, data.y_test.unique().tolist(), data.source
        (torch.Size([125, 13]), [0, 1, 2], 'scikit-learn')
    """
    _known(name, [*_SKLEARN, *_PRESPLIT, *_TABLES])
    if split_seed is None and name not in _PRESPLIT:
        raise ValueError(f"{name} ships no split of its own; pass a split_seed (only {', '.join(_PRESPLIT)} do)")
    if name in _SKLEARN:
        bunch = getattr(require("sklearn.datasets", "demo"), _SKLEARN[name])()
        x, y, source = torch.from_numpy(bunch.data), torch.from_numpy(bunch.target), "scikit-learn"
        parts = split(x, y.long(), test_fraction, split_seed or 0, stratify=True)
    elif name in _PRESPLIT:
        folder = find(f"uci_classification/{_PRESPLIT[name]}", _UCI)
        parts = [table(folder / f"{name}_scale_{part}.csv") for part in ("X_tr", "y_tr", "X_te", "y_te")]
        parts = (parts[0], parts[1].long(), parts[2], parts[3].long())
        source = str(folder)
        if split_seed is not None:
            x, y = torch.cat([parts[0], parts[2]]), torch.cat([parts[1], parts[3]])
            parts = split(x, y, test_fraction, split_seed, stratify=True)
    else:
        folder = find(f"uci_classification/{name}", _UCI)
        if name == "ionosphere":
            rows = table(folder / "ionosphere.data", ",")
            x, y = rows[:, :-1], rows[:, -1]
        else:
            x, y = table(folder / "X.txt"), table(folder / "Y.txt")
        source = str(folder)
        parts = split(x, y.long(), test_fraction, split_seed or 0, stratify=True)
    x_train, y_train, x_test, y_test = parts
    if standardize:
        x_train, x_test = standardised(x_train, x_test)
    return Dataset(x_train.to(dtype), y_train, x_test.to(dtype), y_test, name, source)


def uci_regression(
    name: str, seed: int = 0, test_fraction: float = 0.1, standardize: bool = True, dtype: torch.dtype = torch.float32
) -> Dataset:
    """A regression table: x [n d], y [n 1], both standardised by the training part (`y_mean`, `y_std` lead back to the unit of y).

    Args:
        name: concrete, energy, kin8nm, naval_propulsion_plant, power_plant, wine_quality_red, yacht from a data folder; diabetes from scikit-learn.

    Example:
        >>> data = uci_regression("diabetes", seed=3, dtype=torch.float64)
        >>> data.x_train.shape, data.y_test.shape
        (torch.Size([398, 10]), torch.Size([44, 1]))
        >>> float(data.y_train.mean().abs() < 1e-12)
        1.0
    """
    _known(name, [*_REGRESSION, "diabetes"])
    if name == "diabetes":
        bunch = require("sklearn.datasets", "demo").load_diabetes(scaled=False)
        X, y, source = bunch.data, bunch.target, "scikit-learn"
    else:
        path = find(f"uci_regression/{name}.npz", _UCI)
        with np.load(path) as file:
            X, y = file["X"], file["y"]
        source = str(path)
    parts = split(torch.from_numpy(X).double(), torch.from_numpy(y).double().unsqueeze(-1), test_fraction, seed)
    x_train, y_train, x_test, y_test = parts
    mean, std = 0.0, 1.0
    if standardize:
        x_train, x_test = standardised(x_train, x_test)
        mean, std = float(y_train.mean()), float(y_train.std())
    y_train, y_test = (y_train - mean) / std, (y_test - mean) / std
    return Dataset(x_train.to(dtype), y_train.to(dtype), x_test.to(dtype), y_test.to(dtype), name, source, mean, std)


def digits(seed: int = 0, test_fraction: float = 0.3, dtype: torch.dtype = torch.float32) -> Dataset:
    """1,797 hand-written digits of 8 × 8 pixels (scikit-learn): x [n 64] in [0, 1], row by row, y [n] from 0 to 9.

    Example:
        >>> data = digits()
        >>> data.x_train.shape, data.x_test.unflatten(-1, (1, 8, 8)).shape
        (torch.Size([1258, 64]), torch.Size([539, 1, 8, 8]))
    """
    data = uci_classification("digits", seed, test_fraction, standardize=False, dtype=dtype)
    return data._replace(x_train=data.x_train / 16, x_test=data.x_test / 16)


def a1a(dtype: torch.dtype = torch.float32) -> Dataset:
    """Adult a1a (LIBSVM): 1,605 training and 30,956 test rows, x [n 123] binary, y [n] int64 in {0, 1} (1: income above $50,000 a year)."""
    path = find("a1a.npz", "The LIBSVM data collection has it as a1a and a1a.t.")
    with np.load(path) as file:
        X, y, X_te, y_te = file["X"], file["y"], file["X_te"], file["y_te"]
    X = np.pad(X, ((0, 0), (0, X_te.shape[1] - X.shape[1])))  # features 120 to 123 are zero in every training row
    labels = [torch.from_numpy((part > 0).astype(np.int64)) for part in (y, y_te)]
    return Dataset(floating(X, dtype), labels[0], floating(X_te, dtype), labels[1], "a1a", str(path))


def banana(dtype: torch.dtype = torch.float32) -> Dataset:
    """The banana benchmark (Rätsch): 400 training points and the 4,900 others for testing, x [n 2], y [n] int64 in {0, 1}."""
    x_path, y_path = find("gp/banana_X_train"), find("gp/banana_Y_train")
    all_path = find("gp/banana_5300/banana.csv")
    X, y = np.loadtxt(x_path, delimiter=","), np.loadtxt(y_path)
    rows = np.loadtxt(all_path, delimiter=",")
    # The full set is rounded to three significant digits; each training point takes one row of it away.
    left = [tuple(row) for row in rows]
    for (a, b), label in zip(X, y):
        left.remove((float(f"{a:.3g}"), float(f"{b:.3g}"), label + 1))
    rest = np.array(left)
    labels = [torch.from_numpy(part.astype(np.int64)) for part in (y, rest[:, 2] - 1)]
    return Dataset(floating(X, dtype), labels[0], floating(rest[:, :2], dtype), labels[1], "banana", str(x_path))
