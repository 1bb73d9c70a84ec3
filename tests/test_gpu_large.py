"""Ops on more than 2^31 elements: their last rows equal the reference's on those rows alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastreg.kernels import registry
from test_ops import compare, outputs
from tolerances import assert_all_close

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device with 60 GB", allow_module_level=True)

pytestmark = pytest.mark.gpu

WIDTH = 4096
ROWS = 2**31 // WIDTH + 3
TAIL = 64
OFFSETS = [0, 1000, ROWS - TAIL, ROWS]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=dtype)


# Arguments by op; what has a dimension of ROWS is cut to its last TAIL rows, offsets to one segment.
LARGE: dict[str, Callable[[], tuple[object, ...]]] = {
    "segment_dot": lambda: (draw(ROWS, WIDTH), draw(ROWS, WIDTH), OFFSETS),
    "outer_sqnorm": lambda: (draw(ROWS, WIDTH), draw(ROWS, 8), OFFSETS, True),
    "outer_apply": lambda: (draw(ROWS, 8), draw(ROWS, 8), draw(ROWS, WIDTH), OFFSETS, False, None, None),
    "segment_sum": lambda: (draw(ROWS, WIDTH), OFFSETS),
    "affine_sqnorm": lambda: (draw(ROWS, WIDTH, 1), draw(ROWS, WIDTH, 1), OFFSETS),
    "index_sqnorm": lambda: (torch.randint(50_000, (ROWS,), device="cuda"), draw(ROWS, WIDTH), OFFSETS),
    "normalize": lambda: (draw(ROWS, WIDTH), 1e-5, True),
    "normalize_backward": lambda: (draw(ROWS, WIDTH), draw(ROWS, dtype=torch.float32).exp(), draw(ROWS, WIDTH), True),
    "gelu_double_backward": lambda: (draw(ROWS, WIDTH), draw(ROWS, WIDTH), draw(ROWS, WIDTH), False),
}


def tail(argument: object) -> object:
    """What of an argument the last rows depend on."""
    if argument is OFFSETS:
        return [0, TAIL]
    return argument[-TAIL:].cpu() if isinstance(argument, Tensor) and argument.shape[0] == ROWS else argument


@pytest.mark.parametrize("op_name", LARGE)
def test_last_rows(op_name: str) -> None:
    op, args = registry()[op_name], LARGE[op_name]()
    whole = op(*args)
    last = tuple(x[-1:] if x.shape[0] == len(OFFSETS) - 1 else x[-TAIL:] for x in outputs(whole))
    assert_all_close(compare(op, op_name, tuple(tail(a) for a in args), tuple(x.cpu() for x in last)))
