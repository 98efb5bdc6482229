"""Generalized Gauss-Newton (J, JᵀΛJ): linearise a network once, keep Σ JᵀΛJ in the structure you can afford."""

from bayesgn.ggn.block_diagonal import Diag, Layerwise
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.difference import DifferenceProducts
from bayesgn.ggn.eigen_kron import EigenKron
from bayesgn.ggn.full import Full
from bayesgn.ggn.gram import Gram
from bayesgn.ggn.hessian import Hessian
from bayesgn.ggn.identity import Identity
from bayesgn.ggn.jacobian import FunctionLinearization, jacobian, linearize
from bayesgn.ggn.kron import Kron
from bayesgn.ggn.linearization import Linearization, Linearizer
from bayesgn.ggn.low_rank import LowRank
from bayesgn.ggn.low_rank_diagonal import LowRankPlusDiagonal
from bayesgn.ggn.matrix_free import MatrixFree
from bayesgn.ggn.structure import Curvature, Precision, Structure

__all__ = [
    "Block", "Curvature", "Diag", "DifferenceProducts", "EigenKron", "Full", "FunctionLinearization", "Gram", "Hessian", "Identity", "Kron",
    "Layerwise", "Linearization", "Linearizer", "LowRank", "LowRankPlusDiagonal", "MatrixFree", "Precision", "Structure", "jacobian", "linearize",
]  # fmt: skip
