"""Steps to a loss of AdamW, Muon, SOAP, full and layerwise Gauss-Newton, prox-linear, GN by CG, and the control, at two batch sizes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bayesgn import optim
from bayesgn._extras import require
from paper_repro.full_gauss_newton import methods
from paper_repro.full_gauss_newton.gpt import Corpus
from paper_repro.full_gauss_newton.methods import Curve, Setting

TITLE: str = "Abreu, Vyas, Kakade and Morwani (2025): the potential of second-order optimization for LLMs, a study with full Gauss-Newton"

GN = "GN (inner Muon)"
CONTROL = "Muon on micro-batches"


def muon(lr: float, adam_lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda net: optim.MuonRecipe(net, lr=lr, adam_lr=adam_lr)(list(net.parameters()))


def adamw(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda net: torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def soap(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    SOAP = require("pytorch_optimizer", "repro").SOAP
    return lambda net: SOAP(net.parameters(), lr=lr, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=1)


RATES = {"lr": 0.01, "adam_lr": 0.02, "carry": 0.5}  # of the inner optimizer


def inner(setting: Setting) -> dict[str, Callable[[], Curve]]:
    """Gauss-Newton by an inner optimizer, and its control, alike at both batches."""
    return {
        GN: lambda: methods.gauss_newton(GN, setting, **RATES),
        "prox-linear": lambda: methods.gauss_newton("prox-linear", setting, objective=optim.Convex(), **RATES),
        CONTROL: lambda: methods.control(CONTROL, setting, 0.02, 0.01),
    }


def large(setting: Setting) -> dict[str, Callable[[], Curve]]:
    """A batch of many micro-batches. Rates are the best of small grids (see the README)."""
    return {
        **inner(setting),
        "Muon": lambda: methods.first_order("Muon", setting, muon(0.05, 0.02)),
        "SOAP": lambda: methods.first_order("SOAP", setting, soap(0.01)),
        "layerwise GN": lambda: methods.gauss_newton("layerwise GN", setting, blocks=optim.Layerwise(methods.layer), **RATES),
        "GN by sublayer": lambda: methods.gauss_newton("GN by sublayer", setting, blocks=optim.Layerwise(methods.sublayer), **RATES),
        "GN by CG": lambda: methods.conjugate_gradients("GN by CG", setting),
        "AdamW": lambda: methods.first_order("AdamW", setting, adamw(0.003)),
    }


def small(setting: Setting) -> dict[str, Callable[[], Curve]]:
    """A batch of few: where Gauss-Newton should gain little."""
    return {
        **inner(setting),
        "Muon": lambda: methods.first_order("Muon", setting, muon(0.02, 0.01)),
        "SOAP": lambda: methods.first_order("SOAP", setting, soap(0.01)),
        "AdamW": lambda: methods.first_order("AdamW", setting, adamw(0.003)),
    }


def compare(name: str, setting: Setting, runs: dict[str, Callable[[], Curve]]) -> dict[str, Curve]:
    net = setting.net()
    print(
        f"### {name}: {setting.tokens:,} tokens in {setting.micro} micro-batches; {sum(p.numel() for p in net.parameters()):,} weights, "
        f"{setting.corpus.vocabulary} characters of {setting.corpus.name}; to a validation loss of {setting.target} nats\n"
    )
    print("| method | steps | sequential gradients | tokens (M) | CPU seconds |\n|---|---|---|---|---|")
    found = {}
    for method, start in runs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # steps that the line search turned down
            curve = found[method] = start()
        spent = curve.at(setting.target)
        cells = [f"{spent['steps']:.1f}", f"{spent['gradients']:,.0f}", f"{spent['tokens'] / 1e6:.2f}", f"{spent['seconds']:.1f}"]
        if spent["steps"] == float("inf"):
            cells = [f"> {curve.steps[-1]} (loss {curve.loss[-1]:.3f})", f"> {curve.gradients[-1]:,}", f"> {curve.tokens[-1] / 1e6:.2f}", f"> {curve.seconds[-1]:.0f}"]
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)
    print()
    return found


def ratios(name: str, setting: Setting, curves: dict[str, Curve]) -> dict[str, float]:
    """Steps (and for the control gradients and seconds) in those of full GN; a run that did not arrive counts with all its steps, a lower bound."""

    def spent(method: str, what: str) -> float:
        at = curves[method].at(setting.target)[what]
        return at if at != float("inf") else float(getattr(curves[method], what)[-1])

    out = {f"{name}: GN steps": spent(GN, "steps")}
    out |= {f"{name}: {method} / GN steps": spent(method, "steps") / spent(GN, "steps") for method in curves if method != GN}
    out |= {f"{name}: control / GN {what}": spent(CONTROL, what) / spent(GN, what) for what in ("gradients", "seconds")}
    return out


def run(quick: bool, figures: Path) -> dict[str, float]:
    """All of it in about a quarter of an hour of CPU time, or a net a fifth of the size in half a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if quick:
            setting = Setting(Corpus(32, 400_000), width=32, heads=2, depth=1, sequences=8, micro=16, target=2.6, limit=60)
            chosen = (GN, "prox-linear", CONTROL, "Muon")
            found = {"large batch": compare("large batch", setting, {k: v for k, v in large(setting).items() if k in chosen})}
            settings = {"large batch": setting}
        else:
            corpus = Corpus(64)
            settings = {
                "large batch": Setting(corpus, width=64, heads=4, depth=2, sequences=8, micro=64, target=2.2, limit=250),
                "small batch": Setting(corpus, width=64, heads=4, depth=2, sequences=8, micro=4, target=2.2, limit=1000),
            }
            found = {name: compare(name, setting, build(setting)) for (name, setting), build in zip(settings.items(), (large, small))}
    finally:
        torch.set_num_threads(threads)
    numbers: dict[str, float] = {}
    for name, curves in found.items():
        numbers |= ratios(name, settings[name], curves)
    for name, value in numbers.items():
        print(f"{name}: {value:.3g}")
    if not quick:
        keep(found, figures.parent / "curves.json")
    draw(found, settings, figures)
    return numbers


def keep(found: dict[str, dict[str, Curve]], path: Path) -> None:
    """The curves at no more than sixty steps each."""
    text = {}
    for name, curves in found.items():
        text[name] = {}
        for method, curve in curves.items():
            at = sorted({round(i * (len(curve.loss) - 1) / 60) for i in range(61)})
            text[name][method] = {what: [round(getattr(curve, what)[i], 4) for i in at] for what in ("steps", "loss", "gradients", "seconds")}
    path.write_text(json.dumps(text, separators=(",", ":")) + "\n")


COLOURS = {GN: "#c0392b", "prox-linear": "#e67e22", "layerwise GN": "#8e44ad", "GN by sublayer": "#c39bd3", "GN by CG": "#7f8c8d", CONTROL: "#111111"}
COLOURS |= {"Muon": "#2471a3", "SOAP": "#17a589", "AdamW": "#7d6608"}


def draw(found: dict[str, dict[str, Curve]], settings: dict[str, Setting], figures: Path) -> None:
    """Loss against steps at each batch size, and against seconds at the large one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    panels = [(name, "steps") for name in found] + [("large batch", "seconds")]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), layout="constrained")
    for ax, (name, what) in zip(axes, panels):
        target, last = settings[name].target, 0.0
        ends = {method: getattr(curve, what)[-1] for method, curve in found[name].items()}
        first = min(getattr(curve, what)[1] for curve in found[name].values())
        apart = (max(ends.values()) / first) ** 0.04  # of two labels, on the logarithmic axis
        for method, end in sorted(ends.items(), key=lambda item: item[1]):
            curve = found[name][method]
            style = "--" if method == CONTROL else "-"
            ax.plot(getattr(curve, what)[1:], curve.loss[1:], color=COLOURS[method], linewidth=1.4, linestyle=style)
            last = max(end, last * apart)
            ax.text(last, target - 0.03, "control" if method == CONTROL else method, color=COLOURS[method], rotation=90, va="top", ha="center", fontsize=8)
        ax.axhline(target, color="0.8", linewidth=0.8, zorder=0)
        ax.set(xscale="log", xlim=(first / 1.1, last * 1.2), ylim=(target - 0.62, 3.4), xlabel={"steps": "steps", "seconds": "CPU seconds"}[what])
        ax.set_yticks([t for t in (2.2, 2.4, 2.6, 2.8, 3.0, 3.2, 3.4) if t >= target])
        ax.set_title(f"{name}: {settings[name].tokens:,} tokens", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation loss (nats a character)")
    path = figures / "steps_to_loss.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(48).save(path, optimize=True)  # half the bytes
