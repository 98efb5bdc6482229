"""Residuals of many parameters: J sparse by a known pattern, or by products alone."""

from __future__ import annotations

import logging
from collections import defaultdict

import torch
from torch import Tensor

from bayesgn._extras import require
from bayesgn.ggn.jacobian import FunctionLinearization
from bayesgn.optim.residual_quadratic import ResidualQuadratic, ResidualSolver, conjugate_gradients

logger = logging.getLogger("bayesgn.optim")


class SparseLU(ResidualSolver):
    """J of a known sparsity pattern, by a few products: columns that share no row are worked out together.

        J V with V [p k] of zeros and ones, one colour a column

    Rows are coloured instead where that needs fewer. Steps come from a sparse LU of JᵀJ + λD (scipy) with one refinement on the residuals.

    Args:
        pattern: [m p], True (or non-zero) where a residual may depend on a parameter: a bool tensor or a sparse one.

    Raises:
        ValueError: for a pattern of another shape than J, or one that misses an entry.

    Example:
        >>> pattern = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, 1)
        >>> SparseLU(pattern).colours  # four columns by two products
        2

    Source: Curtis, Powell and Reid (1974), "On the estimation of sparse Jacobian matrices"; Björck (1996), sec. 2.9.3, for the refinement.
    """

    def __init__(self, pattern: Tensor) -> None:
        if not isinstance(pattern, Tensor) or pattern.dim() != 2:
            got = f"a tensor {tuple(pattern.shape)}" if isinstance(pattern, Tensor) else f"a {type(pattern).__name__}"
            raise ValueError(f"SparseLU: the pattern is {got}; expected a bool or sparse tensor [m p].")
        if pattern.layout == torch.strided:
            index = pattern.nonzero().mT
        else:
            coo = pattern.to_sparse_coo().coalesce()
            index = coo.indices()[:, coo.values() != 0]
        self.shape = tuple(pattern.shape)
        self.rows, self.columns = index[0].cpu(), index[1].cpu()
        by_column, by_row = _colour(self.rows, self.columns, self.shape[1]), _colour(self.columns, self.rows, self.shape[0])
        self.by_rows = int(by_row.max(initial=-1)) < int(by_column.max(initial=-1))
        self.colour = torch.from_numpy(by_row if self.by_rows else by_column)
        self.colours = int(self.colour.max()) + 1 if len(self.colour) else 0

    def values(self, lin: FunctionLinearization) -> Tensor:
        """The entries of J in the order of the pattern's."""
        θ = lin.θ
        seeds = torch.nn.functional.one_hot(self.colour.long(), self.colours).to(θ)
        along, across = (self.columns, self.rows) if self.by_rows else (self.rows, self.columns)
        found = lin.rmatvec(seeds) if self.by_rows else lin.matvec(seeds)
        return found[along.to(θ.device), self.colour[across].to(θ.device)]

    def check(self, lin: FunctionLinearization, generator: torch.Generator | None) -> None:
        if self.shape != lin.shape:
            raise ValueError(f"the sparsity pattern is {list(self.shape)}; this problem has {lin.shape[0]} residuals of {lin.shape[1]} parameters.")
        device = lin.θ.device if generator is None else generator.device
        v = torch.randn(lin.shape[1], generator=generator, dtype=lin.θ.dtype, device=device).to(lin.θ.device)
        true = lin.matvec(v)
        kept = torch.zeros_like(true).index_add_(0, self.rows.to(v.device), self.values(lin) * v[self.columns.to(v.device)])
        error = (true - kept).abs()
        if float(error.max()) > torch.finfo(v.dtype).eps ** 0.5 * float(true.abs().max()):
            raise ValueError(
                f"the sparsity pattern misses entries of J: residual {int(error.argmax())} depends on a parameter that its row does not name "
                f"(J v differs by {float(error.max()):.2g} from the coloured one); add the entry, or use optim.ConjugateGradients()."
            )

    def quadratic(self, lin, loss, unit, box, scaling, generator) -> SparseQuadratic:
        values = self.values(lin)
        if not bool(values.isfinite().all()):
            k = int((~values.isfinite()).nonzero()[0])
            name = lin.function.tree.name(int(self.columns[k]))
            raise FloatingPointError(f"the derivative of residual {int(self.rows[k])} with respect to {name} is {float(values[k])}")
        q = SparseQuadratic(lin, loss, unit, box)
        q.keep(self, values)
        q.finish(scaling)
        return q

    def __repr__(self) -> str:
        return f"SparseLU({len(self.rows)} entries of {self.shape[0]} × {self.shape[1]}, {self.colours} colours)"


def _colour(rows: Tensor, columns: Tensor, count: int):
    """Greedy: a colour of each of ``count`` columns, none twice within a row; the fullest columns first. A numpy array."""
    import numpy as np

    in_row: dict[int, list[int]] = defaultdict(list)
    in_column: dict[int, list[int]] = defaultdict(list)
    for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
        in_row[i].append(j)
        in_column[j].append(i)
    colour = np.full(count, -1, dtype=np.int64)
    taken: dict[int, set[int]] = defaultdict(set)  # colours that a row has already
    for j in sorted(range(count), key=lambda j: -len(in_column[j])):
        used = set().union(*(taken[i] for i in in_column[j])) if in_column[j] else set()
        c = next(c for c in range(len(used) + 1) if c not in used)
        colour[j] = c
        for i in in_column[j]:
            taken[i].add(c)
    return colour


class SparseQuadratic(ResidualQuadratic):
    """J̃ by its non-zero entries; JᵀJ + λD by a sparse LU on the CPU."""

    def keep(self, layout: SparseLU, values: Tensor) -> None:
        """Take the entries of J in the order of the layout's."""
        numpy, scipy = require("numpy", "repro"), require("scipy.sparse", "repro")
        weight = self.weight
        values = values * (weight[layout.rows.to(values.device)] if isinstance(weight, Tensor) else weight)
        self._like = values
        entries = values.detach().cpu().double().numpy()
        self._J = scipy.csc_matrix((entries, (layout.rows.numpy(), layout.columns.numpy())), shape=layout.shape)
        self._JT, self._numpy = self._J.T.tocsr(), numpy
        self._factor: tuple | None = None

    def _tensor(self, array) -> Tensor:
        return torch.from_numpy(array).to(self._like)

    @staticmethod
    def _array(tensor: Tensor):
        return tensor.detach().cpu().double().numpy()

    def matvec(self, δ: Tensor) -> Tensor:
        return self._tensor(self._J @ self._array(δ))

    def rmatvec(self, u: Tensor) -> Tensor:
        return self._tensor(self._JT @ self._array(u))

    def column_squares(self) -> Tensor:
        return self._tensor(self._numpy.asarray(self._J.multiply(self._J).sum(0)).reshape(-1))

    def least_squares(self, rhs: Tensor, damping: float, free: Tensor) -> Tensor:
        scipy, linalg = require("scipy.sparse", "repro"), require("scipy.sparse.linalg", "repro")
        if not bool(free.any()):
            return torch.zeros_like(self.slope)
        keep = self._array(free).astype(bool)
        if self._factor is None or self._factor[0] != damping or (self._factor[1] != keep).any():
            J = self._J[:, keep]
            scaling = self._array(self.scaling)[keep]
            normal = (J.T @ J + damping * scipy.diags(scaling)).tocsc()
            try:
                self._factor = damping, keep, J, scaling, linalg.splu(normal)
            except RuntimeError:  # exactly singular and not damped: damped as little as rounding allows
                jitter = 1e-12 * normal.diagonal().max()
                logger.info("JᵀJ is singular: solved with %.1e on its diagonal", jitter)
                self._factor = damping, keep, J, scaling, linalg.splu((normal + jitter * scipy.identity(len(scaling))).tocsc())
        _, _, J, scaling, lu = self._factor
        b = self._array(rhs)
        step = lu.solve(-(J.T @ b))
        step += lu.solve(-(J.T @ (b + J @ step)) - damping * scaling * step)
        δ = self._numpy.zeros(len(keep))
        δ[keep] = step
        return self._tensor(δ)


class ConjugateGradients(ResidualSolver):
    """J by products only, by forward and reverse mode; nothing of size m × p is formed. For any number of parameters.

    Steps come from conjugate gradients on the normal equations. The diagonal of JᵀJ, which a scaling asks for, is an unbiased estimate from
    random signs u: E[(Jᵀu)_j²] = ‖J_j‖².

    Args:
        tol: of a solve, relative to its right-hand side.
        iterations: at most this many products with J and Jᵀ for a solve.
        probes: random vectors for the diagonal.

    Raises:
        ValueError: for numbers that are not positive.

    Example:
        >>> ConjugateGradients(tol=1e-6)
        ConjugateGradients(tol=1e-06, iterations=200, probes=8)

    Source: Bekas, Kokiopoulou and Saad (2007), "An estimator for the diagonal of a matrix".
    """

    def __init__(self, tol: float = 1e-4, iterations: int = 200, probes: int = 8) -> None:
        if not tol > 0 or min(iterations, probes) < 1:
            raise ValueError(f"ConjugateGradients: tol={tol}, iterations={iterations}, probes={probes}; all must be positive.")
        self.tol, self.iterations, self.probes = float(tol), iterations, probes

    def quadratic(self, lin, loss, unit, box, scaling, generator) -> ProductsQuadratic:
        q = ProductsQuadratic(lin, loss, unit, box)
        q.tol, q.iterations, q.probes, q.generator = self.tol, self.iterations, self.probes, generator
        q.finish(scaling)
        if not bool(q.slope.isfinite().all()):
            j = int((~q.slope.isfinite()).nonzero()[0])
            raise FloatingPointError(f"the derivative of the cost with respect to {lin.function.tree.name(j)} is {float(q.slope[j])}")
        return q


class ProductsQuadratic(ResidualQuadratic):
    """J̃ by the products of a linearization, scaled by D for conjugate gradients."""

    tol: float
    iterations: int
    probes: int
    generator: torch.Generator | None

    def matvec(self, δ: Tensor) -> Tensor:
        return self.weight * self.lin.matvec(δ)

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.lin.rmatvec(self.weight * u)

    def least_squares(self, rhs: Tensor, damping: float, free: Tensor) -> Tensor:
        scale = torch.where(free, self.scaling.rsqrt(), 0.0)
        return scale * conjugate_gradients(
            lambda z: self.matvec(scale * z), lambda u: scale * self.rmatvec(u), -rhs, damping, self.tol, self.iterations
        )

    def column_squares(self) -> Tensor:
        m = len(self.residual)
        device = self.residual.device if self.generator is None else self.generator.device
        signs = torch.randint(2, (m, self.probes), generator=self.generator, device=device, dtype=torch.int8).to(self.residual) * 2 - 1
        rows = [self.rmatvec(u) for u in signs.unbind(1)]
        return torch.stack(rows).square().mean(0)
