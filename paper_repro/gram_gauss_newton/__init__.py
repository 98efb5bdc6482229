"""Cai et al. (2019), "Gram-Gauss-Newton method: learning overparameterized neural networks for regression problems"."""
