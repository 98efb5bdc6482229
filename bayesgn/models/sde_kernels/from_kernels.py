"""From gpytorch kernels to state space."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from gpytorch import kernels
from torch import Tensor

from bayesgn.models.sde_kernels.combined import Product, Scaled, Sum
from bayesgn.models.sde_kernels.harmonic import Cosine, Periodic
from bayesgn.models.sde_kernels.matern import Matern
from bayesgn.models.sde_kernels.polynomial import Polynomial
from bayesgn.models.sde_kernels.rational import RBF
from bayesgn.models.sde_kernels.space import StateSpace


@functools.singledispatch
def state_space(kernel) -> StateSpace:
    """The state-space form of a gpytorch kernel over time, at its present hyper-parameters, with a graph to them; float64 inside.

    =====================  ===========================  =====================================================================
    kernel                 form                         states
    =====================  ===========================  =====================================================================
    Matern, ν = ½, 1½, 2½  :class:`Matern`              ν + ½; :class:`Matern72Kernel` has 4
    RBF                    :class:`RBF`                 6; the kernel to 9e-6 (its docstring shows how to have it closer)
    Periodic               :class:`Periodic`            2 J + 1; the kernel to 1e-6 (7 harmonics for ℓ = 1)
    Cosine                 :class:`Cosine`              2
    Constant               :class:`Polynomial`          1
    Linear                 :class:`Polynomial`          2
    Polynomial             :class:`Polynomial`          power + 1
    SpectralMixture        :class:`RBF` × Cosine        12 a mixture; the kernel to 9e-6 of its variance
    Scale, Additive        :class:`Scaled`, `Sum`       those of the parts
    Product                :class:`Product`             the product of the parts' (quasi-periodic: Matern × Periodic)
    =====================  ===========================  =====================================================================

    A ``functools.singledispatch``: ``@state_space.register`` adds a kernel of your own, or another form for a heir of a known one.

    Raises:
        TypeError: for a kernel that has no form here.
        ValueError: for one that is not over time alone (``ard_num_dims``, ``active_dims``) or stands for several (a batch shape).

    Example:
        >>> import gpytorch
        >>> from bayesgn.models.sde_kernels import state_space
        >>> kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5) * gpytorch.kernels.CosineKernel())
        >>> process = state_space(kernel)
        >>> process.transition(torch.tensor([0.1, 0.2], dtype=torch.float64)).shape
        torch.Size([2, 6, 6])
    """
    raise _refusal(kernel)


def _refusal(kernel) -> TypeError:
    return TypeError(
        f"{type(kernel).__name__} has no state-space form here; expected Matern, RBF, Periodic, Cosine, Constant, Linear, Polynomial or "
        "SpectralMixture kernels, or scaled, added and multiplied ones. Use models.GP or models.SparseGP for other kernels, or register a form: "
        "@sde_kernels.state_space.register."
    )


def _form(kind: type) -> Callable[[Callable], Callable]:
    """Registers a form for kernels of a kind. Heirs that compute something else (with derivatives, say) are not of that kind."""

    def decorate(build: Callable) -> Callable:
        def checked(kernel) -> StateSpace:
            if type(kernel).forward is not kind.forward:  # type: ignore[attr-defined]
                raise _refusal(kernel)
            if kernel.active_dims is not None and kernel.active_dims.tolist() != [0]:
                raise ValueError(
                    f"{type(kernel).__name__} has active_dims={kernel.active_dims.tolist()}, but over time there is one input column, 0; leave "
                    "active_dims out, or use models.SpatioTemporalGP with a kernel for time and one for space."
                )
            return build(kernel)

        state_space.register(kind, checked)
        return build

    return decorate


def _scalar(kernel, name: str) -> Tensor:
    """A hyper-parameter in the widest dtype of its device."""
    value = getattr(kernel, name)
    if value.numel() != 1:
        what = f"batch shape {list(kernel.batch_shape)}" if kernel.batch_shape.numel() != 1 else f"ard_num_dims={kernel.ard_num_dims}"
        raise ValueError(
            f"{type(kernel).__name__} has {what} ({name} of shape {list(value.shape)}); expected one kernel over one input column. Pass a list of "
            "kernels for several latent functions; models.GP takes several columns."
        )
    return _wide(value).reshape(())


def _wide(value: Tensor) -> Tensor:
    return value if value.device.type == "mps" else value.double()


@_form(kernels.MaternKernel)
def _(kernel):
    return Matern(kernel.nu, _scalar(kernel, "lengthscale"))


@_form(kernels.RBFKernel)
def _(kernel):
    return RBF(_scalar(kernel, "lengthscale"))


@_form(kernels.PeriodicKernel)
def _(kernel):
    return Periodic(_scalar(kernel, "lengthscale"), _scalar(kernel, "period_length"))


@_form(kernels.CosineKernel)
def _(kernel):
    return Cosine(0.5 / _scalar(kernel, "period_length"))  # cos(π τ / period)


@_form(kernels.ConstantKernel)
def _(kernel):
    return Polynomial(_scalar(kernel, "constant").reshape(1))


@_form(kernels.LinearKernel)
def _(kernel):
    variance = _scalar(kernel, "variance")
    return Polynomial(torch.stack([torch.zeros_like(variance), variance]))


@_form(kernels.PolynomialKernel)
def _(kernel):
    power, offset = kernel.power, _scalar(kernel, "offset")
    if power != int(power) or power < 1:
        raise ValueError(f"PolynomialKernel has power={power}; expected a whole number from 1.")
    m = int(power)
    return Polynomial(torch.stack([math.comb(m, k) * offset ** (m - k) for k in range(m + 1)]))  # (t t' + c)^m


@_form(kernels.SpectralMixtureKernel)
def _(kernel):
    if kernel.batch_shape.numel() != 1 or kernel.ard_num_dims != 1:
        raise ValueError(
            f"SpectralMixtureKernel has batch shape {list(kernel.batch_shape)} and ard_num_dims={kernel.ard_num_dims}; expected one kernel over one "
            "input column."
        )
    weights, frequencies, widths = (_wide(p).reshape(-1) for p in (kernel.mixture_weights, kernel.mixture_means, kernel.mixture_scales))
    return Sum([Scaled(Product([Cosine(f), RBF(0.5 / math.pi / s)]), w) for w, f, s in zip(weights, frequencies, widths)])


@_form(kernels.ScaleKernel)
def _(kernel):
    return Scaled(state_space(kernel.base_kernel), _scalar(kernel, "outputscale"))


@_form(kernels.AdditiveKernel)
def _(kernel):
    return Sum([state_space(k) for k in kernel.kernels])


@_form(kernels.ProductKernel)
def _(kernel):
    return Product([state_space(k) for k in kernel.kernels])


class Matern72Kernel(kernels.Kernel):
    """The Matérn kernel with ν = 7/2, which gpytorch's own MaternKernel does not offer, for any number of inputs.

        k(r) = (1 + s + 2 s² / 5 + s³ / 15) e^{−s},   s = √7 r

    with r the distance in units of the lengthscale. It takes the arguments of gpytorch's ``Kernel`` (``ard_num_dims``, ``lengthscale_prior`` …).

    Example:
        >>> import bayesgn as bgn
        >>> kernel = bgn.models.sde_kernels.Matern72Kernel()
        >>> bgn.models.sde_kernels.state_space(kernel).d
        4

    Source: Rasmussen and Williams (2006), eq. 4.16.
    """

    has_lengthscale = True

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:
        middle = x1.mean(dim=-2, keepdim=True)
        x1, x2 = (x1 - middle) / self.lengthscale, (x2 - middle) / self.lengthscale
        s = math.sqrt(7) * self.covar_dist(x1, x2, diag=diag, **params)
        return (1 + s * (1 + s * (0.4 + s / 15))) * (-s).exp()


@_form(Matern72Kernel)
def _(kernel):
    return Matern(3.5, _scalar(kernel, "lengthscale"))
