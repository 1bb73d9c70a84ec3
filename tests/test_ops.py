"""Every op, implementation, example and dtype against the op's reference in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastreg.kernels import Implementation, Op, registry
from tolerances import Comparison, assert_all_close, perturbed

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Named ones are required: missing, they fail. The reference is what the others are judged by.
EXPECTED = tuple(os.environ.get("FASTREG_TEST_BACKENDS", "reference,native,triton").split(","))
# Triton kernels run compiled where there is a GPU, and in Triton's interpreter elsewhere.
ON_GPU = ("triton", "cuda") if torch.cuda.is_available() else ()


@dataclass(frozen=True)
class Case:
    """One implementation of one op in one dtype."""

    op: Op
    implementation: Implementation
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op.name}-{self.implementation.name}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def device(self) -> str:
        """Where this implementation is tested."""
        return "cuda" if self.implementation.name in ON_GPU else "cpu"

    def examples(self) -> list[tuple[object, ...]]:
        """The examples this implementation accepts."""
        found = self.op.examples(self.dtype, self.device)
        return [args for args in found if self.implementation.why_not(*args) is None]


    def some_examples(self) -> list[tuple[object, ...]]:
        """A few of them where a program of the kernel costs a millisecond, in Triton's interpreter; else all."""
        found = self.examples()
        return found[::5] if self.implementation.name == "triton" and not ON_GPU else found


def cases(names: tuple[str, ...] = EXPECTED) -> list[Case]:
    """Implementations under test; a dtype an implementation never accepts is none of its cases.

    An op that writes into its arguments cannot be given them twice: it has tests of its own.
    """
    every = [
        Case(op, implementation, dtype)
        for op in registry().values()
        for implementation in op.implementations
        if implementation.name in names and "!" not in op.schema
        for dtype in DTYPES
    ]
    return [case for case in every if case.dtype == torch.float32 or case.examples()]


def marked(found: list[Case]) -> list[object]:
    """The cases as parameters, those that need a GPU marked so."""
    return [pytest.param(c, id=str(c), marks=[pytest.mark.gpu] if c.device == "cuda" else []) for c in found]


def outputs(result: object) -> tuple[Tensor, ...]:
    """An op's result as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def converted(args: tuple[object, ...], change: Callable[[Tensor], Tensor]) -> tuple[object, ...]:
    """The arguments with ``change`` applied to every floating tensor."""
    return tuple(change(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def longest_sum(args: tuple[object, ...]) -> int:
    """The longest dimension of the inputs: the terms of one summation loop."""
    return max([1, *(size for x in args if isinstance(x, Tensor) for size in x.shape)])


def compare(op: Op, label: str, args: tuple[object, ...], result: object) -> list[Comparison]:
    """Comparisons of a result with the reference on upcast inputs."""
    wide = converted(args, lambda x: x.double())
    oracle = outputs(op.reference(*wide))
    moved = outputs(op.reference(*converted(wide, perturbed)))
    reduced = longest_sum(args)
    parts = zip(outputs(result), oracle, moved, strict=True)
    return [Comparison(f"{label}[{i}]", *part, reduced) for i, part in enumerate(parts)]


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element left unwritten shows."""
    # On a GPU some torch functions of the references have no deterministic form: that is theirs to say.
    torch.use_deterministic_algorithms(True, warn_only=bool(ON_GPU))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend_name", EXPECTED)
def test_expected_backend_runs_something(backend_name: str) -> None:
    able = [str(case) for case in cases() if case.implementation.name == backend_name and case.examples()]
    assert able, f"{backend_name} is listed in FASTREG_TEST_BACKENDS and runs no example"


@pytest.mark.parametrize("case", marked(cases()))
def test_matches_reference_in_float64(case: Case) -> None:
    examples = case.examples()
    assert examples, f"{case} accepts none of its op's examples: {case.implementation.why_not}"
    found: list[Comparison] = []
    for number, args in enumerate(examples):
        found += compare(case.op, f"example {number}", args, case.implementation.fn(*args))
    assert_all_close(found)


@pytest.mark.parametrize("case", marked(cases(("native",))))
def test_native_matches_reference_with_any_number_of_threads(case: Case, threads: int) -> None:
    found: list[Comparison] = []
    for number, args in enumerate(case.examples()):
        found += compare(case.op, f"example {number}", args, case.implementation.fn(*args))
    assert_all_close(found)


@pytest.mark.parametrize("case", marked(cases()))
def test_accepts_strided_inputs(case: Case) -> None:
    found: list[Comparison] = []
    for number, args in enumerate(case.some_examples()):
        spread = converted(args, lambda x: torch.stack([x, x + 1], dim=-1)[..., 0])
        found += compare(case.op, f"example {number}", args, case.implementation.fn(*spread))
    assert_all_close(found)


@pytest.mark.parametrize("case", marked(cases()))
def test_repeats_bit_for_bit_and_leaves_inputs_alone(case: Case) -> None:
    for args in case.some_examples():
        before = converted(args, torch.clone)
        first, *others = (outputs(case.implementation.fn(*args)) for _ in range(10 if ON_GPU else 2))
        assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
        kept = zip(before, args, strict=True)
        assert all(torch.equal(x, y) for x, y in kept if isinstance(x, Tensor))


@pytest.mark.parametrize("op", registry().values(), ids=lambda op: op.name)
def test_operator_schema_and_fake_implementation(op: Op) -> None:
    for args in op.examples(torch.float32, "cpu")[:6]:
        torch.library.opcheck(op.overload, args, test_utils=("test_schema", "test_faketensor"))


# Shapes beyond the examples: several blocks, chunks, panels and tasks of the native code.


def normal(*shape: int) -> Tensor:
    """Standard normal numbers; the shape is the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


UNEVEN = [0, 100, 900, 900, 901, 1400, 1425]
LARGE: dict[str, list[tuple[object, ...]]] = {
    "outer_sum": [
        (normal(1425, 70), normal(1425, 45), UNEVEN),
        (normal(700, 40), normal(700, 1100), [0, 690, 700]),
        (normal(700, 1100), normal(700, 33), [0, 300, 600, 700]),
        (normal(600, 64), normal(600, 48), list(range(0, 601, 3))),
    ],
    "outer_sqnorm": [
        (normal(1425, 70), normal(1425, 45), UNEVEN, True),
        (normal(600, 200), normal(600, 300), list(range(0, 601, 6)), True),
        (normal(700, 700), normal(700, 530), [0, 40, 40, 190, 400, 700], True),
    ],
    "outer_apply": [
        (normal(600, 200), normal(600, 200), normal(600, 70), list(range(0, 601, 6)), True, None, None),
        (normal(1425, 30), normal(1425, 30), normal(1425, 45), UNEVEN, False, None, None),
    ],
    "affine_sqnorm": [
        (normal(1425, 700, 1), normal(1425, 700, 1), UNEVEN),
        (normal(64, 50, 130), normal(64, 50, 130), [0, 20, 64]),
    ],
    "index_sqnorm": [(torch.arange(1425) ** 2 % 37, normal(1425, 70), UNEVEN)],
    "segment_dot": [(normal(1425, 130), normal(1425, 130), UNEVEN)],
    "normalize": [(normal(900, 300), 1e-5, True)],
    "normalize_backward": [(normal(900, 300), normal(900).exp(), normal(900, 300), True)],
    "normalize_double_backward": [
        (normal(900, 300), normal(900).exp(), normal(900, 300), normal(301, 900)[:300].T, True)
    ],
    "gelu_double_backward": [
        (30 * normal(90000), normal(90000), normal(90000), True),
        (30 * normal(90000), normal(90000), normal(90000), False),
    ],
}


def native_of(op_name: str) -> Implementation:
    """The C++ implementation of an op."""
    (found,) = [i for i in registry()[op_name].implementations if i.name == "native"]
    return found


@pytest.mark.parametrize("op_name", LARGE)
def test_native_large(op_name: str, threads: int) -> None:
    found: list[Comparison] = []
    for number, args in enumerate(LARGE[op_name]):
        found += compare(registry()[op_name], f"large {number}", args, native_of(op_name).fn(*args))
    assert_all_close(found)


def test_native_outer_sum_ignores_the_number_of_threads() -> None:
    args = LARGE["outer_sum"][0]
    before = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(native_of("outer_sum").fn(*args))
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
