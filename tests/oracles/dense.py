"""Brute-force linear algebra of a linearised network, in float64, as a second opinion on `bayesgn.ggn`.

Nothing here imports bayesgn, shares a formula's implementation with it, or is meant to be fast: one `autograd.grad` per output entry
and per datum, dense p × p matrices, explicit inverses of small matrices. Letters and shapes: n data, r outputs of one datum (all
positions and classes, flattened), p weights, k columns of a root S of Λ, t positions that share one weight, i and o inputs and outputs of a layer.

Order of the p weights everywhere: `net.named_parameters()` without those that need no gradient, each flattened row-major; a tied
parameter stands once, under its first name. `mask` keeps a subset of these p columns, as a LongTensor of indices or a BoolTensor [p].
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---------------------------------------------------------------------------------------------------------------- nets and data


def call(net: nn.Module, x: Any) -> Tensor:
    """A net's raw answer as a tensor, whatever the shape of its input.

    A mapping goes in as keywords when `forward` has parameters of those names, whole otherwise; a tuple or list is spread over
    `forward`'s positional parameters when there are enough of them, and goes in whole otherwise. Of a structured answer, `.logits` (or
    `["logits"]`) is read.
    """
    signature = inspect.signature(net.forward).parameters.values()
    if isinstance(x, Mapping):
        names = {q.name for q in signature if q.kind in (q.POSITIONAL_OR_KEYWORD, q.KEYWORD_ONLY)}
        spread = any(q.kind is q.VAR_KEYWORD for q in signature) or set(x) <= names
        output = net(**x) if spread else net(x)
    elif isinstance(x, (tuple, list)):
        positional = [q for q in signature if q.kind in (q.POSITIONAL_ONLY, q.POSITIONAL_OR_KEYWORD)]
        spread = any(q.kind is q.VAR_POSITIONAL for q in signature) or len(positional) >= len(x) > 1
        output = net(*x) if spread else net(x)
    else:
        output = net(x)
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, Mapping) else output.logits


def datum(x: Any, n: int) -> Any:
    """The n-th datum of a batch as a batch of one, copied (a net may write into its input)."""
    if isinstance(x, Tensor):
        return x[n : n + 1].clone()
    if isinstance(x, Mapping):
        return {key: datum(value, n) for key, value in x.items()}
    return tuple(datum(value, n) for value in x)


def size(x: Any) -> int:
    """How many data a batch holds."""
    if isinstance(x, Tensor):
        return len(x)
    return size(next(iter(x.values() if isinstance(x, Mapping) else x)))


def weights(net: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in `named_parameters` order, tied ones once; `names` keeps some of them."""
    named = {name: q for name, q in net.named_parameters() if q.requires_grad}
    if names is None:
        return named
    names = set(names)
    if unknown := names - set(named):
        raise KeyError(f"no trainable parameter is called {sorted(unknown)}; there are {list(named)}")
    return {name: q for name, q in named.items() if name in names}


def vector(net: nn.Module, names: Iterable[str] | None = None, mask: Tensor | None = None) -> Tensor:
    """θ [p] in float64, detached."""
    theta = torch.cat([q.detach().double().flatten() for q in weights(net, names).values()])
    return theta if mask is None else theta[mask]


def _outputs(net: nn.Module, x: Any, rows: Callable[[Tensor], Tensor] | None) -> Tensor:
    output = call(net, x)
    output = output if rows is None else rows(output)
    return output.reshape(len(output), -1)  # also a net that answers [n]


def outputs(net: nn.Module, x: Any, rows: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """f [n r], every datum run alone. `rows` reorders the raw output first (a likelihood's `rows`: classes last)."""
    with (
        torch.enable_grad()
    ):  # the same kernels as in `jacobian`: TransformerEncoderLayer has another path under no_grad
        return torch.cat([_outputs(net, datum(x, n), rows).detach().double() for n in range(size(x))])


# ------------------------------------------------------------------------------------------------------------------- Jacobians


def jacobian(
    net: nn.Module,
    x: Any,
    names: Iterable[str] | None = None,
    mask: Tensor | None = None,
    rows: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """J [n r p], J[n, j, :] = ∂ f_nj / ∂θ, by one `autograd.grad` per output entry of a datum that is run alone.

    Args:
        net: in eval mode; run as it stands, nothing is functionalised or patched.
        x: tensor, mapping or tuple of tensors with the data along the first axis of each.
        names: keep these parameters only.
        mask: keep these of the p columns only (indices or booleans), after `names`.
        rows: reorders the raw output before it is flattened to [n r].
    """
    q = list(weights(net, names).values())
    J = []
    with torch.enable_grad():
        for n in range(size(x)):
            f = _outputs(net, datum(x, n), rows)[0]
            J.append(torch.stack([_flat_grad(entry, q) for entry in f]).double())
    J = torch.stack(J)
    return J if mask is None else J[..., mask]


def _flat_grad(value: Tensor, q: list[Tensor], create_graph: bool = False) -> Tensor:
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(w).flatten() for w in q])
    grads = torch.autograd.grad(value, q, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(q, grads, strict=True)])


def finite_difference_jacobian(
    net: nn.Module,
    x: Any,
    names: Iterable[str] | None = None,
    mask: Tensor | None = None,
    rows: Callable[[Tensor], Tensor] | None = None,
    step: float = 1e-6,
) -> Tensor:
    """J [n r p] without autograd, by central differences; good to about 1e-8 for smooth nets with weights of size one."""
    net = copy.deepcopy(net)  # keeps ties; the caller's net is not perturbed, not even for a moment
    columns = []
    for w in weights(net, names).values():
        for j in range(w.numel()):
            entry = w.data.view(-1)[j : j + 1]
            kept = entry.clone()
            entry.copy_(kept + step)
            up = outputs(net, x, rows)
            entry.copy_(kept - step)
            columns.append((up - outputs(net, x, rows)) / (2 * step))
            entry.copy_(kept)
    J = torch.stack(columns, -1)
    return J if mask is None else J[..., mask]


def finite_difference(function: Callable[[Tensor], Tensor], point: Tensor, step: float = 1e-6) -> Tensor:
    """Gradient of a scalar function by central differences, shaped as `point`; the step is relative to max(1, |x_j|)."""
    point = point.detach().double()
    gradient = torch.zeros_like(point)
    for j in range(point.numel()):
        h = torch.zeros_like(point)
        h.view(-1)[j] = step * max(1.0, abs(point.reshape(-1)[j].item()))
        gradient.view(-1)[j] = (function(point + h) - function(point - h)).detach() / (2 * h.sum())
    return gradient


# ------------------------------------------------------------------------------------------------ curvature, evidence, predictions


def position_blocks(Lam: Tensor) -> Tensor:
    """Λ of the positions, [n *positions c c] -> block-diagonal [n r r] with r = positions · c, position first."""
    n, c = len(Lam), Lam.shape[-1]
    return torch.stack([torch.block_diag(*Lam[i].reshape(-1, c, c)) for i in range(n)])


def ggn(J: Tensor, Lam: Tensor) -> Tensor:
    """H [p p] = Σ_n J_nᵀ Λ_n J_n for Λ [n r r]."""
    H = J.new_zeros(J.shape[-1], J.shape[-1])
    for J_n, Lam_n in zip(J, Lam, strict=True):
        H += J_n.mT @ Lam_n @ J_n
    return H


def softmax_ggn(f: Tensor) -> Tensor:
    """Λ [... c c] = diag(π) − π πᵀ of a categorical likelihood at logits f [... c]."""
    probs = f.softmax(-1)
    return torch.diag_embed(probs) - probs[..., :, None] * probs[..., None, :]


def psd_root(Lam: Tensor) -> Tensor:
    """The symmetric root S [... r r] with S S = Λ."""
    eigenvalues, U = torch.linalg.eigh(Lam)
    return U * eigenvalues.clamp(min=0).sqrt()[..., None, :] @ U.mT


def log_evidence(log_lik: Tensor, theta: Tensor, prior_mean: Tensor | float, prior_prec: Tensor, H: Tensor) -> Tensor:
    """Laplace evidence in nats for a prior N(prior_mean, diag(1/prior_prec)), fully normalised,

        log Z ≈ log p(y|θ*) − ½ (θ*−μ)ᵀP(θ*−μ) + ½ log|P| − ½ log|H + P|,

    where the two (p/2) log 2π of the prior and of the Gaussian integral cancel. Differentiable in every argument.
    """
    d = theta - prior_mean
    fit = log_lik - 0.5 * (prior_prec * d * d).sum()
    return fit + 0.5 * prior_prec.log().sum() - 0.5 * torch.linalg.slogdet(H + torch.diag(prior_prec)).logabsdet


def posterior_cov(H: Tensor, prior_prec: Tensor) -> Tensor:
    """(H + diag(prior_prec))⁻¹ [p p]."""
    return torch.linalg.inv(H + torch.diag(prior_prec))


def function_cov(J_test: Tensor, cov: Tensor) -> Tensor:
    """Marginal covariance of each datum's outputs, J Σ Jᵀ, [n r r]."""
    return torch.stack([J_n @ cov @ J_n.mT for J_n in J_test])


def joint_function_cov(J_test: Tensor, cov: Tensor) -> Tensor:
    """Covariance of all outputs of all data, [n·r n·r]; rows run data first, then outputs."""
    J = J_test.flatten(0, 1)
    return J @ cov @ J.mT


def hessian(
    net: nn.Module,
    x: Any,
    log_lik: Callable[[Tensor], Tensor],
    prior_prec: Tensor | None = None,
    names: Iterable[str] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """[p p] Hessian of −log p(y|θ) − log p(θ) at the net's weights, by double backward, one row at a time.

    `log_lik` maps the whole batch's raw output to the scalar log p(y|f). Attention runs on its plain (MATH) kernel, the only one that
    can be differentiated twice. Not for nets with `weight_norm`: torch 2.14's second derivative of `_weight_norm` is wrong
    (gradgradcheck fails, the Hessian is not even symmetric); use `finite_difference_hessian` there.
    """
    q = list(weights(net, names).values())
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        gradient = _flat_grad(-log_lik(call(net, _copy(x))), q, create_graph=True)
        H = torch.stack([_flat_grad(entry, q) for entry in gradient]).double()
    H = H if mask is None else H[mask][:, mask]
    return H if prior_prec is None else H + torch.diag(prior_prec)


def finite_difference_hessian(
    net: nn.Module,
    x: Any,
    log_lik: Callable[[Tensor], Tensor],
    prior_prec: Tensor | None = None,
    names: Iterable[str] | None = None,
    mask: Tensor | None = None,
    step: float = 1e-6,
) -> Tensor:
    """As `hessian`, by central differences of the gradient: only first derivatives, good to about 1e-8."""
    net = copy.deepcopy(net)
    q = list(weights(net, names).values())
    columns = []
    for w in q:
        for j in range(w.numel()):
            entry = w.data.view(-1)[j : j + 1]
            kept = entry.clone()
            sides = []
            for shift in (step, -step):
                entry.copy_(kept + shift)
                with torch.enable_grad():
                    sides.append(_flat_grad(-log_lik(call(net, _copy(x))), q).double())
            entry.copy_(kept)
            columns.append((sides[0] - sides[1]) / (2 * step))
    H = torch.stack(columns, -1)
    H = H if mask is None else H[mask][:, mask]
    return H if prior_prec is None else H + torch.diag(prior_prec)


def _copy(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.clone()
    return {k: _copy(v) for k, v in x.items()} if isinstance(x, Mapping) else tuple(_copy(v) for v in x)


# ---------------------------------------------------------------------------------------------------------- Kronecker factors
# One Linear (or ungrouped Conv2d, by unfolding) layer that is used once in a forward. With its bias folded in,
# W̃ = [W | b] is o × (i+1) and meets ã = (a, 1). At position t (time step, pixel; one position when no weight is shared)
#
#     J_k = Σ_t δ_tk ⊗ ã_t        (row-major in W̃: entry (o, i) is Σ_t δ_tk[o] ã_t[i]),        δ_tk = Σ_j ∂f_j/∂(pre-activation_t) S_jk
#
# and the exact block is H = Σ_n Σ_k J_nk J_nkᵀ. Eschenhagen et al. (2023), "Kronecker-factored approximate curvature for modern
# neural network architectures", sections 3.2 and 3.3, in bayesgn's unnormalised convention (sums over data, not means):
#
#     expand:  A = Σ_n Σ_t ã_nt ã_ntᵀ,   B = Σ_n Σ_t Σ_k δ_ntk δ_ntkᵀ,     H ≈ A ⊗ B / (n t)      every position taken for a datum
#     reduce:  A = Σ_n ā_n ā_nᵀ,         B = Σ_n Σ_k δ̄_nk δ̄_nkᵀ,           H ≈ A ⊗ B / n          ā = mean over t of ã,  δ̄ = sum over t of δ
#
# One position: both are KFAC, A ⊗ B / n. In row-major W̃ the matrix "A ⊗ B" of the papers (column-major) is torch.kron(B, A).
# Exact cases: expand for a deep linear net that treats each position alone, under square loss; reduce for a linear layer followed by
# mean or sum pooling and linear layers, square loss; either for n = t = 1.


class LayerFactors(NamedTuple):
    """Compact factors of one layer's Jacobian.

    Attributes:
        a: inputs with the trailing 1 of the bias where the layer has one, [n t i(+1)].
        delta: derivatives of each of the r outputs by the pre-activations, [n r t o].
    """

    a: Tensor
    delta: Tensor


def layer_factors(net: nn.Module, x: Any, layer: str, rows: Callable[[Tensor], Tensor] | None = None) -> LayerFactors:
    """a and δ of the layer called `layer`, datum by datum; the layer must run exactly once per forward."""
    module = net.get_submodule(layer)
    caught: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, output: caught.append((args[0].detach().clone(), output)))
    a, delta = [], []
    try:
        with torch.enable_grad():
            for n in range(size(x)):
                caught.clear()
                f = _outputs(net, datum(x, n), rows)[0]
                if len(caught) != 1:
                    raise ValueError(
                        f"layer {layer!r} ran {len(caught)} times in one forward; this oracle needs exactly one"
                    )
                z, h = caught[0]
                grads = [torch.autograd.grad(entry, h, retain_graph=True, allow_unused=True)[0] for entry in f]
                grads = torch.cat(
                    [torch.zeros_like(h) if g is None else g for g in grads]
                )  # [r ...], the batch axis was one
                a.append(_positions_in(module, z)[0])
                delta.append(_positions_out(module, grads))
    finally:
        handle.remove()
    a = torch.stack(a).double()
    if module.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    return LayerFactors(a, torch.stack(delta).double())


def _positions_in(module: nn.Module, z: Tensor) -> Tensor:
    """A layer's input as [n t i]."""
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise NotImplementedError("the Kronecker oracle covers Conv2d with groups=1 and numeric zero padding")
        return F.unfold(z, module.kernel_size, module.dilation, module.padding, module.stride).mT
    return z.reshape(len(z), -1, z.shape[-1])


def _positions_out(module: nn.Module, h: Tensor) -> Tensor:
    """A layer's output (or its gradient) as [n t o]."""
    return h.flatten(2).mT if isinstance(module, nn.Conv2d) else h.reshape(len(h), -1, h.shape[-1])


def layer_jacobian(factors: LayerFactors) -> Tensor:
    """[n r o·(i+1)] in row-major W̃ order: Σ_t δ_t ⊗ ã_t."""
    return torch.einsum("nrto,nti->nroi", factors.delta, factors.a).flatten(2)


def homogeneous_order(weight: Tensor, bias: bool) -> Tensor:
    """Indices that take a layer's columns from `named_parameters` order, (weight | bias), to row-major W̃ = [W | b].

    `H_homogeneous = H[order][:, order]` and `J_homogeneous = J[..., order]`. A conv weight counts as its [o, i·kh·kw] matrix.
    """
    o, i = weight.shape[0], weight[0].numel()
    W = torch.arange(o * i).view(o, i)
    return (torch.cat([W, o * i + torch.arange(o)[:, None]], 1) if bias else W).flatten()


class KronFactors(NamedTuple):
    """A [i+1 i+1], B [o o] and the number the product A ⊗ B is divided by."""

    A: Tensor
    B: Tensor
    count: int

    def matrix(self) -> Tensor:
        """The block of H it stands for, in row-major W̃ order."""
        return torch.kron(self.B, self.A) / self.count


def kron_expand(factors: LayerFactors, S: Tensor) -> KronFactors:
    """A = Σ_nt ã ãᵀ, B = Σ_ntk δ δᵀ, H ≈ A ⊗ B / (n t), for a root S [n r k] of Λ."""
    a, delta = factors.a, torch.einsum("nrto,nrk->nkto", factors.delta, S)
    A, B = 0.0, 0.0
    for n in range(len(a)):
        for t in range(a.shape[1]):
            A = A + torch.outer(a[n, t], a[n, t])
            B = B + sum(torch.outer(d, d) for d in delta[n, :, t])
    return KronFactors(A, B, a.shape[0] * a.shape[1])


def kron_reduce(factors: LayerFactors, S: Tensor) -> KronFactors:
    """A = Σ_n ā āᵀ with ā the mean over t, B = Σ_nk δ̄ δ̄ᵀ with δ̄ the sum over t, H ≈ A ⊗ B / n."""
    a, delta = factors.a.mean(1), torch.einsum("nrto,nrk->nkto", factors.delta, S).sum(2)
    A, B = 0.0, 0.0
    for n in range(len(a)):
        A = A + torch.outer(a[n], a[n])
        B = B + sum(torch.outer(d, d) for d in delta[n])
    return KronFactors(A, B, len(a))


def kron_ggn(
    net: nn.Module,
    x: Any,
    S: Tensor,
    layers: Iterable[str],
    variant: Callable[[LayerFactors, Tensor], KronFactors] = kron_expand,
    rows: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Block-diagonal Kronecker approximation of H [p p] over the whole net, in `named_parameters` order.

    Covers the named layers; the rows and columns of every other weight are left at zero.
    """
    start, at = 0, {}
    for name, w in weights(net).items():
        at[name] = torch.arange(start, start + w.numel())
        start += w.numel()
    H = torch.zeros(start, start, dtype=torch.float64)
    for layer in layers:
        module = net.get_submodule(layer)
        has_bias = module.bias is not None
        order = homogeneous_order(module.weight, has_bias)
        columns = torch.cat([at[f"{layer}.weight"], at[f"{layer}.bias"]] if has_bias else [at[f"{layer}.weight"]])[
            order
        ]
        H[columns[:, None], columns] = variant(layer_factors(net, x, layer, rows), S).matrix()
    return H


# ----------------------------------------------------------------------------------------------------- Bayesian linear regression


class LinearRegression(NamedTuple):
    """Exact posterior N(mean [p], cov [p p]) and log p(y) of y = Φ w + ε."""

    mean: Tensor
    cov: Tensor
    log_evidence: Tensor

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [m] and covariance [m m] of the noise-free Φ* w."""
        return features @ self.mean, features @ self.cov @ features.mT


def linear_regression(
    features: Tensor, y: Tensor, noise: Tensor | float, prior_prec: Tensor | float, prior_mean: Tensor | float = 0.0
) -> LinearRegression:
    """Conjugate Bayesian linear regression, y [n] = Φ [n p] w + N(0, noise), w ~ N(prior_mean, 1/prior_prec).

    The posterior comes in the data × data (Kalman gain) form and the evidence as log N(y; Φμ, Φ P⁻¹ Φᵀ + noise), so neither shares
    a formula with a Laplace approximation in weight space, which must agree with both. `noise` is a variance, scalar or [n]; for
    several outputs pass Φ [n·c p], y [n·c].
    """
    n, p = features.shape
    noise = torch.as_tensor(noise, dtype=torch.float64).expand(n)
    prior_cov = torch.diag(1 / torch.as_tensor(prior_prec, dtype=torch.float64).expand(p))
    prior_mean = torch.as_tensor(prior_mean, dtype=torch.float64).expand(p)
    C = features @ prior_cov @ features.mT + torch.diag(noise)
    residual = y - features @ prior_mean
    gain = prior_cov @ features.mT @ torch.linalg.inv(C)
    log_evidence = -0.5 * (
        residual @ torch.linalg.solve(C, residual) + torch.linalg.slogdet(C).logabsdet + n * math.log(2 * math.pi)
    )
    return LinearRegression(prior_mean + gain @ residual, prior_cov - gain @ features @ prior_cov, log_evidence)
