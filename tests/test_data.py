"""Whatever a user hands over, as checked batches."""

from collections import OrderedDict, UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bayesgn import _data

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


class Own(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return X[i], Y[i]


class Streamed(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def joined(data):
    pairs = list(data)
    return torch.cat([_data.tensors(x)[0] for x, _ in pairs]), torch.cat([y for _, y in pairs]), len(pairs)


@pytest.mark.parametrize(
    "data, count",
    [
        ((X, Y), 1),
        ([X, Y], 1),
        ({"a": X, "labels": Y}, 1),
        ({"a": X, "target": Y}, 1),
        (((X, X), Y), 1),
        ([[X, X], Y], 1),
        (({"a": X, "b": X}, Y), 1),
        (TensorDataset(X, Y), 1),
        (Own(), 1),
        (DataLoader(TensorDataset(X, Y), batch_size=4), 2),
        (DataLoader(Streamed(), batch_size=4), 2),
        ([(X[:4], Y[:4]), (X[4:], Y[4:])], 2),
        ([[X[:4], Y[:4]], [X[4:], Y[4:]]], 2),
        (((X[:4], Y[:4]), (X[4:], Y[4:])), 2),
        ([{"a": X[:4], "y": Y[:4]}, {"a": X[4:], "y": Y[4:]}], 2),
        ([(X[:3], X[:3], Y[:3]), (X[3:], X[3:], Y[3:])], 2),
    ],
    ids=[
        "pair", "list pair", "mapping", "mapping target", "tuple inputs", "list inputs", "dict inputs", "TensorDataset", "Dataset",
        "DataLoader", "IterableDataset", "batches", "list batches", "tuple of batches", "dict batches", "several inputs",
    ],  # fmt: skip
)
def test_forms_of_data(data, count):
    found = _data.batches(data)
    for _ in range(2):  # may be walked again
        x, y, n = joined(found)
        assert torch.equal(x, X) and torch.equal(y, Y) and n == count


def test_tensors_are_cut_to_batches():
    sizes = [len(y) for _, y in _data.batches((X, Y), batch_size=4)]
    assert sizes == [4, 2]
    parts = list(_data.batches(((X, {"m": X}), Y), batch_size=4))
    assert isinstance(parts[0][0], tuple) and torch.equal(parts[1][0][1]["m"], X[4:])
    assert [len(y) for _, y in _data.batches(TensorDataset(X, Y), batch_size=5)] == [5, 1]


def test_iterators_stay_iterators():
    found = _data.batches((X[i : i + 2], Y[i : i + 2]) for i in (0, 2, 4))
    x, y, n = joined(found)
    assert torch.equal(x, X) and n == 3 and list(found) == []


def test_length_of_a_loader_is_its_own():
    assert len(_data.batches(DataLoader(TensorDataset(X, Y), batch_size=4))) == 2


def test_inputs_keep_their_container():
    x, y = next(iter(_data.batches([OrderedDict(a=X, b=X, label=Y)])))
    assert isinstance(x, dict) and list(x) == ["a", "b"] and torch.equal(y, Y)
    x, _ = next(iter(_data.batches([UserDict(a=X, labels=Y)])))  # as Hugging Face's BatchEncoding is one
    assert list(x) == ["a"]
    x, _ = next(iter(_data.batches([(X, X, Y)])))
    assert isinstance(x, tuple) and len(x) == 2


@pytest.mark.parametrize(
    "data, error, message",
    [
        (None, TypeError, "data is None .*expected a DataLoader, a pair"),
        (3, TypeError, "data is a int; expected a DataLoader"),
        (X, TypeError, r"data is a tensor of shape \(6, 2\) and dtype torch.float32; expected a DataLoader, a pair"),
        (X.numpy(), TypeError, r"data is a numpy ndarray of shape \(6, 2\); expected a DataLoader, a pair"),
        ((X, Y[:3]), ValueError, r"x has 6 rows but y has 3 \(shape \(3,\)\); they must match"),
        ((X[:0], Y[:0]), ValueError, r"the data are empty \(0 rows\)"),
        ({"a": X}, ValueError, r"a batch with keys \['a'\] has no targets; expected one of \['labels'"),
        ([{"a": X}], ValueError, "has no targets"),
        ([{"a": X, "labels": [1, 2]}], TypeError, "the targets 'labels' of a batch are a list of 2; expected a tensor"),
        ([{"a": X, "labels": Y[:2]}], ValueError, "x has 6 rows but y has 2"),
        ([X], TypeError, r"a batch is a tensor of shape \(6, 2\) .*expected a pair \(x, y\) or a mapping"),
        (["text"], TypeError, r"a batch is 'text' \(str\); expected a pair"),
        ([(X,)], TypeError, r"a batch is a tuple of 1: a tensor of shape \(6, 2\)"),
        (DataLoader(TensorDataset(X)), TypeError, "a batch is a list of 1"),
        ([(X, 3)], TypeError, r"targets are 3 \(int\); expected a tensor. Use a collate_fn"),
        ([(X, np.arange(6))], TypeError, r"targets are a numpy ndarray of shape \(6,\); expected a tensor. Use torch.from_numpy"),
        ([(X.numpy(), Y)], TypeError, r"an input is a numpy ndarray of shape \(6, 2\); expected a tensor \(torch.from_numpy"),
        ([("text", Y)], TypeError, r"an input is 'text' \(str\); expected a tensor"),
        ([(X, Y[0])], ValueError, r"targets are a single number \(tensor\(0\)\); expected one for each of the 6 data"),
        ([(torch.tensor(1.0), Y)], TypeError, "an input is a tensor of shape .*data first"),
    ],
)
def test_what_cannot_be_data_says_so(data, error, message):
    with pytest.raises(error, match=message):
        list(_data.batches(data))


def test_rows_of_an_input():
    constant = torch.tensor(2.0)
    x = {"a": X, "b": (X, constant), "note": "kept"}
    assert _data.len_of(x) == 6
    part = _data.rows(x, slice(1, 3))
    assert torch.equal(part["a"], X[1:3]) and torch.equal(part["b"][0], X[1:3]) and part["b"][1] is constant and part["note"] == "kept"
    assert torch.equal(_data.rows(X, [2, 0]), X[[2, 0]])
    table = torch.ones(4, 3)  # not along the data: the same for all of them
    assert _data.rows((X, table), slice(0, 2))[1] is table
    assert [(s, len(p)) for s, p in _data.split(X, 4)] == [(0, 4), (4, 2)]
    assert next(iter(_data.split(X, 6)))[1] is X  # no copy where nothing is cut
    assert [t.shape for t in _data.tensors(x)] == [X.shape, X.shape, constant.shape]
    doubled = _data.apply(x, lambda t: t * 2)
    assert torch.equal(doubled["b"][0], X * 2) and list(doubled) == list(x)


def test_meta_inputs_are_refused_where_numbers_are_needed():
    with pytest.raises(ValueError, match=r"shape \(6, 2\) .* on the meta device, which holds no numbers"):
        _data.to({"a": X, "b": X.to("meta")}, torch.device("cpu"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_non_finite_numbers_are_found(value, dtype):
    bad = X.to(dtype).clone()
    bad[4, 1] = value
    bad[5, 0] = value
    for x in (bad, {"a": X, "b": bad}, (X, (Y, bad))):
        with pytest.raises(ValueError, match=rf"x holds 2 non-finite value\(s\), the first {value} at index \(4, 1\) of shape \(6, 2\); clean"):
            _data.check_finite(x, "x")
    _data.check_finite({"a": X.to(dtype), "ids": Y, "mask": Y > 2}, "x")


def test_descriptions_are_short():
    assert _data.describe(X) == "a tensor of shape (6, 2) and dtype torch.float32"
    assert _data.describe({"a": 1}) == "a mapping with keys ['a']"
    assert _data.describe([1, 2]) == "a list of 2"
    assert _data.describe((X,)) == f"a tuple of 1: {_data.describe(X)}"
    assert len(_data.describe("x" * 10_000)) < 100
    assert len(_data.describe(np.zeros((1000, 1000)))) < 100
