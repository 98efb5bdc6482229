"""The dense oracles against torch.func, finite differences and each other: a second opinion needs one too."""

import pytest
import torch
from torch.func import functional_call, jacrev

from tests.oracles import dense
from tests.zoo.modules import ZOO, named

# torch.func has no saved-tensor hooks
FUNCTIONAL = [c for c in ZOO if c.name != "checkpointed"]
# central differences see what autograd is told to leave out
CUT = {"embedding_padding", "detached"}


def spd(n: int, p: int, generator: torch.Generator) -> torch.Tensor:
    root = torch.randn(n, p, p, dtype=torch.float64, generator=generator)
    return root @ root.mT / p


@pytest.mark.parametrize("case", FUNCTIONAL, ids=str)
def test_jacobian_is_jacrev(case):
    net, x, r = case.build()
    q = {name: w.detach() for name, w in dense.weights(net).items()}

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            f = dense.call(self.net, x)
            return f.reshape(len(f), -1)

    J = jacrev(lambda theta: functional_call(Flat(), {f"net.{k}": v for k, v in theta.items()}, (x,)))(q)
    J = torch.cat([J[f"{name}"].reshape(dense.size(x), r, -1) for name in q], -1)
    torch.testing.assert_close(dense.jacobian(net, x), J, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_jacobian_is_a_directional_difference(case, generator):
    net, x, _ = case.build()
    J = dense.jacobian(net, x)
    v = torch.randn(J.shape[-1], dtype=torch.float64, generator=generator)
    if case.name in CUT:
        v = v * (J.abs().amax((0, 1)) > 0)
    theta, step, sides = dense.vector(net), 1e-6, []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(theta + sign * step * v, dense.weights(net).values())
        sides.append(dense.outputs(net, x))
    torch.testing.assert_close(J @ v, (sides[0] - sides[1]) / (2 * step), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "tied_embedding", "answer_mapping", "siamese", "segmentation"])
def test_jacobian_entry_by_entry(name):
    net, x, _ = named(name).build()
    torch.testing.assert_close(dense.jacobian(net, x), dense.finite_difference_jacobian(net, x), atol=1e-7, rtol=1e-6)


def test_jacobian_leaves_the_net_alone():
    net, x, _ = named("resnet").build()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    dense.jacobian(net, x)
    dense.finite_difference_jacobian(net, x, names=["7.bias"])
    dense.layer_factors(net, x, "7")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(w.grad is None for w in net.parameters()) and not any(m._forward_hooks for m in net.modules())


def test_names_and_mask_pick_columns():
    net, x, _ = named("mlp").build()
    J = dense.jacobian(net, x)
    assert dense.jacobian(net, x, names=["2.weight", "0.bias"]).equal(J[..., [*range(12, 16), *range(16, 32)]])
    mask = torch.arange(J.shape[-1]) % 3 == 0
    assert dense.jacobian(net, x, mask=mask).equal(J[..., mask])
    assert dense.vector(net, mask=mask.nonzero().flatten()).equal(dense.vector(net)[mask])
    with pytest.raises(KeyError, match="no trainable parameter is called"):
        dense.jacobian(net, x, names=["7.weight"])


def test_rows_put_classes_last():
    net, x, r = named("segmentation").build()
    J = dense.jacobian(net, x, rows=lambda f: f.movedim(1, -1))
    raw = dense.jacobian(net, x).unflatten(1, (2, 3, 3))
    assert J.equal(raw.movedim(1, 3).flatten(1, 3))
    Lam = dense.softmax_ggn(dense.outputs(net, x, rows=lambda f: f.movedim(1, -1)).unflatten(1, (3, 3, 2)))
    assert dense.position_blocks(Lam).shape == (3, r, r)


def test_hessian_is_a_difference_of_gradients(generator):
    for name in ("mlp", "sdpa", "lstm", "tied_embedding"):
        net, x, _ = named(name).build()
        prec = torch.rand(len(dense.vector(net)), dtype=torch.float64, generator=generator) + 0.5
        log_lik = lambda f: -(f.sin() + f**3).sum()
        H = dense.hessian(net, x, log_lik, prec)
        torch.testing.assert_close(H, dense.finite_difference_hessian(net, x, log_lik, prec), atol=1e-6, rtol=1e-6)


def test_ggn_is_the_hessian_of_a_linear_model(generator):
    """Softmax regression: J does not move, so GGN and Hessian are one matrix."""
    net, x, _ = named("linear").build()
    y = torch.randint(2, (len(x),), generator=generator)
    H = dense.hessian(net, x, lambda f: -torch.nn.functional.cross_entropy(f, y, reduction="sum"))
    torch.testing.assert_close(dense.ggn(dense.jacobian(net, x), dense.softmax_ggn(net(x).detach())), H)


@pytest.mark.skipif(not torch.__version__.startswith("2.14"), reason="a defect measured in torch 2.14")
def test_weight_norm_still_has_a_wrong_second_derivative():
    """When this fails, torch is mended: drop the warnings in `dense.hessian` and in the table of the zoo."""
    net, x, _ = named("weight_norm").build()
    log_lik = lambda f: f.sin().sum()
    assert not torch.allclose(
        dense.hessian(net, x, log_lik), dense.finite_difference_hessian(net, x, log_lik), atol=1e-2
    )


def test_evidence_and_predictions_are_those_of_bayesian_linear_regression(generator):
    """A linear net under Gaussian noise, weight space (Laplace) against data space (conjugate)."""
    net, x, c = named("linear").build()
    n, noise = len(x), 0.3
    J, y = dense.jacobian(net, x), torch.randn(n, c, dtype=torch.float64, generator=generator)
    prec = torch.rand(J.shape[-1], dtype=torch.float64, generator=generator) + 0.5
    mean = torch.randn(J.shape[-1], dtype=torch.float64, generator=generator)
    exact = dense.linear_regression(J.flatten(0, 1), y.flatten(), noise, prec, mean)
    log_lik = torch.distributions.Normal((J @ exact.mean), noise**0.5).log_prob(y).sum()
    H = dense.ggn(J, torch.eye(c, dtype=torch.float64).expand(n, c, c) / noise)
    torch.testing.assert_close(dense.log_evidence(log_lik, exact.mean, mean, prec, H), exact.log_evidence)
    cov = dense.posterior_cov(H, prec)
    torch.testing.assert_close(cov, exact.cov)
    f_mean, f_cov = exact.predict(J.flatten(0, 1))
    torch.testing.assert_close(dense.joint_function_cov(J, cov), f_cov)
    torch.testing.assert_close(f_mean.view(n, c), J @ exact.mean)
    blocks = torch.stack([f_cov[i * c : (i + 1) * c, i * c : (i + 1) * c] for i in range(n)])
    torch.testing.assert_close(dense.function_cov(J, cov), blocks)


def test_finite_difference_gradient(generator):
    x = torch.randn(2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    f = lambda x: (x.sin() * x[:1].exp()).sum()
    torch.testing.assert_close(dense.finite_difference(f, x), torch.autograd.grad(f(x), x)[0], atol=1e-8, rtol=1e-8)


# -- Kronecker factors ------------------------------------------------------------------------------------------------------------


def block(net, x, layer, S):
    """The exact block of H in row-major W̃ order, from the autograd Jacobian."""
    module = net.get_submodule(layer)
    names = [f"{layer}.weight"] + ([f"{layer}.bias"] if module.bias is not None else [])
    J = dense.jacobian(net, x, names)[..., dense.homogeneous_order(module.weight, module.bias is not None)]
    return dense.ggn(J, S @ S.mT), J


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("mlp", "2"), ("mlp_no_bias", "0"), ("linear_over_sequence", "0"), ("linear_over_grid", "2"), ("answer_mapping", "fc"),
        ("conv2d", "2"), ("conv2d_strides", "0"), ("segmentation", "0"), ("resnet", "4.downsample.0"), ("sdpa", "0.qkv"),
    ],
)  # fmt: skip
def test_factors_give_the_jacobian(name, layer):
    net, x, _ = named(name).build()
    factors = dense.layer_factors(net, x, layer)
    n, r = factors.delta.shape[:2]
    _, J = block(net, x, layer, torch.eye(r, dtype=torch.float64).expand(n, r, r))
    torch.testing.assert_close(dense.layer_jacobian(factors), J, atol=1e-12, rtol=1e-10)


def test_expand_and_reduce_agree_without_shared_weights(generator):
    net, x, r = named("mlp").build()
    S = dense.psd_root(spd(len(x), r, generator))
    factors = dense.layer_factors(net, x, "2")
    torch.testing.assert_close(dense.kron_expand(factors, S).matrix(), dense.kron_reduce(factors, S).matrix())


@pytest.mark.parametrize("variant", [dense.kron_expand, dense.kron_reduce])
def test_kron_is_exact_for_one_datum(variant, generator):
    net, x, r = named("mlp").build()
    x, S = x[:1], dense.psd_root(spd(1, r, generator))
    H = dense.ggn(dense.jacobian(net, x), S @ S.mT)
    K = dense.kron_ggn(net, x, S, ["0", "2", "4"], variant)
    for a, b in ((0, 16), (16, 36), (36, 51)):
        torch.testing.assert_close(K[a:b, a:b], H[a:b, a:b])
    assert K[:16, 16:].count_nonzero() == 0


def square_loss(n, r):
    return torch.eye(r, dtype=torch.float64).expand(n, r, r)


def test_kron_is_exact_for_deep_linear_nets_under_square_loss():
    net, x, r = named("deep_linear").build()
    for layer in ("0", "1", "2"):
        H, _ = block(net, x, layer, square_loss(len(x), r))
        factors = dense.layer_factors(net, x, layer)
        torch.testing.assert_close(dense.kron_expand(factors, square_loss(len(x), r)).matrix(), H)


def test_expand_is_exact_where_positions_do_not_mix():
    net, x, r = named("linear_per_position").build()
    H, _ = block(net, x, "2", square_loss(len(x), r))
    factors = dense.layer_factors(net, x, "2")
    torch.testing.assert_close(dense.kron_expand(factors, square_loss(len(x), r)).matrix(), H)
    assert not torch.allclose(dense.kron_reduce(factors, square_loss(len(x), r)).matrix(), H, rtol=0.1)


def test_reduce_is_exact_before_mean_pooling():
    net, x, r = named("deep_linear_over_sequence").build()
    H, _ = block(net, x, "0", square_loss(len(x), r))
    factors = dense.layer_factors(net, x, "0")
    torch.testing.assert_close(dense.kron_reduce(factors, square_loss(len(x), r)).matrix(), H)
    assert not torch.allclose(dense.kron_expand(factors, square_loss(len(x), r)).matrix(), H, rtol=0.1)


def test_factors_refuse_a_layer_used_twice():
    net, x, _ = named("module_twice").build()
    with pytest.raises(ValueError, match="ran 2 times"):
        dense.layer_factors(net, x, "block")
