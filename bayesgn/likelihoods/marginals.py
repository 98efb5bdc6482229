"""Reading the marginal blocks of a Gaussian over functions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["marginals"]


def marginals(f) -> tuple[Tensor, Tensor]:
    """Mean [n *positions c] and covariance [n *positions c c] of each row of a Gaussian over f.

    The object is asked first: `f.marginals()` if it has one (a network's lazy answer). gpytorch's `MultitaskMultivariateNormal` and
    `MultivariateNormal` (one latent: c = 1) are read otherwise, and torch's `MultivariateNormal` or `Normal`, whose event is one row.

    >>> mean, cov = marginals(torch.distributions.MultivariateNormal(torch.zeros(5, 2), torch.eye(2)))
    >>> mean.shape, cov.shape
    (torch.Size([5, 2]), torch.Size([5, 2, 2]))
    """
    if hasattr(f, "marginals"):
        return f.marginals()
    if hasattr(f, "num_tasks") and hasattr(f, "lazy_covariance_matrix"):                  # gpytorch Multitask: [... n c]
        mean = f.mean
        n, c = mean.shape[-2:]
        joint = f.lazy_covariance_matrix
        row = torch.arange(n, device=mean.device)[:, None]
        task = torch.arange(c, device=mean.device)
        # The joint covariance runs data first then outputs (interleaved), or outputs first: entry of (row i, output k).
        index = row * c + task if getattr(f, "_interleaved", True) else row + task * n    # [n c]
        if hasattr(joint, "_get_indices"):                                                # read the blocks, not the n c × n c matrix
            left, right = index[:, :, None].expand(n, c, c), index[:, None, :].expand(n, c, c)
            return mean, joint[..., left.reshape(-1), right.reshape(-1)].reshape(*mean.shape[:-2], n, c, c)
        return mean, joint[..., index[:, :, None], index[:, None, :]]
    if hasattr(f, "lazy_covariance_matrix"):                                              # gpytorch, one latent: [... n]
        return f.mean.unsqueeze(-1), f.variance[..., None, None]
    if isinstance(f, torch.distributions.MultivariateNormal):
        return f.mean, f.covariance_matrix
    if isinstance(f, torch.distributions.Independent) and isinstance(f.base_dist, torch.distributions.Normal):
        return f.mean, torch.diag_embed(f.variance)
    raise TypeError(f"likelihood(f) needs a Gaussian over f or samples [s, n, *positions, c], but got a {type(f).__name__}; "
                    "a posterior's answer posterior(x), gpytorch's MultivariateNormal types and torch's MultivariateNormal are understood")
