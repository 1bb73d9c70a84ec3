"""The regularizer as a guest in somebody's training loop: it changes nothing it was not asked to change."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastreg
import oracle
from cases import BY_NAME
from fastreg.errors import FastregError

WEIGHT = 0.7
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def attached(name: str = "mlp_gelu") -> tuple[fastreg.Regularizer, nn.Module, Tensor, Tensor]:
    """Eight samples in four micro-batches."""
    case = BY_NAME[name]
    model = case.model()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
    return reg, model, *case.batch(8)


def gradient(reg: fastreg.Regularizer, model: nn.Module, x: Tensor, y: Tensor) -> oracle.Gradient:
    """The gradient one step leaves."""
    outputs = model(x)
    reg(F.cross_entropy(outputs, y), outputs).backward()
    return oracle.collected_gradient(model)


def hooks(model: nn.Module) -> int:
    """How many hooks the model's modules and parameters hold."""
    of_modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)
    return of_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_the_model_keeps_its_keys_its_class_and_its_attributes() -> None:
    plain = BY_NAME["gpt_tied"].model()
    reg, model, x, y = attached("gpt_tied")
    outputs = model(x)
    reg(F.cross_entropy(outputs.flatten(0, 1), y.flatten()), outputs).backward()
    assert type(model) is type(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()


def test_remove_leaves_no_hook() -> None:
    reg, model, x, y = attached()
    assert hooks(model) > 0
    gradient(reg, model, x, y)
    reg.remove()
    assert hooks(model) == 0
    outputs = model(x)
    assert type(outputs.grad_fn).__name__ == "AddmmBackward0"
    reg.remove()


def test_remove_spares_the_hooks_of_others() -> None:
    model = BY_NAME["mlp_gelu"].model()
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
    reg.remove()
    model(BY_NAME["mlp_gelu"].batch(4)[0])
    assert calls == [1]
    assert hooks(model) == 1


def plain_gradient(x: Tensor, y: Tensor) -> oracle.Gradient:
    case = BY_NAME["mlp_gelu"]
    return oracle.penalty_gradient(case.model(), case.loss_fn, x, y, len(x), weight=0.0)


def test_disabled_is_the_plain_loss() -> None:
    reg, model, x, y = attached()
    reg.enabled = False
    outputs = model(x)
    loss = F.cross_entropy(outputs, y)
    assert reg(loss, outputs) is loss
    loss.backward()
    got, want = oracle.collected_gradient(model), plain_gradient(x, y)
    assert all(torch.equal(got[name], want[name]) for name in want)
    reg.enabled = True
    assert oracle.relative_error(gradient(reg, model, x, y), want) > 1e-3


def test_evaluation_is_the_plain_loss() -> None:
    reg, model, x, y = attached()
    model.eval()
    outputs = model(x)
    loss = F.cross_entropy(outputs, y)
    assert reg(loss, outputs) is loss
    model.train()
    with torch.no_grad():
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        assert reg(loss, outputs) is loss
    with torch.inference_mode():
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        assert reg(loss, outputs) is loss


def test_validation_between_two_steps_changes_nothing() -> None:
    reg, model, x, y = attached()
    want = gradient(reg, model, x, y)
    model.eval()
    with torch.no_grad():
        model(x[:3])
    model.train()
    got = gradient(reg, model, x, y)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_copies_and_pickles_after_a_step() -> None:
    """While attached the copy is a plain model; after removal the model pickles."""
    reg, model, x, y = attached()
    gradient(reg, model, x, y)
    reg.remove()
    clone = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for other in (clone, loaded):
        assert hooks(other) == 0
        assert torch.equal(other(x), model(x))
        again = fastreg.Regularizer(other, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=2)
        gradient(again, other, x, y)
        assert again.sq_norms.shape == (4,)


def test_a_copy_of_an_attached_model_records_nothing_of_the_original() -> None:
    """An averaged model (`deepcopy` while attached) may run between forward and loss."""
    reg, model, x, y = attached()
    want = gradient(reg, model, x, y)
    average = copy.deepcopy(model)
    outputs = model(x)
    with torch.no_grad():
        average(x[:3])
    reg(F.cross_entropy(outputs, y), outputs).backward()
    got = oracle.collected_gradient(model)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_metrics_are_scalars_without_a_graph() -> None:
    case = BY_NAME["mlp_gelu"]
    model, (x, y) = case.model(), case.batch(7)
    penalties = [fastreg.GradNorm(weight=0.4), fastreg.FisherTrace(weight=0.5, seed=1)]
    reg = fastreg.Regularizer(model, penalties, micro_batch_size=2)
    gradient(reg, model, x, y)
    assert {"fastreg/grad_norm", "fastreg/fisher_trace", "fastreg/penalty"} <= reg.metrics.keys()
    for name, value in reg.metrics.items():
        assert name.startswith("fastreg/")
        assert value.shape == ()
        assert not value.requires_grad
    total = 0.4 * reg.metrics["fastreg/grad_norm"] + 0.5 * reg.metrics["fastreg/fisher_trace"]
    torch.testing.assert_close(reg.metrics["fastreg/penalty"], total)
    assert reg.sq_norms.shape == (4,)
    assert not reg.sq_norms.requires_grad


def test_the_global_random_state_is_untouched() -> None:
    """Dropout masks are those of the run without the penalty, self-check and sampled labels included."""
    case = BY_NAME["mlp_gelu"]
    model, (x, y) = case.model(), case.batch(6)
    model.insert(2, nn.Dropout(0.5))
    penalties = [fastreg.GradNorm(weight=0.4), fastreg.FisherTrace(weight=0.5, seed=1)]
    reg = fastreg.Regularizer(model, penalties, micro_batch_size=2)
    torch.manual_seed(7)
    first = model(x)
    reg(F.cross_entropy(first, y), first).backward()
    second = model(x)
    reg(F.cross_entropy(second, y), second).backward()
    reg.remove()
    torch.manual_seed(7)
    torch.testing.assert_close(model(x), first, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(model(x), second, rtol=1e-14, atol=1e-14)


def test_a_step_repeats_bit_for_bit() -> None:
    first = gradient(*attached("residual_conv"))
    second = gradient(*attached("residual_conv"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_regularizers_on_one_model() -> None:
    """Refused: a list of penalties on one regularizer says the same thing."""
    reg, model, _, _ = attached()
    with pytest.raises(FastregError, match="remove|list"):
        fastreg.Regularizer(model, fastreg.GradNorm(weight=0.1), micro_batch_size=4)
    reg.remove()
    fastreg.Regularizer(model, fastreg.GradNorm(weight=0.1), micro_batch_size=4)


def test_memory_does_not_grow() -> None:
    """Not one tensor more after fifty steps, without the garbage collector's help."""
    reg, model, x, y = attached("transformer_encoder")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(steps: int) -> int:
        for _ in range(steps):
            outputs = model(x)
            reg(F.cross_entropy(outputs, y), outputs).backward()
            optimizer.step()
            optimizer.zero_grad()
        del outputs
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = train(5)
        after = train(50)
    finally:
        gc.enable()
    assert after <= before


@pytest.mark.parametrize("name", ["mlp_gelu", "raw_parameters"])
def test_dropped_forwards_do_not_pile_up(name: str) -> None:
    """Forwards whose loss is never asked for (a warm-up without the penalty) are not kept alive."""
    reg, model, x, y = attached(name)

    def alive(forwards: int) -> int:
        for _ in range(forwards):
            model(x)
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    few, many = alive(5), alive(40)
    assert many <= few
    gradient(reg, model, x, y)


def test_training_follows_the_oracle() -> None:
    """Twenty SGD steps with momentum and decay give the same weights as the loop over micro-batches."""
    case = BY_NAME["residual_conv"]
    model, loop = case.model(), case.model()
    x, y = case.batch(8)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=0.05), micro_batch_size=3)
    ours = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    theirs = torch.optim.SGD(loop.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(20):
        outputs = model(x)
        reg(case.loss_fn(outputs, y), outputs).backward()
        ours.step()
        ours.zero_grad()
        for name, g in oracle.penalty_gradient(loop, case.loss_fn, x, y, 3, weight=0.05).items():
            loop.get_parameter(name).grad = g
        theirs.step()
    for p, q in zip(model.parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("attach_to", ["wrapper", "model"])
def test_distributed_data_parallel_of_one_rank(attach_to: str) -> None:
    case = BY_NAME["mlp_gelu"]
    model, (x, y) = case.model(), case.batch(8)
    want = oracle.penalty_gradient(model, case.loss_fn, x, y, 3, weight=WEIGHT)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapper = DistributedDataParallel(model)
        guest = wrapper if attach_to == "wrapper" else model
        reg = fastreg.Regularizer(guest, fastreg.GradNorm(weight=WEIGHT), micro_batch_size=3)
        for _ in range(2):
            outputs = wrapper(x)
            reg(case.loss_fn(outputs, y), outputs).backward()
            oracle.assert_same_gradient(oracle.collected_gradient(model), want)
    finally:
        dist.destroy_process_group()
