"""The posterior of a Gaussian process: sites at the data, and all that follows from them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from bayesgn._psd import safe_cholesky
from bayesgn.ggn.structure import randn
from bayesgn.models.function_gaussian import FunctionGaussian, LatentGaussian
from bayesgn.models.inputs import columns
from bayesgn.models.posterior import Posterior
from bayesgn.rules import Expansion, Marginals, Sites, Turn


class GaussianProcessPosterior(Posterior):
    """q(f) ∝ p(f) Π_n t_n(f_n), with Gaussian sites t_n in place of the likelihood.

    Made by ``bgn.bayes_newton``. It owns copies of model and likelihood; change or tune these and every answer follows.

    Attributes:
        model, likelihood: own copies, with the hyper-parameters as parameters.
        rule: by which the sites were made.
        sites: natural parameters at each datum.
        trace: what inference did, step by step (set by ``bgn.bayes_newton``).
        num_data: data seen.
    """

    def __init__(self, model, likelihood, rule: Expansion, inputs: Any, y: Tensor, sites: Sites, dtype: torch.dtype) -> None:
        self.model, self.likelihood, self.rule = model, likelihood, rule
        self.inputs, self.y, self.sites = inputs, y, sites
        self.dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        self.num_data = len(y)
        self.trace: Any = None
        self._cached: tuple[Any, Marginals] | None = None

    # -- at the data -----------------------------------------------------------------------------------------------------

    def marginals(self) -> Marginals:
        """The belief at the data, without a graph; worked out once for each state of the hyper-parameters."""
        state = tuple((id(p), p._version) for p in self.model.parameters())
        if self._cached is None or self._cached[0] != state:
            with torch.no_grad():
                self._cached = state, self.model.solve(self.inputs, self.sites).marginals
        return self._cached[1]

    def log_evidence(self) -> Tensor:
        """log Z_sites + Σ_n ( L_n[p(y_n|·)] − L_n[t_n] ) in nats: the Laplace evidence, the variational bound, the power-EP energy …, by the rule.

        Differentiable in the hyper-parameters of kernels, means and likelihood at fixed sites.
        """
        log_Z, q = self.model.solve(self.inputs, self.sites)
        return log_Z + self.rule.term(self.likelihood, q, self.y, self.sites).sum()

    def turn(self, lr: float = 1.0, batch: Tensor | None = None, generator: torch.Generator | None = None) -> tuple[GaussianProcessPosterior, Turn]:
        """A new posterior after one turn of the rule over all data, or over a batch of them (an index)."""
        q = self.marginals()
        if batch is None:
            turn = self.rule(self.likelihood, q, self.y, self.sites, lr, generator)
            sites = turn.sites
        else:
            turn = self.rule(self.likelihood, q.rows(batch), self.y[batch], self.sites.rows(batch), lr, generator)
            sites = self.sites.replace(batch, turn.sites)
        return self.with_sites(sites), turn

    def with_sites(self, sites: Sites) -> GaussianProcessPosterior:
        """The same posterior with other sites; model and likelihood are shared."""
        new = copy.copy(self)
        new.sites, new._cached = sites, None
        return new

    # -- anywhere --------------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor):
        """f at x [m] or [m d]: a gpytorch Gaussian, event [m] for one latent function, [m c] for several. The joint covariance is worked out
        when it is asked for."""
        answer = GaussianProcessAnswer(self, columns(x))
        mean = answer.marginals.mean.to(self.dtype)
        return LatentGaussian(mean[:, 0], answer) if self.model.latents == 1 else FunctionGaussian(mean, answer, ())

    def sample_outputs(self, x: Tensor, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Joint draws of f at x [n m c]."""
        with torch.no_grad():
            return self.model.draw(self.inputs, self.sites, columns(x), n, generator).to(self.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Sites, data and hyper-parameters."""
        out = {"x": self.inputs.x, "y": self.y, "nat1": self.sites.nat1, "nat2": self.sites.nat2}
        out |= {f"memory.{i}": t for i, t in enumerate(self.sites.memory)}
        out |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        return out | {f"likelihood.{k}": v for k, v in self.likelihood.state_dict().items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, {self.likelihood!r}, {self.rule!r}, {self.num_data} data)"


class GaussianProcessAnswer:
    """The mean and marginal covariance of one call, the joint covariance when asked for."""

    def __init__(self, posterior: GaussianProcessPosterior, x: Tensor) -> None:
        # Later changes of the hyper-parameters do not reach an answer that was given.
        self.model, self.inputs, self.sites, self.x, self.dtype = posterior.model, posterior.inputs, posterior.sites, x, posterior.dtype
        self._state = [(p, p._version) for p in self.model.parameters()]
        self.marginals = self.model.predict(self.inputs, self.sites, x)
        self._dense: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and latents."""
        return self.marginals.mean.shape  # type: ignore[return-value]

    def mean(self) -> Tensor:
        return self.marginals.mean.to(self.dtype)

    def blocks(self) -> Tensor:
        """Covariance within each row [m c c]."""
        return self.marginals.cov.to(self.dtype)

    def dense(self) -> Tensor:
        """Joint covariance [m c, m c]."""
        if self._dense is None:
            if any(p._version != version for p, version in self._state):
                raise RuntimeError(
                    "hyper-parameters changed between posterior(x) and its joint covariance, which is worked out when it is asked for; call "
                    "posterior(x) again."
                )
            self._dense = self.model.joint(self.inputs, self.sites, self.x)
        return self._dense.to(self.dtype)  # type: ignore[union-attr]

    def cholesky(self) -> Tensor:
        self.dense()
        return safe_cholesky(self._dense)  # type: ignore[arg-type]

    def draw(self, mean: Tensor, shape: torch.Size, base: Tensor | None) -> Tensor:
        """Joint draws of [m c] by an exact root of the dense covariance."""
        L = self.cholesky()
        ε = randn((*shape, L.shape[0]), L, None) if base is None else base.reshape(*shape, -1).to(L)
        return mean + (ε @ L.mT).reshape(*shape, *mean.shape).to(mean)
