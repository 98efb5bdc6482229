"""Linearising expansions: y ≈ A f + b + noise in place of the likelihood, from its conditional mean and covariance alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesgn.likelihoods.cubature import root
from bayesgn.rules.expansions import Expansion, Integral, Variational
from bayesgn.rules.local import Local, outer
from bayesgn.rules.sites import Marginals, Sites


class PosteriorLinearization(Integral):
    """Statistical linear regression of y on f under the belief: L_n = log N(y_n; E_q[ω], Ω) with ω(f) = E[y | f] and Ω held.

        A = Cov_q(ω, f) C⁻¹,   Ω = E_q[Cov(y | f)] + Cov_q(ω) − A C Aᵀ,
        g = AᵀΩ⁻¹(y − E_q[ω]),   Λ = AᵀΩ⁻¹A (GaussNewton),   Λ − Σ_k (Ω⁻¹(y − E_q[ω]))_k ∂²E_q[ω_k]/∂m² (Exact)

    The iterated posterior linearisation smoother. It needs no density, only ``likelihood.conditional_moments``; so what moves the
    noise alone (the second latent of ``HeteroscedasticGaussian``) learns nothing: see :class:`PosteriorLinearization2`. Entries of y that
    are NaN give no information; a singular Ω (one-hot labels) is inverted where it is not zero.

    Its log evidence is the variational bound at the Gaussian it finds, with E_q[log p(y_n | f)] in place of log N(y_n; E_q[ω], Ω): for labels
    and counts the latter is no density of y (a kernel tuned by it runs away, to a "log evidence" above zero). For a Gaussian likelihood both
    are exact.

    Example:
        >>> from bayesgn import rules
        >>> rules.PosteriorLinearization(cubature=rules.Unscented(3))  # the iterated cubature Kalman smoother, for a MarkovGP
        PosteriorLinearization(curvature=GaussNewton(), cubature=Unscented(order=3))

    Source: García-Fernández, Tronarp and Särkkä (2019), "Gaussian process classification using posterior linearization".
    """

    def local(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Local:
        def moments(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self._regression(likelihood, Marginals(m, q.cov))

        y = likelihood.response(q.mean, y)
        mean, A, Ω = moments(q.mean)
        return _Held(q, y, A, Noise(likelihood, Ω, y), lambda m: moments(m)[:2])

    def term(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Tensor:
        return Variational(cubature=self.cubature).term(likelihood, q, y, sites)

    def _regression(self, likelihood, q: Marginals) -> tuple[Tensor, Tensor, Tensor]:
        """E_q[ω] [n d], A [n d c] and Ω [n d d], with nodes m + L z, L Lᵀ = C."""
        z, w = self.rule_for(q).unit(q.mean)
        L = root(q.cov)
        ω, R = likelihood.conditional_moments(q.mean + torch.einsum("qj,nij->qni", z, L))
        mean = torch.einsum("q,qnd->nd", w, ω)
        W = torch.einsum("q,qnd,qc->ndc", w, ω - mean, z)  # A L
        # Cov(ω) − W Wᵀ as the scatter of what the line leaves over: PSD, without a difference of large numbers.
        rest = ω - mean - torch.einsum("ndc,qc->qnd", W, z)
        Ω = torch.einsum("q,qnde->nde", w, R) + torch.einsum("q,qnd,qne->nde", w, rest, rest)
        return mean, _right_solve(W, L), Ω


class PosteriorLinearization2(PosteriorLinearization):
    """Posterior linearisation of second order: L_n = log N(y_n; ω̄(m, C), Ω(m, C)), differentiated in m through everything.

        g = ∂L_n/∂m,   Λ = AᵀΩ⁻¹A + ½ tr(Ω⁻¹∂_iΩ Ω⁻¹∂_jΩ) (GaussNewton: the Fisher information of that Gaussian), A = ∂ω̄/∂m,   −∂²L_n/∂m² (Exact)

    The noise Ω moves with m too, which gives information to a latent that sets the noise. For continuous y: a Gaussian density of labels grows
    without bound as they become certain, so that there is no fixed point to come to; there take :class:`PosteriorLinearization`.

    Example:
        >>> from bayesgn import rules
        >>> rules.PosteriorLinearization2(rules.Exact())
        PosteriorLinearization2(curvature=Exact(psd=eigclip))

    Source: Wilkinson, Särkkä and Solin (2023), sec. 3.4.
    """

    def local(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Local:
        def moments(m: Tensor) -> tuple[Tensor, Tensor]:
            mean, _, Ω = self._regression(likelihood, Marginals(m, q.cov))
            return mean, Ω

        return _Moving(likelihood, q, likelihood.response(q.mean, y), moments)


class Taylor(Expansion):
    """First-order linearisation at the mean: L_n = log N(y_n; ω(m), Cov[y | m]) with the covariance held, ω(f) = E[y | f].

        A = ∂ω/∂f at m,   Ω = Cov[y | f = m],   g = AᵀΩ⁻¹(y − ω(m)),   Λ = AᵀΩ⁻¹A (GaussNewton), with ∂²ω too (Exact)

    The iterated extended Kalman smoother. For exponential families in their natural parameter (Poisson with log link, Bernoulli with
    logit) it is :class:`Laplace`. Missing entries and singular Ω as in :class:`PosteriorLinearization`. Its log evidence is Laplace's, at the
    mean and the curvature it finds.

    Example:
        >>> from bayesgn import rules
        >>> rules.Taylor()
        Taylor(curvature=GaussNewton())

    Source: Bell (1994), "The iterated Kalman smoother as a Gauss-Newton method"; Wilkinson, Särkkä and Solin (2023), sec. 3.5.
    """

    def local(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Local:
        def moments(m: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x = _leaf(m)
                ω = likelihood.conditional_moments(x)[0]
                A = _jacobian([ω], x)[0]
            return _plain(ω), _plain(A)

        y = likelihood.response(q.mean, y)
        return _Held(q, y, moments(q.mean)[1], Noise(likelihood, likelihood.conditional_moments(q.mean)[1], y), moments)

    def term(self, likelihood, q: Marginals, y: Tensor, sites: Sites) -> Tensor:
        return likelihood.log_prob(q.mean, y) - sites.log_at(q.mean)


class Noise:
    """N(0, Ω) on the entries of y that are there, and on the directions in which Ω [n d d] is not zero."""

    def __init__(self, likelihood, Ω: Tensor, y: Tensor) -> None:
        there = ~y.isnan()
        Ω = torch.where(there.unsqueeze(-1) & there.unsqueeze(-2), Ω, 0.0)
        with torch.no_grad():
            self.known = Ω.isfinite().flatten(1).all(-1)
            if len(Ω) and not bool(self.known.any()):
                raise ValueError(
                    f"{likelihood!r} has no finite mean and covariance of y given f at any datum, and linearisations work with these (a Student's t "
                    "has them for dof > 2); take rules.Laplace(), rules.Variational() or rules.PowerEP(0.5)."
                )
            λ, V = torch.linalg.eigh(torch.where(self.known[:, None, None], Ω, 0.0))
            size = λ[:, -1:].clamp_min(0)
            null = (λ <= 10 * Ω.shape[-1] * torch.finfo(Ω.dtype).eps * size).to(Ω)
            size = torch.where(size > 0, size, 1.0)
            self.null = (V * null.unsqueeze(-2)) @ V.mT  # projects on what has no noise, or is missing
            self.rank = Ω.shape[-1] - null.sum(-1)
            filled = self.null * size.unsqueeze(-1)
            self.offset = null.sum(-1) * size.squeeze(-1).log()
            eye = torch.eye(Ω.shape[-1], dtype=Ω.dtype, device=Ω.device)
        # Ω + size · null is regular, and its inverse and determinant are those of Ω where Ω is not zero.
        self.L = torch.linalg.cholesky_ex(torch.where(self.known[:, None, None], Ω + filled, eye))[0]

    def whiten(self, M: Tensor) -> Tensor:
        """L⁻¹ of columns [n d k], without their parts in directions that count for nothing."""
        return torch.linalg.solve_triangular(self.L, M - self.null @ M, upper=False)

    def standardized(self, residual: Tensor) -> Tensor:
        """Residuals [n d] (NaN where missing) in units of the noise."""
        residual = torch.where(residual.isnan(), 0.0, residual)
        return self.whiten(residual.unsqueeze(-1)).squeeze(-1)

    def log_density(self, residual: Tensor) -> Tensor:
        """log N(residual; 0, Ω) [n]; NaN where Ω is not finite."""
        log_det = 2 * self.L.diagonal(dim1=-2, dim2=-1).log().sum(-1) - self.offset
        value = -0.5 * (self.standardized(residual).square().sum(-1) + log_det + self.rank * math.log(2 * math.pi))
        return torch.where(self.known, value, torch.nan)


class _Held(Local):
    """log N(y; ω̄(m), Ω) with Ω held."""

    def __init__(self, q: Marginals, y: Tensor, A: Tensor, noise: Noise, moments: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        again = lambda place: _Held(Marginals(place, q.cov), y, moments(place)[1], noise, moments)
        value = lambda m: noise.log_density(y - moments(m)[0])
        self.y, self.noise, self.moments = y, noise, moments
        self.U, self.r = noise.whiten(A), noise.standardized(y - moments(q.mean)[0])
        g = (self.U.mT @ self.r.unsqueeze(-1)).squeeze(-1)
        super().__init__(q.mean, q.cov, g, again, value, valid=noise.known)

    def fisher(self) -> Tensor:
        return self.U.mT @ self.U

    def hessian(self) -> Tensor:
        with torch.enable_grad():
            x = _leaf(self.place)
            # Σ_k v_k ω̄_k with v = Ω⁻¹ r held
            v = self.noise.whiten(torch.eye(self.y.shape[-1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)).mT @ self.r.unsqueeze(-1)
            bend = _hessian((v.squeeze(-1) * self.moments(x)[0]).sum(), x)
        return self.fisher() - _plain(bend)

    def outer(self) -> Tensor:
        return outer(self.gradient)


class _Moving(Local):
    """log N(y; ω̄(m), Ω(m))."""

    def __init__(self, likelihood, q: Marginals, y: Tensor, moments: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.likelihood, self.y, self.moments = likelihood, y, moments
        with torch.enable_grad():
            x = _leaf(q.mean)
            self._value = self.value_at(x)
            self._x, self._g = x, torch.autograd.grad(self._value.sum(), x, create_graph=True, materialize_grads=True)[0]
        again = lambda place: _Moving(likelihood, Marginals(place, q.cov), y, moments)
        super().__init__(q.mean, q.cov, _plain(self._g), again, self.value_at, valid=self._value.detach().isfinite())

    def value_at(self, m: Tensor) -> Tensor:
        mean, Ω = self.moments(m)
        return Noise(self.likelihood, Ω, self.y).log_density(self.y - mean)

    def fisher(self) -> Tensor:
        with torch.enable_grad():
            mean, Ω = self.moments(self._x)
            A, D = _jacobian([mean, Ω], self._x)
        noise = Noise(self.likelihood, Ω, self.y)
        U = noise.whiten(A)
        # T_i = L⁻¹ ∂_iΩ L⁻ᵀ, c of them
        n, d = mean.shape
        half = noise.whiten(D.reshape(n, d, -1)).reshape(n, d, d, -1).transpose(1, 2).reshape(n, d, -1)
        T = noise.whiten(half).reshape(n, d * d, -1)
        return _plain(U.mT @ U + 0.5 * T.mT @ T)

    def hessian(self) -> Tensor:
        with torch.enable_grad():
            return _plain(-_columns(self._g, self._x))

    def outer(self) -> Tensor:
        return outer(self.gradient)


def _right_solve(W: Tensor, L: Tensor) -> Tensor:
    """W L⁻¹ [n d c]; of least norm where L is singular."""
    if L.shape[-1] == 1:
        return torch.where(L > 0, W / torch.where(L > 0, L, 1.0), 0.0)
    with torch.no_grad():
        triangular = not bool(L.triu(1).any()) and bool((L.diagonal(dim1=-2, dim2=-1) > 0).all())
    if triangular:
        return torch.linalg.solve_triangular(L, W, upper=False, left=False)
    return W @ torch.linalg.pinv(L)


# -- derivatives in the mean, data by data ------------------------------------------------------------------------------------


def _leaf(m: Tensor) -> Tensor:
    """A tensor to differentiate in that nothing else depends on yet; in m's graph where that has one."""
    return m.view_as(m) if m.requires_grad else m.detach().requires_grad_()


def _plain(t: Tensor) -> Tensor:
    return t if torch.is_grad_enabled() else t.detach()


def _columns(g: Tensor, x: Tensor) -> Tensor:
    """∂g/∂x [n … c] for g [n …] whose rows depend on the same row of x [n c] alone."""
    if not g.requires_grad:
        return g.new_zeros(*g.shape, x.shape[-1])
    rows = [torch.autograd.grad(g[:, i].sum(), x, create_graph=True, materialize_grads=True)[0] for i in range(g.shape[1])]
    return torch.stack(rows, 1)


def _hessian(value: Tensor, x: Tensor) -> Tensor:
    if not value.requires_grad:
        return x.new_zeros(*x.shape, x.shape[-1])
    return _columns(torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)[0], x)


def _jacobian(outputs: list[Tensor], x: Tensor) -> list[Tensor]:
    """∂output/∂x [n … c] for outputs [n …] row by row, in as many passes as x has columns.

    The gradient of Σ u · output is linear in u; its derivative in u, one column at a time, is the Jacobian.
    """
    u = [torch.zeros_like(o).requires_grad_() for o in outputs]
    total = torch.stack([(a * o).sum() for a, o in zip(u, outputs)]).sum()
    (g,) = torch.autograd.grad(total, x, create_graph=True, materialize_grads=True)
    if not g.requires_grad:
        return [o.new_zeros(*o.shape, x.shape[-1]) for o in outputs]
    columns = [torch.autograd.grad(g[:, i].sum(), u, create_graph=True, materialize_grads=True) for i in range(x.shape[-1])]
    return [torch.stack(parts, -1) for parts in zip(*columns)]
