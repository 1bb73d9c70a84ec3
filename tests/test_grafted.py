"""Grafted steps: parameters after several steps equal those of plain autograd, in float64."""

from __future__ import annotations

import copy
import json
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg
import oracle
from cases import BY_NAME, CASES, Case
from fastreg.errors import FastregError
from fastreg.optim import SAM, Grafted, LoggedNorm, Magnitude, MicroBatchNorm, UnitNorm
from fastreg.sinks import CSVSink, JSONLSink
from test_distributed import join, problem, spawn

SAMPLES, SIZE, STEPS = 7, 3, 4
NORMS = [0.5, 2.0, 0.25, 3.0]
BASES = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    # Adam divides by its eps what is rounding alone, in front of batch norm: 1e-8 would leave nine digits.
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, eps=1e-4),
}
BUILT: dict[str, Callable[[nn.Module, Path], Magnitude]] = {
    "unit": lambda model, folder: UnitNorm(),
    "logged": lambda model, folder: LoggedNorm(trace(folder)),
    "micro_batch": lambda model, folder: MicroBatchNorm(model, SIZE, seed=0),
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def trace(folder: Path, norms: list[float] = NORMS, every: int = 1) -> Path:
    with CSVSink(folder / "norms.csv") as sink:
        for i, norm in enumerate(norms):
            sink.write(i * every, {"fastreg/loss": 0.0, "fastreg/grad_norm": norm})
    return folder / "norms.csv"


def batch_of(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """Another one of 7 samples every step."""
    inputs, targets = case.batch(SAMPLES + STEPS)
    return inputs[step : step + SAMPLES], targets[step : step + SAMPLES]


def norm_of(gradient: oracle.Gradient) -> Tensor:
    return torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt()


def micro_batches(model: nn.Module, case: Case, batch: tuple[Tensor, Tensor]) -> tuple[oracle.Gradient, Tensor]:
    """The batch's gradient and ||g_k||, one micro-batch after another."""
    each = oracle.micro_batch_gradients(model, case.loss_fn, *batch, SIZE)
    sizes = [len(batch[0][piece]) / len(batch[0]) for piece in oracle.cut(len(batch[0]), SIZE)]
    mean = {name: sum(w * g[name] for w, g in zip(sizes, each, strict=True)) for name in each[0]}
    return mean, torch.stack([norm_of(g) for g in each])


def train(optimizer: Grafted, model: nn.Module, case: Case, steps: range) -> list[Tensor]:
    """Steps of a plain loop; the lengths of the gradients that the base was given."""
    lengths = []
    for step in steps:
        optimizer.zero_grad()
        inputs, targets = batch_of(case, step)
        case.loss_fn(model(inputs), targets).backward()
        optimizer.step()
        lengths.append(norm_of({name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    return lengths


def nearest(norm: Tensor, norms: Tensor) -> Tensor:
    """The entry of ``norms`` that ``norm`` is meant to be."""
    return norms[(norms - norm).abs().argmin()]


def assert_same_parameters(got: nn.Module, want: nn.Module, tolerance: float = 1e-10) -> None:
    for p, q in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


# The formulas


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("name", "magnitude"),
    [
        *((name, magnitude) for name in ("mlp_tanh_no_bias", "residual_conv") for magnitude in BUILT),
        # Micro-batches with statistics of their own: those of the other magnitudes are the whole batch's.
        ("batch_norm_train", "micro_batch"),
    ],
)
def test_parameters_after_some_steps(name: str, magnitude: str, base: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    model, plain = case.model(), case.model()
    optimizer = Grafted(BASES[base](model.parameters()), BUILT[magnitude](model, tmp_path))
    lengths = train(optimizer, model, case, range(STEPS))
    reference = BASES[base](plain.parameters())
    for step in range(STEPS):
        mean, norms = micro_batches(plain, case, batch_of(case, step))
        known = {"unit": torch.ones(1), "logged": torch.tensor(NORMS[step : step + 1]), "micro_batch": norms}
        want = nearest(lengths[step], known[magnitude].double())
        for key, p in plain.named_parameters():
            p.grad = mean[key] * (want / norm_of(mean))
        reference.step()
        torch.testing.assert_close(lengths[step], want, rtol=1e-10, atol=0)
    assert_same_parameters(model, plain)


@pytest.mark.parametrize("case", [c for c in CASES if c.min_group <= 1], ids=lambda c: c.name)
def test_the_norm_is_that_of_one_micro_batch_and_the_direction_that_of_the_batch(case: Case) -> None:
    model = case.model()
    mean, norms = micro_batches(case.model(), case, batch_of(case, 0))
    optimizer = Grafted(torch.optim.SGD(model.parameters(), lr=0.0), MicroBatchNorm(model, SIZE))
    (length,) = train(optimizer, model, case, range(1))
    torch.testing.assert_close(length, nearest(length, norms), rtol=1e-10, atol=0)
    want = {name: g * (length / norm_of(mean)) for name, g in mean.items()}
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


def test_every_micro_batch_is_drawn_as_often() -> None:
    """Three of them, 300 draws: a share of 1/3 has a standard error of 0.027."""
    case = BY_NAME["mlp_tanh_no_bias"]
    model = case.model()
    _, norms = micro_batches(case.model(), case, batch_of(case, 0))
    optimizer = Grafted(torch.optim.SGD(model.parameters(), lr=0.0), MicroBatchNorm(model, SIZE, seed=3))
    lengths = [train(optimizer, model, case, range(1))[0] for _ in range(300)]
    chosen = [int((norms - length).abs().argmin()) for length in lengths]
    drawn = Counter(chosen)
    assert all(abs(drawn[k] / 300 - 1 / 3) < 4 * 0.027 for k in range(3))
    assert len(set(pairwise(chosen))) == 9, "one draw depends on the last"


def test_the_seed_decides() -> None:
    case = BY_NAME["mlp_tanh_no_bias"]

    def lengths(seed: int) -> list[float]:
        model = case.model()
        return [float(x) for x in train(Grafted(sgd(model), MicroBatchNorm(model, 1, seed)), model, case, range(STEPS))]

    assert lengths(0) == lengths(0) != lengths(1)


def test_gradients_of_two_types_have_one_length() -> None:
    model = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False).double()])
    model.append(nn.Linear(2, 2, bias=False).bfloat16())
    before = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), before, strict=True):
        p.grad = g.clone()
    length = sum(float(g.double().square().sum()) for g in before) ** 0.5
    Grafted(sgd(model), UnitNorm()).step()
    for p, g in zip(model.parameters(), before, strict=True):
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 2**-7}[g.dtype]
        torch.testing.assert_close(p.grad, g / length, rtol=tolerance, atol=0)


@pytest.mark.parametrize("iterative", [False, True])
def test_a_zero_gradient_stays_zero(iterative: bool) -> None:
    model = nn.Linear(3, 2).double()
    optimizer = Grafted(sgd(model), MicroBatchNorm(model, 2) if iterative else UnitNorm())
    before = copy.deepcopy(model)
    (model(torch.randn(4, 3).double()) * 0).sum().backward()
    optimizer.step()
    assert_same_parameters(model, before, 0)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


# What the loss was


def test_accumulation_takes_a_micro_batch_of_the_last_backward() -> None:
    case = BY_NAME["mlp_gelu"]
    model = case.model()
    optimizer = Grafted(torch.optim.SGD(model.parameters(), lr=0.0), MicroBatchNorm(model, SIZE))
    batches = [batch_of(case, step) for step in (0, 3)]
    for inputs, targets in batches:
        (case.loss_fn(model(inputs), targets) / 2).backward()
    optimizer.step(scale=0.5)
    found = [micro_batches(case.model(), case, batch) for batch in batches]
    mean = {name: (found[0][0][name] + found[1][0][name]) / 2 for name in found[0][0]}
    got = oracle.collected_gradient(model)
    length = nearest(norm_of(got), found[1][1])
    oracle.assert_same_gradient(got, {name: g * (length / norm_of(mean)) for name, g in mean.items()})


@pytest.mark.parametrize("reduction", ["sum", "counts"])
def test_losses_that_are_no_means_over_samples(reduction: str) -> None:
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), batch_of(case, 0)
    counts = torch.arange(1.0, SAMPLES + 1).double()
    losses, mean_of = case.sample_losses, lambda x, n: (x * n).sum() / n.sum()
    optimizer = Grafted(torch.optim.SGD(model.parameters(), lr=0.0), MicroBatchNorm(model, SIZE))
    if reduction == "sum":
        counts = torch.ones(SAMPLES).double()
        losses(model(inputs), targets).sum().backward()
        optimizer.step(reduction="sum")
    else:
        mean_of(losses(model(inputs), targets), counts).backward()
        optimizer.step(counts=counts)
    plain = case.model()
    each = [mean_of(losses(plain(inputs[s]), targets[s]), counts[s]) for s in oracle.cut(SAMPLES, SIZE)]
    norms = torch.stack([norm_of(oracle.gradient_of(loss, oracle.trainable(plain), False)) for loss in each])
    length = norm_of(oracle.collected_gradient(model))
    torch.testing.assert_close(length, nearest(length, norms), rtol=1e-10, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_and_a_fused_base(fused: bool) -> None:
    case = BY_NAME["mlp_gelu"]
    models = [case.model(torch.float32) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for model, scaled in zip(models, (True, False), strict=True):
        base = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        optimizer = Grafted(base, MicroBatchNorm(model, SIZE, seed=0))
        for step in range(STEPS):
            optimizer.zero_grad()
            inputs, targets = batch_of(case, step)
            loss = case.loss_fn(model(inputs.float()), targets)
            if scaled:
                scaler.scale(loss).backward()
                scaler.step(optimizer, scale=scaler.get_scale())
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
    assert_same_parameters(*models, tolerance=1e-6)


def test_a_step_that_overflowed_is_skipped(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = Grafted(torch.optim.SGD(model.parameters(), lr=0.1, fused=True), LoggedNorm(trace(tmp_path)))
    before, scaler = copy.deepcopy(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.full((4, 3), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    assert_same_parameters(model, before, 0)
    assert optimizer.magnitude.steps == 0


class _Waits(TorchDispatchMode):
    """Refuses to bring a value to the host."""

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_no_value() -> None:
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), batch_of(case, 0)
    optimizer = Grafted(sgd(model), MicroBatchNorm(model, SIZE))
    case.loss_fn(model(inputs), targets).backward()
    with _Waits():
        optimizer.step()
        with pytest.raises(AssertionError):
            float(torch.ones(()))


# The trace


@pytest.mark.parametrize("sink", [CSVSink, JSONLSink])
@pytest.mark.filterwarnings("ignore:Monitor. one micro-batch")
def test_the_trace_of_a_small_batch_run(sink: type, tmp_path: Path) -> None:
    """What a monitor logs is the norm that autograd gives, and what a grafted run then reads, held for a stride."""
    case = BY_NAME["mlp_tanh_no_bias"]
    small, norms = case.model(), []
    with sink(tmp_path / "norms") as file:
        monitor = fastreg.Monitor(small, ("grad_norm",), micro_batch_size=None, every=2, sinks=[file])
        base = sgd(small)
        for step in range(STEPS):
            base.zero_grad()
            inputs, targets = (x[:2] for x in batch_of(case, step))
            loss = case.loss_fn(small(inputs), targets)
            loss.backward()
            norms.append(norm_of({name: p.grad for name, p in small.named_parameters()}))
            monitor.step()
            base.step()
    model = case.model()
    got = train(Grafted(sgd(model), LoggedNorm(tmp_path / "norms", stride=2)), model, case, range(STEPS))
    torch.testing.assert_close(torch.stack(got), torch.stack([norms[t] for t in (0, 0, 2, 2)]), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("stride", "steps"), [(1, (0, 1, 2, 3)), (2, (0, 0, 2, 2)), (3, (0, 0, 0, 3))])
def test_a_stride_reads_the_step_that_was_logged(stride: int, steps: tuple[int, ...], tmp_path: Path) -> None:
    case = BY_NAME["mlp_tanh_no_bias"]
    model = case.model()
    optimizer = Grafted(sgd(model), LoggedNorm(trace(tmp_path), stride=stride))
    got = train(optimizer, model, case, range(STEPS))
    torch.testing.assert_close(torch.stack(got), torch.tensor([NORMS[s] for s in steps]).double())


def test_the_end_of_the_trace_is_an_error_that_leaves_the_parameters(tmp_path: Path) -> None:
    case = BY_NAME["mlp_tanh_no_bias"]
    model = case.model()
    optimizer = Grafted(sgd(model), LoggedNorm(trace(tmp_path, NORMS[:2], every=2), stride=2))
    train(optimizer, model, case, range(STEPS))
    before = copy.deepcopy(model)
    with pytest.raises(FastregError, match=r"must reach step 4, got 2 norms for 2 steps each in .*norms.csv \(stop"):
        train(optimizer, model, case, range(1))
    assert_same_parameters(model, before, 0)


def test_a_step_that_a_resumed_run_logged_again_counts_as_of_then(tmp_path: Path) -> None:
    path = trace(tmp_path, NORMS[:3])
    with CSVSink(path) as sink:
        sink.write(1, {"fastreg/loss": 0.0, "fastreg/grad_norm": 7.0})
    magnitude = LoggedNorm(path)
    assert [magnitude(None) for _ in range(3)] == [0.5, 7.0, 0.25]


def test_rows_of_other_metrics_are_passed_over(tmp_path: Path) -> None:
    rows = [{"step": 0, "x": 1.5}, {"step": 0, "other": None}, {"step": 1, "other": 9.0, "x": 2.5}]
    (tmp_path / "n").write_text("".join(json.dumps(row) + "\n" for row in rows))
    magnitude = LoggedNorm(tmp_path / "n", metric="x")
    assert [magnitude(None), magnitude(None)] == [1.5, 2.5]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("step,a\n0,1.0\n", {"stride": 0}, "stride must be an integer >= 1, got 0"),
        ("step,a\n0,1.0\n", {"stride": True}, "stride must be an integer >= 1, got True"),
        ("step,a\n0,1.0\n", {"metric": "b"}, r"must be one that is logged in .*, got 'b' \(there: \['a', 'step'\]"),
        ("step,a\n0,1.0\n20,1.0\n", {}, "at every multiple of stride=1, got none at step 1 in"),
        ("step,a\n5,1.0\n", {"stride": 5}, "at every multiple of stride=5, got none at step 0 in"),
        ("step,a\n0,1.0\n1,0.", {}, "must end with a whole line"),
        ("", {}, "must end with a whole line"),
        ("step,a\n0,nan\n", {}, "finite norms >= 0, got .*nan"),
        ("step,a\n0,-1.0\n", {}, "finite norms >= 0, got .*-1.0"),
        ("step,a\n0,?\n", {}, "finite norms >= 0, got .*convert"),
        ("epoch,a\n0,1.0\n", {}, "of steps and finite norms >= 0, got KeyError"),
        ('{"step": 0, "a": null}\n', {}, "finite norms >= 0, got .*nan"),
        ('{"step": 0, "a"\n', {}, "must be a CSV or JSON lines file"),
    ],
)
def test_files_that_are_no_trace(text: str, options: dict[str, object], said: str, tmp_path: Path) -> None:
    (tmp_path / "norms").write_text(text)
    with pytest.raises(FastregError, match=said):
        LoggedNorm(tmp_path / "norms", **{"metric": "a"} | options)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FastregError, match="must be a file that a sink has written, got none at"):
        LoggedNorm(tmp_path / "norms")


# The optimizer's side


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("magnitude", ["logged", "micro_batch"])
def test_a_resumed_run_goes_on_as_the_first(magnitude: str, base: str, tmp_path: Path) -> None:
    case, path = BY_NAME["residual_conv"], trace(tmp_path)

    def built(seed: int) -> tuple[Grafted, nn.Module]:
        model = case.model()
        made = LoggedNorm(path) if magnitude == "logged" else MicroBatchNorm(model, 1, seed)
        return Grafted(BASES[base](model.parameters()), made), model

    optimizer, model = built(0)
    train(optimizer, model, case, range(2))
    torch.save([x.state_dict() for x in (model, optimizer, optimizer.magnitude)], tmp_path / "saved")
    train(optimizer, model, case, range(2, STEPS))
    resumed, other = built(1)
    for x, state in zip((other, resumed, resumed.magnitude), torch.load(tmp_path / "saved"), strict=True):
        x.load_state_dict(state)
    train(resumed, other, case, range(2, STEPS))
    assert_same_parameters(other, model, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_as_the_first(copied: Callable[[Grafted], Grafted]) -> None:
    case = BY_NAME["mlp_gelu"]
    model = case.model()
    optimizer = Grafted(sgd(model), MicroBatchNorm(model, 1, seed=0))
    train(optimizer, model, case, range(2))
    other = copied(optimizer)
    assert other.param_groups is other.base.param_groups
    for one in (optimizer, other):
        train(one, one.magnitude.model, case, range(2, STEPS))
    assert_same_parameters(other.magnitude.model, model, 0)


def test_schedulers_hooks_and_the_base_is_shared() -> None:
    case = BY_NAME["mlp_gelu"]
    model = case.model()
    optimizer = Grafted(sgd(model), UnitNorm())
    assert optimizer.param_groups is optimizer.base.param_groups
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    train(optimizer, model, case, range(1))
    scheduler.step()
    assert called == ["pre"]
    assert optimizer.base.param_groups[0]["lr"] == 0.05


def test_a_closure_runs_once_before_the_step() -> None:
    case = BY_NAME["mlp_gelu"]
    models = [case.model() for _ in range(2)]
    inputs, targets = batch_of(case, 0)
    optimizer = Grafted(sgd(models[0]), UnitNorm())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.loss_fn(models[0](inputs), targets)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert torch.equal(loss, case.loss_fn(models[1](inputs), targets))
    train(Grafted(sgd(models[1]), UnitNorm()), models[1], case, range(1))
    assert_same_parameters(*models, tolerance=0)


def test_norms_are_over_the_parameters_of_the_base_and_follow_added_groups() -> None:
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), batch_of(case, 0)
    first, rest = [model[0].weight], list(model.parameters())[1:]
    optimizer = Grafted(torch.optim.SGD(first, lr=0.0), MicroBatchNorm(model, SIZE))
    squares = oracle.sq_norms_by_parameter(case.model(), case.loss_fn, inputs, targets, SIZE)
    for chosen in (["0.weight"], list(squares)):
        model.zero_grad()
        case.loss_fn(model(inputs), targets).backward()
        optimizer.step()
        length = norm_of({name: p.grad for name, p in model.named_parameters() if name in chosen})
        norms = torch.stack([squares[name] for name in chosen]).sum(0).sqrt()
        torch.testing.assert_close(length, nearest(length, norms), rtol=1e-10, atol=0)
        if len(chosen) == 1:
            optimizer.add_param_group({"params": rest})


def test_sam_around_a_grafted_base() -> None:
    case = BY_NAME["mlp_gelu"]
    model, (inputs, targets) = case.model(), batch_of(case, 0)
    plain = SAM(sgd(model), model, rho=0.1, micro_batch_size=SIZE)

    def closure_of(optimizer: SAM) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = case.loss_fn(model(inputs), targets)
            loss.backward()
            return loss

        return closure

    plain.backward(closure_of(plain))
    plain.remove()
    want = oracle.collected_gradient(model)
    want = {name: g / norm_of(want) for name, g in want.items()}
    optimizer = SAM(Grafted(sgd(model), UnitNorm()), model, rho=0.1, micro_batch_size=SIZE)
    optimizer.step(closure_of(optimizer))
    oracle.assert_same_gradient(oracle.collected_gradient(model), want)


def test_without_it_the_model_is_free_again() -> None:
    model = BY_NAME["mlp_gelu"].model()
    optimizer = Grafted(sgd(model), MicroBatchNorm(model, SIZE))
    with pytest.raises(FastregError, match="one fastreg recorder at a time"):
        Grafted(sgd(model), MicroBatchNorm(model, SIZE))
    optimizer.remove()
    Grafted(sgd(model), MicroBatchNorm(model, SIZE)).remove()


def ranks_worker(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    model, x, y = problem(rank)
    parallel = DistributedDataParallel(model)
    optimizer = Grafted(sgd(model), MicroBatchNorm(parallel, 2, seed=rank))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(parallel(x), y).backward()
        optimizer.step()
    torch.save([p.detach() for p in model.parameters()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_take_steps_of_one_length_that_of_a_micro_batch_of_the_first(tmp_path: Path) -> None:
    got = spawn(ranks_worker, tmp_path)
    model, x, y = problem(0)
    _, other_x, other_y = problem(1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        each = oracle.micro_batch_gradients(model, F.cross_entropy, x, y, 2)
        loss = (F.cross_entropy(model(x), y) + F.cross_entropy(model(other_x), other_y)) / 2
        mean = oracle.gradient_of(loss, oracle.trainable(model), False)
        length = norm_of(each[int(torch.randint(len(each), (), generator=draw))])
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.1 * length * mean[name] / norm_of(mean)
    for one, two, p in zip(*got, model.parameters(), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, p.detach(), rtol=1e-10, atol=1e-12)


# What is refused


def test_wrong_arguments() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(FastregError, match=r"base_optimizer must be a torch.optim.Optimizer, got list"):
        Grafted(list(model.parameters()), UnitNorm())
    with pytest.raises(FastregError, match=r"magnitude must be a fastreg.optim.Magnitude, got float \(UnitNorm\(\)"):
        Grafted(sgd(model), 1.0)
    with pytest.raises(FastregError, match=r"must not make gradients of its own, got SAM \(wrap it the other way"):
        Grafted(SAM(sgd(other), other), UnitNorm())
    with pytest.raises(FastregError, match="hold parameters of model alone, got 2 of others"):
        Grafted(sgd(other), MicroBatchNorm(model, 1))
    for size in (0, True, 1.0):
        with pytest.raises(FastregError, match=f"micro_batch_size must be an integer >= 1, got {size}"):
            MicroBatchNorm(model, size)


def test_steps_without_the_backward_they_need() -> None:
    model, x = nn.Linear(2, 2), torch.randn(4, 2)
    with pytest.raises(FastregError, match="gradients must be in .grad, got none"):
        Grafted(sgd(model), UnitNorm()).step()
    optimizer = Grafted(sgd(model), MicroBatchNorm(model, 2))
    for backwards, said in ((0, "got 0"), (2, "got 2"), (1, "got 0")):
        loss = model(x).square().mean()
        for _ in range(backwards):
            loss.backward(retain_graph=True)
        if said == "got 0" and backwards:
            optimizer.step()
        with pytest.raises(FastregError, match=f"must have run since the last step, {said}"):
            optimizer.step()


def test_evaluation_between_backward_and_step_is_not_recorded() -> None:
    model, x = nn.Linear(2, 2), torch.randn(4, 2)
    optimizer = Grafted(sgd(model), MicroBatchNorm(model, 2))
    model(x).square().mean().backward()
    model.eval()
    model(x[:3]).sum()
    optimizer.step()
