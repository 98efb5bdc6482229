"""Generalized Gauss-Newton (J, JᵀΛJ): linearise a network once, keep Σ JᵀΛJ in the structure you can afford."""

from bayesgn.ggn.block_diagonal import Diag, Layerwise
from bayesgn.ggn.blocks import Block
from bayesgn.ggn.eigen_kron import EigenKron
from bayesgn.ggn.full import Full
from bayesgn.ggn.gram import Gram
from bayesgn.ggn.kron import Kron
from bayesgn.ggn.linearization import Linearization, Linearizer
from bayesgn.ggn.low_rank import LowRank
from bayesgn.ggn.matrix_free import MatrixFree
from bayesgn.ggn.structure import Curvature, Precision, Structure

__all__ = [
    "Block", "Curvature", "Diag", "EigenKron", "Full", "Gram", "Kron", "Layerwise", "Linearization", "Linearizer",
    "LowRank", "MatrixFree", "Precision", "Structure",
]  # fmt: skip
