"""Evidence: prior precision(s) and noise by maximising log p(y) over one and the same H; nothing is refitted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesgn.inference.ascent import maximize
from bayesgn.inference.gp_evidence import maximize_over_sites
from bayesgn.inference.hyperparameters import in_double
from bayesgn.models.linearized import LinearizedPosterior
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.models.variational_posterior import VariationalPosterior
from bayesgn.models.weight_posterior import WeightPosterior

BOUNDS, NOISE_BOUNDS = (1e-6, 1e8), (1e-10, 1e10)  # of precisions and of the noise of a network


@dataclass
class Trace:
    """What a search for hyper-parameters did, step by step; ``plots.evidence_trace(trace.evidence)`` draws it.

    Attributes:
        evidence: log p(y) at the start and after every step, in nats; never falls.
        precision: prior precision(s) beside it, a number or a list of numbers each.
        noise: the noise beside it, where the likelihood has one; else empty.
        reason: why it stopped.
        converged: whether it stopped because nothing more was to be gained.
        at_bounds: which hyper-parameters ended at a bound.

    Example:
        >>> Trace(evidence=[-30.0, -12.5], reason="settled", converged=True)
        Trace(1 steps, log evidence -30 → -12.5, settled)
    """

    evidence: list[float] = field(default_factory=list)
    precision: list[Any] = field(default_factory=list)
    noise: list[Any] = field(default_factory=list)
    reason: str = ""
    converged: bool = False
    at_bounds: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return max(len(self.evidence) - 1, 0)

    def note(self, posterior: WeightPosterior, evidence: float | None = None) -> None:
        """Add a step: the posterior as it stands."""
        self.evidence.append(posterior.log_evidence().item() if evidence is None else evidence)
        self.precision.append(posterior.prior.precision.detach().tolist())
        noise = getattr(posterior.likelihood, "noise", None)
        if isinstance(noise, Tensor):
            self.noise.append(noise.detach().tolist())

    def __repr__(self) -> str:
        if not self.evidence:
            return "Trace(empty)"
        return f"Trace({self.steps} steps, log evidence {self.evidence[0]:.4g} → {self.evidence[-1]:.4g}, {self.reason})"


def maximize_evidence(
    posterior: Any,
    steps: int = 100,
    prior: bool = True,
    noise: bool = True,
    tol: float = 1e-7,
    bounds: tuple[float, float] = BOUNDS,
    noise_bounds: tuple[float, float] = NOISE_BOUNDS,
    data: Any = None,
    progress: bool | None = None,
    optimizer: Callable | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """Tune a posterior's own hyper-parameters, in place, by its evidence.

    **A network** from ``bgn.laplace``: prior precision(s) P and noise, over the one H that the posterior holds, s the scale of the loss,

        log p(y | P, s) = log p(y|θ*, s) − ½ (θ*−μ)ᵀP(θ*−μ) + ½ log det P − ½ log det(s H + P)

    H is kept: with its eigenvalues a step costs microseconds. In log P and log s (Gaussian noise) this is a concave function, so
    Newton's method with a line search finds *the* optimum, at which MacKay's fixed point P = γ / |θ*−μ|² holds. Where no
    eigenvalues are to be had (Full with a prior per layer) the same line search runs on L-BFGS directions. The evidence
    never ends below where it began.

    **A Gaussian process** from ``bgn.bayes_newton``: the parameters θ of kernels, means, likelihood (and inducing inputs), on the energy

        E(θ) = log Z_sites(θ) + Σ_n ( L_n[p(y_n|·; θ)] − L_n[t_n] ),   sites t_n at the fixed point of the rule for θ

    by L-BFGS in log θ, with turns of the rule before every evaluation. The gradient is the total one: beside ∂E/∂θ at fixed sites it has what
    the sites' own motion adds, by implicit differentiation. That is nought for VI and EP with the exact curvature and not for Laplace's method,
    where leaving it out moved the optimum by up to 1.2 in a log hyper-parameter and lost up to 2 nats on our examples. gpytorch's constraints
    hold, and its registered priors are added to E, as in its own ``ExactMarginalLogLikelihood``: the optimum is then a MAP.

    **A network** from ``bgn.bayes_newton``, linearised once: prior precision(s) and the likelihood's parameters, on the evidence of the rule at its
    fixed point. The slope is a difference quotient of just that for up to eight of them, else the slope at fixed sites.

    Args:
        posterior: its own copies of prior, model, likelihood and sites change, yours do not.
        steps: at most so many.
        prior, noise: which to tune, the model's hyper-parameters and the likelihood's; a parameter with ``requires_grad_(False)`` stays in any case.
        tol: stop when no log hyper-parameter moves by more.
        bounds: of every prior precision; a warning says when one is hit.
        noise_bounds: of the noise.
        data: the training data again (for posteriors of ``bgn.laplace``), to tune also what H does not scale with (noise of each output,
            degrees of freedom …): H is refitted in between. Without, such parameters stay as they are, and a warning says so.
        progress: a progress bar: ``None`` shows one for work beyond two seconds, ``False`` never.
        optimizer: of a Gaussian process: another optimizer, as a function of the free parameters (as they are stored, gpytorch's raw ones) that
            gives it, ``lambda p: torch.optim.Adam(p, lr=0.1)``, or a pair of it and its scheduler. One turn of the rule goes before every
            gradient. On small problems Adam took ten times as long as the default and stayed less exact.
        batch_size: of a ``models.SparseGP`` under ``rules.Variational``: data in a step. The bound is then climbed by stochastic gradients: natural
            ones for the belief about the inducing variables, Adam (or ``optimizer``) for the hyper-parameters; every step is taken,
            ``trace.evidence`` has estimates, and at the end the sites are settled on all data.
        generator: randomness of batches.

    Returns:
        What happened, step by step, and why it stopped: a :class:`Trace` for a network, a ``HyperparameterTrace`` for a Gaussian process.
        After an interrupt the posterior stands at the best point so far.

    Raises:
        ValueError: for bounds or steps that cannot be right, or when there is nothing to tune.

    Example:
        >>> import torch, bayesgn as bgn
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> posterior = bgn.laplace(bgn.models.Network(net), bgn.likelihoods.Gaussian(0.1), (x, y))
        >>> trace = bgn.maximize_evidence(posterior)
        >>> trace.evidence[-1] > trace.evidence[0], trace.converged
        (True, True)
        >>> import gpytorch
        >>> t = torch.linspace(0, 10, 100); counts = torch.poisson(torch.exp(torch.sin(t)))
        >>> kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5))
        >>> posterior = bgn.bayes_newton(bgn.models.MarkovGP(kernel), bgn.likelihoods.Poisson(), (t, counts), rule=bgn.rules.Variational())
        >>> trace = bgn.maximize_evidence(posterior)
        >>> list(trace.hyperparameters), trace.converged
        (['kernels.0.outputscale', 'kernels.0.base_kernel.lengthscale'], True)

    Source: MacKay (1992), "A practical Bayesian framework for backpropagation networks"; Immer et al. (2021), "Scalable
    marginal likelihood estimation for model selection in deep learning"; Wilkinson, Särkkä and Solin (2023), sec. 3.6, for sites.
    """
    for name, value in (("bounds", bounds), ("noise_bounds", noise_bounds)):
        _bounds(value, name)
    if steps < 0:
        raise ValueError(f"steps={steps}; expected how many steps to take at most, e.g. 100.")
    if hasattr(posterior, "energy"):  # a function of sites, which turns of the rule renew
        if data is not None or bounds != BOUNDS or noise_bounds != NOISE_BOUNDS:
            raise ValueError(
                "data=, bounds= and noise_bounds= are for networks: a Gaussian process holds its data, and its hyper-parameters are bounded by "
                "gpytorch constraints (kernel.register_constraint)."
            )
        return maximize_over_sites(posterior, steps, prior, noise, tol, optimizer, progress, batch_size, generator)
    if optimizer is not None or batch_size is not None:
        raise ValueError(
            "optimizer= and batch_size= are for Gaussian processes; the evidence of a network over one H is maximised by Newton's method."
        )
    if isinstance(posterior, LinearizedPosterior):
        if data is not None:
            raise ValueError("data= is for posteriors of bgn.laplace; one of bgn.bayes_newton holds its data.")
        from bayesgn.inference.refit import maximize_settled

        return maximize_settled(posterior, steps, prior, noise, tol, bounds, noise_bounds, progress)
    if data is not None:
        if isinstance(posterior, VariationalPosterior):
            raise ValueError(
                "data= is for posteriors of bgn.laplace. Of a variational one, bgn.variational(posterior, data=train_loader, tune=True) tunes the "
                "likelihood and the prior beside q."
            )
        from bayesgn.inference.refit import alternate

        return alternate(posterior, steps, prior, noise, tol, bounds, noise_bounds, data, progress)
    if noise:
        _warn_untuned(posterior)
    return over_one_curvature(posterior, steps, prior, noise, tol, bounds, noise_bounds, progress)


def over_one_curvature(
    posterior: NetworkPosterior, steps: int, prior: bool, noise: bool, tol: float, bounds, noise_bounds, progress: bool | None
) -> Trace:
    """``maximize_evidence`` without ``data``: what H does not scale with stays as it is, without a word."""
    parameters = tunable(posterior, prior, noise)
    if not parameters:
        raise ValueError(
            "there is nothing to tune: "
            + ("prior=False and " if not prior else "the prior is frozen (requires_grad_(False)) and ")
            + f"{type(posterior.likelihood).__name__} has no free parameter that H scales with; unfreeze one, or pass data= to refit H."
        )
    lower, upper = limits(posterior, parameters, bounds, noise_bounds)
    trace, path, start = Trace(), [], read(parameters)
    with in_double(parameters):
        objective = spectral_objective(posterior, parameters) or AutogradObjective(posterior, parameters)
        try:
            z, trace.reason, trace.converged = maximize(objective, start, lower, upper, steps, tol, path.append, progress)
        finally:  # also after an interrupt: the best so far
            for z, value in path:
                write(parameters, z)
                trace.note(posterior, value)
    write(parameters, z)
    warn_of_bounds(posterior, parameters, trace, lower, upper, bounds, noise_bounds)
    return trace


def limits(posterior: WeightPosterior, parameters: list[torch.nn.Parameter], bounds, noise_bounds) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of every entry."""
    low, high = _bounds(bounds, "bounds"), _bounds(noise_bounds, "noise_bounds")
    in_prior = {id(p) for p in posterior.prior.parameters()}
    each = np.array([low if id(p) in in_prior else high for p in parameters for _ in range(p.numel())])
    return each[:, 0], each[:, 1]


def warn_of_bounds(posterior: WeightPosterior, parameters: list[torch.nn.Parameter], trace: Trace, lower, upper, bounds, noise_bounds) -> None:
    """Note and say which hyper-parameters ended at a bound."""
    z = read(parameters)
    hit = (z <= lower + 1e-5) | (z >= upper - 1e-5)  # (rounded to float32, they may be)
    trace.at_bounds = [name for name, at in zip(_names(posterior, parameters), hit, strict=True) if at]
    if trace.at_bounds:
        shown = ", ".join(trace.at_bounds[:5]) + (" …" if len(trace.at_bounds) > 5 else "")
        warnings.warn(
            f"maximize_evidence: {shown} ended at a bound (precision {bounds}, noise {noise_bounds}): the evidence has no optimum "
            "inside. Weights that never left the prior mean, or residuals of zero, do this; share a precision among more weights "
            "(WeightPrior(scalar) or per_layer), or pass other bounds.",
            stacklevel=4,
        )


def tunable(posterior: WeightPosterior, prior: bool = True, noise: bool = True) -> list[torch.nn.Parameter]:
    """The free hyper-parameters of a posterior that its evidence can tune over the same H."""
    own = {id(p) for p in posterior.prior.parameters()}
    return [p for p in posterior.hyperparameters() if p.requires_grad and (prior if id(p) in own else noise)]


def read(parameters: list[torch.nn.Parameter]) -> np.ndarray:
    """All of them in one float64 vector."""
    return np.concatenate([p.detach().double().cpu().numpy().reshape(-1) for p in parameters])


def write(parameters: list[torch.nn.Parameter], z: np.ndarray) -> None:
    """Put a vector back."""
    start = 0
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.from_numpy(np.array(z[start : start + p.numel()])).reshape(p.shape))
            start += p.numel()


# -- the evidence as a function of log hyper-parameters ------------------------------------------------------------------


class AutogradObjective:
    """log p(y) and its gradient, whatever the structure."""

    def __init__(self, posterior: WeightPosterior, parameters: list[torch.nn.Parameter]) -> None:
        self.posterior, self.parameters = posterior, parameters

    def __call__(self, z: np.ndarray) -> tuple[float, np.ndarray, None]:
        write(self.parameters, z)
        with torch.enable_grad():
            value = self.posterior.log_evidence()
            gradient = torch.autograd.grad(value, self.parameters, allow_unused=True, materialize_grads=True)
        return value.item(), np.concatenate([g.double().cpu().numpy().reshape(-1) for g in gradient]), None


class SpectralObjective:
    """log p(y) with gradient and Hessian from eigenvalues λ_i of H, each under the precision of its group g(i).

        E = L(φ) + ½ Σ_g (n_g u_g − e^{u_g} q_g) − ½ Σ_i log(e^{v(φ)} λ_i + e^{u_g(i)}) − ½ Σ_g zeros_g u_g

    with u = log precisions, φ the likelihood's parameters, v = log scale, q_g = |θ* − μ|² of a group and r_i = e^u / (e^v λ_i + e^u):

        ∂E/∂u_g = ½ (n_g − zeros_g − e^{u_g} q_g − Σ_{i∈g} r_i),   ∂E/∂v = −½ Σ_i (1 − r_i),   all curvature through r (1 − r).
    """

    def __init__(self, posterior, λ: np.ndarray, group: np.ndarray, n, zeros, q, free_prior: bool, φ: list[torch.nn.Parameter]) -> None:
        self.posterior, self.λ, self.group, self.n, self.zeros, self.q = posterior, λ, group, n, zeros, q
        self.free_prior, self.φ, self.terms = free_prior, φ, None
        self.G = len(n)
        self.u = posterior.prior.log_precision.detach().double().cpu().numpy().reshape(-1)
        with torch.no_grad():
            self.fixed = self._log_fit().item(), self._log_scale().item()
        self.terms = self._gaussian_terms()

    def _gaussian_terms(self) -> tuple[float, float, float, float] | None:
        """(a, b, c, d) where L = a + b φ + c e^{−φ} and v = d − φ for one φ = log noise, as for Gaussian noise: no autograd needed then."""
        if len(self.φ) != 1 or self.φ[0].numel() != 1:
            return None
        z = read(self.φ)
        (L, (L1,), ((L2,),)), (v, (v1,), ((v2,),)) = self._likelihood(z)
        b, c = L1 + L2, L2 * math.exp(z[0])
        a, d = L - b * z[0] - L2, v + z[0]
        (L_, *_), (v_, *_) = self._likelihood(z + 1)  # the form holds, or not: a second point tells
        write(self.φ, z)
        expected = a + b * (z[0] + 1) + c * math.exp(-z[0] - 1)
        same = abs(L_ - expected) <= 1e-11 * (abs(L) + abs(L_)) and abs(v_ - v + 1) <= 1e-11 * (1 + abs(v))
        return (a, b, c, d) if same else None

    def _log_scale(self) -> Tensor:
        return self.posterior.rule.curvature.scale(self.posterior.likelihood).double().log()

    def _log_fit(self) -> Tensor:
        """What the evidence has beside prior and volume."""
        return getattr(self.posterior, "log_fit", self.posterior.log_likelihood)()

    def _likelihood(self, z: np.ndarray):
        """L, v and their derivatives in φ."""
        if not self.φ:
            none = np.zeros(0), np.zeros((0, 0))
            return (self.fixed[0], *none), (self.fixed[1], *none)
        if self.terms is not None:
            (φ,), (a, b, c, d) = z, self.terms
            c = c * math.exp(-φ)
            return (a + b * φ + c, np.array([b - c]), np.array([[c]])), (d - φ, -np.ones(1), np.zeros((1, 1)))
        write(self.φ, z)
        with torch.enable_grad():
            return self._derive(self._log_fit()), self._derive(self._log_scale())

    def _derive(self, value: Tensor):
        first = torch.autograd.grad(value, self.φ, create_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1).double() for g in first])
        rows = []
        for g in flat:
            second = (
                torch.autograd.grad(g, self.φ, retain_graph=True, allow_unused=True, materialize_grads=True)
                if g.requires_grad
                else [torch.zeros_like(p) for p in self.φ]
            )
            rows.append(torch.cat([h.reshape(-1).double() for h in second]))
        return value.item(), flat.detach().cpu().numpy(), torch.stack(rows).detach().cpu().numpy()

    def __call__(self, z: np.ndarray):
        G = self.G if self.free_prior else 0
        u, φ = (z[:G] if self.free_prior else self.u), z[G:]
        (L, L1, L2), (v, v1, v2) = self._likelihood(φ)
        precision, scaled = np.exp(u), self.λ * math.exp(v)
        P = precision[self.group] if self.G > 1 else precision[0]
        total = scaled + P
        r = P / total
        bend = r * (scaled / total)
        sum_r, sum_bend = self._by_group(r), self._by_group(bend)
        pull = precision * self.q
        value = L + 0.5 * float(((self.n - self.zeros) * u - pull).sum()) - 0.5 * float(np.log(total).sum())
        E_v, E_vv = -0.5 * (len(self.λ) - sum_r.sum()), -0.5 * sum_bend.sum()
        g_φ, C = L1 + E_v * v1, L2 + E_vv * np.outer(v1, v1) + E_v * v2
        if not self.free_prior:
            return float(value), g_φ, (np.zeros(0), np.zeros((0, len(φ))), C)
        g_u, D = 0.5 * (self.n - self.zeros - pull - sum_r), -0.5 * (pull + sum_bend)
        return float(value), np.concatenate([g_u, g_φ]), (D, 0.5 * np.outer(sum_bend, v1), C)

    def _by_group(self, x: np.ndarray) -> np.ndarray:
        return x.sum(keepdims=True) if self.G == 1 else np.bincount(self.group, x, minlength=self.G)


def spectral_objective(posterior: NetworkPosterior, parameters: list[torch.nn.Parameter]) -> SpectralObjective | None:
    """The fast form, where H's eigenvalues each meet one precision; None elsewhere."""
    parts, prior, blocks = posterior.spectrum(), posterior.prior, posterior.curvature.blocks
    groups = prior.groups or {}
    u = getattr(prior, "log_precision", None)
    if parts is None or u is None or [id(p) for p in prior.parameters()] != [id(u)]:
        return None
    # The entry of the precision vector that each weight has, read off the prior itself.
    by_weight = u.dim() > 0 and not groups
    entry = [np.arange(b.where.start, b.where.stop) if by_weight else (groups[b.name] if u.dim() else 0) for b in blocks]
    G = u.numel()
    n, q, zeros, λ, group = np.zeros(G), np.zeros(G), np.zeros(G), [], []
    square = posterior.deviation.square().cpu().numpy()
    for b, e in zip(blocks, entry, strict=True):
        np.add.at(n, e, 1.0 if by_weight else float(b.numel))
        np.add.at(q, e, square[b.where] if by_weight else square[b.where].sum())
    for part in parts:
        values = part.eigenvalues.detach().double().cpu().numpy().reshape(-1)
        if part.by_weight:
            where = [np.broadcast_to(entry[i], blocks[i].numel) for i in part.blocks]
            where = np.concatenate(where)
        elif by_weight or len({entry[i] for i in part.blocks}) > 1:
            return None
        else:
            where = np.full(len(values), entry[part.blocks[0]])
            zeros[entry[part.blocks[0]]] += part.zeros
        λ.append(values)
        group.append(where)
    free_prior = any(p is u for p in parameters)
    φ = [p for p in parameters if p is not u]
    if free_prior and parameters[0] is not u:
        return None
    return SpectralObjective(posterior, np.concatenate(λ), np.concatenate(group), n, zeros, q, free_prior, φ)


# -- words ---------------------------------------------------------------------------------------------------------------


def _bounds(value: tuple[float, float], name: str) -> tuple[float, float]:
    low, high = value
    if not (0 < low < high < math.inf):
        raise ValueError(f"{name}={value}; expected (low, high) with 0 < low < high < inf.")
    return math.log(low), math.log(high)


def _names(posterior: WeightPosterior, parameters: list[torch.nn.Parameter]) -> list[str]:
    names, layers = [], {i: name for name, i in (posterior.prior.groups or {}).items()}
    for p in parameters:
        if p is posterior.prior.log_precision:
            names += ["prior precision"] if p.dim() == 0 else [f"precision of {layers.get(i, i)!r}" for i in range(p.numel())]
        else:
            own = next(name for name, q in posterior.likelihood.named_parameters() if q is p)
            names += [f"likelihood {own}"] * p.numel()
    return names


def _warn_untuned(posterior: NetworkPosterior) -> None:
    """Say so where noise was to be tuned (the default) and cannot be over one H: an untuned noise looks like a tuned one."""
    known = {id(p) for p in posterior.hyperparameters()}
    left = [name for name, p in posterior.likelihood.named_parameters() if p.requires_grad and id(p) not in known]
    if left:
        names = ", ".join(name.removeprefix("raw_").removeprefix("log_") for name in left)
        warnings.warn(
            f"maximize_evidence leaves {names} of {type(posterior.likelihood).__name__} as given: H by {posterior.rule.curvature} "
            "is no multiple of one matrix as it changes. Pass data=train_loader to refit H and tune it too, or noise=False if this is meant.",
            stacklevel=3,
        )
