"""The drawing of one regularized step."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LAYERS = ("layer 1", "layer 2", "layer 3")
COLOURS = {"forward": "#4477aa", "chain": "#cc7722", "backward": "#228833"}


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 2.0) -> None:
    """A box centred at (x, y)."""
    style = {"boxstyle": "round,pad=0.05", "fc": "white", "ec": colour, "lw": 1.4}
    axes.add_patch(pyplot.matplotlib.patches.FancyBboxPatch((x - width / 2, y - 0.32), width, 0.64, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """From box to box."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.4})


def row(axes: Axes, y: float, kind: str, texts: tuple[str, ...], *, leftwards: bool) -> None:
    """One pass through the layers."""
    for i, text in enumerate(texts):
        box(axes, 3 * i, y, text, COLOURS[kind])
        if i:
            ends = (3 * i - 1.95, y), (3 * i - 1.05, y)
            arrow(axes, *(ends[::-1] if leftwards else ends), COLOURS[kind])


def one_pass() -> Figure:
    """Forward, chain of output gradients, double backward."""
    figure, axes = pyplot.subplots(figsize=(8.2, 3.5), layout="constrained")
    row(axes, 4, "forward", LAYERS, leftwards=False)
    row(axes, 2.4, "chain", tuple(rf"$||G_k||^2$ of {layer}" for layer in LAYERS), leftwards=True)
    row(axes, 0.8, "backward", tuple(f".grad of {layer}" for layer in LAYERS), leftwards=True)
    box(axes, 9, 4, "loss", COLOURS["forward"], 1.4)
    box(axes, 9, 0.8, "loss + weight R", COLOURS["backward"], 1.9)
    box(axes, -3, 2.4, r"$R = \mathrm{mean}_k\,||g_k||^2$", COLOURS["chain"], 2.0)
    arrow(axes, (7.05, 4), (8.25, 4), COLOURS["forward"])
    arrow(axes, (9, 3.6), (7.05, 2.55), COLOURS["chain"])
    arrow(axes, (-1.05, 2.4), (-1.95, 2.4), COLOURS["chain"])
    arrow(axes, (8, 0.8), (7.05, 0.8), COLOURS["backward"])
    for y, text in ((4.75, "forward, recorded"), (3.15, "reg(loss): gradients of outputs, and squared norms from them"),
                    (1.55, "loss.backward(): up the chain and down the forward, once")):  # fmt: skip
        axes.text(-1.0, y, text, fontsize=8.5, color="0.3")
    axes.set(xlim=(-4.2, 10.2), ylim=(0.2, 5.1))
    axes.axis("off")
    return figure
