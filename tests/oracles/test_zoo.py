"""The zoo keeps its promises: small, repeatable, off its defaults, and a datum's answer does not depend on its neighbours."""

import pytest
import torch

from tests.oracles import dense
from tests.zoo import pretrained
from tests.zoo.modules import ZOO


def leaves(x):
    return (
        [x]
        if isinstance(x, torch.Tensor)
        else [t for v in (x.values() if isinstance(x, dict) else x) for t in leaves(v)]
    )


def test_names_are_unique():
    assert len({c.name for c in ZOO}) == len(ZOO)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_member(case):
    state = torch.get_rng_state()
    net, x, r = case.build()
    again, x_again, _ = case.build()
    assert torch.equal(state, torch.get_rng_state()), "the global random state moved"
    assert all(torch.equal(a, b) for a, b in zip(leaves(x), leaves(x_again), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    assert not any(m.training for m in net.modules())
    assert all(t.dtype == torch.float64 for t in [*net.parameters(), *leaves(x)] if t.is_floating_point())
    assert len(dense.vector(net)) <= 600 and 3 <= dense.size(x) <= 5

    before = {k: v.clone() for k, v in net.state_dict().items()}
    f = dense.call(net, x)
    assert isinstance(f, torch.Tensor) and f.dtype == torch.float64 and f.isfinite().all()
    f = f.detach().reshape(len(f), -1)
    assert f.shape == (dense.size(x), r)
    torch.testing.assert_close(dense.outputs(net, x), f, atol=1e-12, rtol=1e-12)
    with torch.no_grad():  # fused paths
        torch.testing.assert_close(dense.call(net, x).reshape(len(f), -1), f, atol=1e-12, rtol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(leaves(x), leaves(x_again), strict=True)), (
        "the net wrote into its input"
    )
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the net has state of its own"
    assert f.std(0).min() > 1e-6, "an output is the same for all data"


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_marks_tell_the_truth(case):
    net, _, _ = case.build()
    every = [w for m in net.modules() for w in m.parameters(recurse=False)]
    assert ("tied" in case.marks) == (len({id(w) for w in every}) < len(every))
    assert ("frozen" in case.marks) == any(not w.requires_grad for w in net.parameters())
    assert ("batchnorm" in case.marks) == any(
        isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules()
    )
    J = dense.jacobian(*case.build()[:2])
    assert J.abs().amax() > 1e-3
    if "linear" in case.marks:
        kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.Embedding)
        assert all(isinstance(m, kinds) for m in net.modules() if list(m.parameters(recurse=False)))


PRETRAINED = {
    "ccexam_mnist": (pretrained.ccexam_mnist, {"n": 64}, 10),
    "ccexam_usps": (pretrained.ccexam_usps, {"n": 64}, 10),
    "ccexam_svhn": (pretrained.ccexam_samples, {"name": "svhn"}, 10),
    "crepe": (pretrained.crepe, {"n": 8}, 360),
    "minilm": (pretrained.minilm, {"n": 32}, 4),
    "resnet10t": (pretrained.timm_random, {}, 10),
    "vit_tiny": (pretrained.timm_random, {"name": "vit_tiny_patch16_224"}, 10),
}


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained(name):
    loader, options, outputs = PRETRAINED[name]
    state = torch.get_rng_state()
    net, x, y, likelihood, *_ = pretrained.loaded(loader, **options)
    assert torch.equal(state, torch.get_rng_state()), "the global random state moved"
    assert not any(m.training for m in net.modules()) and all(w.requires_grad for w in net.parameters())
    with torch.no_grad():
        f = dense.call(net, x)
    assert f.shape == (dense.size(x), outputs) and len(y) == len(f)
    if name in ("ccexam_mnist", "ccexam_usps", "ccexam_svhn", "minilm"):
        assert (f.argmax(1) == y).double().mean() > 0.8, "a trained net, and inputs prepared as it was trained on"
    if name == "crepe":
        assert (f.argmax(1) - y.argmax(1)).abs().max() <= 1, "within one bin of 20 cents of the true pitch"
