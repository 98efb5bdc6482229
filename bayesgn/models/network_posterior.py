"""The Gaussian posterior of a network: weight space, linearised function space, evidence."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn import _data
from bayesgn._extras import quiet_import
from bayesgn.ggn.evaluation import at_rest, call
from bayesgn.ggn.linearization import Linearizer
from bayesgn.ggn.structure import Curvature, Precision, Structure, accumulator, working
from bayesgn.models._identity import fingerprint, marks, sums, versions
from bayesgn.models.answer import Answer
from bayesgn.models.posterior import Posterior, StalePosteriorError
from bayesgn.models.stream import Stream, same_net
from bayesgn.models.weight_prior import WeightPrior


class NetworkPosterior(Posterior):
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
        self.linearizer, self.curvature, self.structure = linearizer, curvature, structure
        self.likelihood, self.prior, self.rule = likelihood, prior, rule
        self.statistics, self.num_data = statistics, num_data
        self.mean = linearizer.vector.flatten(linearizer.net)
        like = self.mean
        self._wide = accumulator(like)
        dtype = None if self._wide == torch.float64 else self._wide  # a device without float64
        self.prior.to(like.device, dtype)
        self.likelihood.to(like.device, dtype)
        θ = self.mean.to(self._wide)  # first: a difference of bfloat16 weights would be rounded to 8 bits
        self.deviation = θ - self.prior.mean_vector(linearizer.vector, θ)  # θ* − μ
        self._seen, self._sums = versions(self.net), sums(self.net)
        self._print, self._marks = fingerprint(self.net), marks(self.net)
        self._cached: tuple[Any, Precision] | None = None
        self._told_partial = False
        self._made: tuple[Curvature, dict[str, Tensor], Tensor] | None = None
        self._check_likelihood(rule.curvature.scale(likelihood).to(self._wide))

    @property
    def net(self) -> nn.Module:
        """The network, as the user left it."""
        return self.linearizer.net

    # -- weights ---------------------------------------------------------------------------------------------------

    def precision(self) -> Precision:
        """scale · H + P at the present hyper-parameters, with a graph to them."""
        blocks = self.curvature.blocks
        scale = self.rule.curvature.scale(self.likelihood).to(self._wide)
        self._check_likelihood(scale)
        return self.curvature.with_prior(self.prior.of(blocks), scale)

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

    def _settled(self) -> Precision:
        """The same without a graph, kept until a hyper-parameter or H changes."""
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
        return self.mean.to(dtype) + self._settled().sample(_count(n), generator).to(dtype)

    # -- function space --------------------------------------------------------------------------------------------

    def __call__(self, x: Any):
        """N(f(x; θ*), J Σ Jᵀ) over all data and outputs, a gpytorch ``MultitaskMultivariateNormal``; covariance is lazy.

        Where x requires grad, mean, variances and covariance carry gradients to it.
        """
        with quiet_import():
            from bayesgn.models.function_gaussian import FunctionGaussian

        self.check_fresh()
        _check_input(x)
        self._check_behaviour(x)
        answer = Answer(self.linearizer, self.likelihood.rows, self._settled(), x, self.check_fresh)
        with self._explaining(x):
            mean = answer.mean()
        return FunctionGaussian(mean.reshape(-1, mean.shape[-1]), answer, tuple(mean.shape[1:-1]))

    def sample_functions(self, n: int = 1, generator: torch.Generator | None = None) -> Callable[[Any], Tensor]:
        """n draws of whole (linearised) functions: the answer maps x to [n n_data *positions c], the same draws at every call.

            f_s(x) = f(x; θ*) + J(x) (θ_s − θ*),   θ_s ~ q
        """
        deviations = self._settled().sample(_count(n), generator)

        def functions(x: Any) -> Tensor:
            self.check_fresh()
            _check_input(x)
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

    # -- weight space ----------------------------------------------------------------------------------------------

    def sample_outputs(self, x: Any, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """The net itself at n draws of its weights [n n_data *positions c]: the weight-space view (BNN Monte Carlo).

        For a curved net this is not the linearised answer; Immer et al. (2021) show it underfits under a GGN posterior. A net of half
        precision is evaluated in float32, where its draws are more than rounding; if it cannot be, a warning says so.
        """
        self.check_fresh()
        _check_input(x)
        x = self.linearizer.place(x)
        draws = self.sample_weights(n, generator)
        with self._explaining(x):
            if draws.dtype == self.mean.dtype:
                return self._outputs(x, draws, {})
            own = {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
            half = (torch.float16, torch.bfloat16)
            wide = {name: t.detach().to(draws.dtype) for name, t in own.items() if t.dtype in half}
            try:
                return self._outputs(_data.apply(x, lambda t: t.to(draws.dtype) if t.dtype in half else t), draws, wide)
            except RuntimeError as error:
                warnings.warn(
                    f"{type(self.net).__name__} cannot be evaluated in {draws.dtype} ({str(error).splitlines()[0]}), so its draws are rounded to "
                    f"{self.mean.dtype}, and too wide where the posterior is narrower than that. Take sample_functions, or fit net.float().",
                    stacklevel=2,
                )
                return self._outputs(x, draws.to(self.mean.dtype), {}).to(draws.dtype)

    def _outputs(self, x: Any, draws: Tensor, others: dict[str, Tensor]) -> Tensor:
        """The net at each of ``draws`` [n p], and at ``others`` in place of its own tensors."""
        out = []
        with at_rest(self.net, {}), torch.no_grad():
            for θ in draws:
                out.append(self.likelihood.rows(call(self.net, x, others | self.linearizer.vector.unflatten(θ, self.net))))
                if len(out[-1]) != _data.len_of(x):
                    raise ValueError(f"the net answered {len(out[-1])} rows for {_data.len_of(x)} data; the first dimension of both runs over data.")
        return torch.stack(out)

    # -- evidence --------------------------------------------------------------------------------------------------

    def log_evidence(self) -> Tensor:
        """log p(y) by Laplace's method, in nats, differentiable in prior precision(s) and noise.

            log p(y|θ*) + log N(θ*; μ, P⁻¹) + p/2 log 2π − 1/2 log det(s H + P)

        Source: MacKay (1992); Immer et al. (2021), "Scalable marginal likelihood estimation", eq. 6.
        """
        if self.curvature.partial and not self._told_partial:
            self._told_partial = True
            warnings.warn(
                f"the evidence counts the likelihood of all {self.num_data} data but the determinant of the subset that {self.structure} "
                "keeps: it is too large, and tuning by it trusts the data too much. Fit on the subset alone, or use "
                "ggn.Gram(inducing=…) or ggn.LowRank.",
                stacklevel=2,
            )
        blocks = self.curvature.blocks
        prior = self.prior.of(blocks)
        quadratic = sum(
            (p * self.deviation[b.where].square()).sum() for p, b in zip(prior, blocks, strict=True)
        )
        logdet_prior = sum(p.log() * b.numel if p.dim() == 0 else p.log().sum() for p, b in zip(prior, blocks, strict=True))
        fit = self.log_likelihood()
        if not self.rule.curvature.scale(self.likelihood).requires_grad:
            fit = fit.detach()  # H has no graph to these parameters: half a gradient would be a wrong one
        return fit - 0.5 * quadratic + 0.5 * logdet_prior - 0.5 * self.precision().logdet()

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

    def save(self, path: str | Path) -> Path:
        """Write the posterior as safetensors, whole or not at all; :func:`bayesgn.load` reads it back onto the same net.

        H, hyper-parameters and statistics are written, and hashes of the net's weights, but not the net.

        Raises:
            StalePosteriorError: the net moved since.
            TypeError: for a structure, curvature or prior of one's own, which could not be rebuilt from a file.
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
            with _data.advice(x, self.mean):
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
            f"NetworkPosterior({type(self.net).__name__}, {len(self.mean)} weights, {self.structure}, {self.num_data} data, "
            f"{self.prior}, {self.likelihood})"
        )


def _check_input(x: Any) -> None:
    if _data.len_of(x) == 0:
        raise ValueError(f"x is {_data.describe(x)}: 0 data; pass at least one.")
    _data.check_finite(x, "x")


def _count(n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n!r} samples; expected a whole number, at least 1.")
    return n
