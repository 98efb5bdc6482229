"""The steps of optim.GaussNewton against dense matrices of torch.func: every method on every likelihood, every structure, and where they coincide.

Log densities, Fisher information (by expectation over labels), Jacobians and Hessians here are torch's own; bayesgn brings only the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bayesgn import ggn, likelihoods, optim, rules

DTYPE = torch.float64

# -- likelihoods, by torch alone ---------------------------------------------------------------------------------------


def hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """z and weights of a standard normal."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.from_numpy(z), torch.from_numpy(w / w.sum())


def gaussian_labels(f: Tensor) -> tuple[Tensor, Tensor]:
    z, w = hermite(6)
    grid = torch.cartesian_prod(*[z] * len(f)).reshape(-1, len(f))
    return f + 0.5**0.5 * grid, torch.cartesian_prod(*[w] * len(f)).reshape(-1, len(f)).prod(-1)


def heteroscedastic_labels(f: Tensor) -> tuple[Tensor, Tensor]:
    z, w = hermite(8)
    return (f[0] + (f[1] / 2).exp() * z)[:, None], w


def student_labels(f: Tensor) -> tuple[Tensor, Tensor]:
    # y = f + s √ν tan u: the density is cos⁴ u du for ν = 5, so that an even grid over the period is exact.
    u = (torch.arange(64, dtype=DTYPE) + 0.5) / 64 * torch.pi - torch.pi / 2
    return (f + 0.7 * 5**0.5 * u.tan())[:, None], u.cos() ** 4 / (u.cos() ** 4).sum()


def poisson_labels(f: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.arange(120, dtype=DTYPE)
    return y[:, None], td.Poisson(f.exp()).log_prob(y).exp()


@dataclass(frozen=True)
class Family:
    """−log p(y|f) of one datum up to a constant, and labels [m …] with their probabilities [m] at f [c]."""

    name: str
    likelihood: Callable[[], Any]
    loss: Callable[[Tensor, Tensor], Tensor]
    labels: Callable[[Tensor], tuple[Tensor, Tensor]]
    c: int
    natural: bool = True  # an exponential family in its natural parameter: the Hessian in f does not depend on y

    def __str__(self) -> str:
        return self.name

    def hessian(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.func.hessian(self.loss)(f, y)

    def fisher(self, f: Tensor) -> Tensor:
        """Σ_y p(y|f) g gᵀ."""
        y, probability = self.labels(f)
        g = torch.func.vmap(torch.func.grad(self.loss), (None, 0))(f, y)
        return g.mT @ (probability[:, None] * g)

    def draw(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """A label of each datum, from its grid."""
        grids = [self.labels(row) for row in f]
        return torch.stack([y[torch.multinomial(p, 1, generator=generator)[0]] for y, p in grids])


FAMILIES = [
    Family("gaussian", lambda: likelihoods.Gaussian(0.5), lambda f, y: (f - y).square().sum(), gaussian_labels, 2),
    Family("bernoulli", likelihoods.Bernoulli, lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
           lambda f: (torch.tensor([[0.0], [1.0]], dtype=DTYPE), torch.stack([torch.sigmoid(-f[0]), torch.sigmoid(f[0])])), 1),
    Family("categorical", likelihoods.Categorical, lambda f, y: F.cross_entropy(f, y), lambda f: (torch.arange(len(f)), f.softmax(-1)), 3),
    Family("poisson", likelihoods.Poisson, lambda f, y: (f.exp() - y * f).sum(), poisson_labels, 1),
    Family("student_t", lambda: likelihoods.StudentT(5.0, 0.7), lambda f, y: -td.StudentT(5.0, f, 0.7).log_prob(y).sum(),
           student_labels, 1, natural=False),
    Family("heteroscedastic", likelihoods.HeteroscedasticGaussian, lambda f, y: -td.Normal(f[:1], (f[1:] / 2).exp()).log_prob(y).sum(),
           heteroscedastic_labels, 2, natural=False),
]  # fmt: skip
GAUSSIAN, BERNOULLI, CATEGORICAL, POISSON, STUDENT_T, HETEROSCEDASTIC = FAMILIES
ALL_FAMILIES = pytest.mark.parametrize("family", FAMILIES, ids=str)

# -- problems, dense ---------------------------------------------------------------------------------------------------


class Problem:
    """A net, data drawn from it elsewhere in weight space, and everything dense at the net's weights θ [p]."""

    def __init__(self, family: Family, net: nn.Module, x: Tensor, seed: int = 0, weight_decay: float | Tensor = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.family, self.net, self.x, self.decay = family, net.to(DTYPE), x, weight_decay
        self.shapes = {n: p.shape for n, p in net.named_parameters()}
        self.θ = self.weights()
        other = self.θ + 0.3 * torch.randn(len(self.θ), generator=generator, dtype=DTYPE)
        self.y = family.draw(self.f(other, x).detach(), generator)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])

    def f(self, θ: Tensor, x: Tensor) -> Tensor:
        parts = θ.split([s.numel() for s in self.shapes.values()])
        return torch.func.functional_call(self.net, {n: part.reshape(s) for (n, s), part in zip(self.shapes.items(), parts)}, (x,))

    def loss(self, θ: Tensor) -> Tensor:
        data = torch.stack([self.family.loss(f, y) for f, y in zip(self.f(θ, self.x), self.y)]).mean()
        return data + 0.5 * (self.decay * θ.square()).sum()

    @property
    def gradient(self) -> Tensor:
        return torch.func.grad(self.loss)(self.θ)

    @property
    def J(self) -> Tensor:
        return torch.func.jacrev(self.f)(self.θ, self.x)

    def mean(self, Λ: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """1/N Σ JᵀΛJ."""
        rows = zip(self.f(self.θ, self.x).detach(), self.y, self.J)
        return torch.stack([J.mT @ Λ(f, y) @ J for f, y, J in rows]).mean(0)

    def solve(self, H: Tensor, damping: float | Tensor) -> Tensor:
        """−(H + decay + damping)⁻¹ g."""
        return -torch.linalg.solve(H + torch.diag((self.decay + damping) * torch.ones_like(self.θ)), self.gradient)

    def step(
        self, curvature: Any = None, structure: Any = ggn.Full, damping: float = 0.1, decay: float = 0.0, data: Any = None, **options: Any
    ) -> Tensor:
        """The weights' change in one step of the optimizer; the weights are put back."""
        opt = optim.GaussNewton(self.net, self.family.likelihood(), curvature, structure, optim.Constant(damping), weight_decay=decay, **options)
        for part in [(self.x, self.y)] if data is None else data:
            opt.accumulate(*part)
        opt.step()
        assert opt.last is not None and opt.last.accepted
        self.last = opt.last
        δ = self.weights() - self.θ
        nn.utils.vector_to_parameters(self.θ.clone(), self.net.parameters())
        return δ


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return filled(nn.Sequential(*layers[:-1]), seed)


def filled(net: nn.Module, seed: int = 0) -> Any:
    """Weights from a generator of its own; float64."""
    generator, net = torch.Generator().manual_seed(seed), net.to(DTYPE)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=generator, dtype=DTYPE))
    return net


def inputs(n: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def problem_of(family: Family, width: int = 3, n: int = 9, decay: float = 0.0) -> Problem:
    return Problem(family, mlp(2, width, family.c), inputs(n, 2), weight_decay=decay)


def eig(f: Callable[[Tensor], Tensor], H: Tensor) -> Tensor:
    λ, V = torch.linalg.eigh(H)
    return V @ torch.diag(f(λ)) @ V.mT


def clipped(family: Family) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, y: eig(lambda λ: λ.clamp_min(0), family.hessian(f, y))


def close(a: Tensor, b: Tensor, tol: float = 1e-8) -> None:
    """Relative to the whole vector: a step's smallest entries are sums of its largest."""
    assert float((a - b).norm()) <= tol * float(b.norm()), f"relative difference {float((a - b).norm() / b.norm()):.2e}"


def apart(a: Tensor, b: Tensor, by: float = 0.02) -> None:
    assert float((a - b).norm()) > by * float(b.norm())


# -- the methods -------------------------------------------------------------------------------------------------------


def newton(problem: Problem) -> Tensor:
    """|∂² loss|, with the psd part of the Hessian in f where that is indefinite."""
    family = problem.family
    H = torch.func.hessian(problem.loss)(problem.θ) - torch.diag(problem.decay * torch.ones_like(problem.θ))
    return eig(torch.abs, H + problem.mean(lambda f, y: clipped(family)(f, y) - family.hessian(f, y)))


@dataclass(frozen=True)
class Method:
    """Arguments of the optimizer, and the dense matrix they stand for."""

    name: str
    arguments: dict[str, Any]
    dense: Callable[[Problem], Tensor]

    def __str__(self) -> str:
        return self.name


def outer(g: Tensor) -> Tensor:
    return g[:, None] * g


METHODS = [
    Method("gradient_descent", {"structure": ggn.Identity}, lambda q: torch.eye(len(q.θ), dtype=DTYPE)),
    Method("classical_gauss_newton", {"curvature": rules.Identity()}, lambda q: q.mean(lambda f, y: torch.eye(len(f), dtype=DTYPE))),
    Method("generalised_gauss_newton", {"curvature": rules.Exact()}, lambda q: q.mean(clipped(q.family))),
    Method("natural_gradient", {"curvature": rules.GaussNewton()}, lambda q: q.mean(lambda f, y: q.family.fisher(f))),
    Method("gradient_covariance", {"curvature": rules.EmpiricalFisher()}, lambda q: q.mean(lambda f, y: outer(torch.func.grad(q.family.loss)(f, y)))),
    Method("newton", {"curvature": rules.Exact(), "structure": ggn.Hessian}, newton),
]
BY_NAME = {m.name: m for m in METHODS}


@ALL_FAMILIES
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_step_of_every_method_is_the_dense_one(method, family):
    problem = problem_of(family, decay=0.3)
    close(problem.step(**method.arguments, decay=0.3), problem.solve(method.dense(problem), 0.1))


def test_defaults_are_the_natural_gradient():
    problem = problem_of(STUDENT_T)
    assert torch.equal(problem.step(), problem.step(rules.GaussNewton(), ggn.Full))


def test_gradient_descent_is_torch_sgd():
    problem = problem_of(CATEGORICAL)
    sgd = torch.optim.SGD(problem.net.parameters(), lr=0.2)
    F.cross_entropy(problem.net(problem.x), problem.y).backward()
    sgd.step()
    moved = problem.weights() - problem.θ
    nn.utils.vector_to_parameters(problem.θ.clone(), problem.net.parameters())
    close(problem.step(structure=ggn.Identity, damping=0.0, lr=0.2), moved, 1e-13)


# -- where methods coincide, and where they differ ---------------------------------------------------------------------


@ALL_FAMILIES
def test_generalised_gauss_newton_is_the_natural_gradient_in_natural_parameters(family):
    problem = problem_of(family)
    a, b = (problem.step(**BY_NAME[name].arguments) for name in ("generalised_gauss_newton", "natural_gradient"))
    (close if family.natural else apart)(a, b)


@pytest.mark.parametrize("family", [GAUSSIAN, CATEGORICAL], ids=str)
def test_classical_is_generalised_gauss_newton_for_square_loss_alone(family):
    problem = problem_of(family)
    classical = problem.step(rules.Identity(2.0))  # 1 / noise
    (close if family is GAUSSIAN else apart)(classical, problem.step(rules.Exact()))


@pytest.mark.parametrize("family", [GAUSSIAN, STUDENT_T, POISSON, BERNOULLI], ids=str)
def test_newton_is_generalised_gauss_newton_where_the_gradient_in_f_vanishes(family):
    """Targets without residual leave the net's bending no weight; others do."""
    problem = problem_of(family)
    names = ("newton", "generalised_gauss_newton")
    apart(*(BY_NAME[name].dense(problem) for name in names))
    f = problem.f(problem.θ, problem.x).detach()
    if family in (GAUSSIAN, STUDENT_T):
        problem.y = f
    elif family is POISSON:
        problem.y = f.exp()
    else:
        problem.y = torch.sigmoid(f)  # a soft label
    close(*(BY_NAME[name].dense(problem) for name in names), 1e-12)
    if family in (GAUSSIAN, STUDENT_T):  # the gradient is 0 there: look just beside it
        problem.y = f + 1e-5 * inputs(*f.shape)
        close(*(problem.step(**BY_NAME[name].arguments) for name in names), 1e-3)


@pytest.mark.parametrize("name", ["generalised_gauss_newton", "natural_gradient", "newton"])
def test_one_step_solves_a_linear_model(name):
    problem = Problem(GAUSSIAN, filled(nn.Linear(3, 2)), inputs(20, 3))
    δ = problem.step(**BY_NAME[name].arguments, damping=0.0)
    design = torch.cat([problem.x, torch.ones(20, 1, dtype=DTYPE)], 1)
    W = torch.linalg.lstsq(design, problem.y).solution  # [d + 1, c]
    close(problem.θ + δ, torch.cat([W[:-1].mT.flatten(), W[-1]]), 1e-12)


def test_gradient_covariance_is_the_fisher_on_average_over_the_models_labels():
    """Each datum repeated with every label in proportion to its probability; with labels of another model it is not."""
    net, x = mlp(2, 3, 2), inputs(4, 2)
    with torch.no_grad():
        net[-1].weight.zero_(), net[-1].bias.copy_(torch.tensor([0.0, np.log(3.0)]))  # p = (¼, ¾)
    problem = Problem(dataclasses.replace(CATEGORICAL, c=2), net, x.repeat_interleave(4, 0))

    def matrices() -> tuple[Tensor, Tensor]:
        return tuple(BY_NAME[name].dense(problem) for name in ("gradient_covariance", "natural_gradient"))  # type: ignore[return-value]

    problem.y = torch.tensor([0, 1, 1, 1]).repeat(4)
    close(*matrices(), 1e-12)
    close(problem.step(rules.EmpiricalFisher()), problem.step(rules.GaussNewton()), 1e-8)
    problem.y = torch.tensor([0, 0, 0, 1]).repeat(4)
    apart(*matrices(), by=0.5)
    close(problem.step(rules.EmpiricalFisher()), problem.solve(matrices()[0], 0.1))


# -- structures --------------------------------------------------------------------------------------------------------


def blocks(H: Tensor, net: nn.Module) -> Tensor:
    """H within each module's own weights."""
    sizes = [sum(p.numel() for p in m.parameters(recurse=False)) for m in net.modules()]
    return H * torch.block_diag(*[torch.ones(s, s, dtype=DTYPE) for s in sizes if s])


@dataclass(frozen=True)
class Kept:
    """A structure, and what it keeps of a dense H (None: not a function of H alone)."""

    structure: ggn.Structure
    of: Callable[[Tensor, nn.Module], Tensor] | None = lambda H, net: H
    additive: bool = True  # whether two halves are the whole

    def __str__(self) -> str:
        return type(self.structure).__name__


STRUCTURES = [
    Kept(ggn.Full()),
    Kept(ggn.Gram()),
    Kept(ggn.LowRank(rank=200)),
    Kept(ggn.MatrixFree(tol=1e-13)),
    Kept(ggn.Layerwise(), blocks),
    Kept(ggn.Diag(), lambda H, net: torch.diag(H.diagonal())),
    Kept(ggn.Kron(), None),
    Kept(ggn.EigenKron(), None, additive=False),
    Kept(ggn.Hessian(), None),
    Kept(ggn.Identity(), lambda H, net: torch.eye(len(H), dtype=DTYPE)),
]
CURVATURES = [rules.GaussNewton(), rules.Exact(), rules.EmpiricalFisher(), rules.Identity()]
ALL_STRUCTURES = pytest.mark.parametrize("kept", STRUCTURES, ids=str)
DENSE_STRUCTURES = pytest.mark.parametrize("kept", [k for k in STRUCTURES if k.of is not None], ids=str)  # the others have tests of their own
DENSE = {type(m.arguments["curvature"]): m.dense for m in METHODS if "structure" not in m.arguments}


@DENSE_STRUCTURES
@pytest.mark.parametrize("curvature", CURVATURES, ids=lambda c: type(c).__name__)
def test_every_structure_with_every_curvature(kept, curvature):
    problem = problem_of(CATEGORICAL, decay=0.2)
    H = DENSE[type(curvature)](problem)
    close(problem.step(curvature, kept.structure, decay=0.2), problem.solve(kept.of(H, problem.net), 0.1))


@ALL_STRUCTURES
@pytest.mark.parametrize("family", [GAUSSIAN, BERNOULLI, CATEGORICAL], ids=str)
def test_two_halves_are_one_batch(kept, family):
    problem = problem_of(family, n=9, decay=0.2)
    halves = [(problem.x[:4], problem.y[:4]), (problem.x[4:], problem.y[4:])]
    whole = problem.step(structure=kept.structure, decay=0.2)
    close(problem.step(structure=kept.structure, decay=0.2, data=[(halves,)]), whole)  # a loader may be walked twice
    if kept.additive:
        close(problem.step(structure=kept.structure, decay=0.2, data=halves), whole)
        return
    with pytest.raises(ValueError, match="both of its walks"):
        problem.step(structure=kept.structure, decay=0.2, data=halves)
    assert torch.equal(problem.weights(), problem.θ)


@ALL_STRUCTURES
def test_order_of_the_data_does_not_matter(kept):
    problem = problem_of(CATEGORICAL)
    back = [(problem.x.flip(0), problem.y.flip(0))]
    close(problem.step(structure=kept.structure, data=back), problem.step(structure=kept.structure))


@ALL_STRUCTURES
@pytest.mark.parametrize("family", [GAUSSIAN, CATEGORICAL], ids=str)
def test_float32_is_near_float64(kept, family):
    problem = problem_of(family)
    wide = problem.step(structure=kept.structure if str(kept) != "MatrixFree" else ggn.MatrixFree(tol=1e-6))
    problem.net, problem.x, before = problem.net.to(torch.float32), problem.x.float(), problem.θ
    problem.y, problem.θ = problem.y.float() if family is GAUSSIAN else problem.y, problem.θ.float()
    narrow = problem.step(structure=kept.structure if str(kept) != "MatrixFree" else ggn.MatrixFree(tol=1e-6))
    assert narrow.dtype == torch.float32 and before.dtype == DTYPE
    close(narrow.double(), wide, 1e-4)


@settings(max_examples=15, deadline=None)
@given(
    family=st.sampled_from([GAUSSIAN, BERNOULLI, CATEGORICAL]),
    width=st.integers(1, 12),
    n=st.integers(1, 14),
    decay=st.sampled_from([0.0, 1e-2]),
    damping=st.sampled_from([1e-3, 1.0]),
)
def test_full_is_gram(family, width, n, decay, damping):
    problem = problem_of(family, width, n, decay)
    close(problem.step(structure=ggn.Gram, damping=damping, decay=decay), problem.step(structure=ggn.Full, damping=damping, decay=decay))


class Apart(nn.Module):
    """Two heads on inputs of their own, each bent: no output knows both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x[:, :2]).sin(), self.right(x[:, 2:]).exp()], 1)


def test_layerwise_is_full_on_disjoint_blocks():
    problem = Problem(GAUSSIAN, filled(Apart()), inputs(8, 5))
    close(problem.step(structure=ggn.Layerwise), problem.step(structure=ggn.Full), 1e-12)
    joined = problem_of(GAUSSIAN)
    apart(joined.step(structure=ggn.Layerwise), joined.step(structure=ggn.Full))


def test_kron_is_full_for_one_linear_layer_under_square_loss():
    problem = Problem(GAUSSIAN, filled(nn.Linear(3, 2)), inputs(8, 3))
    for structure in (ggn.Kron, ggn.EigenKron):
        close(problem.step(structure=structure), problem.step(structure=ggn.Full), 1e-12)


# -- the Hessian -------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution, pooled, and a head."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 2), nn.Linear(8, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(torch.tanh(self.conv(x)), 2).flatten(1))


def spied(problem: Problem, **options: Any) -> Tensor:
    """The mean loss's Hessian as structure=Hessian has it, before it is made PSD."""
    seen = []

    def keep(H: Tensor) -> Tensor:
        seen.append(H.clone())
        return eig(torch.abs, H)

    problem.step(rules.Exact(), ggn.Hessian(psd=keep), **options)
    return seen[0] / len(problem.x)


@pytest.mark.parametrize("family", [GAUSSIAN, BERNOULLI, CATEGORICAL, POISSON], ids=str)
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_hessian_is_torchs(family, net):
    problem = problem_of(family) if net == "mlp" else Problem(family, filled(Small(family.c)), inputs(5, 1, 5, 5))
    H = torch.func.hessian(problem.loss)(problem.θ)
    close(spied(problem), H, 1e-12)
    assert float(torch.linalg.eigvalsh(H)[0]) < 0, "the case that needs psd"


def test_hessian_of_some_weights():
    problem = problem_of(CATEGORICAL)
    names = [n for n, _ in problem.net.named_parameters()]
    mask = torch.zeros(3, 2, dtype=torch.bool)
    mask[0, 1] = mask[2] = True
    chosen = torch.cat([torch.tensor([1, 4, 5]), torch.arange(9, len(problem.θ))])  # of the first weight; its bias is left out
    H = torch.func.hessian(problem.loss)(problem.θ)[chosen[:, None], chosen]
    selected = {names[0]: mask} | {n: torch.ones(p.shape, dtype=torch.bool) for n, p in list(problem.net.named_parameters())[2:]}
    close(spied(problem, parameters=selected), H, 1e-12)
    expected = torch.zeros_like(problem.θ)
    expected[chosen] = -torch.linalg.solve(eig(torch.abs, H) + 0.1 * torch.eye(len(chosen), dtype=DTYPE), problem.gradient[chosen])
    close(problem.step(rules.Exact(), ggn.Hessian, parameters=selected), expected)


class Pointwise(nn.Module):
    """One net at every position of a sequence [n t d]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name != "gradient_covariance"], ids=str)
def test_positions_are_rows(method):
    """(The gradient covariance differs: its datum is the sequence.)"""
    problem = problem_of(CATEGORICAL, n=8)
    rows = problem.step(**method.arguments)
    problem.net, problem.x, problem.y = Pointwise(problem.net), problem.x.reshape(4, 2, 2), problem.y.reshape(4, 2)
    close(problem.step(**method.arguments), rows)


# -- damping, scaling, groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [k for k in STRUCTURES if k.of is not None and type(k.structure) is not ggn.Identity], ids=str)
def test_running_max_damps_in_units_of_the_largest_diagonal_so_far(kept):
    """Two steps of H + λD: D is diag(H), then the larger of it and the new one."""
    problem, decay = problem_of(CATEGORICAL, decay=0.05), 0.05
    opt = optim.GaussNewton(problem.net, likelihoods.Categorical(), structure=kept.structure, damping=optim.Constant(0.5),
                            scaling=optim.RunningMax(), weight_decay=decay)  # fmt: skip
    D = torch.zeros_like(problem.θ)
    for _ in range(3):
        H = DENSE[rules.GaussNewton](problem)
        D = torch.maximum(D, H.diagonal() + decay)
        δ = problem.solve(kept.of(H, problem.net), 0.5 * D)
        opt.step(problem.x, problem.y)
        close(problem.weights(), problem.θ + δ)
        problem.θ = problem.weights()


def grouped(problem: Problem) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Two groups of whole layers, with weight decay [p] and learning rates [p] of their own; the problem's loss has the decay."""
    names = [n for n, _ in problem.net.named_parameters()]
    first = torch.arange(len(problem.θ)) < sum(problem.shapes[n].numel() for n in names[:2])
    problem.decay, lr = torch.where(first, 0.5, 0.01).to(DTYPE), torch.where(first, 1.0, 0.25).to(DTYPE)
    return [{"parameters": names[:2], "weight_decay": 0.5}, {"parameters": names[2:], "lr": 0.25}], problem.decay, lr




@pytest.mark.parametrize("kept", STRUCTURES, ids=str)
def test_weight_decay_and_lr_of_groups(kept):
    problem = problem_of(GAUSSIAN)
    groups, decay, lr = grouped(problem)
    δ = problem.step(structure=kept.structure, parameters=groups, decay=0.01)
    if kept.of is not None:
        close(δ, lr * problem.solve(kept.of(DENSE[rules.GaussNewton](problem), problem.net), 0.1))
    elif isinstance(kept.structure, ggn.Hessian):
        H = torch.func.hessian(problem.loss)(problem.θ) - torch.diag(decay)
        close(δ, lr * problem.solve(eig(torch.abs, H), 0.1))
    else:  # layer by layer: the step in each is that of a net with its decay everywhere
        close(δ, lr * torch.where(decay == 0.5, *(problem.step(structure=kept.structure, decay=d) for d in (0.5, 0.01))))


@pytest.mark.parametrize("kept", [k for k in STRUCTURES if str(k) in ("Full", "Gram", "LowRank", "MatrixFree", "Hessian")], ids=str)
def test_predicted_decrease_is_the_quadratics(kept):
    """Along a step whose groups have learning rates of their own, so that it is no solution."""
    problem = problem_of(GAUSSIAN)
    groups, decay, _ = grouped(problem)
    δ = problem.step(structure=kept.structure, parameters=groups, decay=0.01)
    H = DENSE[rules.GaussNewton](problem)
    if isinstance(kept.structure, ggn.Hessian):
        H = eig(torch.abs, torch.func.hessian(problem.loss)(problem.θ) - torch.diag(decay))
    predicted = -float(problem.gradient @ δ + 0.5 * δ @ (H + torch.diag(decay)) @ δ)
    actual = float(problem.loss(problem.θ) - problem.loss(problem.θ + δ))
    assert problem.last.ratio == pytest.approx(actual / predicted, rel=1e-8)




SIZES = [(BERNOULLI, 8, 5), (BERNOULLI, 2, 30), (CATEGORICAL, 8, 5), (CATEGORICAL, 2, 30)]
SPECTRA = [(*size, structure) for size in SIZES for structure in (ggn.Gram, ggn.Full)]


@pytest.mark.parametrize(
    "family, width, n, structure",
    SPECTRA,
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_smallest_eigenvalue_is_that_of_the_gram_matrix_or_of_h(family, width, n, structure):
    """The smallest singular value of J̃ with the columns of a root of Λ that are not zero."""
    problem = problem_of(family, width, n)
    roots = []
    for f, J in zip(problem.f(problem.θ, problem.x).detach(), problem.J):
        λ, V = torch.linalg.eigh(family.fisher(f))
        keep = λ > 1e-12  # softmax: c − 1 of c
        roots.append((V[:, keep] * λ[keep].sqrt()).mT @ J)
    smallest = float(torch.linalg.svdvals(torch.cat(roots))[-1].square()) / n
    opt = optim.GaussNewton(problem.net, family.likelihood(), structure=structure, damping=optim.SmallestEigenvalue(3.0))
    opt.step(problem.x, problem.y)
    assert opt.last is not None and opt.last.damping == pytest.approx(3 * smallest, rel=1e-6)
