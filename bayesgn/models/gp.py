"""The Gaussian process with all its data: exact algebra in the sites, O((n c)³)."""

from __future__ import annotations

from typing import Any, NamedTuple

import gpytorch
import torch
from torch import Tensor

from bayesgn._psd import safe_cholesky
from bayesgn.models.belief import Belief
from bayesgn.models.dense_sites import Conditioned, right, roots, weights
from bayesgn.models.gaussian_process import GaussianProcess, Solution, describe
from bayesgn.models.markov_gp import beside, groups
from bayesgn.models.rows import by_rows
from bayesgn.rules import Marginals


class Placed(NamedTuple):
    """Inputs as they came, [n d]."""

    x: Tensor


class Factors(NamedTuple):
    """A group of latents that sites couple: R Rᵀ = nat2 [n k k], L Lᵀ = B [n k, n k], and the mean's weights a [n k]."""

    latents: list[int]
    R: Tensor
    L: Tensor
    a: Tensor


class GP(GaussianProcess):
    """p(f) of a Gaussian process with any gpytorch kernel; dense.

    With R Rᵀ the block-diagonal site precision Λ, B = I + RᵀKR is well conditioned whatever the sites:

        log Z = −½ log |B| + ½ hᵀ Σ h,   Σ = K − K R B⁻¹ RᵀK,   mean = Σ h,   h = nat1

    Latents that no site couples are worked out one by one, c n³ instead of (c n)³.

    Example:
        >>> import gpytorch, bayesgn as bgn
        >>> x = torch.linspace(0, 6, 40, dtype=torch.float64); y = torch.sin(x)
        >>> model = bgn.models.GP(gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()))
        >>> posterior = bgn.bayes_newton(model, bgn.likelihoods.Gaussian(0.01), (x, y))
        >>> posterior(x).mean.shape
        torch.Size([40])

    Source: Rasmussen and Williams (2006), sec. 3.4.
    """

    def place(self, x: Tensor) -> Placed:
        check_columns(self.kernels, x)
        return Placed(x)

    def belief(self, inputs, sites):
        return FactoredBelief(self, inputs, sites)

    def cross(self, a: Tensor, b: Tensor, latents: list[int] | None = None) -> Tensor:
        """Prior covariance [a c, b c] between inputs, data first, then latents (all, or some)."""
        kernels = list(self.kernels) if latents is None else [self.kernels[i] for i in latents]
        if len(kernels) == 1:
            return covariance(kernels[0], a, b)
        K = torch.stack([covariance(k, a, b) for k in kernels], -1)
        return torch.diag_embed(K).permute(0, 2, 1, 3).reshape(len(a) * len(kernels), len(b) * len(kernels))

    def _solve(self, inputs, nat1, nat2):
        parts = [Conditioned.apply(self.cross(inputs.x, inputs.x, g), nat1[:, g], nat2[:, g][:, :, g]) for g in groups(nat2)]
        log_Z, means, covs = zip(*parts)  # type: ignore[arg-type]
        return Solution(sum(log_Z), Marginals(torch.cat(means, -1), beside(covs)))  # type: ignore[arg-type]

    def factors(self, x: Tensor, nat1: Tensor, nat2: Tensor) -> list[Factors]:
        """What all answers share."""
        out = []
        for g in groups(nat2):
            h, Λ, K = nat1[:, g], nat2[:, g][:, :, g], self.cross(x, x, g)
            R, Rinv = roots(Λ, K)
            B = right(right(K, R).mT, R)
            L = safe_cholesky(B + torch.eye(len(B), dtype=B.dtype, device=B.device))
            out.append(Factors(g, R, L, weights(R, Rinv, L, h.reshape(-1))))
        return out

    def marginals_from(self, factors: list[Factors], seen: Tensor, x: Tensor) -> Marginals:
        """At x [m d], from data at ``seen`` [n d]."""

        def some(x: Tensor) -> tuple[Tensor, ...]:
            means, covs = [], []
            for f in factors:
                K = self.cross(x, seen, f.latents)
                k = len(f.latents)
                V = torch.linalg.solve_triangular(f.L, right(K, f.R).mT, upper=False).view(len(f.L), len(x), k)
                prior = torch.diag_embed(torch.stack([variance(self.kernels[a], x) for a in f.latents], -1))
                means.append((K @ f.a).view(len(x), k))
                covs.append(prior - (V.square().sum(0).unsqueeze(-1) if k == 1 else torch.einsum("vma,vmb->mab", V, V)))
            return torch.cat(means, -1), beside(covs)

        return Marginals(*by_rows(some, x, width=max(len(f.L) * len(f.latents) for f in factors)))

    def joint_from(self, factors: list[Factors], seen: Tensor, x: Tensor) -> Tensor:
        parts = []
        for f in factors:
            V = torch.linalg.solve_triangular(f.L, right(self.cross(x, seen, f.latents), f.R).mT, upper=False)
            parts.append(self.cross(x, x, f.latents) - V.mT @ V)
        return latents_inside(parts)

    def _predict(self, inputs, nat1, nat2, x):
        return self.marginals_from(self.factors(inputs.x, nat1, nat2), inputs.x, x)

    def _joint(self, inputs, nat1, nat2, x):
        return self.joint_from(self.factors(inputs.x, nat1, nat2), inputs.x, x)

    def _draw(self, inputs, nat1, nat2, x, n, generator):
        factors = self.factors(inputs.x, nat1, nat2)
        return draws(self.marginals_from(factors, inputs.x, x).mean, self.joint_from(factors, inputs.x, x), n, generator)


class FactoredBelief(Belief):
    """The belief of :class:`GP`: factors are kept, so that a new input costs O((n c)²)."""

    _factors: Any = None

    @torch.no_grad()
    def factors(self) -> list[Factors]:
        if self._factors is None:
            x = self.inputs.x
            self._factors = self.model.factors(x, self.model.shifted(self.sites, self.model.mean_at(x)), self.sites.nat2)
        return self._factors

    def predict(self, x):
        q = self.model.marginals_from(self.factors(), self.inputs.x, x)
        return Marginals(q.mean + self.model.mean_at(x), q.cov)

    def joint(self, x):
        return self.model.joint_from(self.factors(), self.inputs.x, x)


def check_columns(kernels, x: Tensor) -> None:
    """Raise where a kernel was made for inputs with other columns, or covers several outputs at once."""
    for k in kernels:
        try:
            variance(k, x[:1].detach())
            covariance(k, x[:1].detach(), x[:1].detach())
            outputs = k.num_outputs_per_input(x[:1].detach(), x[:1].detach())
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{describe(k)} cannot be evaluated at inputs with {x.shape[-1]} column(s) ({str(error).rstrip('.')}). Look at its ard_num_dims and "
                f"active_dims, and at the shape of x, {tuple(x.shape)}."
            ) from error
        if outputs != 1:
            raise ValueError(
                f"{describe(k)} covers {outputs} outputs, and these models take one kernel for each latent function: of a JacobianKernel pass "
                f"[kernel.output(j) for j in range({outputs})] (means likewise), which leaves out what the outputs share before the data, or use "
                "models.Network(net, structure=ggn.Gram), which does not."
            )


def covariance(kernel, a: Tensor, b: Tensor) -> Tensor:
    """A kernel's matrix [a b], in the dtype of the inputs."""
    if _plainly_scaled(kernel):  # a product of float32 and float64 matrices is slow, one with a number is not
        return kernel.outputscale.reshape(()) * covariance(kernel.base_kernel, a, b)
    return kernel(a, b).to_dense().to(a)


def variance(kernel, x: Tensor) -> Tensor:
    """A kernel's diagonal [n]."""
    if _plainly_scaled(kernel):
        return kernel.outputscale.reshape(()) * variance(kernel.base_kernel, x)
    return kernel(x, diag=True).to(x)


def _plainly_scaled(kernel) -> bool:
    return type(kernel) is gpytorch.kernels.ScaleKernel and kernel.active_dims is kernel.base_kernel.active_dims


def draws(mean: Tensor, cov: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Joint draws [n m c] of N(mean [m c], cov [m c, m c])."""
    L = safe_cholesky(cov)
    device = L.device if generator is None else generator.device
    ε = torch.randn(n, len(L), dtype=L.dtype, device=device, generator=generator).to(L.device)
    return mean + (ε @ L.mT).reshape(n, *mean.shape)


def latents_inside(parts: list[Tensor]) -> Tensor:
    """Covariances of all latents together [m c, m c], or of each alone [m, m], as one [m c, m c]: data first, then latents."""
    if len(parts) == 1:
        return parts[0]
    m = len(parts[0])
    return torch.diag_embed(torch.stack(parts, -1)).permute(0, 2, 1, 3).reshape(m * len(parts), m * len(parts))
