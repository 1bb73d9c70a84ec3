"""Numbers that Python makes anew in every step: constants of an eager step, inputs of a compiled one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Made = TypeVar("Made")
Numbers = list[Callable[[], object]]

# What makes the numbers of the step that is being traced; None while none is.
_tracing: Numbers | None = None


def hosted(make: Callable[[], Made]) -> Made:
    """What ``make`` returns; in a traced step, tensors in the place of its numbers.

    A compiled step calls ``make`` again every time it runs, which keeps counters and generators of Python going, and
    takes what it returns as inputs. Numbers become 0-d tensors on the CPU, which may meet tensors of any device.

    Args:
        make: returns numbers and tensors in tuples, lists or dicts, of the same form every time.
    """
    if _tracing is None:
        return make()
    # Where something is traced, this has been imported; elsewhere it would take a second to.
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, track_tensor_tree

    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    with disable_proxy_modes_tracing():
        leaves, form = tree_flatten(make())
        leaves = [_tensor(leaf) for leaf in leaves]
    for number, leaf in enumerate(leaves):
        if leaf is not None:
            proxy = mode.tracer.create_proxy("placeholder", f"hosted_{len(_tracing)}_{number}", (), {})
            track_tensor_tree(leaf, proxy, constant=None, tracer=mode.tracer)
    _tracing.append(make)
    return tree_unflatten(leaves, form)


@contextmanager
def collected() -> Iterator[Numbers]:
    """Collects what is asked for inside, while a step is traced."""
    global _tracing
    made: Numbers = []
    _tracing = made
    try:
        yield made
    finally:
        _tracing = None


def numbers(made: Numbers) -> list[Tensor]:
    """Those of this step, in the order in which the trace asked for them."""
    found = (_tensor(leaf) for make in made for leaf in tree_leaves(make()))
    return [leaf for leaf in found if leaf is not None]


def gather_placeholders(nodes: list[Node]) -> None:
    """Moves placeholders that were made in the middle of a graph to the others, in their order."""
    last, *rest = [node for node in nodes if node.op == "placeholder"]
    for node in rest:
        last.append(node)
        last = node


def _tensor(leaf: object) -> Tensor | None:
    if leaf is None or isinstance(leaf, Tensor):
        return leaf
    return torch.tensor(leaf, dtype=torch.int64 if isinstance(leaf, int) else torch.float64)
