"""Jδ without J: how a net's outputs move when its weights move along δ."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayesgn._extras import load_forward_mode

Weights = Mapping[str, Tensor]


@contextlib.contextmanager
def differentiable_attention() -> Iterator[None]:
    """nn.MultiheadAttention and nn.TransformerEncoderLayer by their ordinary operations: the fused ones have no forward-mode derivative, and
    round otherwise than the pass that carries the graph."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class TangentProduct(ABC):
    """A way to Jδ = d/dε f(θ + εδ) at ε = 0."""

    @abstractmethod
    def __call__(self, function: Callable[[Weights], Tensor], weights: Weights, f: Tensor, displacement: Weights) -> Tensor:
        """Jδ [like f], without a graph.

        Args:
            function: weights by name ↦ f.
            weights: θ, all that are trained.
            f: function(θ).
            displacement: δ by name; the weights that are not in it stay where they are.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ForwardMode(TangentProduct):
    """Jδ by dual numbers: exact to rounding in any dtype.

        f(θ + ε δ) = f(θ) + ε Jδ   with ε² = 0

    It costs about three forward passes, so that an inner step is 2 to 3 training steps. Attention runs by its math kernel; fused kernels and
    custom autograd functions without `jvp` have no forward mode.

    Raises:
        NotImplementedError: for a net with such an operation.

    Example:
        >>> w, δ = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.5])
        >>> ForwardMode()(lambda weights: weights["w"] ** 2, {"w": w}, w**2, {"w": δ})
        tensor([4., 3.])
    """

    @torch.no_grad()
    def __call__(self, function, weights, f, displacement):
        load_forward_mode()
        with forward_ad.dual_level(), differentiable_attention(), sdpa_kernel(SDPBackend.MATH):
            duals = {n: forward_ad.make_dual(p.detach(), displacement[n]) if n in displacement else p.detach() for n, p in weights.items()}
            try:
                tangent = forward_ad.unpack_dual(function(duals)).tangent
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"an operation of the net has no forward mode ({str(error).splitlines()[0]}); pass products=FiniteDifference(), which needs none."
                ) from error
        return torch.zeros_like(f) if tangent is None else tangent  # None: f does not depend on what moved


class FiniteDifference(TangentProduct):
    """Jδ by one more forward pass, of any kind: fused attention, compiled, sharded.

        Jδ ≈ (f(θ + εδ) − f(θ)) / ε,    ε = step · rms(θ) / rms(δ)

    An inner step is then 1.3 to 1.5 training steps. On a small GPT in float32 Jδ is right to 1e-3 (rounding and bending are then alike), which is
    far below the noise of a micro-batch; in float64 to about 1e-7.

    Args:
        step: relative to the weights' root mean square; None takes √(machine epsilon) of their dtype.

    Raises:
        ValueError: for a step that is not positive.
        TypeError: for weights in 16 bits, where no step is both small and seen.

    Example:
        >>> w, δ = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
        >>> FiniteDifference()(lambda weights: weights["w"] ** 2, {"w": w}, w**2, {"w": δ})
        tensor([4.0000, 3.0000], dtype=torch.float64)
    """

    def __init__(self, step: float | None = None) -> None:
        if step is not None and not step > 0:
            raise ValueError(f"FiniteDifference: step={step}; expected a positive number, or None for √(machine epsilon).")
        self.step = step

    @torch.no_grad()
    def __call__(self, function, weights, f, displacement):
        dtype = next(iter(displacement.values())).dtype
        if torch.finfo(dtype).bits < 32:
            raise TypeError(f"FiniteDifference: the weights are {dtype}, too coarse for differences; pass products=ForwardMode().")
        length = _rms(list(displacement.values()))
        if length == 0:
            return torch.zeros_like(f)
        step = torch.finfo(dtype).eps ** 0.5 if self.step is None else self.step
        ε = step * _rms(list(weights.values())) / length
        if ε == 0:  # a net of zeros
            ε = step / length
        moved = {n: torch.add(p.detach(), displacement[n], alpha=ε) if n in displacement else p.detach() for n, p in weights.items()}
        with differentiable_attention():
            return (function(moved) - f) / ε

    def __repr__(self) -> str:
        return "FiniteDifference()" if self.step is None else f"FiniteDifference(step={self.step:g})"


def _rms(tensors: list[Tensor]) -> float:
    norms = torch.stack(torch._foreach_norm([t.detach() for t in tensors]))
    return float(norms.norm()) / sum(t.numel() for t in tensors) ** 0.5
