"""Nonlinear regression problems of the NIST Statistical Reference Datasets, with certified answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesgn.datasets.lookup import DatasetUnavailable, find

Curve = Callable[[Tensor, Tensor], Tensor]  # (b [p], x [n] or [n d]) -> [n]


class NonlinearRegression(NamedTuple):
    """Data, a curve and its certified least-squares fit.

    Attributes:
        x: predictor [n], or [n d] where there are several.
        y: response [n] as the model has it (``Nelson`` fits the logarithm of what was measured).
        curve: the model (b [p], x) -> [n].
        starts: the two starting points [2 p]; the first is far from the answer.
        certified, standard_errors: parameters and their standard deviations [p], to eleven digits.
        sum_of_squares, noise_std: of the residuals; noise_std² = sum_of_squares / (n − p).
        difficulty: Lower, Average or Higher.
        source: where it was found.
    """

    name: str
    x: Tensor
    y: Tensor
    curve: Curve
    starts: Tensor
    certified: Tensor
    standard_errors: Tensor
    sum_of_squares: float
    noise_std: float
    difficulty: str
    source: str

    def residuals(self, b: Tensor) -> Tensor:
        """curve(b, x) − y [n]."""
        return self.curve(b, self.x) - self.y


def nist(name: str, dtype: torch.dtype = torch.float64) -> NonlinearRegression:
    """One of the 27 nonlinear regression problems of NIST's Statistical Reference Datasets (StRD).

    From a data folder (``nist_strd/NAME.dat``); Misra1a, BoxBOD, DanWood, MGH10, Rat42 and Rat43 are small and stand here as well.

    Args:
        name: one of ``datasets.NIST``.
        dtype: of all tensors. The certified digits need float64.

    Raises:
        ValueError: no problem has this name.
        DatasetUnavailable: it is in no data folder, and not among the six.

    Example:
        >>> problem = nist("BoxBOD")
        >>> problem.residuals(problem.certified).square().sum()  # the certified sum of squares is 1168.0088766
        tensor(1168.0089, dtype=torch.float64)

    Source: National Institute of Standards and Technology, https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml (public domain).
    """
    if name not in _CURVES:
        raise ValueError(f"no NIST problem is called {name!r}; expected one of {', '.join(NIST)}")
    try:
        path = find(f"nist_strd/{name}.dat", "NIST has it: https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml")
    except DatasetUnavailable:
        if name not in _SMALL:
            raise
        fields, rows, difficulty, source = _small(name)
    else:
        fields, rows, difficulty = _read(path)
        source = str(path)
    parameters, (squares, noise_std) = fields
    b, data = torch.tensor(parameters, dtype=dtype), torch.tensor(rows, dtype=dtype)
    x, y = data[:, 1:], data[:, 0]
    x = x[:, 0] if x.shape[1] == 1 else x
    y = y.log() if name == "Nelson" else y
    starts, certified, errors = b[:, :2].T.clone(), b[:, 2].clone(), b[:, 3].clone()
    return NonlinearRegression(name, x, y, _CURVES[name], starts, certified, errors, squares, noise_std, difficulty, source)


def _read(path: Path) -> tuple[tuple[list[list[float]], list[float]], list[list[float]], str]:
    """Starts and certified values of each parameter, the two sums, the rows (y, x …), the level of difficulty."""
    text = path.read_text(encoding="ascii")
    number = r"\s+([-+.\dEe]+)"
    parameters = [[float(v) for v in found] for found in re.findall(rf"^\s+b\d+ ={number * 4}", text, re.M)]
    sums = [float(re.search(rf"{title}:{number}", text)[1]) for title in ("Residual Sum of Squares", "Residual Standard Deviation")]  # type: ignore[index]
    difficulty = re.search(r"(\w+) Level of Difficulty", text)[1]  # type: ignore[index]
    rows = np.loadtxt(text[text.rindex("Data:") :].splitlines()[1:], ndmin=2)
    return (parameters, sums), rows.tolist(), difficulty


# -- the curves, b[0] being the b1 of the definitions --------------------------------------------------------------------------------------


def _gauss(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (-b[1] * x).exp() + b[2] * (-(((x - b[3]) / b[4]) ** 2)).exp() + b[5] * (-(((x - b[6]) / b[7]) ** 2)).exp()


def _lanczos(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (-b[1] * x).exp() + b[2] * (-b[3] * x).exp() + b[4] * (-b[5] * x).exp()


def _cubic_by_cubic(b: Tensor, x: Tensor) -> Tensor:
    return (b[0] + x * (b[1] + x * (b[2] + x * b[3]))) / (1 + x * (b[4] + x * (b[5] + x * b[6])))


def _enso(b: Tensor, x: Tensor) -> Tensor:
    def cycle(cosine: Tensor, sine: Tensor, period: Tensor | float) -> Tensor:
        phase = 2 * math.pi * x / period
        return cosine * phase.cos() + sine * phase.sin()

    return b[0] + cycle(b[1], b[2], 12.0) + cycle(b[4], b[5], b[3]) + cycle(b[7], b[8], b[6])


_CURVES: dict[str, Curve] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": lambda b, x: b[0] * (1 - (-b[1] * x).exp()),
    "Chwirut1": lambda b, x: (-b[0] * x).exp() / (b[1] + b[2] * x),
    "Chwirut2": lambda b, x: (-b[0] * x).exp() / (b[1] + b[2] * x),
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": _enso,
    "Eckerle4": lambda b, x: b[0] / b[1] * (-0.5 * ((x - b[2]) / b[1]) ** 2).exp(),
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Gauss3": _gauss,
    "Hahn1": _cubic_by_cubic,
    "Kirby2": lambda b, x: (b[0] + x * (b[1] + x * b[2])) / (1 + x * (b[3] + x * b[4])),
    "Lanczos1": _lanczos,
    "Lanczos2": _lanczos,
    "Lanczos3": _lanczos,
    "MGH09": lambda b, x: b[0] * x * (x + b[1]) / (x * (x + b[2]) + b[3]),
    "MGH10": lambda b, x: b[0] * (b[1] / (x + b[2])).exp(),
    "MGH17": lambda b, x: b[0] + b[1] * (-b[3] * x).exp() + b[2] * (-b[4] * x).exp(),
    "Misra1a": lambda b, x: b[0] * (1 - (-b[1] * x).exp()),
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x: b[0] - b[1] * x[:, 0] * (-b[2] * x[:, 1]).exp(),
    "Rat42": lambda b, x: b[0] / (1 + (b[1] - b[2] * x).exp()),
    "Rat43": lambda b, x: b[0] / (1 + (b[1] - b[2] * x).exp()) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - (b[2] / (x - b[3])).atan() / math.pi,
    "Thurber": _cubic_by_cubic,
}
NIST: tuple[str, ...] = tuple(_CURVES)


# -- the small problems, from their published definitions: start 1, start 2, certified value, standard deviation; sums; y and x -------------

_MISRA_Y = (10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78)
_MISRA_X = (77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0)
_MGH10_Y = (34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872)
_RAT43_Y = (16.08, 33.83, 65.80, 97.20, 191.55, 326.20, 386.87, 520.53, 590.03, 651.92, 724.93, 699.56, 689.96, 637.56, 717.41)

_SMALL = {
    "Misra1a": (
        "Lower",
        [[500, 0.0001], [250, 0.0005], [2.3894212918e02, 5.5015643181e-04], [2.7070075241e00, 7.2668688436e-06]],
        [1.2455138894e-01, 1.0187876330e-01],
        [_MISRA_Y, _MISRA_X],
    ),
    "BoxBOD": (
        "Higher",
        [[1, 1], [100, 0.75], [2.1380940889e02, 5.4723748542e-01], [1.2354515176e01, 1.0455993237e-01]],
        [1.1680088766e03, 1.7088072423e01],
        [(109, 149, 149, 191, 213, 224), (1, 2, 3, 5, 7, 10)],
    ),
    "DanWood": (
        "Lower",
        [[1, 5], [0.7, 4], [7.6886226176e-01, 3.8604055871e00], [1.8281973860e-02, 5.1726610913e-02]],
        [4.3173084083e-03, 3.2853114039e-02],
        [(2.138, 3.421, 3.597, 4.340, 4.882, 5.660), (1.309, 1.471, 1.490, 1.565, 1.611, 1.680)],
    ),
    "MGH10": (
        "Higher",
        [
            [2, 400000, 25000],
            [0.02, 4000, 250],
            [5.6096364710e-03, 6.1813463463e03, 3.4522363462e02],
            [1.5687892471e-04, 2.3309021107e01, 7.8486103508e-01],
        ],
        [8.7945855171e01, 2.6009740065e00],
        [_MGH10_Y, tuple(range(50, 130, 5))],
    ),
    "Rat42": (
        "Higher",
        [
            [100, 1, 0.1],
            [75, 2.5, 0.07],
            [7.2462237576e01, 2.6180768402e00, 6.7359200066e-02],
            [1.7340283401e00, 8.8295217536e-02, 3.4465663377e-03],
        ],
        [8.0565229338e00, 1.1587725499e00],
        [(8.93, 10.80, 18.59, 22.33, 39.35, 56.11, 61.73, 64.62, 67.08), (9, 14, 21, 28, 42, 57, 63, 70, 79)],
    ),
    "Rat43": (
        "Higher",
        [
            [100, 10, 1, 1],
            [700, 5, 0.75, 1.3],
            [6.9964151270e02, 5.2771253025e00, 7.5962938329e-01, 1.2792483859e00],
            [1.6302297817e01, 2.0828735829e00, 1.9566123451e-01, 6.8761936385e-01],
        ],
        [8.7864049080e03, 2.8262414662e01],
        [_RAT43_Y, tuple(range(1, 16))],
    ),
}


def _small(name: str) -> tuple[tuple[list[list[float]], list[float]], list[list[float]], str, str]:
    difficulty, parameters, sums, columns = _SMALL[name]
    transposed = [list(map(float, values)) for values in zip(*parameters, strict=True)]
    return (transposed, sums), [list(map(float, row)) for row in zip(*columns, strict=True)], difficulty, "the published definition"
