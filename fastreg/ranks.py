"""Ranks that train one model on different data: those of DistributedDataParallel, and of ``fully_shard`` (FSDP2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastreg.kernels import multi_sqnorm
from fastreg.sharding import fully_sharded, groups


def axes(model: nn.Module) -> list[dist.ProcessGroup]:
    """The groups of ranks over which gradients are means: one for each dimension of a mesh, none for one process.

    What is summed over all ranks, or comes from the first, is so over each group in turn.
    """
    if isinstance(model, DistributedDataParallel):
        return [model.process_group]
    # One mesh serves them all: ``check_cut`` sees to that.
    cut = groups(fully_sharded(model))
    return cut[0].mesh_info.mesh.get_all_groups() if cut else []


def is_first(model: nn.Module) -> bool:
    """Whether this process is the first among the ranks of the model."""
    return all(group.rank() == 0 for group in axes(model))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, without a graph; the tensor itself if no rank holds another."""
    own = tensor.detach()
    return own.to_local() if hasattr(own, "to_local") else own


def sq_norms(tensors: Sequence[Tensor]) -> Tensor:
    """``||t||^2`` of every tensor, of the whole of those that ranks hold parts of: ``[n]``, float32 or float64.

    Args:
        tensors: at least one; of any dtypes.
    """
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, t in enumerate(tensors):
        alike[t.dtype, getattr(t, "device_mesh", None), getattr(t, "placements", ())].append(number)
    found: dict[int, Tensor] = {}
    for (_, mesh, placements), members in alike.items():
        squared = multi_sqnorm([local(tensors[i]) for i in members])
        for axis, placement in enumerate(placements):
            if not placement.is_replicate():
                dist.all_reduce(squared, group=mesh.get_group(axis))
        if len(members) == len(tensors):
            return squared
        found.update(zip(members, squared.unbind(), strict=True))
    widest = max((one.dtype for one in found.values()), key=lambda dtype: dtype.itemsize)
    return torch.stack([found[i].to(widest) for i in range(len(tensors))])
