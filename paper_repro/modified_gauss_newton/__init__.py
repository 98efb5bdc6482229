"""Pillutla, Roulet, Kakade and Harchaoui (2023): when the quadratic convergence of the prox-linear method is worth anything under noise."""
