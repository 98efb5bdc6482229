"""Steps δ: Gauss-Newton as a torch Optimizer, for residual functions, for nonsmooth losses and at the scale of language models."""

from bayesgn.optim import outer, robust
from bayesgn.optim.acceleration import Geodesic, Straight
from bayesgn.optim.damping import (
    Constant,
    Damping,
    Dogleg,
    LevenbergMarquardt,
    Proposal,
    SmallestEigenvalue,
    TrustRegion,
)
from bayesgn.optim.expectations import AtMean, Draws, Expectation, Linearized, Reparameterized
from bayesgn.optim.fit import Fit
from bayesgn.optim.gauss_newton import GaussNewton, Step
from bayesgn.optim.inner import (
    Averaging,
    Blocks,
    ExponentialAverage,
    GaussNewtonInner,
    LastIterate,
    Layerwise,
    OuterStep,
    TailAverage,
    Whole,
    cosine,
)
from bayesgn.optim.inner_objectives import Convex, InnerObjective, Quadratized
from bayesgn.optim.large_residuals import ConjugateGradients, SparseLU
from bayesgn.optim.least_squares import Iteration, least_squares
from bayesgn.optim.line_search import Backtracking, Grid, LineSearch
from bayesgn.optim.momentum import Adaptive, HeavyBall, Momentum
from bayesgn.optim.muon import MuonAdamW, MuonRecipe
from bayesgn.optim.parameter_scaling import FadingMax, Units, Unscaled
from bayesgn.optim.prox_linear import ProxLinearFit, ProxLinearStep, prox_linear, subgradient
from bayesgn.optim.prox_solvers import SVRG, DualAscent, DualNewton, InnerSolver
from bayesgn.optim.prox_subproblem import DenseJacobian, JacobianProducts, Subproblem, TermsJacobian
from bayesgn.optim.quadratic import Quadratic
from bayesgn.optim.residual_quadratic import DenseQR, ResidualSolver
from bayesgn.optim.restarts import Restarts
from bayesgn.optim.scaling import Diagonal, RunningMax, Scaling
from bayesgn.optim.tangent import FiniteDifference, ForwardMode, TangentProduct
from bayesgn.optim.variational import Variational

__all__ = [
    "Adaptive", "AtMean", "Averaging", "Backtracking", "Blocks", "ConjugateGradients", "Constant", "Convex", "Damping", "DenseJacobian",
    "DenseQR", "Diagonal", "Dogleg", "Draws", "DualAscent", "DualNewton", "Expectation", "ExponentialAverage", "FadingMax",
    "FiniteDifference", "Fit", "ForwardMode", "GaussNewton", "GaussNewtonInner", "Geodesic", "Grid", "HeavyBall", "InnerObjective",
    "InnerSolver", "Iteration", "JacobianProducts", "LastIterate", "Layerwise", "LevenbergMarquardt", "LineSearch", "Linearized",
    "Momentum", "MuonAdamW", "MuonRecipe", "OuterStep", "Proposal", "ProxLinearFit", "ProxLinearStep", "Quadratic", "Quadratized",
    "Reparameterized", "ResidualSolver", "Restarts", "RunningMax", "SVRG", "Scaling", "SmallestEigenvalue", "SparseLU", "Step", "Straight",
    "Subproblem", "TailAverage", "TangentProduct", "TermsJacobian", "TrustRegion", "Units", "Unscaled", "Variational", "Whole", "cosine",
    "least_squares", "outer", "prox_linear", "robust", "subgradient",
]  # fmt: skip
