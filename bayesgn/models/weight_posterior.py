"""What every Gaussian over a net's weights answers: weights, linearised functions, and whether the net is still the same."""

from __future__ import annotations

import contextlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn import _data
from bayesgn._extras import quiet_import
from bayesgn.ggn.linearization import Linearizer
from bayesgn.ggn.structure import Curvature, Precision, Spectrum, Structure, accumulator, working
from bayesgn.models._identity import fingerprint, marks, sums, versions
from bayesgn.models.answer import Answer
from bayesgn.models.posterior import Posterior, StalePosteriorError
from bayesgn.models.stream import same_net
from bayesgn.models.weight_prior import WeightPrior


class WeightPosterior(Posterior):
    """q(θ) = N(θ̄, Σ) over the weights of a net linearised at θ*, and the functions it implies, f(x) ~ N(f(x; θ*) + J (θ̄ − θ*), J Σ Jᵀ).

    It owns copies of the likelihood and prior: change or tune *these* (``posterior.prior.precision = 3.0``) and every answer follows.

    Attributes:
        net: the user's net, untouched.
        likelihood, prior: own copies, with the hyper-parameters as ``nn.Parameter`` s.
        point: θ* of the selected weights [p], where the net is linearised.
        deviation: θ* − the prior mean [p].
        num_data: data seen.
    """

    curvature: Curvature
    num_data: int

    def __init__(self, linearizer: Linearizer, structure: Structure, likelihood, prior: WeightPrior, rule) -> None:
        self.linearizer, self.structure = linearizer, structure
        self.likelihood, self.prior, self.rule = likelihood, prior, rule
        self.point = linearizer.vector.flatten(linearizer.net)
        like = self.point
        self._wide = accumulator(like)
        dtype = None if self._wide == torch.float64 else self._wide  # a device without float64
        self.prior.to(like.device, dtype)
        self.likelihood.to(like.device, dtype)
        θ = self.point.to(self._wide)  # first: a difference of bfloat16 weights would be rounded to 8 bits
        self.deviation = θ - self.prior.mean_vector(linearizer.vector, θ)
        self._seen, self._sums = versions(self.net), sums(self.net)
        self._print, self._marks = fingerprint(self.net), marks(self.net)
        self._cached: tuple[Any, Precision] | None = None
        self._told_partial = False

    # -- what a heir gives -----------------------------------------------------------------------------------------

    @abstractmethod
    def precision(self) -> Precision:
        """Σ⁻¹ at the present hyper-parameters, with a graph to them."""

    @abstractmethod
    def shift(self) -> Tensor | None:
        """θ̄ − θ* [p], without a graph; None for zero."""

    @abstractmethod
    def spectrum(self) -> list[Spectrum] | None:
        """Eigenvalues of H part by part, where the evidence is a function of them and a mean that stays; None elsewhere."""

    @abstractmethod
    def hyperparameters(self) -> list[nn.Parameter]:
        """What the evidence can tune over the same H: prior precision(s), and what it can of the likelihood."""

    # -- weights ---------------------------------------------------------------------------------------------------

    @property
    def net(self) -> nn.Module:
        """The network, as the user left it."""
        return self.linearizer.net

    @property
    def mean(self) -> Tensor:
        """θ̄ of the selected weights [p]."""
        shift = self.shift()
        return self.point if shift is None else (self.point.to(shift) + shift).to(working(self.point.dtype))

    def _settled(self) -> Precision:
        """Σ⁻¹ without a graph, kept until a hyper-parameter or H changes."""
        parameters = [*self.prior.parameters(), *self.likelihood.parameters()]
        key = (self.num_data, *(p._version for p in parameters), *(id(p) for p in parameters))
        if self._cached is None or self._cached[0] != key:
            with torch.no_grad():
                self._cached = (key, self.precision())
        return self._cached[1]

    def weight_variance(self) -> Tensor:
        """Marginal posterior variances of the weights [p]."""
        return self._settled().diagonal()

    def sample_weights(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draws from q(θ) [n p], in the order of ``posterior.linearizer.vector.names``; float32 for nets of half precision.

        A draw rounded to the 8 bits of a bfloat16 weight would be off by up to |θ|/512, more than many posteriors are wide.
        """
        dtype = working(self.mean.dtype)
        return self.mean.to(dtype) + self._settled().sample(check_count(n), generator).to(dtype)

    # -- function space --------------------------------------------------------------------------------------------

    def __call__(self, x: Any):
        """N(f(x; θ*) + J (θ̄ − θ*), J Σ Jᵀ) over all data and outputs, a gpytorch ``MultitaskMultivariateNormal``; covariance is lazy.

        Where x requires grad, mean, variances and covariance carry gradients to it.
        """
        with quiet_import():
            from bayesgn.models.function_gaussian import FunctionGaussian

        self.check_fresh()
        check_input(x)
        self._check_behaviour(x)
        answer = Answer(self.linearizer, self.likelihood.rows, self._settled(), x, self.check_fresh, self.shift())
        with self._explaining(x):
            mean = answer.mean()
        return FunctionGaussian(mean.reshape(-1, mean.shape[-1]), answer, tuple(mean.shape[1:-1]))

    def sample_functions(self, n: int = 1, generator: torch.Generator | None = None) -> Callable[[Any], Tensor]:
        """n draws of whole (linearised) functions: the answer maps x to [n n_data *positions c], the same draws at every call.

            f_s(x) = f(x; θ*) + J(x) (θ_s − θ*),   θ_s ~ q
        """
        deviations, shift = self._settled().sample(check_count(n), generator), self.shift()
        deviations = deviations if shift is None else deviations + shift

        def functions(x: Any) -> Tensor:
            self.check_fresh()
            check_input(x)
            self._check_behaviour(x)
            out = []
            for lin in self.linearizer.parts(x, self.likelihood.rows):
                change = sum(
                    f.to(self._wide).matvec(deviations[:, b.where].mT)
                    for f, b in zip(lin.factors(), lin.blocks, strict=True)
                )
                f = lin.output.to(self._wide).flatten(1)[..., None] + change  # [n r s]
                out.append(f.movedim(-1, 0).unflatten(2, lin.output.shape[1:]).to(working(lin.output.dtype)))
            return torch.cat(out, dim=1)

        return functions

    # -- evidence --------------------------------------------------------------------------------------------------

    def log_prior_and_volume(self, precision: Precision, deviation: Tensor) -> Tensor:
        """log N(θ̄; μ, P⁻¹) + p/2 log 2π − ½ log det Σ⁻¹, for ``deviation`` θ̄ − μ."""
        if self.curvature.partial and not self._told_partial:
            self._told_partial = True
            warnings.warn(
                f"the evidence counts the likelihood of all {self.num_data} data but the determinant of the subset that {self.structure} "
                "keeps: it is too large, and tuning by it trusts the data too much. Fit on the subset alone, or use "
                "ggn.Gram(inducing=…) or ggn.LowRank.",
                stacklevel=3,
            )
        blocks = self.curvature.blocks
        prior = self.prior.of(blocks)
        quadratic = sum((p * deviation[b.where].square()).sum() for p, b in zip(prior, blocks, strict=True))
        logdet_prior = sum(p.log() * b.numel if p.dim() == 0 else p.log().sum() for p, b in zip(prior, blocks, strict=True))
        return 0.5 * (logdet_prior - quadratic - precision.logdet())

    # -- state -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the posterior as safetensors, whole or not at all; :func:`bayesgn.load` reads it back onto the same net.

        Hyper-parameters, what the posterior was made of, and hashes of the net's weights are written, but not the net.

        Raises:
            StalePosteriorError: the net moved since.
            TypeError: for a structure, rule or prior of one's own, which could not be rebuilt from a file.
        """
        from bayesgn.models._files import save

        return save(self, path)

    def check_fresh(self) -> None:
        """Raise :class:`StalePosteriorError` when the net's weights are no longer those the posterior was made at.

        Version counters are compared first, which costs nothing; then sums of all weights and of their squares, because a write
        through ``.data`` moves no counter. The sums read every weight twice: about 1 ms for a million weights on one core.
        """
        seen = versions(self.net)
        if seen == self._seen and sums(self.net) == self._sums:
            return
        if fingerprint(self.net) != self._print:
            raise StalePosteriorError(
                f"the weights or buffers of {type(self.net).__name__} changed after the posterior was made; its curvature belongs "
                "to the old ones. Fit again, or load the old weights back."
            )
        self._seen, self._sums = seen, sums(self.net)

    def _check_behaviour(self, x: Any) -> None:
        """Raise where hooks or modules were put on the net since, and BackPACK's copy no longer answers x as the net does."""
        if self.linearizer.engine is None or marks(self.net) == self._marks:
            return
        if not same_net(self.linearizer, x, self.likelihood.rows):
            raise StalePosteriorError(
                f"{type(self.net).__name__} answers otherwise than when the posterior was made, though its weights are the same: a forward hook or "
                "another module was put in. Remove it, or make a new Network(net, ...) and fit again."
            )

    @contextlib.contextmanager
    def _explaining(self, x: Any) -> Iterator[None]:
        """Where the net fails on x, say whether x lacks a batch dimension, or has another dtype than the net."""
        try:
            with _data.advice(x, self.point):
                yield
        except (ValueError, RuntimeError) as error:
            if type(error) not in (ValueError, RuntimeError) or not isinstance(x, Tensor) or x.dim() == 0:
                raise
            try:
                self.linearizer.evaluate(x.detach()[None], self.likelihood.rows)
            except (ValueError, RuntimeError, IndexError):
                raise error from None
            raise ValueError(
                f"x has shape {tuple(x.shape)}, on which the net fails, but it answers a batch of one such datum: the first dimension of x must run "
                f"over data, pass x[None]. (What failed: {str(error).splitlines()[0]})"
            ) from error

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.net).__name__}, {len(self.point)} weights, {self.structure}, {self.num_data} data, "
            f"{self.prior}, {self.likelihood})"
        )


def check_input(x: Any) -> None:
    """Raise for no data, or inputs that are not finite."""
    if _data.len_of(x) == 0:
        raise ValueError(f"x is {_data.describe(x)}: 0 data; pass at least one.")
    _data.check_finite(x, "x")


def check_count(n: Any) -> int:
    """A number of draws, at least one."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n!r} samples; expected a whole number, at least 1.")
    return n
