"""What a model must not be when fastreg attaches to it, and what must not happen to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _DDPSink

from fastreg.errors import FastregError
from fastreg.graph_walk import trust
from fastreg.recording import attached, compiled
from fastreg.sharding import check_cut, fully_sharded


def check_model(model: object, *, differentiated_twice: bool = True) -> None:
    """Refuse models on which norms or penalties would be wrong without a word.

    Args:
        differentiated_twice: whether a double backward will run; otherwise compiled modules run as they were written
            while they are recorded.
    """
    if not isinstance(model, nn.Module):
        raise FastregError(f"attach: model must be a torch.nn.Module, got {type(model).__name__}")
    if attached(model):
        raise FastregError(
            "attach: model must carry one fastreg recorder at a time, got a second (pass several penalties in a "
            "list, or call remove() on the first)"
        )
    if model._compiled_call_impl is not None:
        raise FastregError(
            f"attach: model must not be compiled in place, got {type(model).__name__} after .compile() (its hooks "
            "would be compiled too: use torch.compile(model))"
        )
    check_cut(model)
    _trust_wrappers(model)
    for name, module in model.named_modules():
        where = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if differentiated_twice and compiled(module):
            raise FastregError(
                f"attach: model must not be compiled, got {where} (torch.compile has no double backward: attach to "
                "the module before torch.compile and train that)"
            )
        if isinstance(module, nn.SyncBatchNorm):
            raise FastregError(
                f"attach: model must not synchronise batch statistics between ranks, got {where} (micro-batches "
                "are normalised by their own statistics: use BatchNorm or GroupNorm)"
            )
        if isinstance(module, DistributedDataParallel) and module.static_graph:
            raise FastregError(
                f"attach: model must not be DistributedDataParallel(static_graph=True), got {where} (with a double "
                "backward its gradients are silently not reduced: drop static_graph)"
            )


def _trust_wrappers(model: nn.Module) -> None:
    """Nodes that tell a wrapper how far a backward is are identities on gradients, whose backward meets no input."""
    if isinstance(model, DistributedDataParallel):
        trust(_DDPSink)
    if fully_sharded(model):
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction

        trust(RegisterPostBackwardFunction)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what happens to the model's buffers (batch norm statistics) inside the block."""
    kept = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before, version in kept:
                if buffer._version != version:
                    buffer.copy_(before)
