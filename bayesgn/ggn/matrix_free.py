"""MatrixFree: nothing is kept but the data; every answer is a set of conjugate gradient solves with H V products."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgn import _distributed
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.factors import SLICE_ENTRIES, Factors
from bayesgn.ggn.lanczos import quadrature, tridiagonal
from bayesgn.ggn.products import Products
from bayesgn.ggn.structure import Curvature, Precision, Stream, Structure, accumulator, randn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("bayesgn.ggn")

COLUMNS = 8  # of factors, where products are by double backward


_NO_AVERAGE = (
    "MatrixFree keeps the data's own rows of J, of which there is no running average; use ggn.Full, ggn.Layerwise, ggn.Kron, ggn.Diag, "
    "ggn.LowRank or ggn.LowRankPlusDiagonal."
)


class MatrixFree(Structure):
    """All of H without storing it: conjugate gradients for solves, stochastic Lanczos quadrature for the log-determinant.

        (s H + P) x = b by CG, preconditioned by diag(s H + P)
        log det(s H + P) = log det P + tr log(I + A) ≈ log det P + p/m Σ_z zᵀ log(I + A) z,  A = s P^(-1/2) H P^(-1/2)
        θ = (s H + P)⁻¹ (P^(1/2) ε₁ + √s J̃ᵀ ε₂) ~ N(0, (s H + P)⁻¹)                      (perturb and optimise)

    What is exact and what is not: solves, covariances and draws are exact to the CG tolerance, and a solve that stops above
    it says so in the log with its residual. The log-determinant and its gradients are unbiased-in-the-limit *estimates* from
    ``probes`` random sign vectors, the same at every call; :meth:`MatrixFreePrecision.logdet_error` gives the standard error, which
    falls as 1/√probes. Weight variances are estimates from the same vectors. With ``probes`` ≥ p unit vectors take their
    place, and all of these are exact. Every covariance of a datum costs a solve for each output, so predict for few inputs.

    The data stay where they are: they must be walkable again (no iterator), and what was handed in is not copied. Of a fit by several processes
    (``group=``) each multiplies by its own data and holds its own piece of every vector of the conjugate gradients; every answer of the
    posterior is then a joint one, and all processes must ask for it.

    Args:
        tol: relative residual at which CG stops.
        iterations: at most this many products for a solve.
        probes, steps: random vectors of the log-determinant, and Lanczos steps from each (p × probes × steps numbers held).
        memory: bytes of factors to keep between products; beyond it every product walks the data.
        seed: of the random vectors.
        graph: the engine of the products, see :class:`Products`. ``True``, double backward, is for nets with many outputs a datum (language
            models): no more than ``COLUMNS`` columns of factors are then made, for the diagonal that preconditions.

    Raises:
        ValueError: for a tolerance that is not positive, or counts below 1.

    Example:
        >>> import torch
        >>> from bayesgn import ggn, laplace, likelihoods, models
        >>> x = torch.linspace(-1, 1, 20)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> model = models.Network(net, structure=ggn.MatrixFree(tol=1e-8))
        >>> laplace(model, likelihoods.Gaussian(0.1), (x, y))(x).variance.shape
        torch.Size([20, 1])

    Source: Papandreou and Yuille (2010) and Antorán et al. (2023), "Sampling-based inference for large linear models", for
    draws; Ubaru, Chen and Saad (2017) for the quadrature; Hutchinson (1990) for traces.
    """

    def __init__(
        self,
        tol: float = 1e-6,
        iterations: int = 1000,
        probes: int = 16,
        steps: int = 64,
        memory: int = 2**30,
        seed: int = 0,
        graph: bool | None = None,
    ) -> None:
        if not tol > 0 or min(iterations, probes, steps) < 1:
            raise ValueError(f"tol={tol}, iterations={iterations}, probes={probes}, steps={steps}; all must be positive.")
        self.tol, self.iterations, self.probes, self.steps = tol, iterations, probes, steps
        self.memory, self.seed, self.graph = memory, seed, graph

    def check_blend(self) -> None:
        raise ValueError(_NO_AVERAGE)

    def start(self, blocks: list[Block], like: Tensor) -> Curvature:
        return MatrixFreeCurvature(blocks, like, self)


class MatrixFreeCurvature(Curvature):
    """The products of every stream seen."""

    def __init__(self, blocks: list[Block], like: Tensor, options: MatrixFree) -> None:
        self.blocks, self.options = blocks, options
        self.zero = torch.zeros((), dtype=accumulator(like), device=like.device)
        self.products: list[Products] = []
        self.warm: Tensor | None = None  # the last solves of the probes: the next step of tuning starts from them
        self.group: ProcessGroup | None = None  # whose processes' products add up to H V

    @property
    def exact(self) -> bool:
        return True

    def fit(self, stream: Stream, group: ProcessGroup | None = None) -> None:
        """Take a stream in (another one adds to the first)."""
        self._check_whole()
        self.products.append(Products(stream, self.blocks, self.zero, self.options.memory, self.options.graph, self.columns))
        if group is not None:
            self.all_reduce(group)

    def blend(self, other: Curvature, keep: float, gain: float) -> None:
        raise ValueError(_NO_AVERAGE)

    def all_reduce(self, group: ProcessGroup) -> None:
        """From here on H V is the sum of all processes' products. Collective, as is every answer."""
        self._check_whole()
        _distributed.check(group)
        self.group = group

    def _check_whole(self) -> None:
        if self.group is not None:
            raise ValueError(
                "this H is spread over several processes, and data added to it would count once for each of them; fit all data at once with "
                "group=, or use a structure that every process holds whole (ggn.Full, ggn.Kron, ggn.Gram(), ggn.LowRank, …)."
            )

    def add(self, factors: list[Factors]) -> None:
        self._check_whole()
        batch = [(_Given(factors), self.zero)]
        self.products.append(Products(batch, self.blocks, self.zero, self.options.memory, graph=False))  # type: ignore[arg-type]

    def __call__(self, V: Tensor) -> Tensor:
        """H V [p s]."""
        return _distributed.all_sum([self.own(V)], self.group)[0]

    def own(self, V: Tensor) -> Tensor:
        """This process's part of the sum H V [p s]."""
        return sum((products(V) for products in self.products), torch.zeros_like(V))

    def diagonal(self) -> Tensor:
        """diag(H) [p]."""
        own = sum((products.diagonal for products in self.products), self.zero.new_zeros(self.blocks[-1].where.stop))
        return _distributed.all_sum([own], self.group)[0]

    multiplies = True

    @property
    def columns(self) -> int | None:
        return COLUMNS if self.options.graph else None

    def times(self, V: Tensor, scale: Tensor) -> Tensor:
        return scale * self(V)

    def with_prior(self, prior: list[Tensor], scale: Tensor) -> Precision:
        P = torch.cat([p.to(self.zero).expand(b.numel) for p, b in zip(prior, self.blocks, strict=True)])
        return MatrixFreePrecision(self, P, scale.to(self.zero))

    def copy(self) -> MatrixFreeCurvature:
        """An H of its own over the same streams: what is added to one is not in the other."""
        new = MatrixFreeCurvature(self.blocks, self.zero, self.options)
        new.products, new.group = list(self.products), self.group
        return new

    def tensors(self) -> dict[str, Tensor]:
        raise ValueError(
            "structure=ggn.MatrixFree keeps the data themselves and no H, so there is nothing to save. Save the net, and condition "
            "the model on the data again after loading; or use ggn.LowRank or ggn.Kron, which can be saved."
        )

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.tensors()


class _Given:
    """A linearization whose factors are known."""

    def __init__(self, factors: list[Factors]) -> None:
        self._factors = factors

    def factors(self, S: Tensor) -> list[Factors]:
        return self._factors


class MatrixFreePrecision(Precision):
    """s H + P by products; P [p]."""

    def __init__(self, H: MatrixFreeCurvature, P: Tensor, scale: Tensor) -> None:
        self.H, self.P, self.scale, self.options = H, P, scale, H.options
        self._logdet: tuple[Tensor, float] | None = None

    # -- solves ----------------------------------------------------------------------------------------------------

    def solve(self, v: Tensor) -> Tensor:
        B = v.reshape(-1, v.shape[-1]).to(self.P).mT
        return _Solve.apply(self, B, self.P, self.scale).mT.reshape(v.shape)

    def solve_from(self, v: Tensor, start: Tensor) -> Tensor:
        return self.cg(v[:, None].to(self.P), start[:, None].to(self.P), logging.INFO)[:, 0]  # (an optimizer's, which may well stop early)

    def cg(self, B: Tensor, start: Tensor | None = None, level: int = logging.WARNING) -> Tensor:
        """(s H + P)⁻¹ B for B [p s], without a graph."""
        with torch.no_grad():
            s, P, group, tol, iterations = self.scale, self.P, self.H.group, self.options.tol, self.options.iterations
            diagonal = s * self.H.diagonal() + P
            if group is None:
                return conjugate_gradients(lambda V: s * self.H(V) + P[:, None] * V, B, diagonal, tol, iterations, start, level=level)
            pieces = _distributed.Pieces(len(P), group)
            own = pieces.own
            start = None if start is None else start[own]

            def M(V: Tensor) -> Tensor:
                return s * pieces.sum(self.H.own(pieces.join(V))) + P[own, None] * V

            return pieces.join(conjugate_gradients(M, B[own], diagonal[own], tol, iterations, start, group))

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        b = randn((count, len(self.P)), self.P, generator) * self.P.sqrt()
        if self.H.group is not None:  # the same draws for different data would be correlated
            generator = _distributed.own_generator(generator, self.H.group, self.P.device)
        noise = sum((products.noise(count, generator).mT for products in self.H.products), torch.zeros_like(b))
        return self.solve(b + self.scale.sqrt() * _distributed.all_sum([noise], self.H.group)[0])

    def covariance(self, factors: list[Factors]) -> Tensor:
        k = factors[0].k
        size = max(1, SLICE_ENTRIES // max(1, k * len(self.P)))
        out = []
        for start in range(0, factors[0].n, size):
            J = torch.cat([f.rows(slice(start, start + size)).to(self.P.dtype).jacobian() for f in factors], dim=-1)
            out.append(J @ self.solve(J).mT)
        return torch.cat(out)

    def joint(self, factors: list[Factors], other: list[Factors] | None = None) -> Tensor:
        J = torch.cat([f.to(self.P.dtype).jacobian() for f in factors], dim=-1).flatten(0, 1)
        J_ = J if other is None else torch.cat([f.to(self.P.dtype).jacobian() for f in other], dim=-1).flatten(0, 1)
        return self.solve(J) @ J_.mT

    # -- traces ----------------------------------------------------------------------------------------------------

    def probes(self) -> tuple[Tensor, float]:
        """Vectors Z [p m] and a factor c with c Z Zᵀ ≈ I: random signs, or all unit vectors where they are no more."""
        p, m = len(self.P), self.options.probes
        if m >= p:
            return torch.eye(p, dtype=self.P.dtype, device=self.P.device), 1.0
        generator = torch.Generator().manual_seed(self.options.seed)
        signs = 2.0 * torch.randint(2, (p, m), generator=generator) - 1.0
        return signs.to(self.P), 1.0 / m

    def logdet(self) -> Tensor:
        value, _ = self._estimate()
        return _Logdet.apply(self, value, self.P, self.scale)

    def logdet_error(self) -> float:
        """Standard error of :meth:`logdet` over its random vectors (0 where it is exact)."""
        return self._estimate()[1]

    def _estimate(self) -> tuple[Tensor, float]:
        if self._logdet is None:
            with torch.no_grad():
                Z, c = self.probes()
                root = self.P.rsqrt()[:, None]

                def lanczos(H: Callable[[Tensor], Tensor]) -> list[Tensor]:
                    return list(tridiagonal(lambda V: self.scale * root * H(root * V), Z / Z.norm(dim=0), self.options.steps))

                α, β = _distributed.led(self.H.own, lanczos, self.H.group, self.P)
                θ, w = quadrature(α, β)
                each = (w * torch.log1p(θ.clamp_min(0))).sum(1) * Z.square().sum(0)  # zᵀ log(I + A) z
                error = 0.0 if c == 1.0 else float(each.std() / len(each) ** 0.5)
                self._logdet = self.P.log().sum() + c * each.sum(), error
                logger.info("log det of MatrixFree by %d probes: standard error %.2g", len(each), error)
        return self._logdet

    def diagonal(self) -> Tensor:
        # Hutchinson: diag(M⁻¹) ≈ c Σ_z z ∘ M⁻¹z.
        Z, c = self.probes()
        return c * (Z * self.solve(Z.mT).mT).sum(1)


class _Solve(torch.autograd.Function):
    """X = M⁻¹B; with G = M⁻¹ ∂X:  ∂B = G,  ∂P = −Σ G ∘ X,  ∂s = −⟨G, H X⟩ where H X = (B − P X)/s."""

    @staticmethod
    def forward(ctx, M: MatrixFreePrecision, B: Tensor, P: Tensor, scale: Tensor) -> Tensor:
        X = M.cg(B.detach())
        ctx.M = M
        ctx.save_for_backward(X, B, P, scale)
        return X

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        X, B, P, scale = ctx.saved_tensors
        G = ctx.M.cg(grad)
        HX = (B - P[:, None] * X) / scale
        return None, G, -(G * X).sum(1), -(G * HX).sum()


class _Logdet(torch.autograd.Function):
    """∂P = diag(M⁻¹),  ∂s = tr(M⁻¹H) = Σ_z c zᵀ(z − P M⁻¹z)/s, by the probes of the value."""

    @staticmethod
    def forward(ctx, M: MatrixFreePrecision, value: Tensor, P: Tensor, scale: Tensor) -> Tensor:
        ctx.M = M
        ctx.save_for_backward(P, scale)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        P, scale = ctx.saved_tensors
        Z, c = ctx.M.probes()
        X = ctx.M.H.warm = ctx.M.cg(Z, start=ctx.M.H.warm)
        return None, None, grad * c * (Z * X).sum(1), grad * c * (Z * (Z - P[:, None] * X)).sum() / scale


def conjugate_gradients(
    M: Callable[[Tensor], Tensor],
    B: Tensor,
    diagonal: Tensor,
    tol: float,
    iterations: int,
    start: Tensor | None = None,
    group: ProcessGroup | None = None,
    level: int = logging.WARNING,
) -> Tensor:
    """M⁻¹B for a positive definite M known by products, all columns of B [p s] at once, preconditioned by its diagonal [p].

    Stops at ‖B − M X‖ ≤ tol ‖B‖ in every column; where it cannot, the log tells (at ``level``) the worst relative residual. With a ``group``
    each of its processes holds some of the rows of all vectors, M's answer included.
    """

    def dots(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:  # over all rows, of which this process may hold a piece
        return _distributed.all_sum_in_step([(a * b).sum(0) for a, b in pairs], group)

    X = torch.zeros_like(B) if start is None else start.clone()
    R = B.clone() if start is None else B - M(X)
    precond = diagonal.reciprocal()[:, None]
    Z = precond * R
    D = Z
    ρ, size, R2 = dots((R, Z), (B, B), (R, R))
    norm, target = R2.sqrt(), tol * size.sqrt()
    for _ in range(iterations):
        active = norm > target
        if not bool(active.any()):
            return X
        MD = M(D[:, active])
        step = ρ[active] / dots((D[:, active], MD))[0]
        X[:, active] += step * D[:, active]
        R[:, active] -= step * MD
        Z = precond * R[:, active]
        new, R2 = dots((R[:, active], Z), (R[:, active], R[:, active]))
        D[:, active] = Z + (new / ρ[active]) * D[:, active]
        ρ[active], norm[active] = new, R2.sqrt()
    worst = float((norm / size.sqrt().clamp_min(torch.finfo(B.dtype).tiny)).max())
    if worst > tol:
        logger.log(
            level, "conjugate gradients stopped after %d iterations at a relative residual of %.1e (asked for %.1e): raise iterations, "
            "tol or the prior precision (an optimizer's damping)", iterations, worst, tol,
        )  # fmt: skip
    return X
