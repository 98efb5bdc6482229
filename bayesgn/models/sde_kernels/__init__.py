"""gpytorch kernels over time as linear stochastic differential equations.

    dx = F x dt + L dβ,   f(t) = H x(t),   k(t, t') = H A(t − t') P(t') Hᵀ   for t ≥ t'

:func:`state_space` turns a kernel into a :class:`StateSpace`; a kernel of your own joins by ``@state_space.register``.
"""

from bayesgn.models.sde_kernels.combined import Product, Scaled, Sum
from bayesgn.models.sde_kernels.from_kernels import Matern72Kernel, state_space
from bayesgn.models.sde_kernels.harmonic import Cosine, Harmonics, Periodic
from bayesgn.models.sde_kernels.matern import Matern
from bayesgn.models.sde_kernels.polynomial import Polynomial
from bayesgn.models.sde_kernels.rational import RBF, Rational, SpectralTaylor
from bayesgn.models.sde_kernels.space import StateSpace, difference

__all__ = [
    "RBF", "Cosine", "Harmonics", "Matern", "Matern72Kernel", "Periodic", "Polynomial", "Product", "Rational", "Scaled", "SpectralTaylor",
    "StateSpace", "Sum", "difference", "state_space",
]  # fmt: skip
