"""Triton forms of the norm layers: those chosen for large sizes, at small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import test_ops
from fastreg.kernels import _launch, registry
from fastreg.kernels._examples import normal
from fastreg.kernels._segments import of, uniform
from fastreg.kernels.affine_sqnorm.config import CONFIG
from fastreg.kernels.norm_affine.config import (
    BACKWARD,
    DOUBLE_BACKWARD,
    DOUBLE_BACKWARD_SINGLE,
    FORWARD,
    ROUNDS,
    Config,
)
from rule_oracle import PerSample, recorded
from tolerances import assert_all_close

pytest.importorskip("triton")

from fastreg.kernels.affine_sqnorm import triton as affine
from fastreg.kernels.norm_affine import triton as norm

poisoned_allocations = test_ops.poisoned_allocations
pytestmark = [pytest.mark.gpu] if test_ops.ON_GPU else []
DEVICE = "cuda" if test_ops.ON_GPU else "cpu"
NORMS = (
    "norm_affine", "norm_affine_backward", "norm_affine_double_backward",
    "normalize", "normalize_backward", "normalize_double_backward",
)  # fmt: skip
CONFIGS = {"FORWARD": FORWARD, "BACKWARD": BACKWARD, "DOUBLE_BACKWARD": DOUBLE_BACKWARD}
sizes = st.integers(1, 40000)


def triton_of(op_name: str) -> Callable[..., object]:
    """The Triton form of an op."""
    (found,) = [i for i in registry()[op_name].implementations if i.name == "triton"]
    return found.fn


@pytest.fixture(params=["in_runs", "long"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Tiles so small that segments are cut into runs, or that no tile holds what is normalised together."""
    small = {"numbers": 32} if request.param == "in_runs" else {"numbers": 16, "widest": 1}
    for name, config in {**CONFIGS, "DOUBLE_BACKWARD_SINGLE": DOUBLE_BACKWARD_SINGLE}.items():
        monkeypatch.setattr(norm, name, replace(config, **small))
    monkeypatch.setattr(affine, "CONFIG", replace(CONFIG, numbers=16, channels=4))
    yield request.param


@pytest.mark.parametrize("op_name", [*NORMS, "affine_sqnorm"])
def test_forms_for_large_sizes(op_name: str, form: str) -> None:
    op = registry()[op_name]
    found = []
    for number, args in enumerate(op.examples(torch.float32, DEVICE)[::7]):
        found += test_ops.compare(op, f"{form} {number}", args, triton_of(op_name)(*args))
    assert_all_close(found)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("past", [0, 1])
def test_at_and_past_what_a_program_holds(center: bool, past: int) -> None:
    draw, offsets = normal(torch.bfloat16, DEVICE), [0, 2, 2, 3]
    found = []
    for op_name, config in zip(NORMS[:3], CONFIGS.values(), strict=True):
        channels = config.widest + past
        x, weight = draw(3, channels, 1), draw(channels)
        _, mean, rstd = registry()["norm_affine"].reference(x, weight, None, 1, 1e-5, center)
        gradients = [normal(torch.float32, DEVICE)(3, channels) for _ in range(2)]
        args = {
            "norm_affine": (x, weight, weight, 1, 1e-5, center),
            "norm_affine_backward": (x, mean, rstd, weight, draw(*x.shape), offsets, center),
            "norm_affine_double_backward": (
                x, mean, rstd, weight, draw(*x.shape), draw(*x.shape), *gradients, offsets, center,
            ),
        }[op_name]  # fmt: skip
        found += test_ops.compare(registry()[op_name], op_name, args, triton_of(op_name)(*args))
    assert_all_close(found)


def test_a_large_mean_costs_no_digits_of_the_variance(form: str) -> None:
    """The square of a mean of 4096 leaves none of a float32 for a variance of one."""
    x = normal(torch.float32, DEVICE)(2, 300, 1) + 4096
    args = (x, torch.ones(300, device=DEVICE), None, 1, 0.0, True)
    assert_all_close(test_ops.compare(registry()["norm_affine"], form, args, norm.norm_affine(*args)))


@given(sizes, sizes, sizes, st.sampled_from([*CONFIGS.values(), DOUBLE_BACKWARD_SINGLE, CONFIG]))
def test_a_tile_is_no_larger_than_a_program_may_hold(samples: int, channels: int, places: int, config: Config) -> None:
    tile = config.tile(samples, channels, places)
    taken = tile.BLOCK_R * tile.BLOCK_C * tile.BLOCK_P
    assert taken <= max(config.numbers, getattr(config, "widest", 0))
    if isinstance(config, Config):
        assert tile.holds(channels, places) or channels * places > config.widest // 4
        assert tile.BLOCK_R == 1 or tile.holds(channels, places)


@given(st.integers(1, 3000), st.integers(1, 200), st.integers(1, 64))
def test_runs_of_a_segment_have_samples_and_fill_whole_rounds(rows: int, size: int, groups: int) -> None:
    found, tile, programs = of(uniform(rows, size)), BACKWARD.tile(size, 64, 1), 396
    parts = tile.parts(found, groups, programs)
    assert (parts - 1) * tile.BLOCK_R < found.longest
    rounds = parts * found.count * groups / programs
    whole = parts * tile.BLOCK_R >= found.longest
    assert parts == 1 or whole or ROUNDS / (ROUNDS + 1) < rounds <= 1 or ROUNDS <= rounds < 2 * ROUNDS


def test_a_bfloat16_norm_layer_is_one_operation_where_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    net = PerSample(nn.LayerNorm(5)).to(DEVICE, torch.bfloat16)
    x = torch.ones(4, 5, device=DEVICE, dtype=torch.bfloat16)
    assert ("NormAffine" in rules_of(net, x)) == bool(test_ops.ON_GPU)
    monkeypatch.setattr(_launch, "_slower", lambda *_args: None)
    assert "NormAffine" in rules_of(net, x)


def rules_of(net: nn.Module, x: torch.Tensor) -> set[str]:
    """The rules that a forward pass goes through."""
    with recorded(net, 2) as recorder:
        recorder.trace = traced = []
        net(x)
    return {one.rule for one in traced}
