"""Outputs of models that Accelerate has prepared.

Nothing else is needed: call ``reg`` on the loss within ``accelerator.accumulate`` and give the result to
``accelerator.backward``, which divides loss and penalty alike.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastreg.errors import FastregError

if importlib.util.find_spec("accelerate") is None:
    raise FastregError(
        "fastreg.integrations.accelerate: accelerate must be installed, got no such package "
        "(pip install 'fastreg[integrations]')"
    )

from accelerate.utils import extract_model_from_parallel
from accelerate.utils.operations import ConvertOutputsToFp32


@contextmanager
def own_outputs(model: nn.Module) -> Iterator[list[Any]]:
    """The list in which a model's outputs are left as they were before wrappers copied them.

    Accelerate copies them under mixed precision, DistributedDataParallel with ``find_unused_parameters=True``. The loss
    of a model that computes its own does not depend on the copies: give ``reg`` these.

    Args:
        model: prepared or not.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> with own_outputs(model) as outputs:
        ...     result = model(torch.ones(4, 3))
        >>> outputs[0] is result
        True
    """
    inner = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    kept: list[Any] = []
    cast = getattr(inner.forward, "__wrapped__", None)
    if not isinstance(cast, ConvertOutputsToFp32):
        hook = inner.register_forward_hook(lambda *call: kept.append(call[-1]))
        try:
            yield kept
        finally:
            hook.remove()
        return
    forward = cast.model_forward
    cast.model_forward = _keeping(forward, kept)
    try:
        yield kept
    finally:
        cast.model_forward = forward


def _keeping(forward: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        kept.append(forward(*args, **kwargs))
        return kept[-1]

    return run
