"""Named parameters of a network ↔ one flat vector, and subsets of it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bayesgn._parameters import ParameterVector


class Net(nn.Module):
    """Two Linear layers, a raw parameter, a frozen one and a tie."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.second = nn.Linear(3, 2, bias=False)
        self.again = nn.Linear(3, 2, bias=False)
        self.again.weight = self.second.weight


def test_all_that_require_grad_in_the_nets_own_order():
    net = Net()
    vector = ParameterVector.of(net)
    assert vector.names == ("scale", "first.weight", "first.bias", "second.weight")  # named_parameters: own first, ties once
    assert vector.names == tuple(n for n, p in net.named_parameters() if p.requires_grad)
    assert vector.sizes == (1, 6, 3, 6) and vector.numel == 16
    assert torch.equal(vector.flatten(net), nn.utils.parameters_to_vector(p for p in net.parameters() if p.requires_grad))
    assert [vector.slices[n] for n in vector.names] == [slice(0, 1), slice(1, 7), slice(7, 10), slice(10, 16)]
    assert all(vector.tensors(net)[n] is p for n, p in net.named_parameters() if p.requires_grad)


def test_the_order_is_the_nets_whatever_the_callers():
    net = Net()
    assert ParameterVector.of(net, ["second.weight", "first.bias"]).names == ("first.bias", "second.weight")
    assert ParameterVector.of(net, {"first.bias": None, "scale": None}).names == ("scale", "first.bias")
    assert ParameterVector.of(net, (n for n in ["scale"])).names == ("scale",)


def test_a_tied_parameter_goes_by_any_of_its_names():
    net = Net()
    assert ParameterVector.of(net, ["again.weight"]).names == ("second.weight",)
    assert ParameterVector.of(net, ["again.weight", "second.weight"]).numel == 6


def test_a_frozen_parameter_may_be_named():
    assert ParameterVector.of(Net(), ["frozen"]).numel == 4


def test_flatten_is_a_copy():
    net = Net()
    theta = ParameterVector.of(net).flatten(net)
    theta += 1
    assert net.scale.item() == 2.0 and not theta.requires_grad


def test_masks():
    net = Net()
    mask = torch.zeros(3, 2, dtype=torch.bool)
    mask[0, 1] = mask[2, 0] = True
    vector = ParameterVector.of(net, {"first.weight": mask, "first.bias": None})
    assert vector.numel == 5 and vector.masks["first.weight"].tolist() == [1, 4]
    theta = vector.flatten(net)
    assert torch.equal(theta[:2], net.first.weight.detach()[mask])
    new = vector.unflatten(torch.arange(5.0), net)
    assert torch.equal(new["first.weight"][mask], torch.tensor([0.0, 1.0]))
    assert torch.equal(new["first.weight"][~mask], net.first.weight.detach()[~mask])
    assert torch.equal(new["first.bias"], torch.tensor([2.0, 3.0, 4.0]))
    # a mask of all is no mask, a mask of none is not there
    full = ParameterVector.of(net, {"first.weight": torch.ones(3, 2, dtype=torch.bool), "first.bias": torch.zeros(3, dtype=torch.bool)})
    assert full.names == ("first.weight",) and not full.masks


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_split_and_unflatten_undo_flatten(data):
    """For any subset: unflatten(flatten(net)) is the net, and any vector comes back from where it was put."""
    net = Net()
    chosen = {}
    for name, p in net.named_parameters():
        bits = data.draw(st.lists(st.booleans(), min_size=p.numel(), max_size=p.numel()))
        chosen[name] = torch.tensor(bits).reshape(p.shape)
    if not any(m.any() for m in chosen.values()):
        chosen["scale"] = None
    vector = ParameterVector.of(net, chosen)
    own = dict(net.named_parameters())
    for name, value in vector.unflatten(vector.flatten(net), net).items():
        assert torch.equal(value, own[name].detach())
    theta = torch.randn(vector.numel)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name, value in vector.unflatten(theta, net).items():
            dict(other.named_parameters())[name].copy_(value)
    assert torch.equal(vector.flatten(other), theta)
    batch = torch.randn(3, vector.numel)
    assert torch.equal(torch.cat(list(vector.split(batch).values()), -1), batch)


@pytest.mark.parametrize(
    "chosen, error, message",
    [
        ("scale", TypeError, r"parameters='scale' is a str; pass a list of names, e.g. \['scale'\]"),
        (["nowhere"], ValueError, r"parameters \['nowhere'\] are not in the net; it has \['scale', "),
        ([], ValueError, "the selected subset of parameters is empty"),
        ({}, ValueError, "the selected subset of parameters is empty"),
        ({"first.bias": torch.zeros(3, dtype=torch.bool)}, ValueError, "the selected subset of parameters is empty"),
        ({"first.bias": torch.ones(3)}, ValueError, r"mask for first.bias is torch.float32 \(3,\); expected bool \(3,\)"),
        ({"first.bias": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask for first.bias is torch.bool \(2,\); expected bool \(3,\)"),
        ({"first.bias": [True, False, True]}, TypeError, r"mask for first.bias is a list; expected a bool tensor \(3,\)"),
        (list(Net().parameters()), TypeError, r"parameters holds Parameter objects; expected names, e.g. \['scale', 'frozen'\]"),
    ],
    ids=["str", "unknown", "no name", "no mask", "mask of none", "float mask", "short mask", "list mask", "parameters"],
)
def test_what_cannot_be_a_selection_says_so(chosen, error, message):
    with pytest.raises(error, match=message):
        ParameterVector.of(Net(), chosen)


def test_nets_with_nothing_to_be_uncertain_about():
    with pytest.raises(ValueError, match=r"Linear has no parameter with requires_grad=True \(2 parameters, all frozen\); unfreeze some, or name"):
        ParameterVector.of(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match=r"ReLU has no parameter with requires_grad=True \(0 parameters"):
        ParameterVector.of(nn.ReLU())
    whole = nn.Module()
    whole.count = nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)
    with pytest.raises(ValueError, match=r"parameters \['count'\] are not floating point \(torch.int64\)"):
        ParameterVector.of(whole, ["count"])


def test_a_vector_of_another_size_is_refused():
    net = Net()
    vector = ParameterVector.of(net)
    with pytest.raises(ValueError, match="vector has 5 entries, the selected weights are 16"):
        vector.split(torch.zeros(5))
    with pytest.raises(ValueError, match="vector has 5 entries"):
        vector.unflatten(torch.zeros(5), net)
