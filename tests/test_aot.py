"""The Triton kernels compiled without a GPU, by the command that users have for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fastreg.environment import build_info
from fastreg.kernels import registry
from fastreg.kernels._aot import DTYPES, TARGETS, Compiled

GOOD = Compiled("op", "kernel", "bfloat16", "", 90, 128, 0, 1 << 10, 227 << 10, 4, 1, "wgmma")


def env_kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``fastreg env --kernels`` in a process that compiles: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastreg", "env", "--kernels", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report() -> dict[str, list]:
    """What the command says of every kernel for every target."""
    result = env_kernels("--json")
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)
    assert found["faults"] == []
    assert result.returncode == 0, result.stderr
    return found


@pytest.fixture
def compiled(report: dict[str, list]) -> list[Compiled]:
    """The Triton kernels."""
    return [Compiled(**row) for row in report["triton"]]


def test_every_op_with_triton_kernels_compiles_for_every_target(compiled: list[Compiled]) -> None:
    expected = {
        (op.name, str(dtype).removeprefix("torch."), target)
        for op in registry().values()
        if any(i.name == "triton" for i in op.implementations)
        for dtype in DTYPES
        for target in TARGETS
    }
    assert {(row.op, row.dtype, row.capability) for row in compiled} == expected


def test_nothing_spills_or_overruns_shared_memory(compiled: list[Compiled]) -> None:
    assert [row for row in compiled if row.local or row.shared > row.shared_limit] == []


def test_16_bit_products_run_on_the_tensor_cores(compiled: list[Compiled]) -> None:
    products = [row for row in compiled if row.dots and row.dtype == "bfloat16"]
    assert {row.tensor_cores for row in products if row.capability == 80} == {"mma"}
    assert {row.tensor_cores for row in products if row.capability == 90} == {"wgmma"}


def test_cuda_kernels_are_built_for_every_target_and_do_not_spill(report: dict[str, list]) -> None:
    built = build_info()["_cuda"]
    if not built["built"]:
        assert "nvcc" in built["detail"] or "FASTREG_CUDA=0" in built["detail"]
        assert report["cuda"] == []
        return
    assert {(row["kernel"], row["capability"]) for row in report["cuda"]} >= {
        (f"multi_tensor_kernel<{rule}<float>>", target)
        for rule in ("SqNorm", "Dot", "Axpy", "Sgd", "SgdMomentum", "AdamW")
        for target in TARGETS
    }
    assert [row for row in report["cuda"] if row["local"]] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"local": 8}, "8 bytes per thread in local memory"),
        ({"shared": 300_000}, "300000 bytes of shared memory, the limit is 232448"),
        ({"tensor_cores": "mma"}, "products by mma, not wgmma"),
        ({"tensor_cores": ""}, "products by FMA, not wgmma"),
    ],
)
def test_what_is_amiss_is_said(change: dict[str, object], said: str) -> None:
    assert GOOD.faults() == []
    assert replace(GOOD, **change).faults() == [said]


def test_an_unknown_op_is_refused_with_those_there_are() -> None:
    result = env_kernels("no_such_op")
    assert result.returncode == 1
    assert "outer_sum" in result.stderr and "got no_such_op" in result.stderr
