"""Models whose parameters ``fully_shard`` (FSDP2) has cut: whole ones stand in their place while modules run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastreg.errors import FastregError
from fastreg.session import Session

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    from fastreg.rules.tape import Tape

# A module with what ``fully_shard`` gave it: an FSDPModule and an nn.Module, which Python has no type for.
Cut = Any


class Shards:
    """The whole parameters of a model that ``fully_shard`` has cut.

    Args:
        model: the model.
        cut: the modules that ``fully_shard`` was called for.
        parameters: tracked ones; each is replaced here by the whole one as soon as there is one.
        names: of parameters by identity; whole ones are entered here.
    """

    def __init__(
        self, model: nn.Module, cut: list[Cut], parameters: list[nn.Parameter], names: dict[int, str]
    ) -> None:
        self.cut, self.parameters, self.names = cut, parameters, names
        self._exchanging = set(cut)
        numbers = {id(p): number for number, p in enumerate(parameters)}
        inner = (id(p) for module in cut if module is not model for p in module.parameters())
        self._inner = {numbers[key] for key in inner if key in numbers}
        self._places = {
            module: [(name, numbers[id(p)]) for name, p in module._parameters.items() if id(p) in numbers]
            for module in model.modules()
        }

    def follow(self, module: nn.Module) -> list[nn.Parameter]:
        """The whole parameters that there are in ``module`` since it was entered."""
        if module not in self._exchanging:
            return []
        places = [(owner._parameters[name], i) for owner in module.modules() for name, i in self._places.get(owner, ())]
        # A shard is a DTensor in the guise of a parameter.
        whole = [(p, number) for p, number in places if type(p) is nn.Parameter]
        for p, number in whole:
            self.names[id(p)] = self.names[id(self.parameters[number])]
            self.parameters[number] = p
        return [p for p, _ in whole]

    @property
    def whole(self) -> dict[int, nn.Parameter]:
        """Those that have been whole so far, by number."""
        return {number: p for number, p in enumerate(self.parameters) if type(p) is nn.Parameter}

    def refresh(self) -> None:
        """Give up whole parameters: those kept from before the last step of the optimizer are not gathered again."""
        for module in self.cut:
            module.reshard()

    def gradients(
        self, total: Tensor, leaves: Sequence[Tensor], by: Sequence[nn.Parameter], keep: bool
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """``grad total`` by leaves, and by the shards ``by`` its mean over ranks; ``.grad`` stays as it is.

        Whole gradients live only until ranks have exchanged them, so there is no :func:`torch.autograd.grad`.
        """
        whole = [p for p in self.whole.values() if p.requires_grad]
        with swapped([(t, "grad", None) for t in (*leaves, *by)]), swapped(self._reducing_at_once()):
            torch.autograd.backward(total, inputs=[*leaves, *whole], retain_graph=keep)
            return [leaf.grad for leaf in leaves], [p.grad for p in by]

    def waiting(self) -> AbstractContextManager[None]:
        """Backwards inside form no gradients, and leave those that wait to be exchanged by ranks alone."""
        return swapped([(group, "reduce_grads", False) for group in groups(self.cut)])

    def _reducing_at_once(self) -> Iterator[tuple[object, str, object]]:
        """What makes backwards exchange their gradients, and those alone, however the model is set to accumulate."""
        for module in self.cut:
            yield module._get_fsdp_state()._state_ctx, "is_last_backward", True
        for group in groups(self.cut):
            yield from ((group, name, True) for name in ("reduce_grads", "all_reduce_grads"))
            yield group, "_partial_reduce_output", None
            for p in (p for p in group.fsdp_params if hasattr(p, "_unsharded_param")):
                yield p, "unsharded_accumulated_grad", None
                yield p._unsharded_param, "grad", None

    def check(self, session: Session, tape: Tape) -> None:
        """Refuse a recorded forward whose parameters will not be there, or not met, when its backward needs them."""
        if not session.first_order:
            self._check_kept()
        else:
            self._check_joined(session, tape)

    def _check_kept(self) -> None:
        # A double backward on parameters that were freed crashes the process.
        resharding = any(group.reshard_after_backward for group in groups(self.cut))
        if resharding or not all(type(p) is nn.Parameter and p.untyped_storage().size() for p in self.parameters):
            raise FastregError(
                "recording: whole parameters of a model that fully_shard has cut must stay for the double backward, "
                "got one that reshards (fully_shard(..., reshard_after_forward=False) everywhere; every step "
                "model.set_reshard_after_backward(False) before the forward, and True before loss.backward())"
            )

    def _check_joined(self, session: Session, tape: Tape) -> None:
        # These are put together when the whole backward has run, and their module has given its parameters up.
        sliced = {lineage.key for _, lineage in tape.lineages.values() if lineage.lift is not None}
        adaptive = session.directions is not None and session.directions.adaptive
        for number in self._inner:
            key = id(self.parameters[number])
            if key in sliced or (adaptive and session.uses[key] > 1):
                raise FastregError(
                    "recording: parameters of a module inside the model that fully_shard was called for must be used "
                    f"whole, and by adaptive SAM once a forward, got {self.names[key]!r}, which is sliced or shared "
                    "(fully_shard the model, and not that module)"
                )


def groups(cut: Iterable[Cut]) -> list[FSDPParamGroup]:
    """What ``fully_shard`` keeps of the parameters of each module; it has no public reader."""
    found = (module._get_fsdp_state()._fsdp_param_group for module in cut)
    return [group for group in found if group is not None]


@contextmanager
def swapped(values: Iterable[tuple[object, str, object]]) -> Iterator[None]:
    """Attributes have other values inside, and afterwards those from before."""
    kept = []
    for owner, name, value in values:
        kept.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(kept):
            setattr(owner, name, value)


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Its parameters, as an optimizer has them: a model that ``fully_shard`` has cut gives whole ones up for it."""
    for module in fully_sharded(model):
        module.reshard()
    return list(model.parameters())


def fully_sharded(model: nn.Module) -> list[Cut]:
    """Its modules that ``fully_shard`` (FSDP2) was called for."""
    # Where this is not loaded there are none, and to load it takes longer than to load fastreg.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def check_cut(model: nn.Module) -> None:
    """Refuse parameters that ranks hold parts of in another way than ``fully_shard``'s, or not all of them."""
    parameters, cut = own_parameters(model), fully_sharded(model)
    ours = {id(p) for module in cut for p in module.parameters()}
    meshes = {p.device_mesh for p in parameters if hasattr(p, "device_mesh")}
    for name, p in model.named_parameters():
        placements = getattr(p, "placements", None)
        parts = sum(not placement.is_replicate() for placement in placements or ())
        if parts > 1 or (placements is not None and id(p) not in ours):
            raise FastregError(
                f"attach: parameters must be cut by fully_shard alone, got {name!r} placed as {placements} (ranks "
                "must have whole samples and whole layers: use fully_shard in place of tensor parallelism)"
            )
        if len(meshes) > 1 or (cut and p.requires_grad and placements is None):
            raise FastregError(
                f"attach: fully_shard must cut all parameters, on one mesh, got {name!r} and {len(meshes)} meshes "
                "(call it for the model too, with the mesh of its modules, and freeze what it ignores)"
            )
