"""Fixtures shared by all tests, and guards that a test leaves torch as it found it."""

from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CXXFLAGS", "-O1")  # tests meet many sizes of the Kalman kernel, each for a moment: compiling costs more than running

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh CPU generator with a fixed seed: randomness enters as an argument, never through global state."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def float64() -> torch.dtype:
    """The dtype of exactness tests, to be passed as `dtype=`; the default dtype stays untouched."""
    return torch.float64


@pytest.fixture(autouse=True)
def torch_is_left_alone():
    """No test may change torch's default dtype or gradient mode for the tests that follow it."""
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    after = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])
    assert after == before, f"the test left (default dtype, grad mode) = {after}; it found {before}"
