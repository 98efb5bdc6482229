"""Curvatures: which positive semi-definite Λ stands for the loss at one datum. Λ = S Sᵀ is handed on as its root S."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgn._psd import eigclip, psd_root


class Local(ABC):
    """What an expansion knows of each datum: the slope of L_n and where its quadratic touches; curvatures on request.

    Attributes:
        gradient [n c]: ∂L_n/∂m, the true one.
        at [n c]: where the quadratic has that slope.
        cov [n c c]: of the belief.
        valid [n]: False where the expansion itself failed (an improper cavity).
    """

    def __init__(self, q, gradient: Tensor, at: Tensor | None = None, valid: Tensor | None = None) -> None:
        self.gradient, self.cov = gradient, q.cov
        self.at = q.mean if at is None else at
        self.valid = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device) if valid is None else valid

    @abstractmethod
    def fisher(self) -> Tensor:
        """The Gauss-Newton curvature [n c c], PSD."""

    @abstractmethod
    def hessian(self) -> Tensor:
        """−∂²L_n/∂m² [n c c], possibly indefinite."""

    @abstractmethod
    def outer(self) -> Tensor:
        """The mean outer product of gradients [n c c], PSD."""


class Bent(NamedTuple):
    """Λ [n c c], the curvature's memory, and how many blocks were indefinite before they were made PSD."""

    matrix: Tensor
    memory: tuple[Tensor, ...] = ()
    indefinite: int = 0


class Curvature(ABC):
    """Λ at latent values f [n *positions c] and targets y.

    Attributes:
        random: whether :meth:`root` draws; it is then always given a generator, and the same one at every walk over the data.
    """

    random = False

    @abstractmethod
    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """S [n r k] with Λ_n = S Sᵀ over all r = positions · c outputs of a datum."""

    @abstractmethod
    def bend(self, local: Local, memory: tuple[Tensor, ...], generator: torch.Generator | None = None) -> Bent:
        """Λ for an expansion's view of the data."""

    def blend(self, old: Tensor, new: Tensor, cov: Tensor, lr: float) -> Tensor:
        """The site precision after a step of size lr from ``old`` to ``new``; cov is the belief's."""
        return (1 - lr) * old + lr * new

    def columns(self, r: int) -> int:
        """Columns of S for a datum with r outputs."""
        return r

    def scale(self, likelihood) -> Tensor:
        """s with Λ = s · (a matrix that does not depend on the likelihood's parameters): lets noise be tuned over the same H."""
        return likelihood.ggn_scale()

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in sorted(vars(self).items()))
        return f"{type(self).__name__}({options})"


class GaussNewton(Curvature):
    """The generalised Gauss-Newton matrix, the Fisher information of the likelihood.

        Λ = E_{y ~ p(y|f)}[ −∂² log p(y|f) / ∂f² ]

    Equal to the Hessian for exponential families in their natural parameter (Gaussian, softmax, Poisson with log link).

    Example:
        >>> from bayesgn.likelihoods import Bernoulli
        >>> S = GaussNewton().root(Bernoulli(), torch.zeros(1, 1), torch.ones(1, 1))
        >>> S @ S.mT  # p (1 − p)
        tensor([[[0.2500]]])

    Source: Schraudolph (2002); Martens (2020), sec. 9.
    """

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return over_positions(likelihood.ggn_root(f, y))

    def bend(self, local: Local, memory=(), generator=None) -> Bent:
        return Bent(local.fisher())


class Exact(Curvature):
    """The negative Hessian of log p(y|f), made PSD where it is not.

    Args:
        psd: what is done to an indefinite block [c c]: ``eigclip`` (negative eigenvalues to zero) or ``eigabs`` (their size).

    Example:
        >>> from bayesgn.likelihoods import StudentT
        >>> likelihood, f, y = StudentT(dof=4.0, scale=1.0).requires_grad_(False), torch.zeros(1, 1), torch.tensor([[5.0]])
        >>> likelihood.neg_hessian(f, y) < 0  # an outlier: log p(y|f) is convex there
        tensor([[[True]]])
        >>> Exact().root(likelihood, f, y)
        tensor([[[0.]]])
    """

    def __init__(self, psd: Callable[[Tensor], Tensor] = eigclip) -> None:
        self.psd = psd

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return over_positions(psd_root(self.psd(likelihood.neg_hessian(f, y))))

    def bend(self, local: Local, memory=(), generator=None) -> Bent:
        H = local.hessian()
        return Bent(self.psd(H), indefinite=count_indefinite(H))

    def scale(self, likelihood) -> Tensor:
        # The Hessian of a likelihood scales as its Fisher only where the two are the same matrix (a Gaussian's 1/noise).
        return likelihood.ggn_scale()


class EmpiricalFisher(Curvature):
    """The outer product of the datum's own gradient, Λ = g gᵀ with g = ∂ log p(y|f)/∂f.

    One column for each datum, so cheap; not a Fisher matrix (Kunstner, Balles and Hennig 2019 show when it misleads). It does not scale with
    noise, so that ``maximize_evidence`` cannot tune the noise over it without ``data=``.

    Example:
        >>> from bayesgn.likelihoods import Bernoulli
        >>> EmpiricalFisher().root(Bernoulli(), torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])).flatten()  # y − p
        tensor([ 0.5000, -0.5000])
    """

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return likelihood.gradient(f, y).reshape(f.shape[0], -1, 1)

    def bend(self, local: Local, memory=(), generator=None) -> Bent:
        return Bent(local.outer())

    def columns(self, r: int) -> int:
        return 1

    def scale(self, likelihood) -> Tensor:
        return torch.ones_like(likelihood.ggn_scale()).detach()  # g gᵀ has no common factor in general


class MonteCarloFisher(Curvature):
    """The Fisher information by random gradients, unbiased for :class:`GaussNewton` at ``samples`` columns instead of c.

        Λ ≈ 1/M Σ_m g_m g_mᵀ,   g_m = Σ_positions S ε_m,   ε random signs,   S Sᵀ = Fisher of the position

    Random signs on the closed-form root have the mean and covariance of a sampled target's gradient, at every position
    independently, and serve class weights and missing rows exactly.

    Args:
        samples: M, columns for each datum.

    Example:
        >>> from bayesgn.likelihoods import Categorical
        >>> f, y = torch.zeros(5, 10), torch.zeros(5, dtype=torch.long)
        >>> MonteCarloFisher(samples=2).root(Categorical(), f, y, torch.Generator().manual_seed(0)).shape  # two columns, not ten
        torch.Size([5, 10, 2])

    Source: Martens and Grosse (2015), sec. 2.2, with the root in place of a sampled target.
    """

    random = True

    def __init__(self, samples: int = 1) -> None:
        if samples < 1:
            raise ValueError(f"samples={samples}; expected at least one draw for each datum.")
        self.samples = samples

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        S = likelihood.ggn_root(f, y)
        device = S.device if generator is None else generator.device
        signs = torch.randint(2, (*S.shape[:-2], S.shape[-1], self.samples), generator=generator, device=device, dtype=S.dtype)
        g = S @ signs.mul_(2).sub_(1).to(S.device)
        return g.reshape(f.shape[0], -1, self.samples) / self.samples**0.5

    def bend(self, local: Local, memory=(), generator=None) -> Bent:
        S = psd_root(local.fisher())
        device = S.device if generator is None else generator.device
        signs = torch.randint(2, (len(S), S.shape[-1], self.samples), generator=generator, device=device, dtype=S.dtype)
        S = S @ signs.mul_(2).sub_(1).to(S.device)
        return Bent(S @ S.mT / self.samples)

    def columns(self, r: int) -> int:
        return self.samples


def count_indefinite(H: Tensor) -> int:
    """Blocks [n c c] with an eigenvalue below zero, beyond rounding."""
    if H.shape[-1] == 1:
        return int((H < 0).sum())
    finite = torch.where(H.isfinite(), H, 0.0)
    λ = torch.linalg.eigvalsh(finite)
    return int((λ[..., 0] < -1e-12 * λ.abs().amax(-1)).sum())


def over_positions(S: Tensor) -> Tensor:
    """Roots of each position [n *positions c k] as one root of each datum [n r K]: positions are independent given f."""
    n, c, k = S.shape[0], S.shape[-2], S.shape[-1]
    m = S[0, ..., 0, 0].numel() if n else 1
    if m == 1:
        return S.reshape(n, c, k)
    blocks = S.new_zeros(n, m, c, m, k)
    where = torch.arange(m, device=S.device)
    blocks[:, where, :, where, :] = S.reshape(n, m, c, k).transpose(0, 1)
    return blocks.reshape(n, m * c, m * k)
