"""Linear-Gaussian chains with Gaussian sites: filter, smoother and their adjoint, compiled on a CPU, a parallel scan elsewhere."""

from bayesgn._kalman.chain import Chain, draw, smooth, states

__all__ = ["Chain", "draw", "smooth", "states"]
