"""Cayci (2024): Gauss-Newton contracts at a rate that the conditioning of the Gram matrix does not touch."""
