"""Activation checkpointing for two orders of derivatives: what is run again keeps nothing in between.

``torch.utils.checkpoint`` runs a block again in the first backward. Where that backward is itself differentiated (the
d-chain of an exact penalty), its graph keeps what it ran again. Here a block keeps its inputs and, between the d-chain
and the double backward, the gradient of its outputs: both passes run it again and drop everything at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from fastreg.errors import FastregError
from fastreg.peek import traced
from fastreg.recording import recorder_at_work
from fastreg.repeatable import Call, Form
from fastreg.rerun import Rerun
from fastreg.sharding import fully_sharded

Given = ParamSpec("Given")
Out = TypeVar("Out")


def checkpoint(function: Callable[Given, Out], *args: Given.args, **kwargs: Given.kwargs) -> Out:
    """``function(*args, **kwargs)``, which keeps its tensor arguments alone until a backward runs it again.

    Exact in every backward pass and in its double backward. A block keeps its arguments ``x`` and, between the d-chain
    of an exact penalty and the double backward, the gradient ``d`` of its outputs; besides these, inputs and output
    gradients of operations whose parameters are used several times in the model. Counted in layer products, in units of
    a forward: a plain step takes 4 instead of 3, one with an exact penalty 11 to 12 instead of 6.

    Random numbers and autocast are those of the first run; buffers (batch norm statistics) move once. Hooks of modules
    inside run every time, those of parameters once. It only calls the function where gradients are disabled, in what
    :func:`fastreg.compile` traces, and for gradients of every micro-batch in :mod:`fastreg.curvature` and
    :mod:`fastreg.noise`.

    Args:
        function: a module, a bound method of one, or a ``functools.partial`` of these.
        args, kwargs: tensors and constants, in tuples, lists and dicts. A tensor that needs no gradient is kept too.

    Returns:
        What the function returns: tensors and constants, in tuples, lists and dicts.

    Raises:
        FastregError: ``function`` is of no module; tensors that require grad reach its outputs that are neither
            parameters of the module nor arguments; arguments or results hold something else; the parameters are shards
            (``fully_shard``); the function differentiates.

    Source: Chen et al. 2016 (arXiv:1604.06174), for first derivatives; the second run is derived here.

    Example:
        >>> import torch, fastreg
        >>> block, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
        >>> bool((fastreg.checkpoint(block, x) == block(x)).all())
        True
    """
    given: tuple[Any, ...] = args
    named: dict[str, Any] = kwargs
    run: Any = function
    while isinstance(run, partial):
        given, named, run = (*run.args, *given), {**run.keywords, **named}, run.func
    module, recorder = _module_of(run), recorder_at_work()
    in_leaves = recorder is not None and recorder.tape.session.leaves is not None
    if in_leaves or traced() or not torch.is_grad_enabled():
        return run(*given, **named)
    if fully_sharded(module) and any(type(p) is not nn.Parameter for p in module.parameters()):
        raise FastregError(
            f"checkpoint: parameters of the function's module must be whole, got shards in {type(module).__name__}, "
            "which fully_shard has cut (fastreg.checkpoint_blocks([module]): it then acts inside of what gathers them)"
        )
    form, tensors = Form.of((given, named), "arguments")
    call = Call(module, run, form, tensors, recorder)
    outputs = Rerun.apply(call, *tensors, *call.parameters, None if recorder is None else recorder.tape.root)
    return call.outputs.filled(outputs)


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have each of these modules run by :func:`checkpoint` from now on: ``del block.forward`` undoes it.

    Names of parameters, hooks, copies and pickles stay as they were.

    Args:
        blocks: modules that follow each other: the layers of a transformer, the residual blocks of a network.

    Raises:
        FastregError: one is not a module, or its forward was already replaced.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> fastreg.checkpoint_blocks(model)
        >>> model(torch.randn(3, 4)).shape
        torch.Size([3, 4])
    """
    blocks = list(blocks)
    for number, block in enumerate(blocks):
        if not isinstance(block, nn.Module) or "forward" in vars(block) or block in blocks[:number]:
            raise FastregError(
                "checkpoint_blocks: blocks must be modules with a forward of their class, each given once, got "
                f"{type(block).__name__} at place {number} (del block.forward undoes checkpoint_blocks)"
            )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward)


def _module_of(function: Callable[..., Any]) -> nn.Module:
    module = getattr(function, "__self__", function)
    if not isinstance(module, nn.Module):
        raise FastregError(
            "checkpoint: function must be a module, or a method of one, whose parameters are then known, got "
            f"{getattr(function, '__name__', type(function).__name__)!r} (make it the forward of a module)"
        )
    return module
