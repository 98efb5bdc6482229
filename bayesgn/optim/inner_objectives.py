"""What the inner optimizer minimises: convex models of the loss in the outputs of the linearised net."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bayesgn.likelihoods import Categorical, Likelihood
from bayesgn.optim.batches import rows_of
from bayesgn.rules.curvatures import Curvature


class InnerObjective(ABC):
    """A model of the mean loss over rows as a function of v = Jδ, with L_n = −log p(y_n | f_n)."""

    @abstractmethod
    def value(self, likelihood: Likelihood, f: Tensor, v: Tensor, y: Tensor) -> Tensor:
        """The model at v [like f], f = f(θ) the point of expansion."""

    @abstractmethod
    def gradient(self, likelihood: Likelihood, f: Tensor, v: Tensor, y: Tensor) -> Tensor:
        """u = ∂ value / ∂v [like f]."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Convex(InnerObjective):
    """Prox-linear: the loss itself, of the linearised outputs.

        min_δ  1/n Σ_n L_n(f_n + J_n δ)

    Convex in δ where the likelihood is log-concave in f (softmax, Gaussian, Bernoulli, Poisson, …).

    Example:
        >>> from bayesgn import likelihoods
        >>> f, v, y = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> Convex().gradient(likelihoods.Categorical(), f, v, y)  # softmax(f + v) − onehot(y)
        tensor([[-0.2689, 0.2689]])

    Source: Abreu et al. (2025), "GN-prox-linear"; Burke (1985), "Descent methods for composite nondifferentiable optimization problems".
    """

    def value(self, likelihood, f, v, y):
        return -likelihood.log_prob(f + v, y).sum() / _rows(likelihood, f, y)

    def gradient(self, likelihood, f, v, y):
        return likelihood.gradient(f + v, y) / -_rows(likelihood, f, y)


class Quadratized(InnerObjective):
    """Gauss-Newton: the loss to second order in the linearised outputs.

        min_δ  1/n Σ_n L_n(f_n) + ∇L_nᵀ J_n δ + ½ (J_n δ)ᵀ Λ_n J_n δ

    Args:
        curvature: of Λ, such as `rules.MonteCarloFisher()`, through its roots [n r k]; None takes the Fisher information of the likelihood, for a
            softmax by products alone, so that no c × c matrix is made (a vocabulary of thousands is no trouble).
        generator: for a curvature that draws.

    Example:
        >>> from bayesgn import likelihoods
        >>> f, v, y = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> Quadratized().gradient(likelihoods.Categorical(), f, v, y)  # softmax(f) − onehot(y) + (diag p − p pᵀ) v
        tensor([[-0.2500, 0.2500]])

    Source: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent"; Abreu et al. (2025), eq. 3.
    """

    def __init__(self, curvature: Curvature | None = None, generator: torch.Generator | None = None) -> None:
        self.curvature, self.generator = curvature, generator

    def value(self, likelihood, f, v, y):
        g, Λv = self._expand(likelihood, f, v, y)
        return -likelihood.log_prob(f, y).sum() / _rows(likelihood, f, y) + ((g + Λv / 2) * v).sum()

    def gradient(self, likelihood, f, v, y):
        g, Λv = self._expand(likelihood, f, v, y)
        return g + Λv

    def _expand(self, likelihood: Likelihood, f: Tensor, v: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        n = _rows(likelihood, f, y)
        if self.curvature is None and isinstance(likelihood, Categorical):
            # The softmax is a canonical link: Λ = −∂²log p/∂f², whatever the weights, smoothing and missing rows, so Λv is one backward pass.
            with torch.enable_grad():
                at = f.detach().requires_grad_()
                g = likelihood.gradient(at, y)
                (Λv,) = torch.autograd.grad(g, at, v)
            return g.detach() / -n, Λv / -n
        if self.curvature is None:
            S, columns = likelihood.ggn_root(f, y), v.unsqueeze(-1)  # row by row
        else:
            S, columns = self.curvature.root(likelihood, f, y, self.generator), v.reshape(len(f), -1, 1)  # datum by datum, positions together
        return likelihood.gradient(f, y) / -n, (S @ (S.mT @ columns)).reshape(v.shape) / n

    def __repr__(self) -> str:
        return "Quadratized()" if self.curvature is None else f"Quadratized({self.curvature!r})"


def _rows(likelihood: Likelihood, f: Tensor, y: Tensor) -> int:
    return max(1, rows_of(likelihood, f, y))  # a micro-batch of missing rows alone has a loss of 0, and no slope
