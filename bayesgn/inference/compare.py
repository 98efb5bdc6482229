"""Comparison: MAP, MAP + temperature and the posterior side by side on held-out data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesgn import _data, metrics
from bayesgn.inference.temperature import fit_temperature
from bayesgn.models.network_posterior import NetworkPosterior

MARGIN = 1e-3  # of NLL or ECE: a smaller loss is not worth a warning
LARGER_IS_BETTER = ("accuracy", "auroc_ood")
NEUTRAL = ("n", "coverage")


@dataclass
class Comparison:
    """Scores of several predictives on the same held-out data. ``print(comparison)`` is a table.

    Attributes:
        rows: {name: {score: value}}, MAP first; the scores are those of :func:`bayesgn.metrics.summary`.
        temperature: T of the row "MAP + temperature" (None for real targets).
        losses: in words, where the posterior is worse than MAP or MAP + temperature.
        note: on which data T was fitted and the scores were taken.
    """

    rows: dict[str, dict[str, float]]
    temperature: float | None = None
    losses: list[str] = field(default_factory=list)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for JSON."""
        return {"rows": self.rows, "temperature": self.temperature, "losses": self.losses, "note": self.note}

    def __str__(self) -> str:
        columns = [c for c in next(iter(self.rows.values())) if c != "n"]
        width = max(len(name) for name in self.rows)
        titles = {"nll": "NLL", "ece": "ECE", "brier": "Brier", "rmse": "RMSE", "crps": "CRPS", "auroc_ood": "AUROC-OOD"}
        lines = [" " * width + "".join(f"{titles.get(c, c):>11}" for c in columns)]
        best = {}
        for c in columns:
            values = [row[c] for row in self.rows.values()]
            best[c] = None if c in NEUTRAL else max(values) if c in LARGER_IS_BETTER else min(values)
        for name, row in self.rows.items():
            cells = (f"{row[c]:>10.4f}" + ("*" if best[c] is not None and row[c] == best[c] else " ") for c in columns)
            lines.append(f"{name:<{width}}" + "".join(cells).rstrip())
        return "\n".join([*lines, self.note, *self.losses])

    __repr__ = __str__


def compare(
    posterior: NetworkPosterior,
    data: Any,
    ood: Any = None,
    temperature_data: Any = None,
    samples: int = 0,
    generator: torch.Generator | None = None,
    warn: bool = True,
) -> Comparison:
    """How the posterior predicts held-out data, beside the plain net (MAP) and MAP + temperature.

    A temperature costs one number and often does as well: the posterior should be seen beside it. A warning says where the posterior
    loses to either in NLL or ECE (by more than 0.001).

    Args:
        posterior: from ``bgn.laplace``, tuned or not.
        data: held-out data, other than ``tune`` saw, in any form that ``laplace`` takes. Unless ``temperature_data`` is given,
            for classes every second datum goes into the fit of T and *all* rows are scored on the others, so that no
            row has seen what it is scored on.
        ood: inputs from elsewhere (a tensor, a loader, pairs): adds the AUROC of telling them from ``data``, by the entropy of the
            predictive for classes and by its variance for real targets.
        temperature_data: other held-out data for the fit of T; everything is then scored on all of ``data``.
        samples: add a row for the weight-space predictive with so many samples.
        generator: of these.
        warn: whether to warn.

    Returns:
        A :class:`Comparison`: printable, with ``.rows`` and ``.to_dict()``. NLL is in nats a datum (for densities: of y's unit).

    Raises:
        ValueError: for data without two rows, or labels and shapes that cannot be right.

    Example:
        >>> import torch, bayesgn as bgn
        >>> x = torch.linspace(-1, 1, 40)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> posterior = bgn.laplace(bgn.models.Network(net), bgn.likelihoods.Gaussian(0.1), (x[::2], y[::2]))
        >>> list(bgn.compare(posterior, (x[1::2], y[1::2]), warn=False).rows)
        ['MAP', 'posterior']

    Source: Guo et al. (2017), section 4.2; Daxberger et al. (2021), section 4, for the protocol.
    """
    likelihood, ignore = posterior.likelihood, getattr(posterior.likelihood, "ignore_index", None)
    parts = _predictions(posterior, data, samples, generator)
    classes = metrics.is_classification(likelihood.conditional(parts[0].mean))
    seen = sum(len(p.mean) for p in parts)
    tempered, note = None, f"{seen} data"
    if classes:
        if temperature_data is None:
            if seen < 2:
                raise ValueError(f"data hold {seen} datum; half of them fit the temperature: pass more, or temperature_data=.")
            fitting, parts = _halves(parts)
            note = f"scored on {seen - seen // 2} data; the temperature was fitted on the other {seen // 2}"
        else:
            fitting = _predictions(posterior, temperature_data, 0, None, covariance=False)
            note = f"scored on {seen} data; the temperature was fitted on {sum(len(p.mean) for p in fitting)} others"
        tempered = fit_temperature(likelihood, torch.cat([p.mean for p in fitting]), torch.cat([p.y for p in fitting if p.y is not None]))
    views = {"MAP": lambda p: likelihood.conditional(p.mean)}
    if tempered is not None:
        views["MAP + temperature"] = lambda p: tempered.conditional(p.mean)
    views["posterior"] = lambda p: likelihood.predict(p.mean, p.cov)
    if samples:
        views["posterior, weight space"] = lambda p: likelihood(p.draws)
    outside = None if ood is None else _predictions(posterior, _Inputs(ood), samples, generator)
    rows = {}
    with torch.no_grad():
        for name, view in views.items():
            pairs = ((view(p), likelihood.targets(p.mean, p.y)) for p in parts)
            away = None if outside is None else [view(p) for p in outside]
            rows[name] = metrics.summary(pairs, away, ignore_index=ignore if classes else None)
    losses = _losses(rows)
    if losses and warn:
        warnings.warn("compare: " + " ".join(losses), stacklevel=2)
    return Comparison(rows, None if tempered is None else tempered.temperature, losses, note)


def _losses(rows: dict[str, dict[str, float]]) -> list[str]:
    out = []
    for name in [r for r in rows if r.startswith("MAP")]:
        worse = [
            f"{c.upper()} {rows['posterior'][c]:.4f} > {rows[name][c]:.4f}"
            for c in ("nll", "ece")
            if c in rows[name] and not rows["posterior"][c] <= rows[name][c] + MARGIN
        ]
        if worse:
            advice = "bgn.tune(posterior, val_data) makes it no worse than MAP." if name == "MAP" else "A temperature alone does better here."
            out.append(f"The posterior loses to {name}: {', '.join(worse)}. {advice}")
    return out


@dataclass
class _Part:
    """One batch: mean [n *positions c], cov [n *positions c c], draws [s n *positions c] and y."""

    mean: Tensor
    cov: Tensor | None
    draws: Tensor | None
    y: Tensor | None

    def rows(self, keep: Tensor) -> _Part:
        cov = None if self.cov is None else self.cov[keep]
        return _Part(self.mean[keep], cov, None if self.draws is None else self.draws[:, keep], None if self.y is None else self.y[keep])


def _predictions(posterior: NetworkPosterior, data: Any, samples: int, generator, covariance: bool = True) -> list[_Part]:
    parts = []
    if samples and generator is None:
        generator = torch.Generator().manual_seed(0)
    walk = data if isinstance(data, _Inputs) else _data.batches(data)
    with torch.no_grad():
        for x, y in walk:
            f = posterior(x)
            if covariance:
                mean, cov = f.marginals()
            else:
                mean, cov = f.mean.reshape(-1, *f.positions, f.mean.shape[-1]), None
            # A clone for each batch: the same weights for all of them.
            draws = posterior.sample_outputs(x, samples, generator.clone_state()) if samples else None
            if y is not None:
                y = y.to(mean.device)
                posterior.likelihood.validate(mean, y)
            parts.append(_Part(mean, cov, draws, y))
    if not parts:
        raise ValueError("the loader gave no batch (0 data); there is nothing to compare.")
    return parts


def _halves(parts: list[_Part]) -> tuple[list[_Part], list[_Part]]:
    """Every second datum, counted over batches, and the others."""
    odd, even, start = [], [], 0
    for p in parts:
        at = (torch.arange(start, start + len(p.mean)) % 2 == 1).to(p.mean.device)
        start += len(p.mean)
        for side, keep in ((odd, at), (even, ~at)):
            if bool(keep.any()):
                side.append(p.rows(keep))
    return odd, even


class _Inputs:
    """Batches of inputs without targets: a tensor, inputs in a mapping, or batches of inputs or of (inputs, targets)."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Any, None]]:
        if isinstance(self.data, Tensor):
            yield self.data, None
            return
        if isinstance(self.data, dict):
            yield {k: v for k, v in self.data.items() if k not in _data.LABEL_KEYS}, None
            return
        if isinstance(self.data, list) and all(isinstance(x, Tensor) for x in self.data):
            yield from ((x, None) for x in self.data)  # a *tuple* of two tensors would be (inputs, targets)
            return
        try:
            for x, _ in _data.batches(self.data):
                yield x, None
        except TypeError:  # batches without targets
            for x in self.data:
                yield (x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x), None


