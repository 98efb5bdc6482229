"""Muon with AdamW, the inner optimizer of Gauss-Newton steps at scale, and by itself a strong first-order optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from bayesgn._parameters import unwrap

# p(σ) = aσ + bσ³ + cσ⁵ drives singular values from (0, 1] to about one (0.7 to 1.2) in five turns.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalized(G: Tensor, turns: int = 5) -> Tensor:
    """About U Vᵀ for each G = U Σ Vᵀ [... m n]: every singular value moved towards one, by matrix products alone.

        X ← aX + bXXᵀX + c(XXᵀ)²X,     X₀ = G / ‖G‖

    Example:
        >>> U = orthogonalized(torch.diag(torch.tensor([3.0, 0.5])))
        >>> bool(((torch.linalg.svdvals(U) - 1).abs() < 0.4).all())
        True

    Source: Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks".
    """
    a, b, c = QUINTIC
    X = G.mT if G.shape[-2] > G.shape[-1] else G  # the smaller Gram matrix
    X = X / X.flatten(-2).norm(dim=-1).clamp_min(torch.finfo(G.dtype).tiny ** 0.5)[..., None, None]
    for _ in range(turns):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices of hidden layers, AdamW for all other weights.

        B ← μ B + G,   W ← (1 − lr λ) W − lr √max(1, m/n) · orthogonalized(G + μ B)       hidden matrices [m n]
        AdamW with adam_lr                                                                embeddings, head, norms, biases

    ``torch.optim.Muon`` (from torch 2.9 on) takes matrices alone and multiplies them in bfloat16, which costs a CPU without such arithmetic several
    training steps; here products are made in the weights' dtype, of bfloat16 only on CUDA. Kernels of convolutions count as matrices [out, rest].

    Args:
        hidden: weights for Muon, two-dimensional or more.
        other: weights for AdamW.
        lr, momentum: of Muon.
        adam_lr, betas, eps: of AdamW.
        weight_decay: λ, decoupled, of both.

    Raises:
        ValueError: for a hidden weight that is no matrix, or no weights at all.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> opt = MuonAdamW([net[0].weight, net[2].weight], [net[0].bias, net[2].bias, *net[4].parameters()], lr=0.02)
        >>> x = torch.linspace(-1, 1, 32).reshape(16, 2)
        >>> before = net[2].weight.detach().clone()
        >>> net(x).square().mean().backward(); opt.step()
        >>> bool((torch.linalg.matrix_norm(before - net[2].weight, 2) / 0.02 - 1).abs() < 0.4)  # singular values of about lr
        True

    Source: Jordan et al. (2024), "Muon"; Loshchilov and Hutter (2019), "Decoupled weight decay regularization".
    """

    def __init__(
        self,
        hidden: Iterable[Tensor],
        other: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        adam_lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        hidden, other = list(hidden), list(other)
        flat = next((p for p in hidden if p.dim() < 2), None)
        if flat is not None:
            raise ValueError(f"MuonAdamW: a hidden weight has shape {list(flat.shape)}; only matrices [m n] can be orthogonalised: pass it as other.")
        groups = [{"params": hidden, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}]
        groups += [{"params": other, "lr": adam_lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}]
        super().__init__([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step; the loss of the closure, where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"]) if moved and group["weight_decay"] else None
            self._muon(group, moved) if "momentum" in group else self._adam(group, moved)
        return loss

    def _muon(self, group: dict, moved: list[Tensor]) -> None:
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p in moved:
            state, G = self.state[p], p.grad
            assert G is not None
            B = state.setdefault("momentum", torch.zeros_like(p)).mul_(group["momentum"]).add_(G)
            alike.setdefault(p.shape, []).append((p, torch.add(G, B, alpha=group["momentum"]).flatten(1)))
        for found in alike.values():  # matrices of one shape in one batched product
            G = torch.stack([G for _, G in found])
            m, n = G.shape[-2:]
            for (p, _), U in zip(found, orthogonalized(G.bfloat16() if G.is_cuda else G), strict=True):
                p.add_(U.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * max(1.0, m / n) ** 0.5)

    def _adam(self, group: dict, moved: list[Tensor]) -> None:
        β1, β2 = group["betas"]
        for p in moved:
            state, g = self.state[p], p.grad
            assert g is not None
            if not state:
                state.update(step=torch.zeros(()), mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            t = float(state["step"])
            state["mean"].lerp_(g, 1 - β1)
            state["square"].mul_(β2).addcmul_(g, g, value=1 - β2)
            p.addcdiv_(state["mean"], state["square"].div(1 - β2**t).sqrt_().add_(group["eps"]), value=-group["lr"] / (1 - β1**t))


class MuonRecipe:
    """A recipe for :class:`MuonAdamW`: it remembers which weights of a net are hidden matrices, and builds the optimizer for those weights or for
    copies of them.

    Hidden are all weights of two dimensions or more but those of embeddings and of the last layer, as it is registered.

    Args:
        net: whose weights (those that require grad) will be trained.
        hidden: names of the hidden matrices, where the choice should be another.
        options: of :class:`MuonAdamW`.

    Raises:
        ValueError: for names that the net does not have; when called, for a number of weights that differs from the net's.

    Example:
        >>> net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5))
        >>> recipe = MuonRecipe(net, lr=0.01)
        >>> recipe.hidden
        ('1.weight',)
        >>> type(recipe(list(net.parameters()))).__name__
        'MuonAdamW'
    """

    def __init__(self, net: nn.Module, hidden: Sequence[str] | None = None, **options) -> None:
        net = unwrap(net)
        own = {name: p for name, p in net.named_parameters() if p.requires_grad}
        if hidden is None:
            embeddings = {id(p) for m in net.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters(recurse=False)}
            matrices = [(name, p) for name, p in net.named_parameters(remove_duplicate=False) if p.dim() >= 2]
            head = id(matrices[-1][1]) if matrices else None  # (a head tied to an embedding is one of those)
            hidden = [name for name, p in own.items() if p.dim() >= 2 and id(p) not in embeddings and id(p) != head]
        unknown = [name for name in hidden if name not in own]
        if unknown:
            raise ValueError(f"MuonRecipe: the weights {unknown} are not in the net (or frozen); it trains {list(own)}.")
        self.names, self.hidden, self.options = tuple(own), tuple(hidden), options

    def __call__(self, params: Sequence[Tensor]) -> MuonAdamW:
        if len(params) != len(self.names):
            raise ValueError(
                f"MuonRecipe: got {len(params)} weights but the net has {len(self.names)} that require grad; was a layer frozen in between?"
            )
        named = dict(zip(self.names, params, strict=True))
        chosen = set(self.hidden)
        return MuonAdamW([named[n] for n in self.hidden], [p for n, p in named.items() if n not in chosen], **self.options)
