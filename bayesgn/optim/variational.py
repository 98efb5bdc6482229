"""Natural-gradient Gaussian variational inference as a torch Optimizer: the weights of the net are the mean, H + P is the precision."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bayesgn import _data
from bayesgn.ggn import Curvature, Precision
from bayesgn.ggn.conjugate_gradients import conjugate_gradients
from bayesgn.ggn.structure import accumulator
from bayesgn.likelihoods import Likelihood
from bayesgn.optim.bound import Walk, raise_in, standard_error
from bayesgn.optim.checks import check_kind
from bayesgn.optim.diagonal_step import DiagonalStep
from bayesgn.optim.expectations import AtMean, Belief, Draws, Estimate, Expectation, Pairs, Reparameterized, View, write
from bayesgn.rules.curvatures import Curvature as Bending
from bayesgn.rules.curvatures import GaussNewton

logger = logging.getLogger("bayesgn.optim")


class Variational(torch.optim.Optimizer):
    """Variational inference with q(θ) = N(m, (H/T + P)⁻¹), by natural gradients of the bound.

        ELBO = E_q log p(y|θ) − T · KL(q ‖ N(μ, P⁻¹))
        H ← (1 − ρ) H + ρ N/B E_q Σ JᵀΛJ                      over a batch of B of the N data
        m ← m − lr (H/T + P + damping)⁻¹ ( N/B E_q ∂loss / T + P (m − μ) )

    The arguments are independent of one another, and name the published methods among them:

    | method | curvature | structure | expectation |
    |---|---|---|---|
    | VOGGN | ``rules.GaussNewton()`` | ``ggn.Full``, ``Layerwise``, ``Kron``, ``Diag`` | ``Draws(n)`` |
    | VOGN | ``rules.EmpiricalFisher()`` | ``ggn.Diag`` | ``Draws(n)`` |
    | OGGN, OGN | as above | as above | ``AtMean()`` |
    | VON | ``rules.Exact()`` | ``ggn.Hessian`` | ``Draws(n)`` |
    | IVON | – | ``ggn.Diag`` | ``Reparameterized(n)`` |
    | SLANG | ``rules.EmpiricalFisher()`` or ``GaussNewton()`` | ``ggn.LowRankPlusDiagonal`` | ``Draws(n)`` |
    | in the linearised model (no draws) | any | any | ``Linearized()`` |

    The net is trained in place: between steps its weights are the mean. It is evaluated in eval mode (dropout off, BatchNorm by its running
    statistics), and its mode and flags are left as they came.

    Args:
        model: ``models.Network(net, prior, structure, parameters)``.
        likelihood: p(y|f); a copy is taken, whose parameters :meth:`tune` moves.
        num_data: N, data in all, of which a batch is a part.
        curvature: Λ; ``rules.GaussNewton()`` unless given.
        expectation: how E_q is taken; ``Draws(1)`` unless given.
        lr: of the mean; a torch scheduler may move it.
        precision_lr: ρ of every step; ``lr`` as it stands unless given. (Under ``Reparameterized``, whose curvature is noisy, it then falls as one
            over the steps taken, to a hundredth of ``lr``.)
        momentum: of the gradient, in [0, 1).
        damping: added to the precision where it divides the gradient, never to q.
        temperature: T; below 1 a colder, narrower posterior.
        every: steps from one renewal of H to the next; those between cost one backward pass a draw.
        generator: of all draws.

    Attributes:
        prior, likelihood: own copies; what :meth:`tune` moves.

    Raises:
        TypeError, ValueError: for arguments or batches that cannot be right; FloatingPointError for a step that is not finite, which is not taken.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, likelihoods, models, optim
        >>> x = torch.linspace(-1, 1, 40)[:, None]; y = 2 * x + 1
        >>> model = models.Network(torch.nn.Linear(1, 1).eval(), structure=ggn.Full)
        >>> opt = optim.Variational(model, likelihoods.Gaussian(0.1), num_data=40, expectation=optim.Linearized(), lr=1.0)
        >>> _ = opt.step(x, y)  # one step solves a conjugate model
        >>> opt.posterior((x, y)).weight_variance()
        tensor([0.0071, 0.0025], dtype=torch.float64)

    Source: Khan and Rue (2023), "The Bayesian learning rule", sec. 4; Immer (2020), "Disentangling the Gauss-Newton method and approximate
    inference for neural networks", for VOGGN with full and structured covariances.
    """

    def __init__(
        self,
        model: Any,
        likelihood: Likelihood,
        num_data: int,
        curvature: Bending | None = None,
        expectation: Expectation | None = None,
        lr: float = 0.1,
        precision_lr: float | None = None,
        momentum: float = 0.0,
        damping: float = 0.0,
        temperature: float = 1.0,
        every: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if not all(hasattr(model, name) for name in ("net", "vector", "linearizer", "structure", "prior", "believe")):
            raise TypeError(f"model is a {type(model).__name__}; expected models.Network(net, prior=..., structure=...).")
        check_kind("likelihood", likelihood, Likelihood, "likelihood of bayesgn.likelihoods, e.g. likelihoods.Categorical()")
        self.expectation = Draws() if expectation is None else expectation
        check_kind("expectation", self.expectation, Expectation, "expectation of bayesgn.optim, e.g. optim.Draws(1)")
        if curvature is not None:
            check_kind("curvature", curvature, Bending, "curvature of bayesgn.rules, e.g. rules.GaussNewton()")
        self.expectation.check(model.structure, curvature)
        model.structure.check_blend()
        self.bending = GaussNewton() if curvature is None else curvature
        if isinstance(num_data, bool) or not isinstance(num_data, int) or num_data < 1:
            raise ValueError(f"num_data={num_data!r}; expected how many data there are in all, e.g. len(train_loader.dataset).")
        _check("lr", lr, lambda v: 0 < v <= 1, "in (0, 1]: 1 is a whole natural-gradient step")
        if precision_lr is not None:
            _check("precision_lr", precision_lr, lambda v: 0 < v <= 1, "in (0, 1]")
        _check("momentum", momentum, lambda v: 0 <= v < 1, "in [0, 1)")
        _check("damping", damping, lambda v: 0 <= v < math.inf, "that is a precision, 0 or more")
        _check("temperature", temperature, lambda v: 0 < v < math.inf, "above 0")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}; expected steps from one renewal of the curvature to the next, at least 1.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator={generator!r}; expected a torch.Generator: torch.Generator().manual_seed(0).")
        self.model, self.num_data, self.precision_lr, self.generator = model, num_data, precision_lr, generator
        self.momentum, self.damping, self.temperature, self.every = momentum, damping, temperature, every
        self.net, self.vector, self.linearizer = model.net, model.vector, model.linearizer
        self._own = self.vector.tensors(self.net)
        first = next(iter(self._own.values()))
        if first.dtype.itemsize < 4:
            warnings.warn(
                f"the weights are {first.dtype}, in which the mean of q lives: steps below their rounding are lost. Train net.float().",
                stacklevel=2,
            )
        self._zero = torch.zeros((), dtype=accumulator(first), device=first.device)
        dtype = None if self._zero.dtype == torch.float64 else self._zero.dtype
        self.prior = copy.deepcopy(model.prior).to(first.device, dtype)
        self.likelihood = copy.deepcopy(likelihood).to(first.device, dtype)
        self.curvature: Curvature | None = None  # H, at unit noise
        self._precision: Precision | None = None
        self._at: tuple = ()  # hyper-parameters of that precision
        self._variance: tuple[Precision, Tensor] | None = None
        self._velocity: Tensor | None = None
        self._diagonal = DiagonalStep(self)
        self.steps = 0
        super().__init__(list(self._own.values()), {"lr": float(lr)})

    # -- q -------------------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """m of the selected weights [p]."""
        return self.vector.flatten(self.net).to(self._zero)

    def scale(self) -> Tensor:
        """By which H, kept at unit noise, enters the precision of q."""
        return self.bending.scale(self.likelihood).detach().to(self._zero) / self.temperature

    def _prior(self, more: float = 0.0) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        parts = self.prior.of(self.linearizer.blocks)
        return [found.setdefault(id(p), p.detach().to(self._zero) + more) for p in parts]  # (one tensor stays one: a scalar prior)

    def prior_vector(self) -> Tensor:
        """The diagonal of P [p]."""
        return torch.cat([p.expand(b.numel) for p, b in zip(self._prior(), self.linearizer.blocks, strict=True)])

    def deviation(self) -> Tensor:
        """m − μ [p]."""
        θ = self.mean
        return θ - self.prior.mean_vector(self.vector, θ)

    def precision(self) -> Precision:
        """Σ⁻¹ = H/T + P."""
        if self.curvature is None:
            raise RuntimeError("there is no belief before the first step: call step(x, y), or start from a posterior's curvature.")
        key = tuple((id(p), p._version) for p in (*self.prior.parameters(), *self.likelihood.parameters()))
        if self._precision is None or self._at != key:
            self._precision, self._at = self.curvature.solver(self._prior(), self.scale()), key
        return self._precision

    def _belief(self) -> Belief:
        precision = None if self.curvature is None else self.precision()
        return Belief(
            self.net, self.vector, self._own, self.linearizer, self.likelihood, self.bending, self.model.structure, self.mean, precision
        )  # fmt: skip

    def start(self, curvature: Curvature) -> None:
        """Begin from an H at unit noise (of a Laplace posterior of the same structure, say) instead of that of the first batch."""
        self.curvature, self._precision = self._loaded(curvature.tensors()), None

    def _loaded(self, tensors: dict[str, Tensor]) -> Curvature:
        """An H of this structure from the tensors of another, which must be kept alike."""
        H = self._belief().empty()
        own = H.tensors()
        # (a number or a dimension of 0 grows with the data: Kronecker factors, eigenvectors)
        alike = own.keys() == tensors.keys() and all(
            t.dim() == 0 or (t.dim() == o.dim() and all(a in (0, b) for a, b in zip(t.shape, o.shape, strict=True)))
            for t, o in ((t, tensors[name]) for name, t in own.items())
        )
        if not alike:
            theirs = ", ".join(f"{name} {tuple(t.shape)}" for name, t in list(tensors.items())[:3])
            raise ValueError(
                f"that curvature ({theirs} …) is not of structure={self.model.structure!r} over these {self.vector.numel} weights; start from a "
                "posterior of the same structure and selection of weights."
            )
        H.load({name: t.clone() for name, t in tensors.items()})
        return H

    def begin(self, data: Any) -> None:
        """Begin from H at the mean over all of some data, instead of that of the first batch."""
        walk = Walk(self, data)
        H = self._at_mean(walk)
        self._set(H, walk.count)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, x: Any = None, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """One step on a batch, or on all batches of a loader at once; the expected loss of a datum, −E_q log p(y|f), before it."""
        if x is None or (callable(x) and not isinstance(x, Tensor) and not hasattr(x, "__iter__")):
            raise TypeError("a step needs its batch: step(x, y), or step(loader) for all data at once.")
        changed = next((n for n, p in self.vector.tensors(self.net).items() if p is not self._own[n]), None)
        if changed is not None:
            raise RuntimeError(f"{changed} of the net was replaced after the optimizer was made (assign=True?); build a new one.")
        pairs, B = self._pairs(x, y)
        if self.curvature is None:
            self._set(self._at_mean(pairs), B)
        renew = self.steps % self.every == 0
        if isinstance(self.expectation, Reparameterized):
            loss = self._diagonal(pairs, self.num_data / B, renew)
            self.steps += 1
            return loss / B
        found = (self.expectation.estimate if renew else self.expectation.slope)(self._belief(), pairs, self.generator)
        if not renew:  # (an expectation may find the curvature on its way to the slope)
            found = found._replace(curvature=None)
        if not bool(torch.isfinite(found.loss)) or not bool(found.gradient.isfinite().all()):
            raise FloatingPointError(f"the expected loss is {float(found.loss):.4g} or its gradient is not finite; lower lr, or raise damping.")
        self._take(found, self.num_data / B)
        return found.loss.detach() / B

    def _pairs(self, x: Any, y: Tensor | None) -> tuple[Pairs, int]:
        pairs = list(_data.batches((x, y), batch_size=2**62) if y is not None else _data.batches(x))
        pairs = [(a, b) for a, b in pairs if _data.len_of(a)]
        if not pairs:
            raise ValueError("the data are empty (0 rows); there is nothing to learn from.")
        for a, _ in pairs:
            _data.check_finite(a, "x")
        self.linearizer.prepare(pairs[0][0], self.likelihood.rows)
        for p in self._own.values():
            p.grad = None
        B = sum(_data.len_of(a) for a, _ in pairs)
        if B > self.num_data:
            raise ValueError(f"a batch of {B} data, but num_data={self.num_data}: it is the number of all data, of which a batch is a part.")
        return pairs, B

    def _at_mean(self, pairs: Any) -> Curvature | None:
        """H of some data at the mean; None where the expectation begins with a guess."""
        if self.expectation.first:
            return AtMean().estimate(self._belief(), pairs, self.generator).curvature
        next(iter(pairs))  # (plans the net, and looks at the data)
        return None

    def _set(self, found: Curvature | None, B: int) -> None:
        """H before any step: that of B data, or a guess."""
        scale, H = self.bending.scale(self.likelihood).detach().to(self._zero), self._belief().empty()
        if found is not None:
            H.blend(found, 0.0, float(self.num_data / B / scale))
        else:
            guess = self.expectation.initial * self.num_data / float(scale)  # type: ignore[attr-defined]
            H.load({name: torch.full_like(t, guess) for name, t in H.tensors().items()})
        self.curvature, self._precision = H, None

    def _rates(self) -> tuple[float, float]:
        """Of the mean and of H, the latter as far as all steps from one renewal to the next would have moved it."""
        lr = float(self.param_groups[0]["lr"])
        if not 0 <= lr <= 1:
            raise ValueError(f"lr is {lr:g} (set by a scheduler, or in param_groups); expected a part of a natural-gradient step, in [0, 1].")
        ρ = self.precision_lr
        if ρ is None:  # where H is noisy: soon away from the guess that it began with, then the mean of all that was seen
            ρ = lr if self.expectation.caution == 1.0 else max(self.expectation.caution * lr, min(lr, 2 / (self.steps + 2)))
        return lr, 1 - (1 - ρ) ** self.every

    def _take(self, found: Estimate, whole: float) -> None:
        H, (lr, ρ) = self.curvature, self._rates()
        assert H is not None
        before = dict(H.tensors()), self._velocity
        if found.curvature is not None:
            scale = self.bending.scale(self.likelihood).detach().to(self._zero)
            H.blend(found.curvature, 1 - ρ, float(ρ * whole / scale))
            self._precision = None
        try:
            θ = self.mean - lr * self._direction(found, whole)
            if not bool(θ.isfinite().all()):
                raise FloatingPointError("the step is not finite; lower lr, or raise damping.")
        except BaseException:
            H.load(before[0])
            self._velocity, self._precision = before[1], None
            raise
        self._write(θ)
        self.steps += 1

    def _direction(self, found: Estimate, whole: float) -> Tensor:
        """The natural gradient [p]."""
        H = self.curvature
        assert H is not None
        slope = whole * found.gradient.to(self._zero) / self.temperature + self.prior_vector() * self.deviation()
        if self.momentum:
            kept = torch.zeros_like(slope) if self._velocity is None else self._velocity
            self._velocity = self.momentum * kept + (1 - self.momentum) * slope
            slope = self._velocity / (1 - self.momentum ** (self.steps + 1))
        precision = H.solver(self._prior(self.damping), self.scale()) if self.damping else self.precision()
        if found.times is None or whole != 1:
            return precision.solve(slope)
        P, T, times = self.prior_vector() + self.damping, self.temperature, found.times
        return conjugate_gradients(lambda v: times(v) / T + P * v, slope, precision.solve)

    def _write(self, θ: Tensor) -> None:
        write(self.vector, self._own, θ)

    # -- the bound -----------------------------------------------------------------------------------------------------

    def kl(self) -> Tensor:
        """KL(q ‖ prior) in nats."""
        precision, P, δ = self.precision(), self.prior_vector(), self.deviation()
        if self._variance is None or self._variance[0] is not precision:  # (the costly part, and the same until H is renewed)
            self._variance = precision, precision.diagonal()
        return 0.5 * ((P * self._variance[1]).sum() + (P * δ.square()).sum() - len(P) - P.log().sum() + precision.logdet())

    def views(self, data: Any, draws: int = 10, generator: torch.Generator | None = None) -> Iterator[View]:
        """E_q log p(y|f) of some data, a batch at a time, all by the same draws."""
        self.precision()  # there is one, or it says why not
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ValueError(f"draws={draws!r}; expected a whole number, at least 1.")
        yield from self.expectation.views(self._belief(), Walk(self, data), draws, self.generator if generator is None else generator)

    def _views(self, data: Any, draws: int, generator: torch.Generator | None) -> Iterator[View]:
        """The same, of all N data and no fewer."""
        walk = Walk(self, data)
        yield from self.views(walk, draws, generator)
        if walk.count != self.num_data:
            raise ValueError(f"these are {walk.count} data but num_data={self.num_data}; the bound is over all data (a loader with drop_last?).")

    def expected_log_likelihood(self, data: Any, draws: int = 10, generator: torch.Generator | None = None) -> Tensor:
        """E_q log p(y|θ) over all N ``data``, in nats."""
        return sum(v.value(self.likelihood) for v in self._views(data, draws, generator)).to(self._zero)  # type: ignore[union-attr]

    @torch.no_grad()
    def elbo(self, data: Any, draws: int = 10, generator: torch.Generator | None = None) -> Tensor:
        """E_q log p(y|θ) − KL(q ‖ prior) over all N ``data``, in nats; by ``draws`` draws of q where the expectation draws.

        At every temperature this is the bound of the log evidence, not the tempered objective.
        """
        return self.expected_log_likelihood(data, draws, generator) - self.kl()

    @torch.no_grad()
    def objective(self, data: Any, draws: int = 10, generator: torch.Generator | None = None) -> Tensor:
        """E_q log p(y|θ) − T · KL(q ‖ prior), which the steps climb; the bound at T = 1."""
        return self.expected_log_likelihood(data, draws, generator) - self.temperature * self.kl()

    def tune(self, data: Any, draws: int = 10, generator: torch.Generator | None = None) -> None:
        """Raise the bound in the hyper-parameters at this q: prior precision(s) in closed form, the likelihood's parameters by L-BFGS.

            P_g = count_g / Σ_{i in g} ( (m_i − μ_i)² + Σ_ii )
        """
        free = [p for p in self.likelihood.parameters() if p.requires_grad]
        seen = list(self.views(data, draws, generator)) if free else []  # before the prior, and with it q, moves
        if self.prior.log_precision.requires_grad:
            moment = (self.deviation().square() + self.precision().diagonal()).detach()
            with torch.enable_grad():
                # log P enters the bound as ½ Σ_i (log P_i − P_i moment_i): counts and sums are its derivatives.
                parts = torch.cat([p.expand(b.numel) for p, b in zip(self.prior.of(self.linearizer.blocks), self.linearizer.blocks, strict=True)])
                (count,) = torch.autograd.grad(parts.log().sum(), self.prior.log_precision, retain_graph=True)
                (total,) = torch.autograd.grad((parts.to(moment) * moment).sum(), self.prior.log_precision)
            with torch.no_grad():
                change = (count / total.clamp_min(torch.finfo(total.dtype).tiny)).log()
                self.prior.log_precision += torch.where(count > 0, change, 0.0)
        if free:
            raise_in(self.likelihood, free, seen)
        self._precision = None

    # -- answers -------------------------------------------------------------------------------------------------------

    def posterior(self, data: Any, draws: int = 10, generator: torch.Generator | None = None) -> Any:
        """q as a ``models.VariationalPosterior``, with the bound over all N ``data``; it holds a copy of the net, at the mean."""
        self.precision()
        statistics: dict[str, Tensor] = {}
        totals: Tensor | None = None
        with torch.no_grad():
            for view in self._views(data, draws, generator):
                for name, t in view.statistics(self.likelihood).items():
                    statistics[name] = statistics[name] + t if name in statistics else t
                part = view.totals(self.likelihood)
                totals = part if totals is None or part is None else totals + part
        return self.model.believe(self, statistics, standard_error(totals, getattr(self.expectation, "antithetic", False)))

    def snapshot(self) -> dict[str, Any]:
        """All that a step moves, to go back to by :meth:`restore`."""
        return {
            "mean": self.mean, "curvature": None if self.curvature is None else self.curvature.copy(), "velocity": self._velocity,
            "steps": self.steps, "prior": copy.deepcopy(self.prior.state_dict()), "likelihood": copy.deepcopy(self.likelihood.state_dict()),
        }  # fmt: skip

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Back to a :meth:`snapshot`."""
        self._write(snapshot["mean"])
        self.curvature = None if snapshot["curvature"] is None else snapshot["curvature"].copy()
        self._velocity, self.steps, self._precision = snapshot["velocity"], snapshot["steps"], None
        self.prior.load_state_dict(snapshot["prior"])
        self.likelihood.load_state_dict(snapshot["likelihood"])

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with H, momentum and hyper-parameters; safe to load with ``weights_only=True``. The mean is the net's own."""
        state = super().state_dict()
        state["variational"] = {
            "curvature": None if self.curvature is None else dict(self.curvature.tensors()),
            "velocity": self._velocity, "steps": self.steps, "prior": self.prior.state_dict(), "likelihood": self.likelihood.state_dict(),
        }  # fmt: skip
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer of the same arguments stood; load the net's weights beside it."""
        own = state_dict.get("variational")
        if own is None:
            raise ValueError("this state_dict is not of optim.Variational: it has no 'variational'.")
        H = None if own["curvature"] is None else self._loaded(own["curvature"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "variational"})
        self.curvature = H
        self._velocity, self.steps, self._precision = own["velocity"], own["steps"], None
        self.prior.load_state_dict(own["prior"])
        self.likelihood.load_state_dict(own["likelihood"])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "step"}  # (a scheduler's wrapper)

    def __repr__(self) -> str:
        return f"Variational({self.vector.numel} weights, {self.bending!r}, {self.model.structure!r}, {self.expectation!r})"


def _check(name: str, value: Any, good: Callable[[Any], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not good(value):
        raise ValueError(f"{name}={value!r}; expected a number {expected}.")
