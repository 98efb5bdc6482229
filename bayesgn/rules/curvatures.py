"""Curvatures: which positive semi-definite Λ stands for the loss at one datum. Λ = S Sᵀ is handed on as its root S."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgn._psd import eigclip, psd_root
from bayesgn.rules.local import Diagonal, Local, diagonal


class Bent(NamedTuple):
    """Λ [n c c], the curvature's memory, and how many blocks were indefinite before they were made PSD."""

    matrix: Tensor
    memory: tuple[Tensor, ...] = ()
    indefinite: int = 0


class Curvature(ABC):
    """Λ at latent values f [n *positions c] and targets y.

    Attributes:
        random: whether :meth:`root` draws; it is then always given a generator, and the same one at every walk over the data.
        exact: whether Λ is the Hessian wherever that is PSD.
        targets: whether :meth:`root` needs y for more than what is missing.
    """

    random = False
    exact = False
    targets = False

    @abstractmethod
    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """S [n r k] with Λ_n = S Sᵀ over all r = positions · c outputs of a datum."""

    @abstractmethod
    def bend(self, local: Local, memory: tuple[Tensor, ...], generator: torch.Generator | None = None) -> Bent:
        """Λ for an expansion's view of the data."""

    def blend(self, old: Tensor, new: Tensor, lr: float) -> Tensor:
        """The site precision after a step of size lr from ``old`` to ``new``."""
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
    """The generalised Gauss-Newton matrix. It is the Fisher information of the likelihood, so this is also the curvature by that name.

        Λ = E_{y ~ p(y|f)}[ −∂² log p(y|f) / ∂f² ]

    Equal to the Hessian for exponential families in their natural parameter (Gaussian, softmax, Poisson with log link). An expansion
    that averages over a belief averages Λ too; a linearisation y ≈ A f + noise has AᵀΩ⁻¹A.

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
        return _summed(local, local.fisher())


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

    exact = True
    targets = True

    def __init__(self, psd: Callable[[Tensor], Tensor] = eigclip) -> None:
        if not callable(psd):
            raise TypeError(f"Exact: psd={psd!r}; expected a function of blocks [n c c] such as rules.eigclip or rules.eigabs.")
        self.psd = psd

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return over_positions(psd_root(self.psd(likelihood.neg_hessian(f, y))))

    def bend(self, local: Local, memory=(), generator=None) -> Bent:
        matrix, indefinite = made_psd(local.hessian(), self.psd)
        return Bent(matrix, indefinite=indefinite)

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

    targets = True

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return likelihood.gradient(f, y).reshape(f.shape[0], -1, 1)

    def bend(self, local: Local, memory=(), generator=None) -> Bent:
        return _summed(local, local.outer())

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
        fisher, _, indefinite = _summed(local, local.fisher())
        known = _finite(fisher)
        S = psd_root(torch.where(known, fisher, 0.0))
        device = S.device if generator is None else generator.device
        signs = torch.randint(2, (len(S), S.shape[-1], self.samples), generator=generator, device=device, dtype=S.dtype)
        S = S @ signs.mul_(2).sub_(1).to(S.device)
        return Bent(torch.where(known, S @ S.mT / self.samples, fisher), indefinite=indefinite)

    def columns(self, r: int) -> int:
        return self.samples


class Identity(Curvature):
    """Λ = precision · I for every latent that y tells of: gradient ascent, preconditioned by the prior.

    A step moves the mean by (K⁻¹ + Λ)⁻¹ times the gradient, for a prior covariance K; a precision below the largest curvature of the loss may
    overshoot.

    Args:
        precision: of each latent's site.

    Example:
        >>> from bayesgn.likelihoods import Gaussian
        >>> f, y = torch.zeros(2, 1), torch.tensor([[1.0], [torch.nan]])
        >>> Identity(2.0).root(Gaussian(0.1), f, y).square().flatten().detach()  # the second is missing
        tensor([2.0000, 0.0000])
    """

    def __init__(self, precision: float = 1.0) -> None:
        if not precision > 0:
            raise ValueError(f"Identity: precision={precision}; expected a positive number.")
        self.precision = float(precision)

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return over_positions(self._of(likelihood.ggn(f, y)).sqrt())

    def bend(self, local: Local, memory=(), generator=None) -> Bent:
        return Bent(self._of(local.fisher()))

    def _of(self, fisher: Tensor) -> Tensor:
        told = fisher.diagonal(dim1=-2, dim2=-1) != 0  # what is missing has no information
        return torch.diag_embed(told * self.precision).to(fisher)

    def scale(self, likelihood) -> Tensor:
        return torch.ones_like(likelihood.ggn_scale()).detach()


class MeanField(Curvature):
    """Another curvature without its terms across latents: each latent function gets sites of its own.

    Where the latents are independent a priori, so they stay in the posterior, and ``Variational(MeanField(Exact()))`` is mean-field variational
    inference: q(f) = Π_c q_c(f_c). The cross terms are left out before anything is made PSD.

    Args:
        curvature: the other one; :class:`GaussNewton` unless given.

    Example:
        >>> from bayesgn.likelihoods import Categorical
        >>> S = MeanField().root(Categorical(), torch.zeros(1, 2), torch.tensor([0]))
        >>> S @ S.mT  # of [[¼, −¼], [−¼, ¼]]
        tensor([[[0.2500, 0.0000],
                 [0.0000, 0.2500]]])
    """

    def __init__(self, curvature: Curvature | None = None) -> None:
        self.curvature = GaussNewton() if curvature is None else curvature
        if not isinstance(self.curvature, Curvature):
            raise TypeError(f"MeanField: curvature={curvature!r}; expected an instance such as rules.Exact().")

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.curvature.random

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.curvature.exact

    @property
    def targets(self) -> bool:  # type: ignore[override]
        return self.curvature.targets

    def root(self, likelihood, f: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        S = self.curvature.root(likelihood, f, y, generator)
        return torch.diag_embed(S.square().sum(-1).sqrt())

    def bend(self, local: Local, memory=(), generator=None) -> Bent:
        bent = self.curvature.bend(Diagonal(local), memory, generator)
        return bent._replace(matrix=diagonal(bent.matrix))

    def blend(self, old: Tensor, new: Tensor, lr: float) -> Tensor:
        return self.curvature.blend(old, new, lr)

    def scale(self, likelihood) -> Tensor:
        return self.curvature.scale(likelihood)

def made_psd(H: Tensor, psd: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
    """Blocks [n c c] made PSD where they are not, and how many were indefinite beyond rounding. A block that is not finite stays so."""
    known = _finite(H)
    finite = torch.where(known, H, 0.0)
    count, smallest = _indefinite(finite.detach())
    if smallest >= 0:
        return H, 0
    return torch.where(known, psd(finite), H), count


def _finite(H: Tensor) -> Tensor:
    return H.isfinite().flatten(1).all(-1)[:, None, None]


def _indefinite(H: Tensor) -> tuple[int, float]:
    if not len(H):
        return 0, 0.0
    if H.shape[-1] == 1:
        return int((H < 0).sum()), float(H.min())
    λ = torch.linalg.eigvalsh(0.5 * (H + H.mT))
    rounding = max(1e-12, 100 * torch.finfo(H.dtype).eps)
    return int((λ[..., 0] < -rounding * λ.abs().amax(-1)).sum()), float(λ[..., 0].min())


def _summed(local: Local, matrix: Tensor) -> Bent:
    """A matrix that is PSD unless it is a sum with negative weights."""
    if not local.signed:
        return Bent(matrix)
    matrix, indefinite = made_psd(matrix, eigclip)
    return Bent(matrix, indefinite=indefinite)


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
