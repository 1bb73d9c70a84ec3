"""Look for better launch numbers than the frozen ones: ``tune.py [OP ...]`` prints those that win.

Every kernel folder keeps its numbers in frozen dataclasses, held by name in its ``triton.py``. One field of one of them
is changed at a time, to its neighbours among powers of two; what is then wrong or fails to launch is passed over with
the reason, what wins by more than ``MARGIN`` is printed. Nothing is written: a number changes in ``config.py``, by
hand, with the reason beside it.
"""

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from fastreg.kernels import registry
from gpu_kernels import TOLERANCE, gate
from gpu_timing import interleaved, spread
from op_cases import OpCase, gpu_cases

MARGIN = 1.03
ROUNDS = 15
FACTORS = (0.5, 2)


def configs(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The frozen launch numbers that a module of kernels holds."""
    for name, value in vars(module).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and name.isupper():
            yield name, value


def neighbours(config: object) -> Iterator[object]:
    """The config with one integer halved or doubled."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is int:
            for factor in FACTORS:
                if value * factor >= 1:
                    yield dataclasses.replace(config, **{field.name: int(value * factor)})


def milliseconds(case: OpCase, dtype: torch.dtype) -> float:
    """Median time of the case by Triton; infinite if it is wrong."""
    calls, errors = gate(case, dtype, "cuda")
    if errors["triton"] > TOLERANCE[dtype]:
        return float("inf")
    return spread(interleaved({"triton": calls["triton"]}, ROUNDS)["triton"])["p50"]


def tune(case: OpCase, dtype: torch.dtype, module: ModuleType) -> None:
    """Print every neighbouring config that beats the frozen one on a case."""
    frozen = milliseconds(case, dtype)
    for name, config in list(configs(module)):
        for other in neighbours(config):
            setattr(module, name, other)
            try:
                found = milliseconds(case, dtype)
            except (OutOfResources, CompilationError) as refusal:
                print(f"  {other}: {type(refusal).__name__}")
                continue
            finally:
                setattr(module, name, config)
            if frozen > MARGIN * found:
                print(f"  {name} = {other}: {frozen:.3f} -> {found:.3f} ms", flush=True)


def main() -> None:
    """Tune the named ops, or all."""
    torch.manual_seed(0)
    chosen = sys.argv[1:] or list(registry())
    for case in gpu_cases():
        op = registry()[case.op]
        if case.op not in chosen or "triton" not in [i.name for i in op.implementations]:
            continue
        module = importlib.import_module(op.reference.__module__.replace(".reference", ".triton"))
        for dtype in TOLERANCE:
            print(case.op, case.label, dtype, flush=True)
            tune(case, dtype, module)


if __name__ == "__main__":
    main()
