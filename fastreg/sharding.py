"""Models whose parameters ``fully_shard`` (FSDP2) has cut: whole ones stand in their place while modules run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import nn

from fastreg.errors import FastregError
from fastreg.session import Session

if TYPE_CHECKING:
    from fastreg.rules.tape import Tape


class Shards:
    """The whole parameters of a model that ``fully_shard`` has cut.

    Args:
        model: the model.
        cut: the modules that ``fully_shard`` was called for.
        parameters: tracked ones; each is replaced here by the whole one as soon as there is one.
        names: of parameters by identity; whole ones are entered here.
    """

    def __init__(
        self, model: nn.Module, cut: list[nn.Module], parameters: list[nn.Parameter], names: dict[int, str]
    ) -> None:
        self.cut, self.parameters, self.names = cut, parameters, names
        numbers = {id(p): number for number, p in enumerate(parameters)}
        self._inner = {numbers.get(id(p)) for module in cut if module is not model for p in module.parameters()}
        self._places = {
            module: [(name, numbers[id(p)]) for name, p in module._parameters.items() if id(p) in numbers]
            for module in model.modules()
        }

    def follow(self, module: nn.Module) -> list[nn.Parameter]:
        """The whole parameters that ``module`` has now."""
        places = [(owner._parameters[name], i) for owner in module.modules() for name, i in self._places.get(owner, ())]
        # A shard is a DTensor in the guise of a parameter.
        whole = [(p, number) for p, number in places if type(p) is nn.Parameter]
        for p, number in whole:
            self.names[id(p)] = self.names[id(self.parameters[number])]
            self.parameters[number] = p
        return [p for p, _ in whole]

    def refresh(self) -> None:
        """Give up whole parameters: those kept from before the last step of the optimizer are not gathered again."""
        for module in self.cut:
            module.reshard()

    def check(self, session: Session, tape: Tape, keeps_outputs: bool) -> None:
        """Refuse a recorded forward whose parameters will not be there, or not met, when its backward needs them."""
        if not session.first_order:
            self._check_kept()
        elif session.directions is not None or session.perturbation is not None:
            # SAM keeps none.
            if keeps_outputs:
                raise FastregError(
                    "reg: method='perturb' must be given a model that fully_shard has not cut, got one that it has "
                    "(method='exact', fastreg.optim.SAM, or DistributedDataParallel)"
                )
            self._check_joined(session, tape)

    def _check_kept(self) -> None:
        # The setting has no public reader; a double backward on parameters that were freed crashes the process.
        groups = [module._get_fsdp_state()._fsdp_param_group for module in self.cut]
        resharding = any(group is not None and group.reshard_after_backward for group in groups)
        if resharding or not all(type(p) is nn.Parameter and p.untyped_storage().size() for p in self.parameters):
            raise FastregError(
                "recording: whole parameters of a model that fully_shard has cut must stay for the double backward, "
                "got one that reshards (fully_shard(..., reshard_after_forward=False) everywhere; every step "
                "model.set_reshard_after_backward(False) before the forward, and True before loss.backward())"
            )

    def _check_joined(self, session: Session, tape: Tape) -> None:
        derived = {lineage.key for _, lineage in tape.lineages.values() if lineage.lift is not None}
        for number in self._inner - {None}:
            key = id(self.parameters[number])
            if key in derived or session.uses[key] > 1:
                raise FastregError(
                    "recording: parameters of a module inside the model that fully_shard was called for must be used "
                    f"once a forward, and whole, got {self.names[key]!r}, which is shared or sliced (fully_shard the "
                    "model, and not that module)"
                )


def fully_sharded(model: nn.Module) -> list[nn.Module]:
    """Its modules that ``fully_shard`` (FSDP2) was called for."""
    # Where this is not loaded there are none, and to load it takes longer than to load fastreg.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
