"""Class labels under a softmax."""

from __future__ import annotations

import warnings

import torch
import torch.distributions as td
from torch import Tensor

from .base import Likelihood, _constant, _like
from .predictives import Predictive, Probit

__all__ = ["Categorical"]


class Categorical(Likelihood):
    """y ∈ {0 … c−1} with p(y = k | f) = softmax(f)_k.

    With targets t_k = w_k ((1 − ε) [k = y] + ε / c):   log p = Σ_k t_k log p_k,   ∂ = t − |t| p,   Λ = |t| (diag p − p pᵀ),   |t| = Σ_k t_k,
    for the Hessian and the GGN alike, root S = √|t| (diag √p − p √pᵀ). Class weights w and label smoothing ε make this the (negative)
    loss of torch.nn.CrossEntropyLoss, no longer a normalised density; without y the GGN uses E_{y|f}|t|.

    Args:
        weight: class weights [c], or None for ones.
        label_smoothing: ε in [0, 1).
        ignore_index: the label of a missing row.
        class_dim: where a net's raw output keeps its classes: −1 (language models: [n, time, c]) or 1 (segmentation: [n, c, H, W]).
        predictive: how E[softmax(f)] is computed for a Gaussian f: `Probit()`, `MonteCarlo(samples)`, `LaplaceBridge()`, `DirichletMatching()`.
    Shapes: f [... c], y [...] of any integer dtype (or [... 1]). The predictive is a torch Categorical with batch [...].
    Raises (from `validate`) TypeError for float labels, ValueError for labels out of range; warns where f was already softmaxed.

    >>> likelihood = Categorical()
    >>> f, y = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
    >>> likelihood.log_prob(f, y), likelihood.gradient(f, y)
    (tensor([-0.6931]), tensor([[-0.5000,  0.5000]]))

    Source: Bishop (2006), equations 4.106-4.110; as GGN, Martens (2020), "New insights", section 9.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, label_smoothing: float = 0.0, ignore_index: int = -100, class_dim: int = -1,
                 predictive: Predictive | None = None):
        super().__init__()
        if weight is not None:
            weight = _constant(weight)
            if weight.ndim != 1 or not bool(((weight >= 0) & weight.isfinite()).all()):
                raise ValueError(f"Categorical: weight must be one nonnegative number for each class, [c], but is {weight.tolist()}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Categorical: label_smoothing must lie in [0, 1) but is {label_smoothing}")
        self.register_buffer("weight", weight)
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = int(ignore_index)
        self.class_dim = int(class_dim)
        self.predictive = Probit() if predictive is None else predictive
        if not isinstance(self.predictive, Predictive):
            raise TypeError(f"Categorical: predictive is {predictive!r} but should be an object such as Probit(), MonteCarlo(1024), "
                            "LaplaceBridge() or DirichletMatching()")

    def rows(self, output):
        if output.ndim < 2:
            raise ValueError(f"Categorical: the net's output has shape {list(output.shape)} but needs a dimension of classes, [n, c]; "
                             "for one logit of two classes use Bernoulli()")
        return output.movedim(self.class_dim, -1)

    def target_shape(self, f):
        if f.ndim < 1 or f.shape[-1] < 2:
            raise ValueError(f"Categorical: f has shape {list(f.shape)}, a single class; use Bernoulli() for one logit, one latent for each "
                             f"class (a Gaussian process: one kernel each), or class_dim if the classes are not in dimension {self.class_dim}")
        return f.shape[:-1]

    def targets(self, f, y):
        if self.weight is not None and self.weight.shape[0] != f.shape[-1]:
            raise ValueError(f"Categorical: weight has {self.weight.shape[0]} entries but f has shape {list(f.shape)}, "
                             f"{f.shape[-1]} classes; give one weight for each class (is class_dim={self.class_dim} right?)")
        if y.shape == f.shape and f.ndim > 1 and y.is_floating_point() and f.shape[-1] > 1:
            raise ValueError(f"Categorical: y has the shape of f, {list(y.shape)}; class indices [...] are expected, not probabilities or "
                             "one-hot vectors: use y.argmax(-1), or label_smoothing for soft targets")
        return super().targets(f, y)

    def _validate_targets(self, f, y):
        if y.is_floating_point() or y.is_complex():
            raise TypeError(f"Categorical: y has dtype {y.dtype} (first value {y.flatten()[0].item() if y.numel() else None}) but class labels "
                            "are integers; use y.long(), or Gaussian() if this is a regression")
        c = f.shape[-1]
        y = y.long()
        self._refuse(y, ((y < 0) | (y >= c)) & (y != self.ignore_index), f"f has {c} classes, so labels run from 0 to {c - 1}",
                     f"count classes from 0, or mark rows to leave out by ignore_index={self.ignore_index}")

    def _suspect(self, f):
        c = f.shape[-1]
        if f.numel() and bool((f >= 0).all()) and bool(((f.sum(-1) - 1).abs() < 1e-3).all()):
            warnings.warn("Categorical: every row of f is nonnegative and sums to 1, so the net's output seems to be softmaxed already; "
                          f"logits are expected (first row {[round(v, 4) for v in f.reshape(-1, c)[0].tolist()[:8]]}): "
                          "take the softmax out of the net, or pass its log", stacklevel=3)

    def _observed(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y = self.targets(f, y).long()
        observed = y != self.ignore_index
        return observed, torch.where(observed, y, 0)

    def _plain(self) -> bool:
        return self.weight is None and self.label_smoothing == 0.0

    def _weights(self, f: Tensor) -> Tensor:
        return f.new_ones(f.shape[-1]) if self.weight is None else _like(self.weight, f)

    def _soft_targets(self, f: Tensor, y: Tensor) -> Tensor:
        """t [... c], zero for missing rows."""
        observed, y = self._observed(f, y)
        t = torch.zeros_like(f).scatter(-1, y.unsqueeze(-1), 1 - self.label_smoothing) + self.label_smoothing / f.shape[-1]
        t = t if self.weight is None else t * self._weights(f)
        return torch.where(observed.unsqueeze(-1), t, 0.0)

    def conditional(self, f):
        return td.Categorical(logits=f)

    def log_prob(self, f, y):
        log_p = f.log_softmax(-1)
        if self._plain():
            observed, y = self._observed(f, y)
            return torch.where(observed, log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1), 0.0)
        return (self._soft_targets(f, y) * log_p).sum(-1)

    def gradient(self, f, y):
        t = self._soft_targets(f, y)
        return t - t.sum(-1, keepdim=True) * f.softmax(-1)

    def neg_hessian(self, f, y):
        return self.ggn(f, y)

    def _total(self, f: Tensor, y: Tensor | None) -> Tensor:
        """|t| [...]; its expectation under p(y | f) without y."""
        if self._plain():
            return f.new_ones(f.shape[:-1]) if y is None else self._observed(f, y)[0].to(f.dtype)
        if y is not None:
            return self._soft_targets(f, y).sum(-1)
        w = self._weights(f)
        return (1 - self.label_smoothing) * (f.softmax(-1) @ w) + self.label_smoothing * w.mean()

    def ggn(self, f, y=None):
        p = f.softmax(-1)
        # p_i (1 − p_i) = Σ_{j≠i} p_i p_j: without the subtraction from p, which leaves a saturated softmax indefinite by rounding.
        other = 1 - torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        cross = (p * self._total(f, y).unsqueeze(-1)).unsqueeze(-1) * p.unsqueeze(-2) * other
        return torch.diag_embed(cross.sum(-1)) - cross

    def ggn_root(self, f, y=None):
        # (diag √p − p √pᵀ)(diag √p − √p pᵀ) = diag p − 2 p pᵀ + p (Σ p) pᵀ = diag p − p pᵀ;  √p from the logits, finite where p underflows.
        p, root = f.softmax(-1), (f.log_softmax(-1) / 2).exp()
        S = torch.diag_embed(root) - p.unsqueeze(-1) * root.unsqueeze(-2)
        return S if self._plain() and y is None else S * self._total(f, y).sqrt()[..., None, None]

    def sample(self, f, generator=None):
        p = f.softmax(-1).reshape(-1, f.shape[-1])
        p = p if generator is None else p.to(generator.device)
        return torch.multinomial(p, 1, generator=generator).reshape(f.shape[:-1]).to(f.device)

    def moments(self, f):
        p = f.softmax(-1)
        return p, p * (1 - p)

    def observed(self, f, y):
        return self._observed(f, y)[0]

    def response(self, f, y):
        """One-hot rows [... c], NaN where the label is missing."""
        observed, y = self._observed(f, y)
        return torch.where(observed.unsqueeze(-1), torch.zeros_like(f).scatter(-1, y.unsqueeze(-1), 1.0), torch.nan)

    def conditional_moments(self, f):
        """p and diag p − p pᵀ, of rank c − 1."""
        p = f.softmax(-1)
        return p, torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)

    def predict(self, mean, cov):
        return self.predictive(mean, cov)

    def predict_from_samples(self, samples):
        # A mixture of categoricals is the categorical of the averaged probabilities.
        return td.Categorical(probs=samples.softmax(-1).mean(0))

    def arguments(self):
        return {"weight": self.weight, "label_smoothing": self.label_smoothing, "ignore_index": self.ignore_index,
                "class_dim": self.class_dim, "predictive": self.predictive}
