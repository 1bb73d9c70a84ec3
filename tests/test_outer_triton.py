"""Triton forms of outer_sum and outer_sqnorm: each where others would be chosen too, and what they are planned by."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import test_ops
from fastreg.kernels import registry
from fastreg.kernels._examples import OFFSETS, normal
from fastreg.kernels._segments import of
from fastreg.kernels.outer_sqnorm.config import LONG_PAIR, SHORT_PAIR, SINGLE_PAIR, WIDE as ONE_ACCUMULATOR, Pair
from fastreg.kernels.outer_sum.config import NARROW, SINGLE, WIDE, Tile
from tolerances import assert_all_close

pytest.importorskip("triton")

from fastreg.kernels.outer_sqnorm.triton import block_table, outer_pairs, outer_rows
from fastreg.kernels.outer_sum.tiles import outer_tiles, shares

poisoned_allocations = test_ops.poisoned_allocations
pytestmark = [pytest.mark.gpu] if test_ops.ON_GPU else []
DEVICE = "cuda" if test_ops.ON_GPU else "cpu"
lengths = st.lists(st.integers(0, 12), min_size=1, max_size=8)
RAGGED = (0, 0, 1, 71, 72, 72, 137)


def cumulated(sizes: list[int]) -> tuple[int, ...]:
    """Offsets of segments of these sizes."""
    return tuple(sum(sizes[:k]) for k in range(len(sizes) + 1))


def drawn(dtype: torch.dtype, offsets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of 67 inputs and 45 outputs."""
    draw = normal(dtype, DEVICE)
    return draw(offsets[-1], 67), draw(offsets[-1], 45)


@pytest.mark.parametrize("tile", [WIDE, NARROW, SINGLE, ONE_ACCUMULATOR], ids=str)
@pytest.mark.parametrize("offsets", [*OFFSETS, RAGGED], ids=str)
def test_tiles_of_any_segments(tile: Tile, offsets: tuple[int, ...]) -> None:
    a, d = drawn(torch.bfloat16, offsets)
    summed = outer_tiles(a, d, of(offsets), tile, summed=True)
    found = test_ops.compare(registry()["outer_sum"], "with the total", (a, d, offsets), summed)
    total, sq = outer_tiles(a, d, of(offsets), tile, summed=False)
    assert total is None
    found += test_ops.compare(registry()["outer_sqnorm"], "without it", (a, d, offsets, False), sq)
    assert_all_close(found)


@pytest.mark.parametrize("pair", [LONG_PAIR, SHORT_PAIR, SINGLE_PAIR], ids=str)
@pytest.mark.parametrize("offsets", [*OFFSETS, RAGGED], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_pairs_of_any_segments(pair: Pair, offsets: tuple[int, ...], bias: bool) -> None:
    a, d = drawn(torch.bfloat16, offsets)
    result = outer_pairs(a, d, of(offsets), bias, pair)
    assert_all_close(test_ops.compare(registry()["outer_sqnorm"], "pairs", (a, d, offsets, bias), result))


@pytest.mark.parametrize("shape", [(3, 2), (600, 5), (7, 2100)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_segments_of_one_or_none(shape: tuple[int, int], bias: bool) -> None:
    draw, offsets = normal(torch.bfloat16, DEVICE), (0, 0, 1, 2, 2, 3, 3)
    a, d = (draw(3, width) for width in shape)
    result = outer_rows(a, d, of(offsets), bias)
    assert_all_close(test_ops.compare(registry()["outer_sqnorm"], "rows", (a, d, offsets, bias), result))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("op_name", ["outer_sum", "outer_sqnorm"])
def test_no_inputs_or_no_outputs(op_name: str, shape: tuple[int, int]) -> None:
    op = registry()[op_name]
    a, d = (torch.ones(5, width, device=DEVICE) for width in shape)
    args = (a, d, [0, 2, 2, 5], *([False] if op_name == "outer_sqnorm" else []))
    (triton,) = (i for i in op.implementations if i.name == "triton")
    found = zip(test_ops.outputs(triton.fn(*args)), test_ops.outputs(op.reference(*args)), strict=True)
    assert all(torch.equal(x, y) for x, y in found)


@given(lengths, st.integers(1, 9))
def test_blocks_cover_every_pair_of_a_segment_once(sizes: list[int], size: int) -> None:
    offsets = cumulated(sizes)
    table, bounds = block_table(offsets, size)
    covered = torch.zeros(offsets[-1], offsets[-1])
    for left, left_rows, right, right_rows, _ in table:
        covered[left : left + left_rows, right : right + right_rows] += 1 if left == right else 2
    together = torch.block_diag(*(torch.ones(n, n) for n in sizes if n)) if offsets[-1] else covered
    assert torch.equal((covered + covered.T) * together, 2 * together)
    assert bounds[-1] == sum(row[1] for row in table)


@given(lengths, st.integers(1, 9))
def test_sums_of_a_segment_lie_between_its_bounds(sizes: list[int], size: int) -> None:
    offsets = cumulated(sizes)
    table, bounds = block_table(offsets, size)
    for left, left_rows, _, _, place in table:
        for row in range(left_rows):
            segment = next(k for k, (start, stop) in enumerate(pairwise(offsets)) if start <= left + row < stop)
            assert bounds[segment] <= place + row < bounds[segment + 1]


@given(lengths, st.integers(1, 9), st.integers(1, 5))
def test_shares_are_runs_of_whole_segments(sizes: list[int], block: int, splits: int) -> None:
    found = shares(of(cumulated(sizes)), block, splits)
    assert 1 <= len(found) <= splits
    assert [first for first, _, _ in found] == [0, *(past for _, past, _ in found[:-1])]
    assert found[-1][1] == len(sizes)
    for first, past, steps in found:
        assert steps == sum(max(1, -(-rows // block)) for rows in sizes[first:past])
