"""Training with evidence: MAP training whose weight decay and noise are tuned by the marginal likelihood as it goes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bayesgn import _data
from bayesgn._parameters import unwrap
from bayesgn.ggn.evaluation import call
from bayesgn.inference.evidence import maximize_evidence
from bayesgn.models.network import Network
from bayesgn.models.network_posterior import NetworkPosterior
from bayesgn.models.stream import Validation

logger = logging.getLogger("bayesgn.inference")


@dataclass
class History:
    """The course of :func:`train_with_evidence`.

    Attributes:
        loss: mean penalised loss of every epoch, in nats a datum.
        epoch: the epochs (counted from 1) after which the evidence was worked out; beside it, after its tuning,
        evidence, precision, noise: log evidence in nats, prior precision(s), noise (where the likelihood has one).
        best: place of the best evidence in these lists.
        reason: why training ended.
    """

    loss: list[float] = field(default_factory=list)
    epoch: list[int] = field(default_factory=list)
    evidence: list[float] = field(default_factory=list)
    precision: list[Any] = field(default_factory=list)
    noise: list[Any] = field(default_factory=list)
    best: int = 0
    reason: str = ""

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights were kept."""
        return self.epoch[self.best]

    def __repr__(self) -> str:
        if not self.evidence:
            return f"History({len(self.loss)} epochs)"
        return f"History({len(self.loss)} epochs, best evidence {self.evidence[self.best]:.4g} after epoch {self.best_epoch}, {self.reason})"


def train_with_evidence(
    model: Network,
    likelihood,
    train_loader: Any,
    epochs: int = 100,
    lr: float = 1e-3,
    every: int = 5,
    burn_in: int = 0,
    steps: int = 20,
    patience: int | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    rule=None,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> tuple[NetworkPosterior, History]:
    """Train a net, and its weight decay and noise by the evidence on the way; no validation data are needed.

        loss = −1/B Σ_batch log p(y|f(x; θ)) + 1/2N (θ − μ)ᵀ P (θ − μ)

    Every ``every`` epochs after ``burn_in``, Laplace is fitted at the present weights and ``steps`` steps of
    :func:`maximize_evidence` set P and the noise for the epochs that follow. The weights of the best evidence are kept.

    The Laplace formula takes the weights for a mode. Early in training they are none, and the best evidence may then be met (and its
    weights kept) before the loss has settled: choose ``burn_in`` so that training is mostly done, and start from a noise no larger
    than you expect, or a small net may settle for a constant function.

    **This trains your net**: its weights end at those of the best evidence, and its mode as it came. A net that comes in train mode is
    trained with every module in the mode you gave it (a BatchNorm frozen by ``.eval()`` stays frozen); one that comes in eval mode, as
    fitted nets do, is put in train mode as a whole. ``model.prior`` and
    ``likelihood`` are not changed; the tuned ones are ``posterior.prior`` and ``posterior.likelihood``. Parameters of the likelihood that the
    evidence cannot tune over one H (noise of each output, degrees of freedom) are trained with the weights.

    Args:
        model: ``models.Network(net, …)``, trained from the weights it has. Weights of a subset that is not selected are trained
            without decay.
        likelihood: p(y|f).
        train_loader: training data; a pair of tensors is shuffled anew each epoch in batches of ``batch_size``.
        epochs: at most so many.
        lr: of Adam, unless ``optimizer`` is given.
        every, burn_in, steps: F, the epochs before the first fit, and K in the paper.
        patience: stop after so many fits without a better evidence; ``None``: never.
        optimizer: a function from a list of parameters to a torch Optimizer, without weight decay.
        scheduler: a function from that to a learning-rate scheduler, stepped every epoch.
        rule: of the Laplace fits, as in :func:`bayesgn.laplace`.
        batch_size, generator: for a pair of tensors; the generator also serves ``MonteCarloFisher``.
        progress: a progress bar: ``None`` shows one for work beyond two seconds, ``False`` never.

    Returns:
        The posterior at the best weights, and the :class:`History`.

    Raises:
        ValueError: for a loss that is NaN, options that cannot be right, or an iterator instead of a loader.

    Example:
        >>> import torch, bayesgn as bgn
        >>> x = torch.linspace(-1, 1, 40)[:, None]; y = torch.sin(3 * x)
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
        >>> model = bgn.models.Network(net, prior=bgn.models.WeightPrior.per_layer(net))
        >>> posterior, history = bgn.train_with_evidence(model, bgn.likelihoods.Gaussian(1.0), (x, y), epochs=20, lr=0.02)
        >>> history.evidence[history.best] > history.evidence[0]
        True

    Source: Immer et al. (2021), "Scalable marginal likelihood estimation for model selection in deep learning", algorithm 1.
    """
    if epochs < 1 or every < 1 or steps < 0 or burn_in < 0:
        raise ValueError(
            f"epochs={epochs}, every={every}, steps={steps}, burn_in={burn_in}; expected epochs, every ≥ 1 and steps, burn_in ≥ 0."
        )
    batches = Epochs(train_loader, batch_size, generator)
    net, own = model.net, copy.copy(model)
    own.prior, likelihood = copy.deepcopy(model.prior), copy.deepcopy(likelihood)
    run = _Run(own, likelihood, batches, rule, steps)
    trained = [p for p in net.parameters() if p.requires_grad] + run.trained_likelihood()
    opt = torch.optim.Adam(trained, lr=lr) if optimizer is None else optimizer(trained)
    schedule = None if scheduler is None else scheduler(opt)
    history = History(reason=f"all {epochs} epochs were taken")
    modes, since_best = [(m, m.training) for m in net.modules()], 0
    try:
        with _bar(epochs, progress) as bar:
            for epoch in range(1, epochs + 1):
                _train_mode(net, modes)
                history.loss.append(run.epoch(opt, epoch))
                if schedule is not None:
                    schedule.step()
                bar.update()
                if epoch != epochs and (epoch <= burn_in or (epoch - burn_in) % every):
                    continue
                since_best = 0 if run.evaluate(history, epoch, generator) else since_best + 1
                bar.set_postfix_str(f"loss {history.loss[-1]:.4g}, log evidence {history.evidence[-1]:.4g}", refresh=False)
                if patience is not None and since_best >= patience:
                    history.reason = f"no better evidence in {patience} fits"
                    break
        run.restore()
    finally:
        for p in trained:
            p.grad = None
        for m, training in modes:
            m.training = training
    assert run.posterior is not None
    logger.info("%s", history)
    return run.posterior, history


def _train_mode(net: nn.Module, modes: list[tuple[nn.Module, bool]]) -> None:
    """The modes that the net came with, where it came in train mode; all of it in train mode otherwise."""
    if not modes[0][1]:  # (the first module is the net itself)
        net.train()
        return
    for m, training in modes:
        m.training = training


class _Run:
    """Weights, prior and likelihood on their way, and the best of them."""

    def __init__(self, model: Network, likelihood, batches: Epochs, rule, steps: int) -> None:
        self.model, self.likelihood, self.batches, self.rule, self.steps = model, likelihood, batches, rule, steps
        self.net, self.vector, self.linearizer = unwrap(model.net), model.vector, model.linearizer
        first = next(iter(self.vector.tensors(self.net).values()))
        self.device = first.device
        self.likelihood.to(self.device)
        self.model.prior.to(self.device)
        self.μ = model.prior.mean_vector(self.vector, first)
        self.posterior: NetworkPosterior | None = None
        self.best: dict[str, Tensor] = {}
        self._validate = Validation(self.likelihood)

    def trained_likelihood(self) -> list[nn.Parameter]:
        """The likelihood's parameters that go with the weights: those that the evidence does not tune."""
        tuned = (self.rule.curvature.scale(self.likelihood) if self.rule is not None else self.likelihood.ggn_scale()).requires_grad
        return [] if tuned else [p for p in self.likelihood.parameters() if p.requires_grad]

    def penalty(self) -> Tensor:
        """½ (θ − μ)ᵀ P (θ − μ), differentiable in the weights."""
        parts, own = [], self.vector.tensors(self.net)
        for name, p in own.items():
            flat = p.reshape(-1)
            parts.append(flat[self.vector.masks[name]] if name in self.vector.masks else flat)
        square = (torch.cat(parts) - self.μ).square()
        blocks = self.linearizer.blocks
        precision = [p.detach().to(square) for p in self.model.prior.of(blocks)]
        return 0.5 * torch.stack([(p * square[b.where]).sum() for p, b in zip(precision, blocks, strict=True)]).sum()

    def epoch(self, opt: torch.optim.Optimizer, epoch: int) -> float:
        """One walk over the data; the mean loss."""
        total, seen, N = 0.0, 0, len(self.batches)
        for i, (x, y) in enumerate(self.batches):
            f = self.likelihood.rows(call(self.model.net, _data.to(x, self.device)))
            y = y.to(self.device)
            if epoch == 1:
                self._validate(f.detach(), y)
            loss = -self.likelihood.log_prob(f, y).sum() / len(f) + self.penalty() / N
            if not bool(torch.isfinite(loss)):
                lr = opt.param_groups[0]["lr"]
                raise ValueError(f"the loss is {loss.item()} in batch {i} of epoch {epoch}; lower lr={lr:g} or look for NaN in the data.")
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            total, seen = total + loss.item() * len(f), seen + len(f)
        return total / seen

    def evaluate(self, history: History, epoch: int, generator: torch.Generator | None) -> bool:
        """Fit, tune, note; whether it is the best so far."""
        self.model.net.eval()  # (the wrapper too, whose mode is asked for); training sets it back
        posterior = self.model.condition(self.batches, self.likelihood, self.rule, generator=generator, progress=False)
        free = [p for p in posterior.hyperparameters() if p.requires_grad]
        if self.steps and free:
            maximize_evidence(posterior, self.steps, progress=False)
            self.model.prior.load_state_dict(posterior.prior.state_dict())
            self.likelihood.load_state_dict(posterior.likelihood.state_dict())
        value = posterior.log_evidence().item()
        better = self.posterior is None or value > history.evidence[history.best]
        history.epoch.append(epoch)
        history.evidence.append(value)
        history.precision.append(posterior.prior.precision.detach().tolist())
        noise = getattr(posterior.likelihood, "noise", None)
        if isinstance(noise, Tensor):
            history.noise.append(noise.detach().tolist())
        if better:
            history.best, self.posterior = len(history.evidence) - 1, posterior
            self.best = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        return better

    def restore(self) -> None:
        """The best weights back into the net."""
        self.net.load_state_dict(self.best)


class Epochs:
    """Data that can be walked again and again, each walk one epoch; its length is the number of data seen in one."""

    def __init__(self, data: Any, batch_size: int, generator: torch.Generator | None) -> None:
        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
            self.pair, self.batch_size, self.generator = data, batch_size, generator
            self.N = len(data[1])
            _data.batches(data)  # checked
            return
        self.pair, self.walk = None, _data.batches(data)
        if isinstance(self.walk, Iterator):
            raise ValueError("train_loader is an iterator, which can be walked once; training walks it every epoch: pass a DataLoader.")
        self.N = sum(len(y) for _, y in self.walk)  # what is seen: not len(dataset), where a loader drops or repeats data
        if self.N == 0:
            raise ValueError("the loader gave no data (0 rows); there is nothing to train on.")

    def __len__(self) -> int:
        return self.N

    def first_batch(self) -> tuple[Any, Tensor]:
        """One batch, to look at."""
        return next(iter(self.walk)) if self.pair is None else (self.pair[0], self.pair[1][: self.batch_size])

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        if self.pair is None:
            yield from self.walk
            return
        x, y = self.pair
        device = "cpu" if self.generator is None else self.generator.device
        for index in torch.randperm(self.N, generator=self.generator, device=device).split(self.batch_size):
            yield _data.rows(x, index.to(_data.tensors(x)[0].device)), y[index.to(y.device)]


def _bar(epochs: int, progress: bool | None):
    from tqdm.auto import tqdm

    return tqdm(total=epochs, desc="training", unit="epoch", leave=False, delay=0 if progress else 2, disable=progress is False)
