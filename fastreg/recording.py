"""Recording: a torch function mode that routes the operations of a model's parameters while the model runs.

The mode is entered and left by removable forward hooks on the model and on every module inside it (not on the model
alone: activation checkpointing re-runs inner modules in the backward, long after the model's own forward, and not on
those with parameters alone: attention has none). Nothing is wrapped, and nothing is written on modules or parameters
but the hooks. Compiled modules run as they were written while they are recorded. ``fully_shard`` (FSDP2) puts whole
parameters in the place of its shards while its modules run: they are tracked from then on, and what its own hooks do is
no part of the recording.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, resolve_name

from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.loss import tensors_in
from fastreg.rules.registry import ROUTES, load_late
from fastreg.rules.tape import Tape
from fastreg.rules.use import Lineage
from fastreg.rules.views import VIEWS
from fastreg.session import Phase, Session, Traced
from fastreg.sharding import Shards, fully_sharded

# What a torch function or a module is called with.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Operation = Callable[..., Any]


class Recorder(TorchFunctionMode):
    """Routes parametrised operations of one model to rules while the model runs.

    Args:
        model: hooks are attached to it and to every module inside it.
        size: samples per micro-batch.
        parameters: the parameters to track.
        active: asked at each forward whether to record it.
        phase: what ordinary backward passes of the recorded graph compute.

    Attributes:
        session: the session of the last recorded forward, or None.
        owner: the Regularizer that it is of, if any.
        shards: the whole parameters of a model that ``fully_shard`` has cut, or None.
        keeps_outputs: set it to have the model's last outputs in ``outputs``, until they are taken away.
        trace: set it to a list to have recorded operations noted there.
        on_open: set it to be called with every new session before anything is recorded in it.
        on_outputs: set it to be called with the session and the model's outputs after every forward of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int,
        parameters: Iterable[nn.Parameter],
        active: Callable[[], bool],
        phase: Phase = Phase.PLAIN,
    ) -> None:
        super().__init__()
        self.model, self.size, self.active, self.phase = model, size, active, phase
        self.parameters = list(parameters)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.session: Session | None = None
        self.owner: object = None
        self.trace: list[Traced] | None = None
        self.keeps_outputs = False
        self.outputs: object = None
        self.on_open: Callable[[Session], None] | None = None
        self.on_outputs: Callable[[Session, object], None] | None = None
        self._tape: Tape | None = None
        self._entered: list[nn.Module | None] = []
        self._cut = fully_sharded(model)
        self.shards = Shards(model, self._cut, self.parameters, self.names) if self._cut else None
        self._paused = False
        self._hooked = list(model.modules())
        self._stance: AbstractContextManager[Any] | None = None
        self._compiled = any(compiled(module) for module in model.modules())
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._inner: list[torch.utils.hooks.RemovableHandle] = []
        self.attach()

    def attach(self) -> None:
        """Attach the hooks."""
        # Hooks inside a compiled module are compiled with it: there they come and go with the recording.
        first = [self.model] if self._compiled else self._hooked
        self._handles += [handle for module in first for handle in self._attach(module)]

    def detach(self) -> None:
        """Take the hooks away; what was recorded stays."""
        for handle in (*self._handles, *self._inner):
            handle.remove()
        self._handles.clear()
        self._inner.clear()

    def _attach(self, module: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        if module in self._cut:
            yield module.register_forward_pre_hook(Hook(self, "pause"), with_kwargs=True, prepend=True)
            yield module.register_forward_hook(Hook(self, "pause"), with_kwargs=True, prepend=True, always_call=True)
        yield module.register_forward_pre_hook(Hook(self, "enter"), with_kwargs=True)
        yield module.register_forward_hook(Hook(self, "leave"), with_kwargs=True, always_call=True)

    def remove(self) -> None:
        """Detach every hook, and drop what was recorded."""
        self.detach()
        self.session = self._tape = self.outputs = None

    def tracked_names(self) -> dict[int, str]:
        """Names of the parameters whose gradients the norms are made of, by identity."""
        return {id(p): self.names.get(id(p), "?") for p in self.parameters if p.requires_grad}

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Forward pre-hook: start or continue recording."""
        self._paused = False
        if not self._entered:
            recorded = torch.is_grad_enabled() and self.active()
            if self._compiled:
                self._attach_inside(recorded)
            if not recorded:
                return
            if self.shards is not None:
                self.shards.follow(module)
            self._open(module, args, kwargs)
            if self._compiled:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self.__enter__()
        elif self.shards is not None:
            whole = self.shards.follow(module)
            assert self._tape is not None
            self._tape.lineages.update((id(p), (p, Lineage(p))) for p in whole if p.requires_grad)
        self._entered.append(module)

    @property
    def last(self) -> Session:
        """The session, where a forward is known to have been recorded."""
        assert self.session is not None
        return self.session

    @property
    def tape(self) -> Tape:
        """What is recorded into."""
        assert self._tape is not None
        return self._tape

    @contextmanager
    def into(self, tape: Tape) -> Iterator[None]:
        """Record into ``tape`` what runs in the block, inside modules or not, in a backward pass too."""
        before, depth, self._tape = self._tape, len(self._entered), tape
        self._entered.append(None)
        try:
            with nullcontext() if depth else self:
                yield
        finally:
            self._tape = before
            del self._entered[depth:]

    def pause(self, module: nn.Module, *_: object) -> None:
        """Hook before and after those of ``fully_shard``, which follow it."""
        self._paused = True
        if not self._entered and module is self.model and torch._C._current_graph_task_id() == -1:
            assert self.shards is not None  # pause is hooked to what it has cut
            self.shards.refresh()

    def _attach_inside(self, recorded: bool) -> None:
        """Hooks on the modules inside a compiled model, while it is recorded and run as it was written."""
        if recorded and not self._inner:
            inside = (module for module in self._hooked if module is not self.model)
            self._inner = [handle for module in inside for handle in self._attach(module)]
        elif not recorded:
            for handle in self._inner:
                handle.remove()
            self._inner.clear()

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, output: object) -> None:
        """Forward hook, also run when the forward raises: stop recording at the outermost module."""
        self._paused = False
        if not self._entered or self._entered[-1] is not module:
            return
        self._entered.pop()
        if not self._entered:
            self.__exit__(None, None, None)
            if self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None
        if module is self.model and torch._C._current_graph_task_id() == -1:
            if self.shards is not None:
                assert self.session is not None and self._tape is not None
                self.shards.check(self.session, self._tape)
            self.outputs = output if self.keeps_outputs else None
            if self.on_outputs is not None:
                assert self.session is not None
                self.on_outputs(self.session, output)

    def _open(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        if torch._C._current_graph_task_id() != -1 and self._tape is not None:
            return
        load_late()
        if isinstance(self.model, DistributedDataParallel) and module is not self.model:
            raise FastregError(
                "recording: a DistributedDataParallel model must be called itself, got a call of a module inside it "
                "(gradients of such a forward are never reduced)"
            )
        samples = batch_size(args, kwargs)
        known = self.session
        if known is not None and known.open and known.micro_batches.samples == samples:
            if module is self.model:
                assert self._tape is not None
                self._tape.forget_derived()
            return
        tracked = [p for p in self.parameters if p.requires_grad]
        if not tracked:
            raise FastregError("recording: the model must have a parameter that requires grad, got none")
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in tracked) else torch.float32
        self.session = session = Session(samples, self.size, dtype, tracked[0].device, self.phase)
        session.trace = self.trace
        if self.on_open is not None:
            self.on_open(session)
        if known is not None and known.open:
            session.earlier = [*(ref for ref in known.earlier if ref() is not None), weakref.ref(known)]
        self._tape = Tape(session, tracked)

    def __torch_function__(
        self, func: Operation, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if self._paused or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        route = ROUTES.get(func)
        tape = self._tape
        assert tape is not None
        first_order = tape.session.first_order
        if route is not None and route.serves(self._tracked(args, kwargs) is not None, first_order):
            try:
                return route.rule(tape, *args, **kwargs)
            except UnsupportedOperation as refusal:
                raise self._unsupported(func, args, kwargs, str(refusal)) from None
        return self._unrouted(func, args, kwargs)

    def _tracked(self, args: Args, kwargs: Kwargs) -> Tensor | None:
        # Not by the property, which torch.compile does not find on a mode.
        assert self._tape is not None
        lineages = self._tape.lineages
        for argument in (*args, *kwargs.values()):
            if id(argument) in lineages:
                return argument
            if type(argument) in (list, tuple):
                for item in argument:
                    if id(item) in lineages:
                        return item
            if type(argument) is nn.Parameter and argument.requires_grad and id(argument) not in self.names:
                raise FastregError(
                    f"recording: parameters must belong to the model when fastreg is attached, got an unknown one of "
                    f"shape {tuple(argument.shape)} (attach after the model is complete)"
                )
        return None

    def _unrouted(self, func: Operation, args: Args, kwargs: Kwargs) -> object:
        source = self._tracked(args, kwargs)
        out = func(*args, **kwargs)
        if source is None:
            return out
        outputs = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if _carries_gradient(t)]
        tape = self._tape
        assert tape is not None
        outputs = [t for t in outputs if id(t) not in tape.lineages]
        if not outputs:
            return out
        isometric = VIEWS.get(func)
        if isometric is None or not args or args[0] is not source:
            raise self._unsupported(func, args, kwargs, "no rule is registered for this function")
        lineage = tape.lineage(source)
        assert lineage is not None
        for i, tensor in enumerate(out if isinstance(out, (tuple, list)) else (out,)):
            step = _step(func, args[1:], kwargs, i if isinstance(out, (tuple, list)) else None)
            tape.derive(tensor, lineage, step, isometric(*args, **kwargs))
        return out

    def _unsupported(self, func: Operation, args: Args, kwargs: Kwargs, reason: str) -> UnsupportedOperation:
        source = self._tracked(args, kwargs)
        lineage = None if self._tape is None else self._tape.lineage(source)
        name = self.names.get(lineage.key, "?") if lineage is not None else "(none)"
        return UnsupportedOperation(
            f"recording: parameter {name!r} must reach an operation with a rule, got "
            f"{resolve_name(func) or func} at {_call_site()}: {reason} (register one with "
            "fastreg.rules.registry.route, or leave the parameter out with parameters=... or requires_grad_(False))"
        )


class Hook:
    """A forward hook of one recorder. Copies and pickles of the model carry an inert one."""

    def __init__(self, recorder: Recorder | None = None, action: str = "") -> None:
        self.recorder, self.action = recorder, action

    def __call__(self, *args: object) -> None:
        if self.recorder is not None:
            getattr(self.recorder, self.action)(*args)

    def __reduce__(self) -> tuple[object, ...]:
        return Hook, ()


def recorder_at_work() -> Recorder | None:
    """The one that records what runs now in this thread."""
    return next((mode for mode in _get_current_function_mode_stack() if isinstance(mode, Recorder)), None)


def compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made this module, or ``module.compile()`` was called."""
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def attached(model: nn.Module) -> list[Recorder]:
    """The live recorders attached to ``model`` or to one of its modules."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    recorders = (hook.recorder for hook in hooks if isinstance(hook, Hook) and hook.recorder is not None)
    return list(dict.fromkeys(recorders))


def _step(func: Operation, rest: Args, kwargs: Kwargs, index: int | None) -> Callable[[Tensor], Tensor]:
    if index is None:
        return lambda p: func(p, *rest, **kwargs)
    return lambda p: func(p, *rest, **kwargs)[index]


def _carries_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def batch_size(args: Args, kwargs: Kwargs) -> int:
    """B, from the first tensor among the arguments of a module."""
    for tensor in tensors_in((*args, *kwargs.values())):
        if tensor.dim():
            return tensor.shape[0]
    raise FastregError(
        "recording: the first module called must take a tensor with the batch along dimension 0, got none"
    )


def _call_site() -> str:
    here, library = str(Path(__file__).parent), str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((here, library)):
            return f"{frame.filename}:{frame.lineno}"
    return "an unknown place"
