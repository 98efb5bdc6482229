"""A network as a Gaussian process, drawn: its kernel over the data, and what the process says of each datum.

Data stand in the order of their classes, as in Khan, Immer, Abedi and Korzepa (2019), "Approximate inference turns deep networks into Gaussian
processes", figures 1 and 3: what the net has learnt to tell apart shows as blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesgn._canvas import CYCLE, GREY, array, axes, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def kernel_matrix(
    K: Any,
    y: Tensor | None = None,
    outputs: int = 1,
    names: Sequence[str] | None = None,
    label: str | None = None,
    quantile: float = 0.99,
    ax: Axes | None = None,
) -> Axes:
    """A kernel's matrix over data, sorted by class. Blue is positive, red negative (below a twentieth of the scale), white is nothing in common.

    Args:
        K: [n c, n c], data first, then outputs: a tensor, or what ``kernel(x)`` gives.
        y: the class of each datum [n]; the order stays as it is without.
        outputs: c. Of several outputs the sum of their own kernels is drawn, Σ_j K_ij,i'j.
        names: of the classes, in order.
        label: of the colour bar.
        quantile: of all |K_ij| at which the colours end; the diagonal stands out of most kernels.

    Example:
        >>> x = torch.linspace(0, 1, 6)[:, None]
        >>> ax = kernel_matrix(x @ x.T, torch.tensor([1, 0, 1, 0, 1, 0]))
        >>> ax.images[0].get_array().shape, [text.get_text() for text in ax.get_xticklabels()]
        ((6, 6), ['0', '1'])
    """
    K = torch.as_tensor(K.to_dense() if hasattr(K, "to_dense") else K).detach()
    if K.ndim != 2 or K.shape[0] != K.shape[1] or K.shape[0] % outputs:
        raise ValueError(f"K has shape {list(K.shape)}; expected a square matrix [n c, n c] of n data and c = outputs = {outputs}")
    if outputs > 1:
        K = K.unflatten(0, (-1, outputs)).unflatten(2, (-1, outputs)).diagonal(dim1=1, dim2=3).sum(-1)
        label = "sum of kernels" if label is None else label
    order, _ = _by_class(y, len(K))
    K = K[order.to(K.device)][:, order.to(K.device)]
    ax = axes(ax, (4.6, 4.0))
    end = float(_quantile(K.abs(), quantile)) or 1.0
    signed = float(K.min()) < -0.05 * end  # (less would hardly be seen, and takes half of the colours)
    image = ax.imshow(array(K), cmap="RdBu" if signed else "Blues", vmin=-end if signed else 0.0, vmax=end, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="kernel" if label is None else label, extend="both" if signed else "max", shrink=0.85)
    for set_ticks, line in ((ax.set_xticks, ax.axvline), (ax.set_yticks, ax.axhline)):
        _mark(y, names, set_ticks, line)
    ax.set_aspect("equal")
    return _unboxed(ax, "data by class" if y is not None else "data", "data by class" if y is not None else "data")


def gp_image(
    values: Tensor,
    y: Tensor | None = None,
    names: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    label: str = "posterior mean",
    ax: Axes | None = None,
) -> Axes:
    """One number for each datum and output as an image: the mean of a Gaussian process, or its standard deviation, data sorted by class.

    Args:
        values: [n c], such as ``posterior(x).mean`` or ``posterior(x).stddev``.
        y: the class of each datum [n]; the order stays as it is without.
        names, outputs: of the classes and of the outputs (the same, for a classifier).
        label: of the colour bar, with the unit.

    Example:
        >>> y = torch.tensor([2, 0, 1])
        >>> gp_image(torch.eye(3)[y], y).images[0].get_array().tolist()  # a row for each output, classes from left to right
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    values = torch.as_tensor(values).detach()
    if values.ndim != 2:
        raise ValueError(f"values have shape {list(values.shape)}; expected [n c], a number for each datum and output; for one output see gp_bars")
    order, _ = _by_class(y, len(values))
    values = values[order.to(values.device)]
    ax = axes(ax, (6.0, 2.4))
    signed = bool((values < 0).any())
    end = float(values.abs().max()) or 1.0
    image = ax.imshow(
        array(values.T), aspect="auto", interpolation="nearest", cmap="RdBu" if signed else "cividis", vmin=-end if signed else None,
        vmax=end if signed else None,
    )  # fmt: skip
    ax.figure.colorbar(image, ax=ax, label=label)
    _mark(y, names, ax.set_xticks, ax.axvline)
    shown = [str(j) for j in range(values.shape[1])] if outputs is None else list(outputs)
    if len(shown) != values.shape[1]:
        raise ValueError(f"{len(shown)} names for {values.shape[1]} outputs")
    ax.set_yticks(range(len(shown)), shown)
    return _unboxed(ax, "data by class" if y is not None else "data", "output")


def gp_bars(
    f: Distribution,
    y: Tensor | None = None,
    names: Sequence[str] | None = None,
    ylabel: str = "f",
    ax: Axes | None = None,
) -> Axes:
    """The mean of a Gaussian process of one output at each datum, with two standard deviations about it: by class, and within it by mean.

    Args:
        f: [n] or [n 1], as ``posterior(x)`` gives it.
        y: the class of each datum [n].
        names: of the classes, in order.

    Example:
        >>> f = torch.distributions.Normal(torch.tensor([3.0, 1.0, 2.0]), torch.ones(3))
        >>> gp_bars(f, torch.tensor([1, 0, 0])).collections[0].get_segments()[1].tolist()  # the second of class 0: 2 ± 2
        [[1.0, 0.0], [1.0, 4.0]]
    """
    mean, std = f.mean.detach().flatten().cpu(), f.variance.detach().clamp_min(0).sqrt().flatten().cpu()
    if f.mean.ndim > 1 and f.mean.shape[-1] != 1:
        raise ValueError(f"f has shape {list(f.mean.shape)}; expected one output, [n] or [n 1]; gp_image draws several")
    labels = torch.zeros(len(mean)) if y is None else torch.as_tensor(y).detach().flatten().cpu()
    _by_class(y, len(mean))
    first = mean.argsort()
    order = first[labels[first].argsort(stable=True)]
    ax = axes(ax, (6.0, 3.0))
    at, mean, std, labels = torch.arange(len(mean)), mean[order], std[order], labels[order]
    for i, k in enumerate(labels.unique()):
        mine, colour = labels == k, CYCLE[i % len(CYCLE)]
        ax.vlines(array(at[mine]), array((mean - 2 * std)[mine]), array((mean + 2 * std)[mine]), color=colour, alpha=0.35, linewidth=1.2)
        ax.plot(array(at[mine]), array(mean[mine]), ".", color=colour, markersize=3)
    ax.axhline(0.0, color=GREY, linewidth=0.6)
    _mark(y, names, ax.set_xticks, ax.axvline)
    return finish(ax, "data by class" if y is not None else "data", ylabel)


# -- the order of classes ------------------------------------------------------------------------------------------------------------------------


def _by_class(y: Tensor | None, n: int) -> tuple[Tensor, Tensor | None]:
    """The data in the order of their classes, and these in that order."""
    if y is None:
        return torch.arange(n), None
    y = torch.as_tensor(y).detach().flatten().cpu()
    if len(y) != n:
        raise ValueError(f"y has {len(y)} classes for {n} data; expected one for each")
    order = y.argsort(stable=True)
    return order, y[order]


def _mark(y: Tensor | None, names: Sequence[str] | None, set_ticks: Any, line: Any) -> None:
    """A line between classes, and the name of each in its middle."""
    if y is None:
        return
    classes, counts = torch.as_tensor(y).detach().flatten().cpu().unique(return_counts=True)
    shown = [f"{k:g}" for k in classes.tolist()] if names is None else list(names)
    if len(shown) != len(classes):
        raise ValueError(f"{len(shown)} names for {len(classes)} classes")
    ends = counts.cumsum(0) - 0.5
    for end in ends[:-1].tolist():
        line(end, color="black", linewidth=0.5)
    set_ticks((ends - counts / 2).tolist(), shown)


def _quantile(values: Tensor, q: float) -> Tensor:
    """(torch's own takes 16 million numbers at most.)"""
    flat = values.flatten().double()
    return flat.kthvalue(max(1, min(len(flat), round(q * len(flat))))).values


def _unboxed(ax: Axes, xlabel: str, ylabel: str) -> Axes:
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.tick_params(length=0)
    return ax
