"""The Gaussian posterior of a network by variational inference: weight space, linearised function space, the bound."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn._parameters import ParameterVector
from bayesgn.ggn.blocks import find_blocks
from bayesgn.ggn.linearization import Linearizer
from bayesgn.ggn.structure import Curvature, Precision, Spectrum, Structure
from bayesgn.models import net_draws
from bayesgn.models.weight_posterior import WeightPosterior
from bayesgn.models.weight_prior import WeightPrior


class VariationalPosterior(WeightPosterior):
    """q(θ) = N(m, (s H / T + P)⁻¹), fitted to the bound E_q log p(y|θ) − T · KL(q ‖ prior), and the functions it implies.

    Made by ``bgn.variational`` or ``optim.Variational``. ``posterior(x)`` is the net linearised at m, ``sample_outputs`` the net itself at draws of
    the weights, over which the bound was taken. Its net is a copy of the user's with m for weights.

    Attributes:
        net: a copy of the user's net, at the mean.
        likelihood, prior: own copies, with the hyper-parameters as ``nn.Parameter`` s.
        mean: m of the selected weights [p].
        num_data: data that the bound is over.
        temperature: T.
        error: standard error of E_q log p, and so of the bound, by the draws it was taken with; 0 where there were none.
        trace: what inference did, epoch by epoch (set by ``bgn.variational``).

    Example:
        >>> import bayesgn as bgn
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).eval()
        >>> model = bgn.models.Network(net, structure=bgn.ggn.Full)
        >>> posterior = bgn.variational(model, bgn.likelihoods.Gaussian(0.1), (x, y), epochs=5, generator=torch.Generator().manual_seed(0))
        >>> posterior(x).mean.shape, posterior.sample_outputs(x, 5).shape, posterior.sample_weights(5).shape
        (torch.Size([20, 1]), torch.Size([5, 20, 1]), torch.Size([5, 25]))

    Source: Khan and Rue (2023), "The Bayesian learning rule"; Immer (2020), "Disentangling the Gauss-Newton method and approximate inference".
    """

    def __init__(
        self,
        linearizer: Linearizer,
        structure: Structure,
        curvature: Curvature,
        likelihood,
        prior: WeightPrior,
        rule,
        statistics: dict[str, Tensor],
        num_data: int,
        temperature: float = 1.0,
        narrowed: Tensor | None = None,
        error: float = 0.0,
    ) -> None:
        super().__init__(linearizer, structure, likelihood, prior, rule)
        self.curvature, self.statistics, self.num_data, self.temperature = curvature, statistics, num_data, float(temperature)
        self.error = float(error)
        self.trace: Any = None
        self._follows = followed(rule.curvature, self.likelihood)
        self._given = {name: p.detach().clone() for name, p in self.likelihood.named_parameters()}
        if narrowed is None:  # s H/T Σ = 1 − P Σ
            narrowed = ((len(self.point) - self._prior_spread()) / self.scale()).detach()
        self.narrowed = narrowed.to(self.point.device, self._wide)  # tr HΣ of the q that the statistics were taken under

    def scale(self) -> Tensor:
        """By which H, kept at unit noise, enters the precision."""
        return self.rule.curvature.scale(self.likelihood).to(self._wide) / self.temperature

    def precision(self) -> Precision:
        """s H / T + P at the present hyper-parameters, with a graph to them."""
        self._check_likelihood()
        return self.curvature.with_prior(self.prior.of(self.curvature.blocks), self.scale())

    def shift(self) -> None:
        """None: the net of this posterior stands at the mean."""
        return None

    def spectrum(self) -> list[Spectrum] | None:
        return self.curvature.spectrum() if self.temperature == 1 else None

    def _check_likelihood(self) -> None:
        """Raise where a parameter of the likelihood moved that neither H nor the expected log likelihood follows."""
        for name, p in self.likelihood.named_parameters():
            then = self._given[name]
            if name not in self._follows and not torch.allclose(p.detach().to(then), then, rtol=1e-5, atol=1e-7):
                raise ValueError(
                    f"{type(self.likelihood).__name__}'s {name} is {p.tolist()} but q was fitted at {then.tolist()}, and does not follow it. Fit "
                    "again: bgn.variational(posterior, likelihood, data=train_loader), with tune=True to tune it too."
                )

    def hyperparameters(self) -> list[nn.Parameter]:
        """What the bound can tune over the same H: prior precision(s), and the noise where H scales with it."""
        out = list(self.prior.parameters())
        if self.rule.curvature.scale(self.likelihood).requires_grad:
            out += [p for p in self.likelihood.parameters() if p.requires_grad]
        return out

    def sample_outputs(self, x: Any, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """The net itself at n draws of its weights [n n_data *positions c]: the weight-space view, under which the bound was taken."""
        return net_draws.sample_outputs(self, x, n, generator)

    # -- the bound -----------------------------------------------------------------------------------------------------

    def _prior_spread(self) -> Tensor:
        """tr PΣ."""
        blocks, variance = self.curvature.blocks, self.precision().diagonal()
        return sum((p * variance[b.where]).sum() for p, b in zip(self.prior.of(blocks), blocks, strict=True))  # type: ignore[return-value]

    def log_likelihood(self) -> Tensor:
        """E_q Σ log p(y|f) over the data seen, under the q that was fitted."""
        return self.likelihood.log_prob_of(self.statistics).to(self._wide)

    def log_fit(self) -> Tensor:
        """E log p + ½ s tr HΣ₀: what the bound has beside prior and volume, and Σ does not enter."""
        return self.log_likelihood() + 0.5 * self.temperature * self.scale() * self.narrowed

    def log_evidence(self) -> Tensor:
        """The bound E_q log p(y|θ) − KL(q ‖ prior) in nats, differentiable in prior precision(s) and noise.

        At other hyper-parameters than the fit's, Σ follows them and E_q log p is corrected to first order, by −½ s tr HΔΣ; at T = 1 the bound then
        is

            E log p + ½ s tr HΣ₀ + log N(m; μ, P⁻¹) + p/2 log 2π − ½ log det(s H + P)

        with the fit's Σ₀: the Laplace evidence, where E log p + ½ s tr HΣ₀ stands for the likelihood at the mean. Under draws of the weights it is
        as exact as its draws, see ``error``: two posteriors that are closer than that are not told apart.
        """
        p, T = len(self.point), self.temperature
        bound = self.log_fit() + self.log_prior_and_volume(self.precision(), self.deviation)
        return bound if T == 1 else bound + 0.5 * (T - 1) * (self._prior_spread() - p)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Mean, H, expected statistics and hyper-parameters, all tensors."""
        out = {"mean": self.mean, "deviation": self.deviation, "narrowed": self.narrowed, "temperature": self.narrowed.new_tensor(self.temperature)}
        out["error"] = self.narrowed.new_tensor(self.error)
        out |= {f"curvature.{k}": v for k, v in self.curvature.tensors().items()}
        out |= {f"statistics.{k}": v for k, v in self.statistics.items()}
        out |= {f"prior.{k}": v.detach() for k, v in self.prior.state_dict().items()}
        return out | {f"likelihood.{k}": v.detach() for k, v in self.likelihood.state_dict().items()}


def followed(curvature, likelihood) -> set[str]:
    """The likelihood's parameters that H scales with, frozen or not."""
    own = copy.deepcopy(likelihood).requires_grad_(True)
    with torch.enable_grad():
        scale = curvature.scale(own)
    if not scale.requires_grad:
        return set()
    named = dict(own.named_parameters())
    found = torch.autograd.grad(scale, list(named.values()), allow_unused=True)
    return {name for name, g in zip(named, found, strict=True) if g is not None}


def copied(linearizer: Linearizer, mean: Tensor | None = None) -> Linearizer:
    """A linearizer over a copy of the net, with ``mean`` [p] for its selected weights, and the same plan of blocks."""
    net = copy.deepcopy(linearizer.net)
    vector = ParameterVector(linearizer.vector.names, linearizer.vector.shapes, dict(linearizer.vector.masks))
    if mean is not None:
        own = vector.tensors(net)
        with torch.no_grad():
            for name, value in vector.unflatten(mean, net).items():
                own[name].copy_(value)
    new = Linearizer(net, vector, linearizer.use_backpack)
    settled = zip(linearizer.blocks, find_blocks(net, vector), strict=True)
    new.blocks = [replace(found, module=found.module if b.module is not None else None, layout=b.layout) for b, found in settled]
    return new


def moved_onto(linearizer: Linearizer, structure: Structure, curvature: Curvature) -> Curvature:
    """The same H over the blocks of another copy of the net."""
    new = structure.start(linearizer.blocks, linearizer.vector.flatten(linearizer.net))
    new.load({name: t.clone() for name, t in curvature.tensors().items()})
    return new
