"""The linearised network as a Gaussian process of gpytorch's: its kernel and its mean function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from torch import Tensor, nn

from bayesgn.ggn.dual import shared, tiled_gram
from bayesgn.ggn.factors import Factors
from bayesgn.ggn.held import columns
from bayesgn.ggn.structure import working
from bayesgn.models.function_space import Seen, Tangent, follows

if TYPE_CHECKING:
    from bayesgn.models.network import Network


class JacobianKernel(Kernel):
    """The prior covariance of a net's linearised functions, the (empirical neural) tangent kernel with the weights' prior in it.

        k(x, x') = J(x) P⁻¹ J(x')ᵀ,    J = ∂f/∂θ at θ*,    θ ~ N(μ, P⁻¹)

    With :class:`LinearizedMean` it is the Gaussian process that ``bgn.laplace`` and ``bgn.bayes_newton`` make of a ``Network``: in gpytorch's
    ``ExactGP``, in ``models.GP`` under any likelihood, in ``models.SparseGP`` with inducing points, in sums and products with other kernels.
    J is never formed where it is an outer product δ ⊗ a (a Linear layer: (A Aᵀ) ∘ (Δ Δᵀ)).

    Its one hyper-parameter is the prior's ``log_precision``, of which the kernel has a copy, ``kernel.prior``: one number, one for each layer
    (``WeightPrior.per_layer``) or for each weight. Set ``kernel.prior.precision = 3.0``, or train it with the rest of a model. θ* is held: the
    net is shared, never changed, and may not move either. Its dtype is the net's; ``.double()`` is for the model around it.

    **Several outputs.** For a net with c outputs the matrix is [n c, n' c], data first, then outputs, as ``MultitaskMultivariateNormal`` has
    them. ``models.GP`` and ``models.SparseGP`` take one kernel for each latent function and know no covariance between them: give them
    ``[kernel.output(j) for j in range(c)]``. That leaves out what the outputs share before the data; it is exact for a last layer. With the
    covariance between outputs, and with as good as any likelihood, the same process is ``models.Network(net, structure=ggn.Gram)``.

    **Inputs** are tensors [n d], as gpytorch's are; leading batch dimensions are worked through one by one. Images are flattened, and
    ``input_shape`` says what to. Factors of the inputs seen lately are kept. Where x requires grad the matrix has a graph to it.

    **Exactness.** Beyond 800 rows ``linear_operator`` turns to conjugate gradients and Lanczos iterations without a word, which this kernel, of rank
    p at most, does not bear: with 1,200 data, 49 weights and a noise of 0.1, the log evidence was off by 2.8 nats and variances by a factor of 30
    (with a noise of 0.001, by 474 nats and a factor of 800). Around training *and* predictions write

        with gpytorch.settings.max_cholesky_size(10**9): ...

    and both are exact to nine digits again. ``models.GP`` and ``models.SparseGP`` have exact algebra of their own.

    Args:
        network: the net, which of its weights are uncertain, and their prior. Its structure does not matter here.
        input_shape: of one datum as the net takes it, such as (1, 28, 28); ``None`` for nets that take [n d].
        active_dims: columns of x that the net sees; all unless given.

    Raises:
        TypeError: for anything but a ``models.Network``.
        ValueError: for inputs the net fails on.
        StalePosteriorError: where the net was trained on since.

    Example:
        >>> import gpytorch, bayesgn as bgn
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double().eval()
        >>> network = bgn.models.Network(net, bgn.models.WeightPrior(2.0), bgn.ggn.Full)
        >>> x = torch.randn(20, 2, dtype=torch.float64); y = x.sin().sum(-1)
        >>> kernel = bgn.models.JacobianKernel(network)
        >>> kernel(x, x[:3]).shape, kernel.prior.precision.item()
        (torch.Size([20, 3]), 2.0)
        >>> gp = bgn.bayes_newton(bgn.models.GP(kernel, bgn.models.LinearizedMean(network)), bgn.likelihoods.Gaussian(0.1), (x, y))
        >>> weight_space = bgn.bayes_newton(network, bgn.likelihoods.Gaussian(0.1), (x, y))
        >>> torch.testing.assert_close(gp.log_evidence(), weight_space.log_evidence())

    Source: Khan, Immer, Abedi and Korzepa (2019), "Approximate inference turns deep networks into Gaussian processes", sec. 3; Jacot, Gabriel
    and Hongler (2018), "Neural tangent kernel", for P = I; independent outputs, Immer, Korzepa and Bauer (2021), sec. 3.2.
    """

    def __init__(self, network: Network, input_shape: tuple[int, ...] | None = None, active_dims: tuple[int, ...] | None = None) -> None:
        super().__init__(active_dims=active_dims)
        self.tangent = Tangent(network, input_shape)
        self.prior = copy.deepcopy(network.prior).to(self.tangent.point.device, working(self.tangent.point.dtype))
        self.prior.of(self.tangent.blocks)
        self.weights, self.only = self.tangent.weights, -1  # (plain values: a file of a model with this kernel fits this net alone)

    def output(self, index: int) -> JacobianKernel:
        """The kernel of one output alone; prior and kept factors are shared with this one, so that all are tuned as one."""
        new: Any = _twin(self)
        new.only = _checked(index)
        return new

    # -- what gpytorch asks ----------------------------------------------------------------------------------------------

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """c."""
        c = self.tangent.outputs(x1)
        if self.only < 0:
            return c
        _check_output(self.only, c)
        return 1

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any) -> Tensor:
        """k(x1, x2) [*batch n c, n' c], or its diagonal [*batch n c] for as many x1 as x2."""
        if last_dim_is_batch:
            raise ValueError("last_dim_is_batch=True asks for a kernel of each column of x by itself, but a net takes all columns together.")
        if diag and x1.shape[-2] != x2.shape[-2]:
            raise ValueError(f"diag=True needs as many x1 {tuple(x1.shape)} as x2 {tuple(x2.shape)}.")
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
        self.num_outputs_per_input(x1, x2)
        one = self._diagonal if diag else self._matrix
        if not batch:
            return one(x1, x2).to(x1)
        pairs = zip(*(x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (x1, x2)), strict=True)
        parts = torch.stack([one(a, b) for a, b in pairs])
        return parts.reshape(*batch, *parts.shape[1:]).to(x1)

    def _matrix(self, a: Tensor, b: Tensor) -> Tensor:
        """[n c, n' c]"""
        return self._weighted(tiled_gram, a, b)

    def _diagonal(self, a: Tensor, b: Tensor) -> Tensor:
        """[n c]"""
        return self._weighted(_own if torch.equal(a, b) else _paired, a, b)

    def _weighted(self, term: Callable[[Factors, Factors, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
        """Σ term(J_a, J_b, P⁻¹) over the blocks of weights; where each block has one precision, from terms at precision 1 that are kept."""
        tangent = self.tangent
        A = tangent.at(a)
        B = A if a is b else tangent.at(b)
        F, G = A.factors, B.factors
        if self.only >= 0:
            part = slice(self.only, self.only + 1)
            F, G = [columns(f, part) for f in F], [columns(g, part) for g in G]
        precision = self.prior.of(tangent.blocks)
        variance = [p.to(tangent.point.device, tangent.wide).reciprocal() for p in precision]
        if follows(a, b) or any(v.dim() for v in variance):
            return sum(term(f, g, v) for f, g, v in zip(F, G, variance, strict=True))  # type: ignore[return-value]

        def at_one() -> list[Tensor]:
            one = torch.ones((), dtype=tangent.wide, device=tangent.point.device)
            terms = (term(f, g, one) for f, g in zip(F, G, strict=True))
            return [sum(terms)] if together else list(terms)  # type: ignore[list-item]

        together = shared(precision)
        kept = A.keep(B, (term, self.only, together), at_one)
        return sum(K * v for K, v in zip(kept, variance))  # type: ignore[return-value]


class LinearizedMean(Mean):
    """The prior mean of a net's linearised functions, for weights θ ~ N(μ, P⁻¹).

        m(x) = f(x; θ*) + J(x) (μ − θ*)

    Observations minus m(x) are what the kernel has to explain. (Zero in its place is the prior of a net whose output would be J(x) (θ − μ).)

    Args:
        network: the net, which of its weights are uncertain, and their prior, of which the mean counts alone.
        input_shape: as in :class:`JacobianKernel`.

    Example:
        >>> import bayesgn as bgn
        >>> net = torch.nn.Linear(2, 1)  # linear in its weights, which are 0 before the data
        >>> bgn.models.LinearizedMean(bgn.models.Network(net))(torch.eye(2)).abs().max() < 1e-6
        tensor(True)

    Source: Immer, Korzepa and Bauer (2021), "Improving predictions of Bayesian neural nets via local linearization", sec. 3.2.
    """

    def __init__(self, network: Network, input_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.tangent = Tangent(network, input_shape)
        point = self.tangent.point.to(self.tangent.wide)
        self._shift = network.prior.mean_vector(network.vector, point) - point  # μ − θ*
        self.weights, self.only = self.tangent.weights, -1

    def output(self, index: int) -> LinearizedMean:
        """The mean of one output alone."""
        new: Any = _twin(self)
        new.only = _checked(index)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """[*batch n] for one output, [*batch n c] for several."""
        flat, tangent = x.reshape(-1, x.shape[-1]), self.tangent
        seen = tangent.at(flat)
        make = lambda: [tangent.value(flat) + self._change(seen)]
        (m,) = make() if follows(flat) else seen.keep(seen, "mean", make)
        if self.only >= 0:
            _check_output(self.only, m.shape[1])
            m = m[:, self.only]
        elif m.shape[1] == 1:
            m = m[:, 0]
        return m.reshape(*x.shape[:-1], *m.shape[1:]).to(x)

    def _change(self, seen: Seen) -> Tensor:
        """J(x) (μ − θ*) [n c]."""
        parts = (f.matvec(self._shift[b.where, None]) for f, b in zip(seen.factors, self.tangent.blocks, strict=True))
        return sum(parts).squeeze(-1)  # type: ignore[union-attr]


def _own(f: Factors, g: Factors, variance: Tensor) -> Tensor:
    """The diagonal of J diag(variance) Jᵀ [n k]."""
    return f.quadratic(variance).diagonal(dim1=-2, dim2=-1).reshape(-1)


def _paired(f: Factors, g: Factors, variance: Tensor) -> Tensor:
    """The diagonal of J diag(variance) J'ᵀ [n k] for as many other data."""
    out, start = [], 0
    for part in f.slices():
        other = g.rows(slice(start, start + part.n))
        out.append((part.jacobian() * variance * other.jacobian()).sum(-1).reshape(-1))
        start += part.n
    return torch.cat(out)


def _twin(module: nn.Module) -> nn.Module:
    """Another module with the same parameters and submodules. (``copy.copy`` of a gpytorch kernel is one with the first: they share a dict.)"""
    new = module.__class__.__new__(module.__class__)
    new.__dict__.update({name: dict(value) if type(value) is dict else value for name, value in module.__dict__.items()})
    return new


def _checked(index: Any) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"output({index!r}); expected the number of an output, 0, 1, ...")
    return index


def _check_output(index: int, c: int) -> None:
    if index >= c:
        raise ValueError(f"output {index} was asked for, but the net has {c}: 0 to {c - 1}.")
