"""The posterior of a net's linearised model under any rule: the loop of Gaussian processes, in weight space."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn.ggn.linearization import Linearizer
from bayesgn.ggn.structure import Precision, Structure
from bayesgn.models.linearized_data import LinearizedData
from bayesgn.models.weight_posterior import WeightPosterior
from bayesgn.models.weight_prior import WeightPrior
from bayesgn.rules import Expansion, Laplace, Marginals, Sites, Turn


class LinearizedPosterior(WeightPosterior):
    """q(θ) ∝ N(θ; μ, P⁻¹) Π_n t_n(f_lin(x_n; θ)), with Gaussian sites t_n in place of the likelihood and one linearisation for all turns.

        f_lin(x; θ) = f(x; θ*) + J(x) (θ − θ*),      Σ = (H + P)⁻¹,   H = Σ_n J_nᵀ Λ_n J_n
        Σ⁻¹ (θ̄ − θ*) = Σ_n J_nᵀ (nat1_n − Λ_n f*_n) − P (θ* − μ)

    Made by ``bgn.bayes_newton(models.Network(net, …), …)``. The linearised net is a Gaussian process with the kernel J P⁻¹ Jᵀ: any rule serves
    it, and a structure keeps H. Where a structure is exact (``Full``, ``Gram``) this is that process. Where it is not (``Kron``, ``Diag``, …) the
    covariance and the determinant in the evidence are the structure's; the mean is not: θ̄ solves the equation above with the exact H, by
    conjugate gradients on products with J, for which the structure is the preconditioner. So at given sites no structure moves the mean, and
    under ``rules.Laplace`` the mean settles at the exact mode of the linearised model whatever the structure. Under the others a structure
    speaks through the variances at the data; ``rules.PowerEP`` leaves a site as it is where a structure's variance makes its cavity improper.

    Attributes:
        net, likelihood, prior, point, deviation: see :class:`WeightPosterior`.
        mean: θ̄ of the selected weights [p].
        rule: by which the sites were made.
        sites: natural parameters at each row; a row is a datum, or a position of one.
        y: targets of each row.
        num_data: rows seen.
        trace: what inference did, step by step (set by ``bgn.bayes_newton``).

    Example:
        >>> import bayesgn as bgn
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = (x[:, 0] > 0).long()
        >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
        >>> model = bgn.models.Network(net, structure=bgn.ggn.Full)
        >>> posterior = bgn.bayes_newton(model, bgn.likelihoods.Categorical(), (x, y), rule=bgn.rules.Variational(), steps=20)
        >>> posterior.trace.energy[-1] > posterior.trace.energy[0]
        True
        >>> posterior(x).mean.shape, posterior.sample_outputs(x, 5).shape, posterior.sample_weights(5).shape
        (torch.Size([20, 2]), torch.Size([5, 20, 2]), torch.Size([5, 34]))

    Source: Immer, Korzepa and Bauer (2021), "Improving predictions of Bayesian neural nets via local linearization", sec. 3.3 (refinement);
    Wilkinson, Särkkä and Solin (2023), "Bayes-Newton methods for approximate Bayesian inference with PSD guarantees".
    """

    def __init__(
        self,
        linearizer: Linearizer,
        structure: Structure,
        likelihood,
        prior: WeightPrior,
        rule: Expansion,
        data: LinearizedData,
        sites: Sites,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__(linearizer, structure, likelihood, prior, rule)
        self.data, self.y, self.num_data = data, data.y, len(data.y)
        self.trace: Any = None
        self._begin(sites, shift)

    @property
    def sites(self) -> Sites:
        """Natural parameters at each row; may be set."""
        return self._sites

    @sites.setter
    def sites(self, sites: Sites) -> None:
        with warnings.catch_warnings():  # what a structure has to say of this net was said at the first sites
            warnings.simplefilter("ignore", UserWarning)
            self._begin(sites, self.shift())

    def _begin(self, sites: Sites, shift: Tensor | None) -> None:
        """H of these sites; ``shift`` is where the search for their mean begins."""
        curvature = self.structure.start(self.linearizer.blocks, self.point)
        curvature.fit(self.data.stream(sites.nat2))
        self.curvature, self._sites, self._start = curvature, sites, shift
        self._cached = self._shift = self._marginals = None

    # -- weights ---------------------------------------------------------------------------------------------------

    def precision(self) -> Precision:
        one, prior = torch.ones((), dtype=self._wide, device=self.point.device), self.prior.of(self.curvature.blocks)
        if torch.is_grad_enabled():
            return self.curvature.with_prior(prior, one)
        return self.curvature.solver(prior, one)  # sites, and H with them, move at every turn: to decompose H would cost ten times as much

    def shift(self) -> Tensor:
        settled = self._settled()
        if self._shift is None or self._shift[0] is not settled:
            with torch.no_grad():
                start = self._start if self._shift is None else self._shift[1]
                self._shift = settled, self.data.mean_shift(self.sites, self._prior_vector(), self.deviation, settled, start)
        return self._shift[1]

    def _prior_vector(self) -> Tensor:
        """The diagonal of P [p]."""
        blocks = self.curvature.blocks
        return torch.cat([p.to(self._wide).expand(b.numel) for p, b in zip(self.prior.of(blocks), blocks, strict=True)])

    # -- at the data -----------------------------------------------------------------------------------------------

    def marginals(self, index: Tensor | None = None) -> Marginals:
        """The belief at the data, or at some of them, without a graph; worked out once for each state of the hyper-parameters."""
        settled = self._settled()
        if self._marginals is None or self._marginals[0] is not settled:
            with torch.no_grad():
                self._marginals = settled, self.data.marginals(settled, self.shift())
        return self._marginals[1] if index is None else self._marginals[1].rows(index)

    def turn(self, lr: float = 1.0, batch: Tensor | None = None, generator: torch.Generator | None = None) -> tuple[LinearizedPosterior, Turn]:
        """A new posterior after one turn of the rule over all rows, or over a batch of them (an index).

        Raises:
            StalePosteriorError: the net moved since it was linearised.
        """
        self.check_fresh()
        q = self.marginals()
        if batch is None:
            turn = self.rule(self.likelihood, q, self.y, self.sites, lr, generator)
            sites = turn.sites
        else:
            turn = self.rule(self.likelihood, q.rows(batch), self.y[batch], self.sites.rows(batch), lr, generator)
            sites = self.sites.replace(batch, turn.sites)
        return self.with_sites(sites), turn

    def with_sites(self, sites: Sites) -> LinearizedPosterior:
        """The same posterior with other sites; data, prior and likelihood are shared."""
        new = copy.copy(self)
        new.sites = sites
        return new

    def restart(self, rule: Expansion | None = None) -> LinearizedPosterior:
        """The same posterior with copies of its own of prior and likelihood, to go on from; under another rule if one is given."""
        new = copy.copy(self)
        new.prior, new.likelihood, new.trace = copy.deepcopy(self.prior), copy.deepcopy(self.likelihood), None
        if rule is not None:
            new.rule, new._sites = rule, self.sites._replace(memory=())  # what another curvature kept
        return new

    # -- weight space ----------------------------------------------------------------------------------------------

    def sample_outputs(self, x: Any, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """The linearised model at n draws of its weights, joint over all inputs [n n_data *positions c].

        Not the net at these weights: refinement moves them to where the linearised model is right, which may be far from where the net is.
        """
        return self.sample_functions(n, generator)(x)

    # -- evidence --------------------------------------------------------------------------------------------------

    def log_evidence(self) -> Tensor:
        """log Z_sites + Σ_n ( L_n[p(y_n|·)] − L_n[t_n] ) in nats: the Laplace evidence, the variational bound, the power-EP energy …, by the rule.

            log Z_sites = Σ_n log t_n(m_n) − ½ (θ̄−μ)ᵀP(θ̄−μ) + ½ log det P − ½ log det(H̃ + P),   m = f_lin(x; θ̄)

        Exact where H̃, the structure's H, is. At a net's MAP, under ``rules.Laplace``, it is the evidence of ``bgn.laplace``. Under
        ``rules.Variational`` an approximate structure is charged its own Kullback-Leibler divergence,

            + ½ tr H̃ Σ − ½ Σ_n tr Λ_n J_n Σ J_nᵀ   (nought where H̃ is exact),

        so that the value stays a lower bound of the linearised model's log evidence whatever the structure (but for ``LowRank``, whose
        determinant counts eigenvalues that its covariance leaves out). Differentiable in prior precision(s) and the likelihood's parameters at
        fixed sites.
        """
        precision, shift, q = self._belief()
        log_Z = self.sites.log_at(q.mean).sum() + self.log_prior_and_volume(precision, self.deviation + shift)
        if self.rule.bound and not self.curvature.exact:
            log_Z = log_Z + 0.5 * (self._determined() - (self.sites.nat2 * q.cov).sum())
        return log_Z + self.rule.term(self.likelihood, q, self.y, self.sites).sum()

    @torch.no_grad()
    def bound_at(self, shift: Tensor) -> Tensor:
        """The variational bound of N(θ* + shift, Σ), another mean with the covariance of these sites, under a rule that has a bound.

        With a shift of zero, and sites made at the net's own outputs, that is the Gaussian of ``bgn.laplace``.

        Raises:
            TypeError: for a rule without a bound.
        """
        if not self.rule.bound:
            raise TypeError(f"{self.rule!r} has no bound; restart(rules.Variational()) gives this posterior one.")
        q = Marginals(self.data.f + self.data.matvec(shift), self.marginals().cov)
        fit = self.rule.term(self.likelihood, q, self.y, self.sites) + self.sites.expected_log(q)  # E_q log p(y_n | f)
        return fit.sum() + self.log_prior_and_volume(self._settled(), self.deviation + shift) + 0.5 * self._determined()

    def _determined(self) -> Tensor:
        """tr H̃ (H̃ + P)⁻¹ = ∂ log det(s H̃ + P) / ∂s at s = 1."""
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            one = torch.ones((), dtype=self._wide, device=self.point.device, requires_grad=True)
            logdet = self.curvature.with_prior(self.prior.of(self.curvature.blocks), one).logdet()
            return torch.autograd.grad(logdet, one, create_graph=graph)[0]

    def _belief(self) -> tuple[Precision, Tensor, Marginals]:
        """Σ⁻¹, θ̄ − θ* and the marginals at the data, with a graph to the prior where one is wanted."""
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in self.prior.parameters())):
            return self._settled(), self.shift(), self.marginals()
        precision, P, Δ = self.precision(), self._prior_vector(), self.shift()
        # A(P) Δ = b(P) at Δ, so dΔ = −A⁻¹ dP (θ̄ − μ).
        residual = (P.detach() - P) * (self.deviation + Δ)
        shift = Δ + _Pull.apply(residual, self)
        return precision, shift, self.data.marginals(precision, shift)

    def log_likelihood(self) -> Tensor:
        """Σ log p(y_n | f_n) at the mean of the belief over the data seen."""
        return self.likelihood.log_prob(self.marginals().mean, self.y).sum()

    def spectrum(self) -> None:
        """None: θ̄ moves with the prior."""
        return None

    def hyperparameters(self) -> list[nn.Parameter]:
        """What the evidence can tune at fixed sites: prior precision(s) and the likelihood's parameters."""
        return [*self.prior.parameters(), *(p for p in self.likelihood.parameters() if p.requires_grad)]

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Mean, sites and hyper-parameters, all tensors; H follows from the sites and the data."""
        out = {"mean": self.mean, "deviation": self.deviation, "shift": self.shift()}
        out |= {"sites.nat1": self.sites.nat1, "sites.nat2": self.sites.nat2}
        out |= {f"sites.memory.{i}": t for i, t in enumerate(self.sites.memory)}
        out |= {f"prior.{k}": v.detach() for k, v in self.prior.state_dict().items()}
        return out | {f"likelihood.{k}": v.detach() for k, v in self.likelihood.state_dict().items()}


class _Pull(torch.autograd.Function):
    """A⁻¹ r at r = 0 with A the exact Σ JᵀΛJ + P of a posterior: the value is 0, the gradient A⁻¹ g."""

    @staticmethod
    def forward(ctx, r: Tensor, posterior: LinearizedPosterior) -> Tensor:
        ctx.posterior = posterior
        ctx.precision, ctx.prior = posterior._settled(), posterior._prior_vector().detach()
        return torch.zeros_like(r)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        posterior = ctx.posterior
        return posterior.data.solve(posterior.sites, ctx.prior, grad, ctx.precision), None


def trained_sites(likelihood, f: Tensor, y: Tensor) -> Sites:
    """Laplace sites at the net's own outputs f* [N c], by Gauss-Newton: g + Λ f* and Λ."""
    n, c = f.shape
    return Laplace()(likelihood, Marginals(f, f.new_zeros(n, c, c)), y, Sites.flat(n, c, f)).sites
