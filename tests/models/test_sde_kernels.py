"""State-space forms of kernels against the kernels themselves, over irregular, coincident and unsorted times."""

from __future__ import annotations

import copy
import math

import gpytorch
import mpmath
import numpy as np
import pytest
import torch
from gpytorch import kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bayesgn.models import sde_kernels
from bayesgn.models.sde_kernels import state_space

D = torch.float64


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=D)


def made(kernel, **values):
    """A kernel in float64 with the given hyper-parameters."""
    kernel = kernel.double()
    for name, value in values.items():
        setattr(kernel, name, tensor(value) if not isinstance(value, torch.Tensor) else value)
    return kernel


def matern(nu: float, lengthscale: float = 1.3):
    return made(kernels.MaternKernel(nu=nu), lengthscale=lengthscale)


def rbf(lengthscale: float = 1.3):
    return made(kernels.RBFKernel(), lengthscale=lengthscale)


def periodic(lengthscale: float = 4.0, period: float = 2.2):
    return made(kernels.PeriodicKernel(), lengthscale=lengthscale, period_length=period)


def linear():
    return made(kernels.LinearKernel(), variance=0.4)


def polynomial(power: int):
    return made(kernels.PolynomialKernel(power), offset=0.7)


def mixture():
    kernel = kernels.SpectralMixtureKernel(num_mixtures=2).double()
    kernel.mixture_weights, kernel.mixture_means = tensor([0.4, 0.6]), tensor([[[0.2]], [[0.5]]])
    kernel.mixture_scales = tensor([[[0.1]], [[0.05]]])
    return kernel


def scaled(kernel, scale: float = 1.7):
    return made(kernels.ScaleKernel(kernel), outputscale=scale)


# name: kernel, its error where it is approximated, states
KERNELS = {
    "Matern12": (matern(0.5), 0.0, 1),
    "Matern32": (matern(1.5), 0.0, 2),
    "Matern52": (matern(2.5), 0.0, 3),
    "Matern72": (made(sde_kernels.Matern72Kernel(), lengthscale=1.3), 0.0, 4),
    "RBF": (rbf(), 9.1e-6, 6),
    "Periodic": (periodic(), 1e-6, 9),
    "Periodic, rough": (periodic(0.2), 1e-6, 25),
    "Cosine": (made(kernels.CosineKernel(), period_length=2.2), 0.0, 2),
    "Constant": (made(kernels.ConstantKernel(), constant=0.6), 0.0, 1),
    "Linear": (linear(), 0.0, 2),
    "Polynomial": (polynomial(3), 0.0, 4),
    "SpectralMixture": (mixture(), 9.1e-6, 24),
    "Scale": (scaled(matern(1.5)), 0.0, 2),
    "Additive": (scaled(matern(0.5)) + matern(2.5, 0.4) + linear(), 0.0, 6),
    "Product": (matern(0.5, 2.0) * matern(1.5), 0.0, 2),
    "quasi-periodic": (scaled(matern(1.5, 5.0) * periodic()), 2e-6, 18),
    "Linear × Matern": (linear() * matern(1.5), 0.0, 4),
    "three factors": (matern(0.5) * scaled(linear() + matern(1.5)) * made(kernels.ConstantKernel(), constant=2.0), 0.0, 4),
}
EACH = pytest.mark.parametrize("name", KERNELS)
TIMES = tensor([3.1, 0.4, 0.4, -2.0, 7.5, 0.41, 3.1, 20.0, -2.0 + 1e-9, 12.25])


def gram(kernel, t: torch.Tensor) -> torch.Tensor:
    """The kernel matrix by pairs: gpytorch's matrix form expands squares, which for near times costs half of the digits."""
    n = len(t)
    i, j = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    # Two rows that are equal as a whole would be taken for a diagonal; a far-away last pair keeps them different.
    a, b = torch.cat([t[i], tensor([-50.0])]).unsqueeze(-1), torch.cat([t[j], tensor([90.0])]).unsqueeze(-1)
    return kernel(a, b, diag=True)[:-1].reshape(n, n)


def from_state_space(space, t: torch.Tensor) -> torch.Tensor:
    """H A(t − t') P(t') Hᵀ for t ≥ t'."""
    n = len(t)
    i, j = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    late, early = torch.maximum(t[i], t[j]), torch.minimum(t[i], t[j])
    return torch.einsum("a,kab,kbc,c->k", space.H, space.transition(late - early), space.covariance(early), space.H).reshape(n, n)


@EACH
def test_kernel(name):
    kernel, error, d = KERNELS[name]
    space = state_space(kernel)
    assert space.d == d
    K = gram(kernel, TIMES)
    assert_close(from_state_space(space, TIMES), K, rtol=1e-12, atol=1e-12 + error * float(K.detach().diagonal().max()))


@EACH
def test_gradients(name):
    kernel, error, _ = copy.deepcopy(KERNELS[name])
    weights = torch.randn(len(TIMES), len(TIMES), dtype=D, generator=torch.Generator().manual_seed(1))
    parameters = list(kernel.parameters())
    ours = torch.autograd.grad((weights * from_state_space(state_space(kernel), TIMES)).sum(), parameters)
    theirs = torch.autograd.grad((weights * gram(kernel, TIMES)).sum(), parameters)
    for a, b in zip(ours, theirs):
        assert_close(a, b, rtol=1e-11, atol=1e-11 + 100 * error)  # of a sum over 100 values


@EACH
def test_noise(name):
    """Q = P(t + dt) − A P(t) Aᵀ for long and short steps, PSD, with its gradient."""
    space = state_space(copy.deepcopy(KERNELS[name][0]))
    dt = torch.cat([torch.logspace(-9, 2, 23, dtype=D), tensor([0.0, 1e5])])
    t = torch.linspace(-3, 3, len(dt), dtype=D)
    A, P, Q = space.transition(dt), space.covariance(t), space.noise(t, dt)
    after = space.covariance(t + dt)
    size = 1 + after.abs().amax((1, 2), keepdim=True)  # a polynomial's is large, and differences of it keep so many digits
    assert_close(Q / size, (after - A @ P @ A.mT) / size, rtol=0, atol=2e-13)
    assert_close(Q, Q.mT, rtol=0, atol=0)
    eigenvalues = torch.linalg.eigvalsh(Q.detach())
    assert float((eigenvalues[:, 0] / eigenvalues[:, -1].clamp_min(1e-300)).min()) > -1e-14


@EACH
def test_noise_gradients(name):
    """Against those of the plain difference, where that keeps its digits."""
    kernel = copy.deepcopy(KERNELS[name][0])
    dt = tensor([0.03, 0.2, 0.9, 2.1, 6.0, 30.0])
    t = torch.linspace(-1, 2, len(dt), dtype=D)
    space = state_space(kernel)
    weights = torch.randn(len(dt), space.d, space.d, dtype=D, generator=torch.Generator().manual_seed(2))
    weights = weights + weights.mT
    parameters = list(kernel.parameters())
    Q = space.noise(t, dt)
    options = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad((weights * Q).sum(), parameters, **options) if Q.requires_grad else [torch.zeros_like(p) for p in parameters]
    plain = torch.autograd.grad((weights * sde_kernels.difference(state_space(kernel), t, dt)).sum(), parameters, **options)
    for a, b in zip(ours, plain):
        assert_close(a, b, rtol=1e-10, atol=1e-9)  # a polynomial's terms are of size 1e8 here


@EACH
@settings(max_examples=10, deadline=None)
@given(s=st.floats(0, 30), t=st.floats(0, 30), scale=st.floats(1e-6, 1.0))
def test_steps_compose(name, s, t, scale):
    """A(s) A(t) = A(s + t)."""
    space = state_space(KERNELS[name][0])
    A = space.transition(scale * tensor([s, t, s + t]))
    assert_close(A[0] @ A[1], A[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, (kernel, _, _) in KERNELS.items() if state_space(kernel).stationary])
def test_balanced(name):
    """States of stationary processes have variances near one, whatever the unit of time."""
    kernel = KERNELS[name][0]
    space = state_space(kernel)
    P = space.covariance(tensor([1e6]))[0].detach()
    eigenvalues = torch.linalg.eigvalsh(P)
    assert float(eigenvalues[-1] / eigenvalues[0]) < 10
    assert_close(space.covariance(tensor([-4.0]))[0], P, rtol=0, atol=0)


@pytest.mark.parametrize("lengthscale", [1e-6, 1e6])
@pytest.mark.parametrize("name", ["Matern12", "Matern32", "Matern52", "Matern72", "RBF"])
def test_any_unit_of_time(name, lengthscale):
    kernel = copy.deepcopy(KERNELS[name][0])
    kernel.lengthscale = tensor(lengthscale)
    space, unit = state_space(kernel), state_space(made(copy.deepcopy(kernel), lengthscale=1.0))
    dt = torch.logspace(-8, 2, 21, dtype=D)
    assert_close(space.transition(lengthscale * dt), unit.transition(dt), rtol=1e-12, atol=1e-13)
    Q, expected = space.noise(dt, lengthscale * dt), unit.noise(dt, dt)
    size = expected.abs().amax((1, 2), keepdim=True)  # about dt: an absolute tolerance would not see short steps
    assert_close(Q / size, expected / size, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
def test_noise_of_tiny_steps_keeps_its_digits(nu):
    """Var f(t + dt) given the state at t, by a Schur complement with 80 digits."""
    p, λ = round(nu - 0.5), math.sqrt(2 * nu)
    with mpmath.workdps(80):
        rate = mpmath.mpf(λ)

        def k(τ):  # Rasmussen and Williams (2006), eq. 4.16
            z, f = rate * τ, mpmath.factorial
            return mpmath.exp(-z) * f(p) / f(2 * p) * sum(f(p + i) / f(i) / f(p - i) * (2 * z) ** (p - i) for i in range(p + 1))

        # k = Σ_j c_j |τ|^j: derivatives at zero from the series, all even up to 2p
        series = mpmath.taylor(k, 0, 2 * p)
        for z in (1e-6, 1e-4, 1e-2, 0.5, 2.9, 3.1):
            τ = mpmath.mpf(z) / rate
            P = mpmath.matrix(p + 1, p + 1)
            for i in range(p + 1):
                for j in range(p + 1):
                    P[i, j] = (-1) ** j * series[i + j] * mpmath.factorial(i + j) if (i + j) % 2 == 0 else 0
            cross = mpmath.matrix([mpmath.diff(k, τ, i) if i else k(τ) for i in range(p + 1)])  # Cov(f(t + τ), f^(i)(t)) = (−1)^i k^(i)(τ)
            cross = mpmath.matrix([(-1) ** i * cross[i] for i in range(p + 1)])
            exact = 1 - (cross.T * mpmath.inverse(P) * cross)[0]
            ours = sde_kernels.Matern(nu, tensor(1.0)).noise(tensor([0.0]), tensor([z / λ]))[0, 0, 0]
            assert float(ours) == pytest.approx(float(exact), rel=1e-11)


@pytest.mark.parametrize("order, error", [(4, 4.5e-4), (5, 6.2e-5), (6, 9.1e-6), (7, 1.9e-6), (8, 3.8e-7), (9, 9.1e-8), (10, 2.3e-8)])
def test_how_near_the_rbf_is(order, error):
    space = sde_kernels.RBF(tensor(0.7), order)
    τ = torch.linspace(0, 10, 4001, dtype=D)
    k = space.transition(τ)[:, 0, 0]
    assert space.d == order and float((k - (-0.5 * (τ / 0.7) ** 2).exp()).abs().max()) < error
    assert float(k[0]) == pytest.approx(1, abs=1e-11)


@pytest.mark.parametrize("order, error", [(2, 1.5e-1), (4, 1.71e-2), (6, 3e-3), (8, 6.1e-4)])
def test_spectral_taylor(order, error):
    """By its definition: the spectral density at some frequencies, and how near the kernel is."""
    space = sde_kernels.SpectralTaylor(tensor(1.0), order)
    τ, h = torch.linspace(0, 40, 8001, dtype=D), 0.005
    k = space.H[0] ** 2 * space.transition(τ)[:, 0, 0]
    assert float((k - (-0.5 * τ**2).exp()).abs().max()) < error
    for ω in (0.0, 1.0, 2.5):
        y = (k * torch.cos(ω * τ)).numpy()
        simpson = h / 3 * (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum())
        S = math.sqrt(2 * math.pi) / sum((ω**2 / 2) ** i / math.factorial(i) for i in range(order + 1))
        assert 2 * simpson == pytest.approx(S, rel=1e-8)


@pytest.mark.parametrize("lengthscale", [0.02, 0.3, 1.0, 20.0, 1e5])
@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-10])
def test_periodic_is_as_near_as_asked(lengthscale, tol):
    space = sde_kernels.Periodic(tensor(lengthscale), tensor(3.0), tol)
    τ = torch.linspace(0, 3, 301, dtype=D)
    k = torch.einsum("a,kab,b->k", space.H, space.transition(τ), space.H)
    exact = (-2 * torch.sin(math.pi * τ / 3) ** 2 / lengthscale).exp()
    assert float((k - exact).abs().max()) < tol + 1e-14
    fewer = space.H[: space.d - 2] @ space.H[: space.d - 2]  # k(0) with a harmonic less
    assert space.d == 3 or 1 - float(fewer) > tol


def test_a_long_time_keeps_its_phase():
    """A million periods later, and in seconds since 1970."""
    space = state_space(KERNELS["Cosine"][0])  # cos(π τ / 2.2)
    dt = tensor([4.4e6 + 0.7, 1.7e9])
    exact = torch.as_tensor(np.array([float(mpmath.cos(mpmath.pi * mpmath.mpf(float(x)) / mpmath.mpf(2.2))) for x in dt]))
    assert_close(space.transition(dt)[:, 0, 0], exact, rtol=0, atol=4e-7)


def test_matern72_is_gpytorchs_kind():
    kernel = made(sde_kernels.Matern72Kernel(ard_num_dims=2), lengthscale=torch.tensor([[0.8, 2.0]], dtype=D))
    x = torch.rand(6, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    r = torch.cdist(x / kernel.lengthscale, x / kernel.lengthscale, compute_mode="donot_use_mm_for_euclid_dist")
    s = math.sqrt(7) * r
    assert_close(kernel(x).to_dense(), (1 + s + 2 * s**2 / 5 + s**3 / 15) * (-s).exp(), rtol=1e-10, atol=1e-10)
    assert_close(kernel(x, diag=True), torch.ones(6, dtype=D))


# -- a heir, other forms, errors ---------------------------------------------------------------------------------------------


class Closer(kernels.RBFKernel):
    """An RBF kernel to be approximated more closely."""


def test_another_form_for_a_heir():
    @state_space.register
    def _(kernel: Closer):
        return sde_kernels.RBF(kernel.lengthscale.double(), order=9)

    kernel = made(Closer(), lengthscale=1.3)
    assert_close(from_state_space(state_space(scaled(kernel)), TIMES), 1.7 * gram(kernel, TIMES), rtol=0, atol=2e-7)


class Plain(kernels.MaternKernel):
    """A heir that changes nothing of the kernel."""


def test_heirs_are_told_from_kernels_that_compute_something_else():
    assert state_space(Plain(nu=1.5)).d == 2
    for kernel in (kernels.RBFKernelGrad(), kernels.Matern52KernelGrad(), kernels.PolynomialKernelGrad(2)):
        with pytest.raises(TypeError, match=f"{type(kernel).__name__} has no state-space form"):
            state_space(kernel)


@pytest.mark.parametrize(
    "kernel", [kernels.RQKernel(), kernels.PiecewisePolynomialKernel(), scaled(kernels.RQKernel()) + linear(), matern(0.5) * kernels.RQKernel()]
)
def test_kernels_without_a_form_are_named(kernel):
    with pytest.raises(TypeError, match=r"(RQ|PiecewisePolynomial)Kernel has no state-space form .* models.GP .* register"):
        state_space(kernel)
    with pytest.raises(TypeError, match="int has no state-space form"):
        state_space(3)


def test_kernels_over_more_than_time():
    with pytest.raises(ValueError, match=r"MaternKernel has ard_num_dims=3 .* one input column"):
        state_space(kernels.MaternKernel(nu=0.5, ard_num_dims=3))
    with pytest.raises(ValueError, match=r"RBFKernel has batch shape \[2\] .* list of kernels"):
        state_space(kernels.RBFKernel(batch_shape=torch.Size([2])))
    with pytest.raises(ValueError, match=r"RBFKernel has active_dims=\[1\]"):
        state_space(scaled(linear()) + kernels.RBFKernel(active_dims=(1,)))
    with pytest.raises(ValueError, match="SpectralMixtureKernel has batch shape"):
        state_space(kernels.SpectralMixtureKernel(num_mixtures=2, ard_num_dims=2))
    assert state_space(kernels.ScaleKernel(kernels.RBFKernel(active_dims=(0,), ard_num_dims=1))).d == 6


def test_arguments_that_cannot_be():
    for wrong in (1.0, -0.5, 7.5, 0.75):
        with pytest.raises(ValueError, match=f"nu={wrong}"):
            sde_kernels.Matern(wrong, tensor(1.0))
    with pytest.raises(ValueError, match="order=3; expected 4 to 10"):
        sde_kernels.RBF(tensor(1.0), 3)
    with pytest.raises(ValueError, match="order=12; expected 2 to 8"):
        sde_kernels.SpectralTaylor(tensor(1.0), 12)
    with pytest.raises(ValueError, match="tol=0"):
        sde_kernels.Periodic(tensor(1.0), tensor(1.0), tol=0)
    with pytest.raises(ValueError, match=r"power=1.5; expected a whole number"):
        state_space(kernels.PolynomialKernel(1.5))
    with pytest.raises(ValueError, match="positive real part"):
        sde_kernels.Rational((1 + 1j, -2), (), tensor(1.0))
    with pytest.raises(ValueError, match="should differ"):
        sde_kernels.Rational((2, 2), (), tensor(1.0))
    with pytest.raises(ValueError, match=r"1 zero\(s\) for 2 states"):
        sde_kernels.Rational((1, 2), (1j,), tensor(1.0))


def test_rational_against_its_spectral_density():
    """Two real poles and a zero: partial fractions by hand."""
    p, q, z = 1.0, 2.5, 0.8
    space = sde_kernels.Rational((p, q), (z,), tensor(2.0), variance=3.0)
    τ = torch.linspace(0, 9, 40, dtype=D)
    # ∫ (ω² + z²) / ((ω² + p²)(ω² + q²)) e^{iωτ} dω ∝ (z² − p²) / p e^{−pτ} − (z² − q²) / q e^{−qτ}
    a, b = (z**2 - p**2) / p, -(z**2 - q**2) / q
    exact = 3 * (a * (-p * τ / 2).exp() + b * (-q * τ / 2).exp()) / (a + b)
    assert_close(space.H[0] ** 2 * space.transition(τ)[:, 0, 0], exact, rtol=1e-13, atol=1e-13)


def test_float32_parameters_are_widened():
    kernel = gpytorch.kernels.ScaleKernel(kernels.MaternKernel(nu=2.5))
    space = state_space(kernel)
    assert space.transition(tensor([0.1])).dtype == D and space.covariance(tensor([0.1])).dtype == D
    space.noise(tensor([0.0]), tensor([0.3])).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in kernel.parameters())
