"""Squared gradient norms of whole backward passes: those of accumulation, or of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.monitor.sources import Backward, Source, check_passes
from fastreg.recording import batch_size
from fastreg.sharding import Shards, check_cut, fully_sharded


class BackwardSource(Source):
    """Every backward pass is one micro-batch. Works with any model."""

    def __init__(self, model: nn.Module) -> None:
        check_cut(model)
        super().__init__(model)
        self._model, self._samples, self._forwards, self._pass = model, 0, 0, -1
        self._passes: list[tuple[int, dict[int, Tensor]]] = []
        self._handles = [model.register_forward_pre_hook(self._count, with_kwargs=True)]
        self._hooked: set[int] = set()
        cut = fully_sharded(model)
        if cut:
            self._shards = Shards(model, cut, list(self.parameters), dict.fromkeys(map(id, self.parameters), ""))
            self._handles += [module.register_forward_pre_hook(self._follow) for module in cut]
        else:
            self._attach(dict(enumerate(self.parameters)))

    def _follow(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Gradients of one rank are those of whole parameters, which keep their identity once they are there."""
        self._shards.follow(module)
        self._attach(self._shards.whole)

    def _attach(self, parameters: dict[int, nn.Parameter]) -> None:
        for number in parameters.keys() - self._hooked:
            self._handles.append(parameters[number].register_hook(partial(self._square, number)))
        self._hooked |= parameters.keys()

    def _count(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and self._model.training and torch._C._current_graph_task_id() == -1:
            self._samples = batch_size(args, kwargs)
            self._forwards += 1

    def _square(self, number: int, gradient: Tensor) -> None:
        if not self.on or not self._model.training:
            return
        task = torch._C._current_graph_task_id()
        if task != self._pass or not self._passes:
            self._pass = task
            self._passes.append((self._samples, {}))
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=dtype)
        self._passes[-1][1][number] = norm.square()

    def take(self, reduction: Reduction, by_layer: Callable[[Tensor], Tensor]) -> list[Backward]:
        passes, self._passes = self._passes, []
        if reduction.counts is not None:
            raise FastregError("Monitor.step: counts go with micro_batch_size=b, got them with None")
        forwards, self._forwards = self._forwards, max(self._forwards - len(passes), 0)
        check_passes(len(passes), forwards)
        return [self._backward(samples, found, reduction, by_layer) for samples, found in passes]

    def _backward(
        self, samples: int, found: dict[int, Tensor], reduction: Reduction, by_layer: Callable[[Tensor], Tensor]
    ) -> Backward:
        zero = torch.zeros_like(next(iter(found.values())))
        squared = torch.stack([found.get(i, zero) for i in range(len(self.parameters))])
        total = samples if reduction.kind == "sum" else 1
        return Backward(samples, by_layer(squared.unsqueeze(0)) / (reduction.scale * total) ** 2, 1 / samples)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passes.clear()
