"""A network's answer: a Gaussian over its outputs whose covariance is worked out only when it is asked for."""

from __future__ import annotations

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator.operators import DenseLinearOperator, LinearOperator
from torch import Tensor


class FunctionCovariance(LinearOperator):
    """The joint covariance [N c, N c] of a network's outputs; data first, then outputs. Nothing is computed at construction.

    Args:
        answer: an object with ``shape`` (N, c), ``blocks() -> [N c c]`` marginal blocks and ``dense() -> [N c, N c]``.
        like: a tensor that gives device and dtype.
    """

    def __init__(self, like: Tensor, answer) -> None:
        super().__init__(like, answer=answer)
        self.answer, self._like = answer, like

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    def _size(self) -> torch.Size:
        N, c = self.answer.shape
        return torch.Size([N * c, N * c])

    def _transpose_nonbatch(self) -> FunctionCovariance:
        return self

    def _expand_batch(self, batch_shape: torch.Size) -> LinearOperator:
        dense = self.to_dense()
        return DenseLinearOperator(dense.expand(*batch_shape, *dense.shape[-2:]))

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.to_dense() @ rhs

    def _diagonal(self) -> Tensor:
        return self.answer.blocks().diagonal(dim1=-2, dim2=-1).reshape(-1)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        return self.to_dense()[row_index, col_index]

    def to_dense(self) -> Tensor:
        return self.answer.dense()


class FunctionGaussian(MultitaskMultivariateNormal):
    """f at N rows and c outputs, as gpytorch's ``MultitaskMultivariateNormal`` (event [N c], rows interleaved).

    ``variance`` and :meth:`marginals` need the covariance within each datum only; ``covariance_matrix``, ``rsample`` and
    ``log_prob`` are joint over all data. A net with extra positions has N = data × positions rows.
    """

    def __init__(self, mean: Tensor, answer, positions: tuple[int, ...]) -> None:
        self.answer, self.positions = answer, positions
        super().__init__(mean, FunctionCovariance(mean, answer), validate_args=False)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Mean [n *positions c] and covariance [n *positions c c] of each row."""
        mean, blocks, c = self.mean, self.answer.blocks(), self.mean.shape[-1]
        return mean.reshape(-1, *self.positions, c), blocks.reshape(-1, *self.positions, c, c)

    @property
    def variance(self) -> Tensor:
        return self.answer.blocks().diagonal(dim1=-2, dim2=-1)

    @property
    def stddev(self) -> Tensor:
        return self.variance.clamp_min(0).sqrt()

    def rsample(self, sample_shape=torch.Size(), base_samples: Tensor | None = None) -> Tensor:
        # Exact: above 800 rows linear_operator would turn to Lanczos without a word.
        if base_samples is not None:
            sample_shape = base_samples.shape[: base_samples.dim() - self.mean.dim()]
            if base_samples.shape[len(sample_shape) :] != self.mean.shape:
                raise ValueError(f"base_samples have shape {tuple(base_samples.shape)}; expected [..., {', '.join(map(str, self.mean.shape))}].")
        return self.answer.draw(self.mean, torch.Size(sample_shape), base_samples)

    def log_prob(self, value: Tensor) -> Tensor:
        if value.shape[-2:] != self.mean.shape:
            raise ValueError(f"value has shape {tuple(value.shape)}; expected [..., {', '.join(map(str, self.mean.shape))}].")
        L = self.answer.cholesky()
        joint = torch.distributions.MultivariateNormal(self.mean.reshape(-1).to(L), scale_tril=L)
        return joint.log_prob(value.reshape(*value.shape[:-2], -1).to(L)).to(self.mean)

    # What gpytorch makes out of a Gaussian by `self.__class__(mean, covariance)` is a plain Gaussian of its own.

    def plain(self) -> MultitaskMultivariateNormal:
        """The same Gaussian as gpytorch's own class."""
        return MultitaskMultivariateNormal(self.mean, self.lazy_covariance_matrix)

    def expand(self, batch_size) -> MultitaskMultivariateNormal:
        return self.plain().expand(batch_size)

    def add_jitter(self, noise: float = 1e-4) -> MultitaskMultivariateNormal:
        return self.plain().add_jitter(noise)

    def __add__(self, other) -> MultitaskMultivariateNormal:
        return self.plain() + (other.plain() if isinstance(other, FunctionGaussian) else other)

    def __mul__(self, other) -> MultitaskMultivariateNormal:
        return self.plain() * other


class LatentGaussian(MultivariateNormal):
    """f at m rows of one latent function, as gpytorch's ``MultivariateNormal`` (event [m]); the joint covariance is worked out when asked for."""

    def __init__(self, mean: Tensor, answer) -> None:
        self.answer = answer
        super().__init__(mean, FunctionCovariance(mean, answer), validate_args=False)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Mean [m 1] and covariance [m 1 1] of each row."""
        return self.mean.unsqueeze(-1), self.answer.blocks()

    @property
    def variance(self) -> Tensor:
        return self.answer.blocks()[:, 0, 0]

    @property
    def stddev(self) -> Tensor:
        return self.variance.clamp_min(0).sqrt()

    def rsample(self, sample_shape=torch.Size(), base_samples: Tensor | None = None) -> Tensor:
        if base_samples is not None:
            sample_shape = base_samples.shape[:-1]
            if base_samples.shape[-1:] != self.mean.shape:
                raise ValueError(f"base_samples have shape {tuple(base_samples.shape)}; expected [..., {len(self.mean)}].")
        return self.answer.draw(self.mean, torch.Size(sample_shape), base_samples)

    def log_prob(self, value: Tensor) -> Tensor:
        if value.shape[-1:] != self.mean.shape:
            raise ValueError(f"value has shape {tuple(value.shape)}; expected [..., {len(self.mean)}].")
        L = self.answer.cholesky()
        return torch.distributions.MultivariateNormal(self.mean.to(L), scale_tril=L).log_prob(value.to(L)).to(self.mean)

    def plain(self) -> MultivariateNormal:
        """The same Gaussian as gpytorch's own class."""
        return MultivariateNormal(self.mean, self.lazy_covariance_matrix)

    def __getitem__(self, index) -> MultivariateNormal:
        """Some rows; their joint covariance is worked out for them alone."""
        if isinstance(index, slice) or (isinstance(index, Tensor) and index.dim() == 1):
            return LatentGaussian(self.mean[index], self.answer.rows(index))
        return MultivariateNormal(self.mean, DenseLinearOperator(self.covariance_matrix))[index]

    def unsqueeze(self, dim: int) -> MultivariateNormal:
        return MultivariateNormal(self.mean, DenseLinearOperator(self.covariance_matrix)).unsqueeze(dim)

    def expand(self, batch_size) -> MultivariateNormal:
        return self.plain().expand(batch_size)

    def add_jitter(self, noise: float = 1e-4) -> MultivariateNormal:
        return self.plain().add_jitter(noise)

    def __add__(self, other) -> MultivariateNormal:
        return self.plain() + (other.plain() if isinstance(other, LatentGaussian) else other)

    def __mul__(self, other) -> MultivariateNormal:
        return self.plain() * other
