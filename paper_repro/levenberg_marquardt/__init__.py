"""Pooladzandi and Zhou (2022), "Improving Levenberg-Marquardt algorithm for neural networks": LM with momentum, scaling, line search and uphill steps."""
