"""Hamiltonian Monte Carlo by Pyro's no-U-turn sampler: the gold standard that approximations are compared with."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesgn import _data
from bayesgn._extras import quiet_import
from bayesgn._psd import safe_cholesky
from bayesgn.ggn.structure import accumulator, working
from bayesgn.inference.samples import BAD, Samples
from bayesgn.models.linearized import LinearizedPosterior
from bayesgn.models.network import Network
from bayesgn.models.weight_posterior import WeightPosterior

if TYPE_CHECKING:
    from bayesgn.models.pyro_model import PyroModel

log = logging.getLogger("bayesgn.inference")

MOST_WHITENED = 4096  # weights for which the covariance of `start` is factorised; beyond it, its diagonal
MOST_ENTRIES = 2**28  # of the Jacobian of a linearised model
WATCHED = 30  # function values at the data whose R-hat is looked at


def hmc(
    model: Network | LinearizedPosterior,
    likelihood=None,
    data: Any = None,
    samples: int = 1000,
    warmup: int = 1000,
    chains: int = 4,
    start: WeightPosterior | Tensor | None = None,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Samples:
    """Draws from the exact posterior p(θ | y) ∝ N(θ; μ, P⁻¹) Π_n p(y_n | f(x_n; θ)) by the no-U-turn sampler.

    Of a ``models.Network`` this is the posterior of the net itself, which Laplace and variational inference over its weights approximate. Of a
    ``LinearizedPosterior`` (from ``bgn.bayes_newton(network, …)`` or ``network.start(likelihood, data)``) it is that of the model linearised at
    the trained weights, f(x; θ*) + J (θ − θ*): what refinement approximates.

    With a posterior for ``start`` (a ``LinearizedPosterior`` is its own) the chains begin at its draws and run in coordinates z,
    θ = mean + L z with L Lᵀ its covariance, in which a posterior near that Gaussian is round. Steps are then as long as the narrowest direction
    allows without the widest taking hundreds of them. The answer does not depend on it. A net costs tens to hundreds of evaluations a draw, the more
    the further its posterior is from a Gaussian (a wide prior, little noise): this is for nets of tens of weights, not of millions.

    Chains run one after another, with the net in its own dtype and the sampler in float64. Interrupted from the keyboard, whole chains are
    returned with a warning, or the part of the first one.

    Args:
        model: the network with its prior, or a linearised posterior, which has likelihood and data.
        likelihood: p(y|f), with its parameters as they are.
        data: (x, y), a Dataset, a DataLoader or batches: all of it enters every step. NaN and labels to ignore are missing targets.
        samples: draws of each chain that are kept.
        warmup: draws before them, in which step size and mass matrix are tuned.
        chains: how many; two or more, that R-hat may tell whether they agree.
        start: a posterior over the same weights, e.g. ``bgn.laplace(...)`` with ``ggn.Full``; or weights [chains p], or [p] for all of them. Unless
            given all chains begin at the trained weights, in coordinates scaled by the prior, and agreement says little of other modes.
        target_accept: mean acceptance that the step size is tuned to; nearer 1 where trajectories diverge.
        max_tree_depth: a trajectory takes at most 2**max_tree_depth steps.
        generator: all randomness; torch's global state is left as it was either way.
        progress: a progress bar: ``None`` shows one for work beyond two seconds, ``False`` never.

    Returns:
        Draws as a callable: ``samples.likelihood(samples(x))`` is the predictive distribution.

    Raises:
        TypeError, ValueError: for a model, data or numbers that cannot be right.

    Warns:
        where R-hat of functions at the data exceeds 1.05, where trajectories diverged, or where arviz, which tells, is not installed.

    Example:
        >>> import bayesgn as bgn
        >>> from bayesgn.inference import hmc
        >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]; y = 2 * x
        >>> net = torch.nn.Linear(1, 1).double().eval()
        >>> model, likelihood = bgn.models.Network(net, structure=bgn.ggn.Full), bgn.likelihoods.Gaussian(0.1)
        >>> laplace = bgn.laplace(model, likelihood, (x, y))
        >>> draws = hmc(model, likelihood, (x, y), samples=200, warmup=100, chains=2, start=laplace, generator=torch.Generator().manual_seed(0))
        >>> draws.weights.shape, draws(x).shape, draws.likelihood(draws(x)).mean.shape
        (torch.Size([2, 200, 2]), torch.Size([400, 20, 1]), torch.Size([20, 1]))

    Source: Hoffman and Gelman (2014), "The no-U-turn sampler"; Vehtari et al. (2021), "Rank-normalization, folding, and localization: an improved
    R-hat"; on the weights and functions of nets, Izmailov et al. (2021), "What are Bayesian neural network posteriors really like?".
    """
    for name, value in (("samples", samples), ("warmup", warmup), ("chains", chains), ("max_tree_depth", max_tree_depth)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}; expected a whole number, at least 1.")
    if isinstance(target_accept, bool) or not isinstance(target_accept, (int, float)) or not 0 < target_accept < 1:
        raise ValueError(f"target_accept={target_accept!r}; expected a number between 0 and 1, e.g. 0.8.")
    if isinstance(model, LinearizedPosterior):
        if likelihood is not None or data is not None:
            raise TypeError("a LinearizedPosterior has its likelihood and data; leave them out, or pass models.Network(net, …) with them.")
        target, start = _Linearized(model), model if start is None else start
    else:
        target = _Trained(model, likelihood, data)
    center, root, z = _coordinates(target, start, chains, generator)
    return _run(target, center, root, z, samples, warmup, float(target_accept), max_tree_depth, generator, progress)


# -- what is sampled ---------------------------------------------------------------------------------------------------------


class _Trained:
    """The net itself at all data."""

    def __init__(self, network: Any, likelihood: Any, data: Any) -> None:
        if isinstance(network, WeightPosterior):
            raise TypeError(
                f"model is a {type(network).__name__}, which keeps no data; pass what it was made of, and it as a start: "
                "hmc(models.Network(net, prior), likelihood, data, start=posterior)."
            )
        if not isinstance(network, Network):
            raise TypeError(f"model is a {type(network).__name__}; wrap the net first: models.Network(net, prior=…).")
        if data is None:
            raise TypeError("hmc needs a likelihood and data (x, y) beside a Network.")
        from bayesgn.models.pyro_model import PyroModel

        self.model: PyroModel = PyroModel(network, likelihood)
        self.likelihood, self.vector, self.trained = self.model.likelihood, self.model.vector, self.model.trained
        parts = [(x, y) for x, y in _data.batches(data) if _data.len_of(x)]
        if not parts:
            raise ValueError("the data hold no rows; there is nothing to learn from.")
        x = _joined([x for x, _ in parts])
        y = self.model.check(x, torch.cat([y for _, y in parts]))
        assert y is not None
        self.x, self.y = self.model.place(x), y
        f = self.model.outputs(self.x, self.trained)
        if not bool(self.likelihood.observed(f, y).any()):
            raise ValueError(f"all {len(y)} targets are missing; there is nothing to learn from.")
        self.named = self.model.named

    def log_likelihood(self, weights: Tensor) -> Tensor:
        """Of each datum [n] at weights [p]."""
        return self.model.log_likelihood(self.x, self.y, weights)

    def log_joint(self, weights: Tensor) -> Tensor:
        return self.log_likelihood(weights).to(weights).sum() + self.model.log_prior(weights)

    def outputs(self, x: Any, weights: Tensor) -> Tensor:
        return self.model.outputs(self.model.place(x), weights)

    def watched(self, count: int) -> Any:
        return _data.rows(self.x, _spread(_data.len_of(self.x), count))


class _Linearized:
    """f(x; θ*) + J (θ − θ*) at all data, and J of them."""

    def __init__(self, posterior: LinearizedPosterior) -> None:
        posterior.check_fresh()
        self.posterior, self.linearizer, self.vector = posterior, posterior.linearizer, posterior.linearizer.vector
        self.likelihood = copy.deepcopy(posterior.likelihood).requires_grad_(False)
        data, p = posterior.data, len(posterior.point)
        if data.f.numel() * p > MOST_ENTRIES:
            raise ValueError(
                f"the Jacobian of {data.f.numel()} outputs in {p} weights has {data.f.numel() * p:.2g} entries, more than {MOST_ENTRIES:.2g} "
                "(hmc.MOST_ENTRIES); take fewer data or fewer weights (parameters=…)."
            )
        self.f, self.y, self.wide = data.f, data.y, accumulator(posterior.point)
        eye = torch.eye(p, dtype=data.f.dtype, device=data.f.device)
        self.J = torch.cat([J.matvec(eye).reshape(-1, data.f.shape[-1], p) for _, J in data.products()])  # [N c p]
        self.trained = posterior.point
        self.point, self.deviation = posterior.point.to(self.wide), posterior.deviation
        blocks = posterior.curvature.blocks
        with torch.no_grad():
            self.precision = torch.cat([P.to(self.wide).expand(b.numel) for P, b in zip(posterior.prior.of(blocks), blocks, strict=True)])

    def log_likelihood(self, weights: Tensor) -> Tensor:
        """Of each row [N] at weights [p]."""
        return self.likelihood.log_prob(self.f + self.J @ (weights - self.point), self.y)

    def log_joint(self, weights: Tensor) -> Tensor:
        P, δ = self.precision, weights - self.point + self.deviation
        return self.log_likelihood(weights).sum() + 0.5 * (P.log() - P * δ.square() - np.log(2 * np.pi)).sum()

    def outputs(self, x: Any, weights: Tensor) -> Tensor:
        self.posterior.check_fresh()
        Δ, out = (weights.to(self.wide) - self.point).mT, []
        for lin in self.linearizer.parts(x, self.likelihood.rows):
            change = sum(f.to(self.wide).matvec(Δ[b.where]) for f, b in zip(lin.factors(), lin.blocks, strict=True))
            f = lin.output.to(self.wide).flatten(1)[..., None] + change  # [n r s]
            out.append(f.movedim(-1, 0).unflatten(2, lin.output.shape[1:]).to(working(lin.output.dtype)))
        return torch.cat(out, dim=1)

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        parts, shapes = self.vector.split(weights), dict(zip(self.vector.names, self.vector.shapes, strict=True))
        return {n: part if n in self.vector.masks else part.unflatten(-1, shapes[n] or (1,)) for n, part in parts.items()}

    def watched(self, count: int) -> Any:
        first = self.posterior.data.x[0]
        return _data.rows(first, _spread(_data.len_of(first), count))


def _joined(parts: list[Any]) -> Any:
    """Inputs in batches as one."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {k: _joined([part[k] for part in parts]) for k in first}
    return tuple(_joined([part[i] for part in parts]) for i in range(len(first))) if len(parts) > 1 else first


def _spread(n: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, n - 1, min(n, count)).round().astype(int)).tolist()


# -- coordinates -------------------------------------------------------------------------------------------------------------


def _coordinates(target: Any, start: Any, chains: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """center [p] and L (a matrix, or the diagonal of one) with θ = center + L z, and where each chain begins, z [chains p]."""
    wide, p = accumulator(target.trained), target.vector.numel
    center = target.trained.to(wide)
    precision = target.precision if isinstance(target, _Linearized) else target.model.precision
    if isinstance(start, WeightPosterior):
        if start.linearizer.vector.names != target.vector.names or len(start.point) != p:
            raise ValueError(
                f"start is a posterior over {len(start.point)} weights of {list(start.linearizer.vector.names)[:3]} …, the model has {p} of "
                f"{list(target.vector.names)[:3]} …; both need the same net and the same parameters=."
            )
        center = start.mean.to(target.trained.device, wide)
        with torch.no_grad():
            if p <= MOST_WHITENED:
                Σ = start.precision().solve(torch.eye(p, dtype=wide, device=center.device))
                root = safe_cholesky(0.5 * (Σ + Σ.mT))
            else:
                log.info("%d weights: coordinates are scaled by the variances of start alone", p)
                root = start.weight_variance().to(wide).sqrt()
        device = center.device if generator is None else generator.device
        with _own_randomness(generator, center.device):
            z = torch.randn(chains, p, dtype=wide, device=device, generator=generator).to(center.device)
        return center, root, z
    root = precision.to(wide).rsqrt()
    if start is None:
        return center, root, center.new_zeros(chains, p)
    if not isinstance(start, Tensor):
        raise TypeError(f"start is {_data.describe(start)}; expected a posterior over the weights, weights [chains p], or None.")
    if start.shape not in ((p,), (chains, p)):
        raise ValueError(f"start has shape {tuple(start.shape)}; expected {(chains, p)}, weights of each chain, or {(p,)}.")
    _data.check_finite(start, "start")
    return center, root, ((start.to(center) - center) / root).expand(chains, p)


# -- the sampler -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _own_randomness(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """torch's global generators, from which Pyro draws, in a state of our own; as they were afterwards (but for one draw without a generator)."""
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu" if generator is None else generator.device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def _run(
    target: Any, center: Tensor, root: Tensor, z: Tensor, samples: int, warmup: int, target_accept: float, depth: int, generator, progress
) -> Samples:
    from tqdm.auto import tqdm

    with quiet_import():
        import pyro
        from pyro.infer.mcmc import NUTS

    count = 0

    def weights_at(z: Tensor) -> Tensor:
        return center + (root @ z if root.dim() == 2 else root * z)

    def potential(at: dict[str, Tensor]) -> Tensor:
        nonlocal count
        count += 1
        return -target.log_joint(weights_at(at["z"]))

    for i, first in enumerate(z):
        with torch.no_grad():
            value = float(potential({"z": first}))
        if not np.isfinite(value):
            raise ValueError(
                f"the log joint is {-value} where chain {i} begins; start at the trained weights (start=None), or look at the data's scale."
            )
    kept, accept = [], []
    part: list[tuple[Tensor, Tensor]] = []
    kernel: Any = None
    interrupted = False
    seeds = _seeds(generator, len(z))
    bar = tqdm(total=len(z) * (warmup + samples), desc="NUTS", unit="draw", leave=False, disable=progress is False, delay=0 if progress else 2)
    try:
        with bar, pyro.validation_enabled(False), torch.enable_grad():
            for chain, first in enumerate(z):
                part = []
                kernel = NUTS(potential_fn=potential, target_accept_prob=target_accept, max_tree_depth=depth)
                with _own_randomness(seeds[chain], z.device):
                    at = {"z": first.clone()}
                    kernel.initial_params = at
                    kernel.setup(warmup)
                    for step in range(warmup + samples):
                        at = kernel.sample(at)
                        if step >= warmup:
                            θ = weights_at(at["z"].detach())
                            with torch.no_grad():
                                part.append((θ, target.log_joint(θ)))
                        bar.update()
                kept.append((part, _diverging(kernel, len(part))))
                accept.append(_acceptance(kernel))
    except KeyboardInterrupt:
        interrupted = True
        if not kept:
            if len(part) < 4:
                raise
            kept, accept = [(part, _diverging(kernel, len(part)))], [_acceptance(kernel)]
    weights = torch.stack([torch.stack([θ for θ, _ in chain]) for chain, _ in kept])
    log_joint = torch.stack([torch.stack([value for _, value in chain]) for chain, _ in kept])
    diverging = torch.stack([bad for _, bad in kept])
    out = Samples(target, weights, log_joint, diverging, torch.tensor(accept), count)
    if interrupted:
        warnings.warn(f"interrupted: {len(kept)} of {len(z)} chains with {weights.shape[1]} draws are returned.", stacklevel=3)
    _report(out)
    return out


def _seeds(generator: torch.Generator | None, chains: int) -> list[torch.Generator]:
    """A generator for each chain, so that one does not depend on how long another was."""
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (chains,), generator=generator, device=device).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _diverging(kernel: Any, draws: int) -> Tensor:
    out = torch.zeros(draws, dtype=torch.bool)
    out[[i for i in kernel.diagnostics()["divergences"] if i < draws]] = True
    return out


def _acceptance(kernel: Any) -> float:
    return float(kernel.diagnostics()["acceptance rate"])


def _report(samples: Samples) -> None:
    """Looks at functions at the data, and says what went wrong, if something did."""
    try:
        samples.at_data = samples.diagnose(samples.target.watched(WATCHED))
    except ImportError as error:
        warnings.warn(f"whether the chains have converged was not looked at: {error}.", stacklevel=4)
    log.info("%r, acceptance %s, %d evaluations", samples, [round(a, 3) for a in samples.accept.tolist()], samples.evaluations)
    worst = 1.0 if samples.at_data is None else float(samples.at_data.r_hat.max())
    if np.isnan(worst):
        warnings.warn(f"whether the chains have converged cannot be told from {samples.weights.shape[1]} draws; take more samples.", stacklevel=4)
    if worst > BAD:
        warnings.warn(
            f"the chains have not converged: R-hat of the functions at the data is up to {worst:.3g} (1.01 or less would be good). Take more "
            "samples and warmup, start=bgn.laplace(...) with structure=ggn.Full, or a tighter prior; chains in different modes may never agree.",
            stacklevel=4,
        )
    if bool(samples.diverging.any()):
        warnings.warn(
            f"{int(samples.diverging.sum())} of {len(samples)} trajectories diverged, so that a part of the posterior may have been missed; take "
            "target_accept=0.95, more warmup, or start= a posterior.",
            stacklevel=4,
        )
