"""A call that can be made again: its function, the form of its arguments, and what surrounded it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastreg.errors import FastregError
from fastreg.graph_walk import leaves_of
from fastreg.recording import Recorder
from fastreg.rules.tape import Tape
from fastreg.session import Session

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, slice, torch.dtype, torch.device, torch.Size)


class Form(NamedTuple):
    """Nested values without their tensors."""

    spec: TreeSpec
    leaves: tuple[object, ...]

    @staticmethod
    def of(values: object, what: str) -> tuple[Form, list[Tensor]]:
        """The form and the tensors, whose places hold the class.

        Raises:
            FastregError: there is something else in them, which could hold tensors, or another state the second time.
        """
        leaves, spec = tree_flatten(values)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_CONSTANTS)):
                raise FastregError(
                    f"checkpoint: {what} must be tensors and constants in tuples, lists and dicts, got a "
                    f"{type(leaf).__name__} (a cache of keys and values: use_cache=False; a class of yours: "
                    "torch.utils._pytree.register_dataclass)"
                )
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return Form(spec, tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)), tensors

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The values with these tensors."""
        remaining = iter(tensors)
        return tree_unflatten([next(remaining) if leaf is Tensor else leaf for leaf in self.leaves], self.spec)


class Ran(NamedTuple):
    """One run with a graph: leaves of its own in the place of the arguments, and what depends on them."""

    leaves: list[Tensor]
    outputs: list[Tensor]


class Surroundings:
    """Random numbers and autocast as they are now, for the devices of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._devices = sorted({t.device.index for t in tensors if t.is_cuda})
        self._random = torch.get_rng_state(), [torch.cuda.get_rng_state(index) for index in self._devices]
        kinds = ["cpu", "cuda"] if self._devices else ["cpu"]
        self._autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
        self._cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As they were, for the block."""
        with ExitStack() as stack:
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self._cached))
            stack.enter_context(torch.random.fork_rng(self._devices))
            torch.set_rng_state(self._random[0])
            for index, state in zip(self._devices, self._random[1], strict=True):
                torch.cuda.set_rng_state(state, index)
            yield


class Call:
    """One call of a block: what running it again needs beside its tensors.

    Args:
        module: what the function is of; its buffers move in the first run alone.
        function: what is run.
        form: of ``(args, kwargs)``.
        tensors: those in it.
        recorder: the recorder at work, or None.

    Attributes:
        count: how many tensors are among the arguments.
        parameters: those of the module that require grad.
        session: that of the recorded forward which the call is part of, or None.
        outputs: the form of what it returned.
        derived: numbers of the arguments that derive from a parameter alone.
    """

    def __init__(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        form: Form,
        tensors: list[Tensor],
        recorder: Recorder | None,
    ) -> None:
        self.parameters, self.count = [p for p in module.parameters() if p.requires_grad], len(tensors)
        self.session: Session | None = None
        self.outputs = form
        self._module, self._function, self._form, self._recorder = module, function, form, recorder
        self._surroundings = Surroundings([*tensors, *self.parameters])
        if recorder is not None:
            self._tape, self.session = recorder.tape, recorder.tape.session
        self._lineages = [None if recorder is None else self._tape.lineage(t) for t in tensors]
        self.derived = [number for number, lineage in enumerate(self._lineages) if lineage is not None]

    def again(self, tensors: Sequence[Tensor], session: Session | None) -> Ran:
        """Run it as it first ran, recorded in ``session``."""
        with self._surroundings.restored(), _spare_buffers(self._module):
            ran = self.run(tensors, session)
        if session is not None and session.inspect is not None:
            session.inspect(ran.outputs, session)
        return ran

    def run(self, tensors: Sequence[Tensor], session: Session | None) -> Ran:
        """Run it with a graph, recorded in ``session``."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors[: self.count]]
            # Not leaves: what the function hooks to its arguments could not look at the engine's plan.
            arguments = [t.view_as(t) if t.requires_grad else t for t in leaves]
            args, kwargs = self._form.filled(arguments)
            tape = None if session is None else self._part(arguments, session)
            with nullcontext() if tape is None or self._recorder is None else self._recorder.into(tape):
                result = self._function(*args, **kwargs)
        self.outputs, outputs = Form.of(result, "results")
        if tape is not None and any(tape.lineage(out) is not None for out in outputs):
            raise FastregError(
                "checkpoint: results must depend on samples, got one of a parameter alone (leave that module as it is)"
            )
        return Ran(leaves, outputs)

    def refuse_captured(self, ran: Ran) -> None:
        """Gradients by what reaches the outputs otherwise than as an argument or a parameter would be lost."""
        known = {id(t) for t in (*ran.leaves, *self.parameters)}
        if self.session is not None:
            known.add(id(self.session.probe))
        for leaf in leaves_of(ran.outputs):
            if id(leaf) not in known:
                raise FastregError(
                    "checkpoint: tensors that require grad must be parameters of the function's module, or arguments, "
                    f"got another one of shape {tuple(leaf.shape)} (pass it as an argument)"
                )

    def _part(self, arguments: list[Tensor], session: Session) -> Tape:
        """The tape for one run; an argument that derives from a parameter alone still does inside."""
        tape = copy(self._tape)
        known = {id(t): (t, lineage) for t, lineage in zip(arguments, self._lineages) if lineage is not None}
        tape.session, tape.lineages = session, {**tape.lineages, **known}
        tape.root = session.probe.view_as(session.probe)
        return tape


@contextmanager
def _spare_buffers(module: nn.Module) -> Iterator[None]:
    """Put copies in the place of its buffers: batch norm moves them, which no version of theirs would tell."""
    places = [(m._buffers, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    for buffers, name, buffer in places:
        buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for buffers, name, buffer in places:
            buffers[name] = buffer
