"""The Gaussian posterior of a network by Laplace's method: weight space, linearised function space, evidence."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn.ggn.linearization import Linearizer
from bayesgn.ggn.structure import Curvature, Precision, Spectrum, Structure
from bayesgn.models import net_draws
from bayesgn.models.stream import Stream
from bayesgn.models.weight_posterior import WeightPosterior
from bayesgn.models.weight_prior import WeightPrior


class NetworkPosterior(WeightPosterior):
    """q(θ) = N(θ*, (s H + P)⁻¹) and the linearised functions it implies, f(x) ~ N(f(x; θ*), J (s H + P)⁻¹ Jᵀ).

    Made by ``bgn.laplace`` or ``Network.condition``. It owns copies of the likelihood and prior: change or tune *these*
    (``posterior.prior.precision = 3.0``) and every answer follows; H is kept at unit noise.

    Attributes:
        net: the user's net, untouched.
        likelihood, prior: own copies, with the hyper-parameters as ``nn.Parameter`` s.
        mean: θ* of the selected weights [p].
        num_data: data seen.

    Example:
        >>> from bayesgn import ggn, laplace, likelihoods, models
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).eval()
        >>> posterior = laplace(models.Network(net, structure=ggn.Full), likelihoods.Gaussian(0.1), (x, y))
        >>> posterior
        NetworkPosterior(Sequential, 25 weights, Full(), 20 data, WeightPrior(precision=1), Gaussian(noise=0.1))
        >>> f = posterior(x[:3])
        >>> f.mean.shape, f.variance.shape, f.covariance_matrix.shape
        (torch.Size([3, 1]), torch.Size([3, 1]), torch.Size([3, 3]))
        >>> posterior.sample_outputs(x[:3], 5).shape, posterior.sample_functions(5)(x[:3]).shape, posterior.sample_weights(5).shape
        (torch.Size([5, 3, 1]), torch.Size([5, 3, 1]), torch.Size([5, 25]))
        >>> before = posterior.log_evidence(); posterior.prior.precision = 3.0
        >>> bool(posterior.log_evidence() != before)
        True
    """

    def __init__(
        self,
        linearizer: Linearizer,
        curvature: Curvature,
        likelihood,
        prior: WeightPrior,
        rule,
        statistics: dict[str, Tensor],
        num_data: int,
        structure: Structure,
    ) -> None:
        super().__init__(linearizer, structure, likelihood, prior, rule)
        self.curvature, self.statistics, self.num_data = curvature, statistics, num_data
        self._made: tuple[Curvature, dict[str, Tensor], Tensor] | None = None
        self._check_likelihood(rule.curvature.scale(likelihood).to(self._wide))

    def precision(self) -> Precision:
        """scale · H + P at the present hyper-parameters, with a graph to them."""
        blocks = self.curvature.blocks
        scale = self.rule.curvature.scale(self.likelihood).to(self._wide)
        self._check_likelihood(scale)
        return self.curvature.with_prior(self.prior.of(blocks), scale)

    def shift(self) -> None:
        """None: the mean is θ* itself."""
        return None

    def spectrum(self) -> list[Spectrum] | None:
        return self.curvature.spectrum()

    def _check_likelihood(self, scale: Tensor) -> None:
        """Raise where the likelihood moved since H was made and H does not scale with what moved."""
        now = {name: p.detach().clone() for name, p in self.likelihood.named_parameters()}
        if self._made is None or self._made[0] is not self.curvature:  # a new H, made with the likelihood as it is
            self._made = (self.curvature, now, scale.detach())
            return
        _, then, before = self._made
        moved = [k for k, p in now.items() if not torch.allclose(p, then[k], rtol=1e-5, atol=1e-7)]
        if moved and torch.equal(scale.detach(), before):
            raise ValueError(
                f"{type(self.likelihood).__name__}'s {moved[0]} is {now[moved[0]].tolist()} but H was made at {then[moved[0]].tolist()} and does "
                "not scale with it. Fit again with this likelihood, or tune it by bgn.maximize_evidence(posterior, data=train_loader)."
            )

    # -- weight space ----------------------------------------------------------------------------------------------

    def sample_outputs(self, x: Any, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """The net itself at n draws of its weights [n n_data *positions c]: the weight-space view (BNN Monte Carlo).

        For a curved net this is not the linearised answer; Immer et al. (2021) show it underfits under a GGN posterior. A net of half
        precision is evaluated in float32, where its draws are more than rounding; if it cannot be, a warning says so.
        """
        return net_draws.sample_outputs(self, x, n, generator)

    # -- evidence --------------------------------------------------------------------------------------------------

    def log_evidence(self) -> Tensor:
        """log p(y) by Laplace's method, in nats, differentiable in prior precision(s) and noise.

            log p(y|θ*) + log N(θ*; μ, P⁻¹) + p/2 log 2π − 1/2 log det(s H + P)

        Source: MacKay (1992); Immer et al. (2021), "Scalable marginal likelihood estimation", eq. 6.
        """
        fit = self.log_likelihood()
        if not self.rule.curvature.scale(self.likelihood).requires_grad:
            fit = fit.detach()  # H has no graph to these parameters: half a gradient would be a wrong one
        return fit + self.log_prior_and_volume(self.precision(), self.deviation)

    def log_likelihood(self) -> Tensor:
        """Σ log p(y_n | f(x_n; θ*)) over the data seen."""
        return self.likelihood.log_prob_of(self.statistics).to(self._wide)

    def hyperparameters(self) -> list[nn.Parameter]:
        """What the evidence can tune over the same H: prior precision(s), and the noise where H scales with it."""
        out = list(self.prior.parameters())
        scale = self.rule.curvature.scale(self.likelihood)
        if scale.requires_grad:
            out += [p for p in self.likelihood.parameters() if p.requires_grad]
        return out

    # -- more data -------------------------------------------------------------------------------------------------

    def condition(
        self, data: Any, generator: torch.Generator | None = None, progress: bool | None = None
    ) -> NetworkPosterior:
        """The posterior after more data at the same weights; this one stays as it is.

        Equal to fitting all data at once for ``Full``, ``Layerwise``, ``Kron``, ``Diag``, ``Gram`` and ``MatrixFree``. ``LowRank`` truncates
        the sum to its rank again, and ``Gram(inducing=…)`` projects new data onto the inducing data of the first fit: close to it, but
        not equal. Hyper-parameters are carried over.

        Raises:
            ValueError: for a structure that cannot add data to a fitted H (``EigenKron``), or data that cannot be right.
        """
        self.check_fresh()
        stream = Stream(self.linearizer, self.likelihood, self.rule, data, generator, progress)
        stream.begin()
        curvature = self.curvature.copy()
        curvature.fit(stream)
        statistics = {name: t + stream.statistics[name] for name, t in self.statistics.items()}
        return NetworkPosterior(
            self.linearizer, curvature, copy.deepcopy(self.likelihood), copy.deepcopy(self.prior), self.rule, statistics,
            self.num_data + stream.count, structure=self.structure,
        )  # fmt: skip

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Mean, H, statistics and hyper-parameters, all tensors."""
        out = {"mean": self.mean, "deviation": self.deviation}
        out |= {f"curvature.{k}": v for k, v in self.curvature.tensors().items()}
        out |= {f"statistics.{k}": v for k, v in self.statistics.items()}
        out |= {f"prior.{k}": v.detach() for k, v in self.prior.state_dict().items()}
        out |= {f"likelihood.{k}": v.detach() for k, v in self.likelihood.state_dict().items()}
        return out
