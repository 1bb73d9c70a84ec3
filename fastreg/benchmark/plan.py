"""What the suite measures, as data: parts, models, micro-batch counts, methods, and the curves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastreg.benchmark.method import Suite
from fastreg.benchmark.methods import default_methods
from fastreg.benchmark.presets import PRESETS, Preset, gpt_of, mlp_of
from fastreg.benchmark.run import Cell


@dataclass(frozen=True)
class Group:
    """Cells of one part that measure the same methods.

    Attributes:
        part: what they belong to.
        models: names of presets.
        m: micro-batch counts.
        named: methods beyond those that the part measures by default, in the full plan.
        only: methods in the place of those, where steps are too long for all of them.
        quick: whether ``--quick`` measures this.
        memory: whether peak memory is measured on a CPU, where every method takes a process of its own.
    """

    part: Suite
    models: tuple[str, ...]
    m: tuple[int, ...]
    named: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    quick: bool = False
    memory: bool = False

    def cells(self, quick: bool) -> Iterator[Cell]:
        """One for every model and count."""
        methods = self.only or (*default_methods(self.part), *(() if quick else self.named))
        for model, m in itertools.product(self.models, self.m):
            yield Cell(PRESETS[model], m, tuple(dict.fromkeys(("plain", *methods))), self.part, memory=self.memory)


@dataclass(frozen=True)
class Curve:
    """One size varied, everything else the same.

    Attributes:
        name: model and size.
        values: of the size, increasing.
        point: the preset and the micro-batches at a value.
        quick: whether ``--quick`` measures this.
    """

    name: str
    values: tuple[int, ...]
    point: Callable[[int], tuple[Preset, int]]
    quick: bool = False

    def cells(self) -> Iterator[Cell]:
        """One for every value."""
        for value in self.values:
            preset, m = self.point(value)
            yield Cell(preset, m, CURVE_METHODS, "scaling", self.name, value, memory=False)


# A compiled method would be compiled anew at every point, which takes longer than all that is measured there.
CURVE_METHODS = ("plain", "plain_norms", "exact", "fisher", "m_sam", "sequential", "functorch")
COMPILED = ("plain_compiled", "exact_compiled", "fisher_compiled", "functorch_compiled")
COMPILED_NORMS = ("functorch_norms_compiled", "functorch_micro_norms_compiled")
FEW_NORMS = ("plain_norms", "micro_norms", "sequential_norms", "functorch_norms", "opacus_hooks", "opacus_ghost")

GROUPS: dict[str, tuple[Group, ...]] = {
    "cpu": (
        Group("norms", ("mlp",), (8,), named=COMPILED_NORMS, quick=True),
        Group("norms", ("gpt",), (8,), quick=True),
        Group("norms", ("resnet", "resnet18-bn"), (8,)),
        Group("norms", ("resnet18-gn", "vit-tiny"), (8,), only=FEW_NORMS),
        Group("penalty", ("mlp",), (8,), quick=True, memory=True),
        Group("penalty", ("mlp",), (32,), named=COMPILED),
        Group("penalty", ("gpt",), (8,), named=COMPILED, quick=True, memory=True),
        Group("penalty", ("resnet", "resnet18-gn"), (8,), memory=True),
        Group("penalty", ("resnet18-bn", "vit-tiny"), (8,)),
        Group("penalty", ("resnet",), (32,)),
        *(Group(part, ("mlp",), (8,), quick=True) for part in ("fisher", "regularizers", "monitor", "sam")),
        *(Group(part, ("gpt",), (8,)) for part in ("fisher", "regularizers", "monitor", "sam", "hvp")),
        Group("monitor", ("resnet", "mlp2048"), (8,)),
        Group("sam", ("resnet", "mlp2048"), (16,)),
        Group("hvp", ("mlp",), (8,), named=("hvp_compiled",), quick=True),
        Group("scale", ("gpt",), (8,), memory=True),
    ),
    "cuda": (
        Group("norms", ("mlp2048", "gpt2", "resnet18"), (8,)),
        Group("penalty", ("mlp2048", "gpt2", "resnet18"), (8,), named=COMPILED, quick=True),
        Group("penalty", ("gpt2", "resnet18"), (16,)),
        *(Group(part, ("gpt2", "resnet18"), (8,)) for part in ("fisher", "regularizers", "monitor", "sam", "hvp")),
        *(Group("penalty", (model,), (8,)) for model in ("vit-tiny", "resnet18-bn")),
    ),
}


def _small_gpt(batch: int = 4, **sizes: int) -> Preset:
    return gpt_of(batch, **{"layers": 2, **sizes})


def _gpt2(batch: int = 16, width: int = 768, **sizes: int) -> Preset:
    return gpt_of(batch, width=width, heads=width // 64, **{"vocab": 32768, "context": 512, "layers": 12, **sizes})


CURVES: dict[str, tuple[Curve, ...]] = {
    "cpu": (
        Curve("mlp m", (1, 4, 16, 64, 256), lambda m: (mlp_of(), m), quick=True),
        Curve("mlp micro-batch size", (2, 8, 32, 128), lambda size: (mlp_of(batch=8 * size), 8)),
        Curve("mlp batch", (64, 256, 1024), lambda batch: (mlp_of(batch=batch), batch // 16)),
        Curve("mlp width", (128, 256, 512, 1024, 2048), lambda width: (mlp_of(width=width), 8)),
        Curve("mlp depth", (2, 4, 8, 16), lambda depth: (mlp_of(depth=depth), 8)),
        Curve("gpt m", (1, 2, 4, 8), lambda m: (_small_gpt(8), m)),
        Curve("gpt context", (32, 64, 128, 256), lambda context: (_small_gpt(context=context), 4)),
        Curve("gpt width", (64, 128, 256, 512), lambda width: (_small_gpt(width=width, heads=width // 64), 4)),
        Curve("gpt depth", (1, 2, 4, 8), lambda depth: (_small_gpt(layers=depth), 4)),
    ),
    "cuda": (
        Curve("mlp m", (1, 4, 16, 64, 256), lambda m: (mlp_of(2048, batch=512), m), quick=True),
        Curve("mlp micro-batch size", (8, 32, 128, 512), lambda size: (mlp_of(2048, batch=8 * size), 8)),
        Curve("mlp batch", (128, 512, 2048, 8192), lambda batch: (mlp_of(2048, batch=batch), batch // 32)),
        Curve("mlp width", (512, 1024, 2048, 4096, 8192), lambda width: (mlp_of(width, batch=512), 8)),
        Curve("mlp depth", (2, 4, 8, 16), lambda depth: (mlp_of(2048, depth, batch=512), 8)),
        Curve("gpt m", (1, 2, 4, 8, 16), lambda m: (_gpt2(), m)),
        Curve("gpt context", (128, 256, 512, 1024), lambda context: (_gpt2(context=context), 8)),
        Curve("gpt width", (256, 512, 768, 1024), lambda width: (_gpt2(width=width), 8)),
        Curve("gpt depth", (3, 6, 12, 24), lambda depth: (_gpt2(layers=depth), 8)),
    ),
}


def plan(device: str, quick: bool, parts: Sequence[str] = ()) -> list[Cell]:
    """The cells of the suite: those of the same problem one after another, and curves last.

    Args:
        device: ``"cpu"`` or ``"cuda"``; each has sizes of its own.
        quick: the few that ``--quick`` measures.
        parts: the parts that are wanted; all by default.
    """
    cells = [cell for group in GROUPS[device] if group.quick or not quick for cell in group.cells(quick)]
    cells.sort(key=lambda cell: (list(PRESETS).index(cell.preset.name), cell.m))
    cells += [cell for curve in CURVES[device] if curve.quick or not quick for cell in curve.cells()]
    return [cell for cell in cells if not parts or cell.part in parts]
