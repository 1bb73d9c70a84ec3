"""Penalties and monitor in the Trainer of transformers: gradients of its updates against plain float64 autograd."""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastreg
from fastreg.errors import FastregError
from test_distributed import spawn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import GPT2Config, LlamaConfig, TrainerCallback, TrainingArguments, ViTConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastreg.integrations.transformers import (
    MonitoredTrainer,
    RegularizedTrainer,
    RegularizerMixin,
    Trainer,
)

WEIGHT, SIZE, IGNORED = 0.3, 2, -100
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 20}


def precise_norm(self: nn.Module, x: Tensor) -> Tensor:
    """``LlamaRMSNorm.forward`` without its cast to float32."""
    return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def build(kind: str, attention: str = "sdpa", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    options = {"attn_implementation": attention}
    if kind == "gpt2":
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        config = GPT2Config(vocab_size=19, n_positions=8, n_embd=12, n_layer=2, n_head=3, **rates)
        model = transformers.GPT2LMHeadModel._from_config(config, **options)
    elif kind == "llama":
        config = LlamaConfig(vocab_size=19, max_position_embeddings=8, num_key_value_heads=2, **SMALL)
        model = transformers.LlamaForCausalLM._from_config(config, **options)
    else:
        rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
        config = ViTConfig(image_size=8, patch_size=4, num_labels=5, **SMALL, **rates)
        model = transformers.ViTForImageClassification._from_config(config, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.double()


def data(kind: str, samples: int = 18) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    if kind == "vit":
        pixels = torch.randn(samples, 3, 8, 8, generator=draw).double()
        return [{"pixel_values": x, "labels": torch.tensor(i % 5)} for i, x in enumerate(pixels)]
    tokens = torch.randint(19, (samples, 7), generator=draw)
    # Lengths of 3 to 7 tokens: sums over batches differ.
    masks = torch.arange(7) < torch.randint(3, 8, (samples, 1), generator=draw)
    labels = tokens.where(masks, IGNORED)
    labels[:, 0] = IGNORED
    rows = zip(tokens, masks.long(), labels)
    return [dict(zip(("input_ids", "attention_mask", "labels"), row)) for row in rows]


class Watch(TrainerCallback):
    """Weights before every update, and the gradients that the optimizer is given."""

    def __init__(self) -> None:
        self.weights: list[nn.Module] = []
        self.gradients: list[list[Tensor]] = []

    def on_step_begin(self, *_: object, model: nn.Module, **__: object) -> None:
        self.weights.append([p.detach().clone() for p in model.parameters()])

    def on_pre_optimizer_step(self, *_: object, model: nn.Module, **__: object) -> None:
        self.gradients.append([p.grad.clone() for p in model.parameters()])


def make(cls: type, model: nn.Module, samples: list, folder: Path, *, watch: Watch | None = None, **given) -> Trainer:
    """A trainer of five samples a batch; options of TrainingArguments go by ``args``."""
    penalised = {"penalty": fastreg.GradNorm(WEIGHT), "micro_batch_size": SIZE}
    options = {"max_steps": 2, "learning_rate": 0.05, "max_grad_norm": 0.0, "optim": "sgd", "logging_steps": 1}
    options |= {"per_device_train_batch_size": 5, "lr_scheduler_type": "constant", "save_strategy": "no"}
    options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "train_sampling_strategy": "sequential"}
    arguments = TrainingArguments(str(folder), dataloader_pin_memory=False, **options | given.pop("args", {}))
    callbacks = [watch] if watch else []
    given = (penalised if issubclass(cls, RegularizerMixin) else {}) | given
    trainer = cls(model=model, args=arguments, train_dataset=samples, callbacks=callbacks, **given)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def stacked(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Losses of the labels that count, as one vector."""
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").flatten()
    if labels.dim() > 1:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    smoothing = getattr(model, "smoothing", 0.0)
    return F.cross_entropy(
        logits[labels != IGNORED], labels[labels != IGNORED], reduction="none", label_smoothing=smoothing
    )


def explicit(model: nn.Module, samples: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, int]:
    """C, R and the number of labels of one batch, micro-batch by micro-batch."""
    parameters, squared = list(model.parameters()), []
    for start in range(0, len(samples), SIZE):
        mean = token_losses(model, stacked(samples[start : start + SIZE])).mean()
        found = torch.autograd.grad(mean, parameters, create_graph=True, allow_unused=True)
        squared.append(sum(g.square().sum() for g in found if g is not None))
    losses = token_losses(model, stacked(samples))
    return losses.mean(), torch.stack(squared).mean(), len(losses)


def wanted(model: nn.Module, batches: list[list], *, by_tokens: bool = True, weight: float = WEIGHT) -> list[Tensor]:
    """The gradient of ``sum_j f_j (C_j + weight R_j)``."""
    with sdpa_kernel(SDPBackend.MATH):
        found = [explicit(model, batch) for batch in batches]
        total = sum(n for _, _, n in found)
        factors = [n / total if by_tokens else 1 / len(found) for _, _, n in found]
        value = sum(f * (c + weight * r) for f, (c, r, _) in zip(factors, found))
        return list(torch.autograd.grad(value, list(model.parameters())))


def with_weights(model: nn.Module, weights: list[Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    for p, known in zip(model.parameters(), weights, strict=True):
        p.data = known
    return model


def updates(samples: list, accumulated: int, count: int, batch: int = 5) -> Iterator[list[list]]:
    """The batches of every update, in the order of the data."""
    for start in range(count):
        offsets = [(start * accumulated + j) * batch for j in range(accumulated)]
        yield [samples[i : i + batch] for i in offsets]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    """Relative to the whole gradient: some parts of it are zero."""
    size = torch.cat([w.flatten() for w in want]).norm()
    error = torch.cat([(g - w).flatten() for g, w in zip(got, want, strict=True)]).norm()
    assert error <= tolerance * size


def run(kind: str, folder: Path, attention: str = "sdpa", cls: type = RegularizedTrainer, **given: object) -> tuple:
    model, watch = build(kind, attention), Watch()
    untouched = build(kind, "sdpa")
    trainer = make(cls, model, data(kind), folder, watch=watch, **given)
    trainer.train()
    return trainer, watch, untouched


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """Every call of ``train`` collects garbage, and there are a million objects of libraries to look at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the casts to float32 in norms and losses."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", precise_norm)
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit"])
def test_every_update_has_the_gradient_of_the_explicit_sum(kind: str, attention: str, tmp_path: Path) -> None:
    _, watch, model = run(kind, tmp_path, attention)
    # Others' eager attention has its softmax in float32.
    tolerance = 1e-6 if attention == "eager" and kind != "gpt2" else 1e-10
    for step, batches in enumerate(updates(data(kind), 1, 2)):
        want = wanted(with_weights(model, watch.weights[step]), batches)
        assert_close(watch.gradients[step], want, tolerance)
        assert wanted_differs(watch.gradients[step], with_weights(model, watch.weights[step]), batches)


def wanted_differs(got: list[Tensor], model: nn.Module, batches: list[list]) -> bool:
    """Whether the penalty is more than a percent of the gradient, so that the comparison sees it."""
    plain = wanted(model, batches, weight=0.0)
    return sum((g - p).square().sum() for g, p in zip(got, plain)) > 1e-4 * sum(p.square().sum() for p in plain)


@pytest.mark.parametrize(("kind", "accumulated"), [("gpt2", 2), ("gpt2", 3), ("vit", 2)])
def test_accumulated_batches_of_unequal_token_counts(kind: str, accumulated: int, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": accumulated, "max_steps": 1}
    _, watch, model = run(kind, tmp_path, args=options)
    (batches,) = updates(data(kind), accumulated, 1)
    assert_close(watch.gradients[0], wanted(model, batches))


def test_labels_that_the_trainer_counts_in_vain_shrink_loss_and_penalty_alike(tmp_path: Path) -> None:
    samples, watch = data("gpt2"), Watch()
    for sample in samples:
        sample["labels"][0] = 1
    make(RegularizedTrainer, build("gpt2"), samples, tmp_path, watch=watch, args={"max_steps": 1}).train()
    counts = torch.stack([sample["labels"] != IGNORED for sample in samples[:5]])
    share = (counts[:, 1:].sum() / counts.sum()).double()
    assert_close(watch.gradients[0], [share * g for g in wanted(build("gpt2"), [samples[:5]])], 1e-7)


def test_the_last_update_of_an_epoch_has_fewer_batches_and_samples(tmp_path: Path) -> None:
    samples = data("gpt2")
    options = {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1}
    _, watch, model = run("gpt2", tmp_path, args=options)
    last = with_weights(model, watch.weights[1])
    assert_close(watch.gradients[1], wanted(last, [samples[15:18]]))


class Plain(nn.Module):
    """A model that takes no ``num_items_in_batch``: the Trainer divides by the number of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("gpt2")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> object:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_model_that_knows_nothing_of_the_update_has_equal_shares(tmp_path: Path) -> None:
    watch, samples = Watch(), data("gpt2")
    make(RegularizedTrainer, Plain(), samples, tmp_path, watch=watch, args={"gradient_accumulation_steps": 2}).train()
    assert_close(watch.gradients[0], wanted(build("gpt2"), next(updates(samples, 2, 1)), by_tokens=False))


def test_a_loss_function_of_the_users(tmp_path: Path) -> None:
    def loss(outputs: object, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        if num_items_in_batch is None:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    options = {"gradient_accumulation_steps": 2, "max_steps": 1}
    _, watch, model = run("gpt2", tmp_path, compute_loss_func=loss, args=options)
    assert_close(watch.gradients[0], wanted(model, next(updates(data("gpt2"), 2, 1))))


def test_smoothed_labels(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "label_smoothing_factor": 0.2}
    _, watch, model = run("llama", tmp_path, args=options)
    model.smoothing = 0.2
    # The Trainer adds smoothed losses up in float32.
    assert_close(watch.gradients[0], wanted(model, next(updates(data("llama"), 2, 1))), 1e-7)


def test_perturbed_penalties(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 1}
    _, watch, model = run("gpt2", tmp_path, method="perturb", difference="central", args=options)
    batches = next(updates(data("gpt2"), 2, 1))
    assert_close(watch.gradients[0], wanted(model, batches), 1e-5)
    assert wanted_differs(watch.gradients[0], model, batches)


def test_three_steps_are_those_of_a_hand_written_loop(tmp_path: Path) -> None:
    trainer, _, model = run("gpt2", tmp_path, args={"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for (batch,) in updates(data("gpt2"), 1, 3):
        for p, g in zip(model.parameters(), wanted(model, [batch]), strict=True):
            p.grad = g
        optimizer.step()
    assert_close(list(trainer.model.parameters()), list(model.parameters()), 1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if reentrant:
        with pytest.raises(FastregError, match="reentrant"):
            run("gpt2", tmp_path, args=options)
        return
    _, watch, model = run("gpt2", tmp_path, args=options | {"max_steps": 1})
    assert_close(watch.gradients[0], wanted(model, next(updates(data("gpt2"), 1, 1))))


def test_bfloat16_autocast_rounds_as_plain_autograd_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, batches = Watch(), next(updates(data("gpt2"), 1, 1))
    want = wanted(build("gpt2"), batches)
    monkeypatch.undo()
    make(RegularizedTrainer, build("gpt2").float(), data("gpt2"), tmp_path, watch=watch, args={"bf16": True}).train()
    with torch.autocast("cpu", torch.bfloat16):
        plain = wanted(build("gpt2").float(), batches)
    got, plain, want = (torch.cat([g.flatten() for g in found]) for found in (watch.gradients[0], plain, want))
    assert got.dtype == torch.float32
    assert 1e-3 * want.norm() < (got - want).norm() < 1.5 * (plain - want).norm() < 0.1 * want.norm()


def test_logs_have_the_metrics_of_the_last_batch(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer, watch, model = run("gpt2", tmp_path, args=options, eval_dataset=data("gpt2", 4))
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(training) == 2
    for step, batches in enumerate(updates(data("gpt2"), 2, 2)):
        _, penalty, _ = explicit(with_weights(model, watch.weights[step]).eval(), batches[-1])
        assert training[step]["fastreg/grad_norm"] == pytest.approx(penalty.item(), rel=1e-9)
        assert training[step]["fastreg/penalty"] == pytest.approx(WEIGHT * penalty.item(), rel=1e-9)
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert others and not any(name.startswith("fastreg") for entry in others for name in entry)


def test_evaluation_is_the_trainers(tmp_path: Path) -> None:
    results = []
    for cls in (Trainer, RegularizedTrainer):
        trainer = make(cls, build("gpt2", dropout=0.5), data("gpt2"), tmp_path, eval_dataset=data("gpt2", 7))
        results.append([trainer.evaluate()["eval_loss"], trainer.predict(data("gpt2", 7)).predictions])
        assert all(p.grad is None for p in trainer.model.parameters())
    assert results[0][0] == results[1][0] and (results[0][1] == results[1][1]).all()


def test_the_loss_that_is_logged_is_the_trainers(tmp_path: Path) -> None:
    losses = []
    for cls in (Trainer, RegularizedTrainer):
        options = {"gradient_accumulation_steps": 2, "learning_rate": 0.0}
        trainer = make(cls, build("gpt2"), data("gpt2"), tmp_path, args=options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def trained(steps: int, checkpoint: Path | None, folder: str) -> list[Tensor]:
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        penalties = [fastreg.FisherTrace(WEIGHT), fastreg.GradNorm(WEIGHT)]
        given = {"penalty": penalties, "fraction": 0.4, "every": 3, "args": options | {"optim": "adamw_torch"}}
        trainer = make(RegularizedTrainer, build("gpt2", dropout=0.2), data("gpt2", 60), tmp_path / folder, **given)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return list(trainer.model.parameters())

    straight, checkpoint = trained(4, None, "straight"), tmp_path / "halves" / "checkpoint-2"
    trained(2, None, "halves")
    assert all(map(torch.equal, straight, trained(4, checkpoint, "halves")))
    (checkpoint / "fastreg_regularizer_0.pt").unlink()
    assert not all(map(torch.equal, straight, trained(4, checkpoint, "halves")))


def ranks_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    Tensor.float = lambda tensor: tensor
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    watch, options = Watch(), {"gradient_accumulation_steps": 2, "ddp_backend": "gloo", "max_steps": 1}
    options |= {"per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 1}
    make(RegularizedTrainer, build("gpt2"), data("gpt2"), Path(folder), watch=watch, args=options).train()
    monitored = make(MonitoredTrainer, build("gpt2"), data("gpt2"), Path(folder), fraction=1.0, args=options)
    monitored.train()
    names = ("fastreg/grad_norm", "fastreg/noise_trace")
    measured = torch.tensor([monitored.state.log_history[0][name] for name in names], dtype=torch.float64)
    torch.save([*watch.gradients[0], measured], Path(folder) / f"{rank}.pt")


def test_two_processes_with_batches_of_unequal_token_counts(tmp_path: Path) -> None:
    got = spawn(ranks_worker, tmp_path)
    # Batches go to the processes in turn.
    (batches,) = updates(data("gpt2"), 4, 1, batch=3)
    want = wanted(build("gpt2"), batches)
    rows = sample_gradients(build("gpt2"), sum(batches, []))
    expected = torch.stack([rows.mean(0).norm(), rows.var(0).sum()])
    for *one, measured in got:
        assert_close(one, want)
        torch.testing.assert_close(measured, expected, rtol=1e-9, atol=0)
    files = {file.name for file in (tmp_path / "checkpoint-1").glob("fastreg_*")}
    assert files == {f"fastreg_{name}_{rank}.pt" for name in ("regularizer", "monitor") for rank in range(2)}


def test_arguments_are_refused_when_the_trainer_is_built(tmp_path: Path) -> None:
    with pytest.raises(FastregError, match="micro_batch_size must be an integer >= 1, got 0"):
        make(RegularizedTrainer, build("gpt2"), data("gpt2"), tmp_path, micro_batch_size=0)
    with pytest.raises(FastregError, match="method must be 'exact' or 'perturb', got 'guess'"):
        make(RegularizedTrainer, build("gpt2"), data("gpt2"), tmp_path, method="guess")


def test_data_parallel_models_are_refused(tmp_path: Path) -> None:
    trainer = make(RegularizedTrainer, build("gpt2"), data("gpt2"), tmp_path)
    with pytest.raises(FastregError, match="model must not be DataParallel .*torchrun"):
        trainer.compute_loss(nn.DataParallel(trainer.model.train()), stacked(data("gpt2", 3)))


def test_every_new_model_has_a_regularizer_of_its_own(tmp_path: Path) -> None:
    watch = Watch()
    trainer = make(RegularizedTrainer, None, data("gpt2"), tmp_path, watch=watch, model_init=lambda: build("gpt2"))
    models = []
    for _ in range(2):
        trainer.train()
        models.append(trainer.model)
    assert models[0] is not models[1] and trainer.regularizer.model is models[1]
    assert all(map(torch.equal, watch.gradients[0], watch.gradients[2]))
    assert not any(module._forward_pre_hooks for module in models[0].modules())


def several_labels() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A loss that transformers does not divide by num_items_in_batch."""
    model = build("vit")
    model.config.problem_type = "multi_label_classification"
    samples = data("vit")
    targets = torch.rand(len(samples), 5, generator=torch.Generator().manual_seed(1)).double()
    return model, [sample | {"labels": target} for sample, target in zip(samples, targets)]


def test_a_loss_that_ignores_the_update_has_the_weight_that_the_trainer_gives_it(tmp_path: Path) -> None:
    """The Trainer takes it for divided, and descends the sum over batches."""
    model, samples = several_labels()
    watch = Watch()
    make(RegularizedTrainer, model, samples, tmp_path, watch=watch, args={"gradient_accumulation_steps": 2}).train()
    want = wanted(several_labels()[0], next(updates(samples, 2, 1)), by_tokens=False)
    assert_close(watch.gradients[0], [2 * g for g in want])


def test_a_first_batch_without_labels(tmp_path: Path) -> None:
    samples, watch = data("gpt2"), Watch()
    for sample in samples[:5]:
        sample["labels"][:] = IGNORED
    options = {"gradient_accumulation_steps": 2, "max_steps": 1}
    make(RegularizedTrainer, build("gpt2"), samples, tmp_path, watch=watch, args=options).train()
    assert_close(watch.gradients[0], wanted(build("gpt2"), [samples[5:10]]))


def test_a_loss_over_other_labels_needs_counts_of_its_own(tmp_path: Path) -> None:
    class Doubled(RegularizedTrainer):
        def counts(self, inputs: dict[str, Tensor]) -> Tensor:
            return 2 * super().counts(inputs)

    with pytest.raises(FastregError, match=r"mean over labels that count, .*, times their share .*\(override counts\)"):
        run("gpt2", tmp_path, cls=Doubled)


def sample_gradients(model: nn.Module, samples: list[dict[str, Tensor]]) -> Tensor:
    """Of every sample, ``[S, D]``, weighted by its tokens over the mean number of tokens."""
    rows, counts = [], []
    for sample in samples:
        losses = token_losses(model, stacked([sample]))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), list(model.parameters()))]))
        counts.append(len(losses))
    return torch.stack(rows) * len(samples) / sum(counts)


def test_the_monitor_reads_gradients_before_they_are_clipped(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-3, "per_device_train_batch_size": 4}
    monitor = {"metrics": ("noise_trace", "grad_norm", "sample_norms"), "ema": 0.0}
    trainer, watch, model = run("gpt2", tmp_path, cls=MonitoredTrainer, args=options, **monitor)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, batches in enumerate(updates(data("gpt2"), 2, 2, batch=4)):
        rows = sample_gradients(with_weights(model, watch.weights[step]), sum(batches, []))
        assert entries[step]["fastreg/grad_norm"] == pytest.approx(rows.mean(0).norm().item(), rel=1e-9)
        assert entries[step]["fastreg/noise_trace"] == pytest.approx(rows.var(0).sum().item(), rel=1e-9)
        assert "fastreg/sample_norms" not in entries[step]
    assert sum(g.square().sum() for g in watch.gradients[0]).sqrt() == pytest.approx(1e-3, rel=1e-2)


def test_a_resumed_monitor_goes_on_averaging(tmp_path: Path) -> None:
    def logged(steps: int, checkpoint: str | None, folder: str) -> dict[str, float]:
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        given = {"ema": 0.9, "metrics": ("noise_trace",), "args": options}
        trainer = make(MonitoredTrainer, build("gpt2"), data("gpt2", 60), tmp_path / folder, **given)
        trainer.train(resume_from_checkpoint=checkpoint)
        return [entry for entry in trainer.state.log_history if "loss" in entry][-1]["fastreg/noise_trace"]

    straight = logged(4, None, "straight")
    logged(2, None, "halves")
    assert logged(4, str(tmp_path / "halves" / "checkpoint-2"), "halves") == straight


def test_transformers_does_not_take_the_folder_of_kernels_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils.import_utils import is_kernels_available

    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent)
    assert not is_kernels_available.__wrapped__()
    assert sys.modules.pop("kernels").__file__.endswith("kernels/__init__.py")
