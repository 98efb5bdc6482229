"""The posterior of a Gaussian process: sites at the data, and all that follows from them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesgn._psd import safe_cholesky
from bayesgn.ggn.structure import randn
from bayesgn.models import _gp_files
from bayesgn.models.belief import Belief, same_state, state_of
from bayesgn.models.function_draws import FunctionDraws
from bayesgn.models.function_gaussian import FunctionGaussian, LatentGaussian
from bayesgn.models.inputs import columns, tensors
from bayesgn.models.posterior import Posterior
from bayesgn.rules import Expansion, Marginals, Sites, Turn


class GaussianProcessPosterior(Posterior):
    """q(f) ∝ p(f) Π_n t_n(f_n), with Gaussian sites t_n in place of the likelihood.

    Made by ``bgn.bayes_newton``. It owns copies of model and likelihood; change or tune these and every answer follows. Inference goes on from it by
    ``bgn.bayes_newton(posterior)``, with more data by ``bgn.bayes_newton(posterior.with_data((x, y)))``.

    Attributes:
        model, likelihood: own copies, with the hyper-parameters as parameters.
        rule: by which the sites were made.
        sites: natural parameters at each datum.
        trace: what inference did, step by step (set by ``bgn.bayes_newton``).
        num_data: data seen.
        dtype: of answers; inside, algebra is float64 where the device has it.

    Example:
        >>> import gpytorch, bayesgn as bgn
        >>> x = torch.linspace(0, 6, 50, dtype=torch.float64); y = (x.sin() > 0).double()
        >>> model = bgn.models.GP(gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()))
        >>> posterior = bgn.bayes_newton(model, bgn.likelihoods.Bernoulli(), (x, y), rule=bgn.rules.Variational())
        >>> f = posterior(torch.tensor([1.5, 4.5], dtype=torch.float64))
        >>> f.mean.shape, f.covariance_matrix.shape, posterior.likelihood(f).mean.shape
        (torch.Size([2]), torch.Size([2, 2]), torch.Size([2, 1]))
        >>> more = posterior.with_data((torch.tensor([7.0]), torch.tensor([1.0])))
        >>> bgn.bayes_newton(more).num_data
        51
    """

    def __init__(self, model, likelihood, rule: Expansion, inputs: Any, y: Tensor, sites: Sites, dtype: torch.dtype) -> None:
        self.model, self.likelihood, self.rule = model, likelihood, rule
        self.inputs, self.y, self.sites = inputs, y, sites
        self.dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        self.num_data = len(y)
        self.trace: Any = None

    @property
    def sites(self) -> Sites:
        """Natural parameters at each datum; may be set."""
        return self._sites

    @sites.setter
    def sites(self, sites: Sites) -> None:
        self._sites = sites
        self._kept: tuple[Any, Belief] | None = None

    # -- at the data -----------------------------------------------------------------------------------------------------

    def belief(self) -> Belief:
        """What follows from sites and hyper-parameters without a graph to them; kept until one of them changes."""
        state = state_of(self.model)
        if self._kept is None or not same_state(self._kept[0], state):
            self._kept = state, self.model.belief(self.inputs, self.sites)
        return self._kept[1]

    def marginals(self, index: Tensor | None = None) -> Marginals:
        """The belief at the data, or at some of them, without a graph; worked out once for each state of the hyper-parameters."""
        return self.belief().solution().marginals if index is None else self.belief().marginals(index)

    def log_evidence(self) -> Tensor:
        """log Z_sites + Σ_n ( L_n[p(y_n|·)] − L_n[t_n] ) in nats: the Laplace evidence, the variational bound, the power-EP energy …, by the rule.

        Differentiable in the hyper-parameters of kernels, means and likelihood at fixed sites.
        """
        if torch.is_grad_enabled():
            return self.energy(self.sites)[0]
        log_Z, q = self.belief().solution()
        return log_Z + self.rule.term(self.likelihood, q, self.y, self.sites).sum()

    def energy(self, sites: Sites) -> tuple[Tensor, Marginals]:
        """The log evidence at other sites and the belief at the data that goes with it; both differentiable in sites and hyper-parameters."""
        log_Z, q = self.model.solve(self.inputs, sites)
        return log_Z + self.rule.term(self.likelihood, q, self.y, sites).sum(), q

    def turn(self, lr: float = 1.0, batch: Tensor | None = None, generator: torch.Generator | None = None) -> tuple[GaussianProcessPosterior, Turn]:
        """A new posterior after one turn of the rule over all data, or over a batch of them (an index)."""
        if batch is None:
            turn = self.rule(self.likelihood, self.marginals(), self.y, self.sites, lr, generator)
            return self.with_sites(turn.sites), turn
        turn = self.rule(self.likelihood, self.marginals(batch), self.y[batch], self.sites.rows(batch), lr, generator)
        new = self.with_sites(self.sites.replace(batch, turn.sites))
        assert self._kept is not None
        new._kept = self._kept[0], self._kept[1].renewed(batch, new.sites)
        return new, turn

    # -- other posteriors ------------------------------------------------------------------------------------------------

    def with_sites(self, sites: Sites) -> GaussianProcessPosterior:
        """The same posterior with other sites; model and likelihood are shared."""
        new = copy.copy(self)
        new.sites = sites
        return new

    def restart(self, rule: Expansion | None = None) -> GaussianProcessPosterior:
        """The same posterior with copies of its own of model and likelihood, to go on from; under another rule if one is given."""
        new = copy.copy(self)
        new.model, new.likelihood, new.trace = copy.deepcopy(self.model), copy.deepcopy(self.likelihood), None
        new.sites = self.sites
        if rule is not None:
            new.rule, new.model.power = rule, rule.power
            new.sites = self.sites._replace(memory=())  # what another curvature kept
        return new

    def with_data(self, data: Any) -> GaussianProcessPosterior:
        """The same posterior with more data, whose sites say nothing yet: ``bgn.bayes_newton(posterior.with_data((x, y)))`` takes them in, and
        starts from what is known of the others.

        Args:
            data: a pair (x, y), a Dataset or a DataLoader.
        """
        x, y = tensors(data)
        x, y = self._columns(x.to(self.y.device)), y.to(self.y.device)
        self.likelihood.validate_targets(x.new_zeros(len(x), self.model.latents), y)
        y = y.reshape(len(y), *self.y.shape[1:]) if y[:1].numel() == self.y[:1].numel() else y
        more = Sites.flat(len(x), self.model.latents, x)
        parts = zip((self.sites.nat1, self.sites.nat2, *self.sites.memory), (more.nat1, more.nat2, *[None] * len(self.sites.memory)), strict=True)
        nat1, nat2, *memory = (torch.cat([a, a.new_zeros(len(x), *a.shape[1:]) if b is None else b]) for a, b in parts)
        new = self.restart()
        new.inputs, new.y = new.model.place(torch.cat([self.inputs.x, x])), torch.cat([self.y, y])
        new.num_data, new.sites = len(new.y), Sites(nat1, nat2, tuple(memory))
        return new

    def to(self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None) -> GaussianProcessPosterior:
        """The same posterior on another device, or with answers of another dtype; this one stays as it is."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        new = self.restart()
        new.trace = self.trace
        if dtype is not None:
            if not dtype.is_floating_point:
                raise TypeError(f"dtype is {dtype}; expected a floating one, of the answers.")
            new.dtype = dtype
        if device is not None:
            device = torch.device(device)
            wide = torch.float32 if device.type == "mps" else torch.float64
            move = lambda t: t.to(device, wide) if t.is_floating_point() else t.to(device)
            x, y = move(self.inputs.x), self.y.to(device, wide if self.y.dtype == torch.float64 else None)
            for module in (new.model, new.likelihood):
                module.to(device, wide) if wide == torch.float32 else module.to(device)
            new.inputs, new.y = new.model.place(x), y
            new.sites = Sites(move(self.sites.nat1), move(self.sites.nat2), tuple(move(t) for t in self.sites.memory))
        return new

    # -- anywhere --------------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor):
        """f at x [m] or [m d]: a gpytorch Gaussian, event [m] for one latent function, [m c] for several. The joint covariance is worked out
        when it is asked for. Mean and covariance carry gradients to x where it requires them, and to hyper-parameters that do."""
        answer = GaussianProcessAnswer(self, self._columns(x))
        mean = answer.mean()
        return LatentGaussian(mean[:, 0], answer) if self.model.latents == 1 else FunctionGaussian(mean, answer, ())

    def sample_outputs(self, x: Tensor, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Joint draws of f at x [n m c]."""
        with torch.no_grad():
            return self.model.draw(self.inputs, self.sites, self._columns(x), n, generator).to(self.dtype)

    def sample_functions(self, n: int = 1, generator: torch.Generator | None = None) -> FunctionDraws:
        """n draws of whole functions: the answer maps x [m] or [m d] to [n m c], the same draws at every call.

        A value is drawn where it is first asked for, given all values drawn before, so that calls agree with one another exactly and any of them is a
        draw of the joint posterior. Time grows with the cube of the different inputs asked for, so up to some thousands. There are no
        gradients to x: see ``posterior(x).rsample()`` for these.
        """
        return FunctionDraws(self.belief(), self._columns, self.dtype, n, generator)

    def _columns(self, x: Tensor) -> Tensor:
        """Inputs as [m d], with as many columns as the data have."""
        wide, d = columns(x), self.inputs.x.shape[-1]
        if wide.shape[-1] != d:
            raise ValueError(f"x has shape {tuple(x.shape)}, which makes {wide.shape[-1]} column(s); the data have {d}: pass x as [m, {d}].")
        return wide

    # -- state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Sites, data and hyper-parameters."""
        out = {"x": self.inputs.x, "y": self.y, "nat1": self.sites.nat1, "nat2": self.sites.nat2}
        out |= {f"memory.{i}": t for i, t in enumerate(self.sites.memory)}
        out |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        return out | {f"likelihood.{k}": v for k, v in self.likelihood.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the sites, data and hyper-parameters that ``state_dict`` gave, in place; the rule stays.

        Raises:
            ValueError: where names or shapes of hyper-parameters differ.
        """
        _gp_files.set_state(self.model, state, "model")
        _gp_files.set_state(self.likelihood, state, "likelihood")
        like = self.sites.nat1
        self.inputs, self.y = self.model.place(state["x"].to(like).clone()), state["y"].to(like.device).clone()
        self.num_data = len(self.y)
        self.sites = _gp_files.sites_of(state, like.device)

    def save(self, path: str | Path) -> Path:
        """Write the posterior as safetensors, whole or not at all; ``bgn.load(path, model)`` reads it back onto a model with the same kernels.

        Sites, data, hyper-parameters, names of kernels and the trace are written, but no code.

        Raises:
            TypeError: for a rule of one's own, which could not be rebuilt from a file.
        """
        return _gp_files.save(self, path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, {self.likelihood!r}, {self.rule!r}, {self.num_data} data)"


class GaussianProcessAnswer:
    """The mean and marginal covariance of one call, the joint covariance when asked for."""

    def __init__(self, posterior: GaussianProcessPosterior, x: Tensor) -> None:
        # Later changes of the sites do not reach an answer that was given.
        model, self.x, self.dtype = posterior.model, x, posterior.dtype
        self._grad = torch.is_grad_enabled()
        graph = self._grad and any(p.requires_grad for p in model.parameters())
        self.belief = Belief(model, posterior.inputs, posterior.sites) if graph else posterior.belief()
        self._state = state_of(model)
        self.marginals = self.belief.predict(x)
        self._dense: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and latents."""
        return self.marginals.mean.shape  # type: ignore[return-value]

    def rows(self, index) -> GaussianProcessAnswer:
        """The answer at some of the rows."""
        new = copy.copy(self)
        new.x, new.marginals, new._dense = self.x[index], self.marginals.rows(index), None
        return new

    def mean(self) -> Tensor:
        return self.marginals.mean.to(self.dtype)

    def blocks(self) -> Tensor:
        """Covariance within each row [m c c]."""
        return self.marginals.cov.to(self.dtype)

    def dense(self) -> Tensor:
        """Joint covariance [m c, m c]."""
        return self._joint().to(self.dtype)

    def _joint(self) -> Tensor:
        if self._dense is None:
            if not same_state(self._state, state_of(self.belief.model)):
                raise RuntimeError(
                    "hyper-parameters changed between posterior(x) and its joint covariance, which is worked out when it is asked for; call "
                    "posterior(x) again."
                )
            with torch.set_grad_enabled(self._grad):  # torch's lazy properties would turn it on
                self._dense = self.belief.joint(self.x)
        return self._dense

    def cholesky(self) -> Tensor:
        return safe_cholesky(self._joint())

    def draw(self, mean: Tensor, shape: torch.Size, base: Tensor | None) -> Tensor:
        """Joint draws of [m c] by an exact root of the dense covariance."""
        L = self.cholesky()
        ε = randn((*shape, L.shape[0]), L, None) if base is None else base.reshape(*shape, -1).to(L)
        return mean + (ε @ L.mT).reshape(*shape, *mean.shape).to(mean)
