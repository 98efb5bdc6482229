"""Immer (2020) and Immer, Korzepa and Bauer (2021): Gauss-Newton makes a network a linear model; infer in it, and predict with it."""
