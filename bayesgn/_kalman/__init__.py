"""Linear-Gaussian chains with Gaussian sites: filter, smoother and their adjoint, compiled on a CPU, a parallel scan elsewhere."""

from bayesgn._kalman.chain import Chain, draw, means, smooth, states
from bayesgn._kalman.gains import gained

__all__ = ["Chain", "draw", "gained", "means", "smooth", "states"]
