"""GPU stage of the passes over tensor lists: GPT-2 small's parameters, against torch's fused and foreach optimizers.

Launched from the host, as in training: what 148 launches cost is part of the figure.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gpu_results
from fastreg.benchmark.presets import PRESETS
from fastreg.kernels import adamw_step_, multi_axpy_, multi_sqnorm, sgd_step_
from gpu_kernels import ROUNDS
from gpu_timing import interleaved, spread

Call = Callable[[], object]


def tensors(count: int, device: str, model: str) -> list[list[Tensor]]:
    """``count`` lists of random tensors shaped as a model's parameters."""
    shapes = [p.shape for p in PRESETS[model].build().parameters()]
    return [[torch.randn(shape, device=device) for shape in shapes] for _ in range(count)]


def torch_step(make: type[torch.optim.Optimizer], ps: list[Tensor], grads: list[Tensor], **options: object) -> Call:
    """A step of torch's own optimizer on copies of the parameters."""
    own = [p.clone().requires_grad_() for p in ps]
    for p, g in zip(own, grads):
        p.grad = g
    return make(own, **options).step


def calls(device: str, model: str) -> dict[str, tuple[int, dict[str, Call]]]:
    """By pass: bytes per parameter that it must move, and the calls that are compared."""
    ps, grads, firsts, seconds = tensors(4, device, model)
    seconds = [v.square_() for v in seconds]
    one = torch.tensor(1e-3, device=device)
    momentum, adamw = {"lr": 1e-3, "momentum": 0.9}, {"lr": 1e-3}
    return {
        "sqnorm": (4, {
            "fastreg": lambda: multi_sqnorm(grads),
            "torch foreach norm": lambda: torch._foreach_norm(grads),
        }),
        "axpy": (12, {
            "fastreg": lambda: multi_axpy_(ps, grads, one),
            "torch foreach add": lambda: torch._foreach_add_(ps, grads, alpha=1e-3),
        }),
        "sgd with momentum, norms": (20, {
            "fastreg": lambda: sgd_step_(ps, grads, firsts, **momentum),
            "torch fused, no norms": torch_step(torch.optim.SGD, ps, grads, fused=True, **momentum),
            "torch foreach, no norms": torch_step(torch.optim.SGD, ps, grads, foreach=True, **momentum),
        }),
        "adamw, norms": (28, {
            "fastreg": lambda: adamw_step_(ps, grads, firsts, seconds, 10, **adamw),
            "torch fused, no norms": torch_step(torch.optim.AdamW, ps, grads, fused=True, **adamw),
            "torch foreach, no norms": torch_step(torch.optim.AdamW, ps, grads, foreach=True, **adamw),
        }),
    }  # fmt: skip


def measure(model: str, bytes_per_s: float) -> list[dict[str, object]]:
    """One row per pass and call."""
    numbers = sum(p.numel() for p in PRESETS[model].build().parameters())
    rows: list[dict[str, object]] = []
    for name, (per_number, compared) in calls("cuda", model).items():
        floor = 1e3 * numbers * per_number / bytes_per_s
        times = interleaved(compared, ROUNDS, graphs=False)
        rows += [
            {"op": name, "case": f"{numbers} parameters", "dtype": "float32", "implementation": call,
             "error": 0.0, "floor_ms": floor, "bound": "memory", "ms": spread(times[call])}
            for call in compared
        ]  # fmt: skip
    return rows


def main() -> None:
    """``gpu_lists.py RESULTS``: add the rows to a results file that has the ceilings; ``check``: run all once here."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results")
    results = parser.parse_args().results
    if results == "check":
        for name, (_, compared) in calls("cpu", "gpt").items():
            for call, run in compared.items():
                run()
                print(f"{name}: {call} runs")
        return
    top = gpu_results.read(Path(results))["ceilings"]
    gpu_results.add(Path(results), "lists", measure("gpt2", top["bytes_per_s"]))


if __name__ == "__main__":
    main()
