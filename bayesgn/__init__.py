"""bayesgn: Bayesian deep learning by Gauss-Newton.

    f(x; θ) ≈ f(x; θ*) + J (θ − θ*)      log p(y|f) ≈ quadratic with gradient g and precision Λ      H = Σ JᵀΛJ

The verbs (`laplace`, `maximize_evidence`, `compare`, …) stand here beside the rooms (`models`, `ggn`, `likelihoods`, …). Nothing is imported
before it is asked for (PEP 562), so `import bayesgn` costs milliseconds; torch, gpytorch, matplotlib and torchmetrics load where first used.

Example:
    >>> import bayesgn as bgn
    >>> bgn.datasets.two_moons(seed=0).x_train.shape
    torch.Size([200, 2])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bayesgn._extras import quiet_import

__version__ = "0.1.0"

# name -> the module that defines it. A verb may share its module's name (`laplace`): the front door gives the function.
_VERBS = {
    "laplace": "bayesgn.inference.laplace",
    "bayes_newton": "bayesgn.inference.bayes_newton",
    "refine": "bayesgn.inference.refine",
    "variational": "bayesgn.inference.variational",
    "maximize_evidence": "bayesgn.inference.evidence",
    "train_with_evidence": "bayesgn.inference.training",
    "tune": "bayesgn.inference.tuning",
    "compare": "bayesgn.inference.compare",
    "load": "bayesgn.inference.persistence",
    "mixture": "bayesgn.inference.mixture",
    "last_layer": "bayesgn.models.subsets",
    "named": "bayesgn.models.subsets",
    "largest_variance": "bayesgn.models.subsets",
    "magnitude": "bayesgn.models.subsets",
    "random_subset": "bayesgn.models.subsets",
    "shard": "bayesgn._distributed",
}
_ROOMS = ("datasets", "ggn", "inference", "integrations", "likelihoods", "metrics", "models", "optim", "plots", "rules")

if TYPE_CHECKING:
    from bayesgn import datasets, ggn, inference, integrations, likelihoods, metrics, models, optim, plots, rules
    from bayesgn._distributed import shard
    from bayesgn.inference.bayes_newton import bayes_newton
    from bayesgn.inference.compare import compare
    from bayesgn.inference.evidence import maximize_evidence
    from bayesgn.inference.laplace import laplace
    from bayesgn.inference.mixture import mixture
    from bayesgn.inference.persistence import load
    from bayesgn.inference.refine import refine
    from bayesgn.inference.training import train_with_evidence
    from bayesgn.inference.tuning import tune
    from bayesgn.inference.variational import variational
    from bayesgn.models.subsets import largest_variance, last_layer, magnitude, named, random_subset

__all__ = [
    "bayes_newton",
    "compare",
    "datasets",
    "ggn",
    "inference",
    "integrations",
    "laplace",
    "largest_variance",
    "last_layer",
    "likelihoods",
    "load",
    "magnitude",
    "maximize_evidence",
    "metrics",
    "mixture",
    "models",
    "named",
    "optim",
    "plots",
    "random_subset",
    "refine",
    "rules",
    "shard",
    "train_with_evidence",
    "tune",
    "variational",
]


def __getattr__(name: str) -> Any:
    module = _VERBS.get(name) or (f"bayesgn.{name}" if name in _ROOMS else None)
    if module is None:
        raise AttributeError(f"module 'bayesgn' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        with quiet_import():
            found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # our module is there; a package that it needs is not
        raise AttributeError(
            f"module 'bayesgn' has no attribute {name!r}: {error.name} is not part of this installation ({__version__})"
        ) from error
    value = getattr(found, name) if name in _VERBS else found
    globals()[name] = value  # asked once; later look-ups do not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
