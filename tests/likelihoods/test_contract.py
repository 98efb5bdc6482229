"""The likelihood contract, over all families: autodiff, enumeration, quadrature and scipy as second opinions, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgn import likelihoods as L

from .families import FAMILIES, Family

D = torch.float64
close = lambda a, b, tol=1e-9: torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def outcomes(family, lik, f):
    """Every y (or a quadrature grid of them) for ONE row f [c], each output moving alone: values [q], weights [q]."""
    if family.support == "elliptical":                                         # rings around f: E over y = f + ρ L (cos θ, sin θ)
        u = torch.linspace(-12, 12, 1501, dtype=D).exp()
        θ = torch.arange(16, dtype=D) * (2 * np.pi / 16)
        L_ = torch.linalg.cholesky(torch.as_tensor(lik.scale_matrix.detach() if lik.scale_matrix.ndim == 2 else lik.scale_matrix.detach().diag()))
        ring = torch.stack([θ.cos(), θ.sin()], -1) @ L_.T
        weights = (u.square() * (24 / 1500) * L_.diagonal().prod() * (2 * np.pi / 16)).repeat_interleave(16)
        return f + (u[:, None, None] * ring).reshape(-1, 2), weights
    if family.support == "real":
        u = torch.linspace(-25, 25, 40_001, dtype=D)
        return f[0] + u.sinh(), u.cosh() * (50 / 40_000)
    if family.support == "positive":
        u = torch.linspace(-30, 8, 40_001, dtype=D)
        return u.exp(), u.exp() * (38 / 40_000)
    if family.support == "unit":
        u = torch.linspace(-60, 60, 40_001, dtype=D)
        return u.sigmoid().clamp(1e-300, 1 - 1e-16), u.sigmoid() * (-u).sigmoid() * (120 / 40_000)
    top = {"binary": 2, "counts": 400, "counts-5": 6, "labels": f.shape[-1], "labels-4": 4, "labels-2": 2}[family.support]
    values = torch.arange(top)
    return (values if family.support.startswith("labels") else values.to(D)), torch.ones(top, dtype=D)


def rows_of(family, f, values):
    """Rows in which all outputs take the same value: y in full shape for f [q c]."""
    F = f.expand(len(values), -1)
    shape = family.build().target_shape(F)
    if values.shape == shape:
        return F, values
    return F, values.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def test_gradient_and_hessian_by_autodiff(family):
    lik = family.build()
    f, y = family.data(7)
    for row in range(7):
        log_p = lambda x, r=row: lik.log_prob(x, y[r])
        close(lik.gradient(f, y)[row], torch.autograd.functional.jacobian(log_p, f[row]))
        close(lik.neg_hessian(f, y)[row], -torch.autograd.functional.hessian(log_p, f[row]))


def test_density_by_scipy(family):
    if family.oracle is None:
        pytest.skip("scipy has no such family")
    lik = family.build()
    f, y = family.data(6)
    want = [(o.logpdf if hasattr(o, "logpdf") else o.logpmf)(y_n.numpy()) for o, y_n in
            ((family.oracle(f_n.numpy()), y_n) for f_n, y_n in zip(f, y))]
    close(lik.log_prob(f, y), torch.tensor(np.array(want, dtype=float)).reshape(6))


def test_density_normalises_and_ggn_is_the_expected_hessian(family):
    """E_{y|f} by enumeration or a fine grid. With several independent outputs the diagonal blocks are integrated output by output."""
    if family.support == "vector":
        return the_vector_case(family)
    lik = family.build()
    f = family.data(1)[0]
    values, weights = outcomes(family, lik, f[0])
    F, y = rows_of(family, f[0], values)
    if y.ndim > 1 and y.shape[-1] > 1 and family.support != "elliptical":      # p(y_k) alone: the other outputs are missing
        ggn = torch.zeros(family.c, family.c, dtype=D)
        for k in range(y.shape[-1]):
            if isinstance(lik, L.FromDistribution):
                p = (lik._outputs(F).log_prob(y)[:, k]).exp() * weights
                H = torch.zeros(len(F), family.c, family.c, dtype=D)
                H[:, k, k] = lik.neg_hessian(F, y)[:, k, k]                    # its Hessian is diagonal: outputs are independent
            else:
                alone = torch.full_like(y, torch.nan)
                alone[:, k] = y[:, k]
                p = lik.log_prob(F, alone).exp() * weights
                H = lik.neg_hessian(F, alone)
            close(p.sum(), torch.ones((), dtype=D))
            ggn += torch.einsum("q,qij->ij", p, H)
    else:
        p = (lik.conditional(F).log_prob(y) if not family.density else lik.log_prob(F, y)).exp() * weights
        close(p.sum(), torch.ones((), dtype=D))
        ggn = torch.einsum("q,qij->ij", p, lik.neg_hessian(F, y))
    close(lik.ggn(f)[0], ggn, 1e-8 if family.exact else 0.05)


def the_vector_case(family):
    """Gauss-Hermite over y ~ p(y | f), whose moments scipy knows: exact, since the Hessian is a polynomial of degree two in y."""
    lik = family.build()
    f = family.data(1)[0]
    o = family.oracle(f[0].numpy())
    d = len(o.mean)
    x, w = np.polynomial.hermite_e.hermegauss(3)
    z = torch.tensor(np.stack(np.meshgrid(*[x] * d, indexing="ij"), -1).reshape(-1, d))
    w = torch.tensor(np.stack(np.meshgrid(*[w] * d, indexing="ij"), -1).prod(-1).ravel() / (2 * np.pi) ** (d / 2))
    y = torch.tensor(np.asarray(o.mean)) + z @ torch.linalg.cholesky(torch.tensor(np.asarray(o.cov))).T
    H = lik.neg_hessian(f.expand(len(y), -1), y)
    close(lik.ggn(f)[0], torch.einsum("q,qij->ij", w, H))
    y[:, 0] = torch.nan                                                        # the same with an output integrated out
    H = lik.neg_hessian(f.expand(len(y), -1), y)
    close(lik.ggn(f, y[:1])[0], torch.einsum("q,qij->ij", w, H))


SEVERAL = [f for f in FAMILIES if f.density and not f.name.startswith("from") and f.data(1)[1].ndim == 2 and f.data(1)[1].shape[1] > 1]


@pytest.mark.parametrize("family", SEVERAL, ids=lambda family: family.name)
def test_rows_missing_in_part_are_marginals(family):
    """p of what is left is ∫ p(y) dy_0 over a grid, and its derivatives are autodiff's; other rows do not notice."""
    lik = family.build()
    f, y = family.data(5)
    gone = y.clone()
    gone[0, 0] = gone[1, -1] = gone[2] = torch.nan
    grid = y.new_tensor(range(400)) if family.support in ("counts", "binary") else None
    if family.support == "binary":
        grid, weights = grid[:2], torch.ones(2, dtype=D)
    elif grid is not None:
        weights = torch.ones(400, dtype=D)
    else:
        one = {"vector": "real", "elliptical": "real"}.get(family.support, family.support)
        grid, weights = outcomes(Family("", family.make, 1, one), lik, y[0, :1])
    whole = y[0].expand(len(grid), -1).clone()
    whole[:, 0] = grid
    close(lik.log_prob(f, gone)[0], (lik.log_prob(f[0].expand(len(grid), -1), whole) + weights.log()).logsumexp(0), 1e-7)
    close(lik.log_prob(f, gone)[3:], lik.log_prob(f, y)[3:])
    for row in range(3):
        log_p = lambda x, r=row: lik.log_prob(x, gone[r])
        close(lik.gradient(f, gone)[row], torch.autograd.functional.jacobian(log_p, f[row]))
        close(lik.neg_hessian(f, gone)[row], -torch.autograd.functional.hessian(log_p, f[row]))
    S = lik.ggn_root(f, gone)
    close(S @ S.mT, lik.ggn(f, gone))
    lik.validate(f, gone)
    assert torch.equal(lik.response(f, gone).isnan(), gone.isnan())


def test_response_and_its_moments(family):
    """E[y | f] and Cov[y | f] of y as a vector, by enumeration or a grid over y where y is one thing, from draws where it is a vector."""
    lik = family.build()
    f, y = family.data(3)
    mean, cov = lik.conditional_moments(f)
    r = lik.response(f, y)
    d = r.shape[-1]
    assert r.shape == mean.shape == (3, d) and cov.shape == (3, d, d)
    gone = y.clone()
    gone[1] = family.missing
    assert lik.response(f, gone)[1].isnan().all()
    close(lik.response(f, gone)[[0, 2]], r[[0, 2]])
    if family.support == "elliptical" or (y.ndim > 1 and y.shape[-1] > 1):
        many = f[:1].expand(40_000, -1)
        draws = lik.response(many, lik.sample(many, torch.Generator().manual_seed(0)))
        e = draws - mean[0]
        assert (e.mean(0).abs() / (cov[0].diagonal() / 40_000).sqrt()).max() < 4.5
        products = e.unsqueeze(-1) * e.unsqueeze(-2)
        assert ((products.mean(0) - cov[0]).abs() / (products.std(0) / 200)).max() < 4.5
        return
    values, weights = outcomes(family, lik, f[0])
    F, y = rows_of(family, f[0], values)
    p = lik.conditional(F).log_prob(y).exp() * weights
    r = lik.response(F, y)
    want = p @ r
    tol = 1e-7 if family.support != "real" else 2e-4                           # a t's second moment beyond the grid
    close(mean[0], want, tol)
    close(cov[0], torch.einsum("q,qi,qj->ij", p, r - want, r - want), tol)


def test_root_of_ggn_and_psd(family):
    lik = family.build()
    f, y = family.data(5)
    for target in (None, y):
        ggn, S = lik.ggn(f, target), lik.ggn_root(f, target)
        close(S @ S.mT, ggn)
        assert torch.linalg.eigvalsh(ggn).min() > -1e-12


def test_missing_rows_are_zero(family):
    lik = family.build()
    f, y = family.data(4)
    gone = y.clone()
    gone[1] = family.missing
    for function in (lik.log_prob, lik.gradient, lik.neg_hessian, lik.ggn, lik.ggn_root):
        assert function(f, gone)[1].abs().sum() == 0
        close(function(f, gone)[[0, 2, 3]], function(f, y)[[0, 2, 3]])
    assert lik.observed(f, gone).tolist() == [True, False, True, True] and bool(lik.observed(f, y).all())
    lik.validate(f, gone)
    x = f.clone().requires_grad_()
    assert torch.autograd.grad(lik.log_prob(x, gone).sum(), x)[0].isfinite().all()
    kept = lik.statistics(f, gone)
    for k, v in lik.statistics(f[[0, 2, 3]], y[[0, 2, 3]]).items():
        close(kept[k], v)


def test_positions_equal_flat_rows(family):
    lik = family.build()
    f, y = family.data(3, 2, 4)
    flat_f, flat_y = f.reshape(24, family.c), y.reshape(24, *y.shape[3:])
    for function in (lik.log_prob, lik.gradient, lik.neg_hessian, lik.ggn, lik.ggn_root):
        out = function(f, y)
        close(out.reshape(24, *out.shape[3:]), function(flat_f, flat_y), 1e-9)
    lik.validate(f, y)
    assert lik.sample(f).shape == y.shape


def test_shapes_of_one_output(family):
    """y may lack or repeat a trailing dimension of one; [n] against [n 1] never becomes [n n]."""
    lik = family.build()
    f, y = family.data(5)
    if y.ndim == 2 and y.shape[1] == 1:
        close(lik.log_prob(f, y[:, 0]), lik.log_prob(f, y))
    if y.ndim == 1:
        close(lik.log_prob(f, y[:, None]), lik.log_prob(f, y))
    assert lik.log_prob(f, y).shape == (5,)
    with pytest.raises(ValueError, match=r"y has shape \[1, 5.*f has shape \[5, "):
        lik.log_prob(f, y[None])
    with pytest.raises(ValueError, match=r"y has shape \[4"):
        lik.validate(f, y[:4])
    with pytest.raises(ValueError, match="y has shape"):
        lik.gradient(f, y.new_zeros(5, 7))


def test_statistics_are_additive_and_sufficient(family):
    lik = family.build()
    f, y = family.data(9)
    whole, a, b = lik.statistics(f, y), lik.statistics(f[:4], y[:4]), lik.statistics(f[4:], y[4:])
    for k in whole:
        assert whole[k].dtype == D
        close(a[k] + b[k], whole[k])
    close(lik.log_prob_of(whole), lik.log_prob(f, y).sum())


def test_sample_moments(family):
    lik = family.build()
    f = family.data(1)[0]
    many = f.expand(40_000, -1)
    y = lik.sample(many, generator=torch.Generator().manual_seed(0)).to(D)
    mean, variance = lik.moments(f)
    if isinstance(lik, L.Categorical):
        y = torch.nn.functional.one_hot(y.long(), family.c).to(D)
    error = (y.mean(0) - mean[0]).abs() / (variance[0] / 40_000).sqrt()
    assert error.max() < 4.5
    torch.testing.assert_close(y.var(0), variance[0], rtol=0.1, atol=0)
    close(lik.sample(f, torch.Generator().manual_seed(3)), lik.sample(f, torch.Generator().manual_seed(3)))


def test_conditional_is_the_density(family):
    lik = family.build()
    f, y = family.data(5)
    p = lik.conditional(f)
    if family.density:
        close(p.log_prob(y), lik.log_prob(f, y))
    assert p.batch_shape == (5,)


def test_ggn_scale(family):
    lik = family.build()
    f, y = family.data(3)
    scale = lik.ggn_scale()
    assert scale.shape == ()
    before = lik.ggn(f) / scale
    with torch.no_grad():
        for p in lik.parameters():
            p.add_(0.3)
    if scale.requires_grad:
        close(lik.ggn(f) / lik.ggn_scale(), before)


def test_config_round_trip(family):
    import json

    lik = family.build()
    f, y = family.data(5)
    if isinstance(lik, L.FromDistribution):
        with pytest.raises(TypeError, match="rebuild it in code"):
            lik.to_config()
        return
    again = L.from_config(json.loads(json.dumps(lik.to_config())))
    assert type(again) is type(lik) and repr(again) == repr(lik)
    close(again.log_prob(f, y), lik.log_prob(f, y), 1e-12)
    again.load_state_dict(lik.state_dict())
    assert torch.equal(again.log_prob(f, y), lik.log_prob(f, y))


def test_copies_and_repr(family):
    import copy

    lik = family.build()
    f, y = family.data(2)
    close(copy.deepcopy(lik).log_prob(f, y), lik.log_prob(f, y))
    assert repr(lik).startswith(type(lik).__name__ + "(")


def test_float32_stays_float32_and_close(family):
    lik = family.build()
    f, y = family.data(4)
    y32 = y.float() if y.is_floating_point() else y.int()
    for function in (lik.log_prob, lik.gradient, lik.neg_hessian, lik.ggn, lik.ggn_root):
        out = function(f.float(), y32)
        if not isinstance(lik, L.FromDistribution):
            assert out.dtype == torch.float32
        if family.exact:
            torch.testing.assert_close(out.double(), function(f, y), rtol=2e-3, atol=2e-4)
    assert lik.sample(f.float()).dtype in (torch.float32, torch.int64)


def test_shapes_on_the_meta_device(family):
    lik = family.build()
    if isinstance(lik, L.FromDistribution):
        pytest.skip("torch distributions look at their arguments' values")
    f, y = family.data(4)
    f, y = f.to("meta"), y.to("meta")
    lik.validate(f, y)
    assert lik.log_prob(f, y).shape == (4,) and lik.gradient(f, y).shape == f.shape
    assert lik.ggn(f, y).shape == lik.neg_hessian(f, y).shape == (4, family.c, family.c)
    assert lik.ggn_root(f, y).device.type == "meta"


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000), n=st.integers(1, 6))
def test_laws(data, seed, n):
    """Rows keep to themselves: a permutation of rows permutes everything; the GGN is PSD wherever f goes."""
    family = data.draw(st.sampled_from([f for f in FAMILIES if f.exact]))
    lik = family.build()
    f, y = family.data(n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for function in (lik.log_prob, lik.gradient, lik.neg_hessian, lik.ggn, lik.ggn_root):
        close(function(f, y)[order], function(f[order], y[order]))
    ggn = lik.ggn(3 * f)
    assert torch.linalg.eigvalsh(ggn).min() >= -1e-9 * max(1.0, float(ggn.detach().abs().max()))
    close(lik.log_prob_of(lik.statistics(f, y)), lik.log_prob_of(lik.statistics(f[order], y[order])))
