"""Pretraining a GPT with a penalty, SAM or a monitor: one process, or several under torchrun.

    python examples/pretrain.py --regularizer grad_norm
    torchrun --nproc-per-node 8 examples/pretrain.py --preset 1.3b --data tokens.bin --parallel fsdp2 --bf16 \\
        --regularizer sam --checkpoint run --every 500

The preset ``tiny`` learns the bytes of this repository's documentation on one CPU core. The others read a file of
uint16 tokens (vocabulary 50304; learning rates as in Brown et al. 2020, arXiv:2005.14165, table 2.1).

The batch of a step is a function of seed and step, and every rank takes its share of it: ``--resume`` continues bit by
bit, and on another number of ranks the same training. If a rank dies, the others fail in their next exchange with it.

Under ``--parallel fsdp2`` exact penalties keep whole weights from the forward to the end of the backward; all else,
``--method perturb`` among it, gathers them block by block.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastreg
import fastreg.optim
from examples import _text
from examples._options import MODELS, PENALTIES, WHOLE, parse
from fastreg.errors import FastregError
from fastreg.models import GPT
from fastreg.sinks import JSONLSink, Sink, TerminalSink

TIMEOUT = timedelta(minutes=5)
LOGGED = 10


class Trainer:
    """Model, optimizer and regularizer of a run."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.args, self.device = args, device
        self.model = parallel(GPT(MODELS[args.preset]).to(device), args)
        decayed = [[p for p in self.model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False)]
        groups = [{"params": ps, "weight_decay": decay} for ps, decay in zip(decayed, (0.1, 0.0), strict=True)]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
        self.reg = self.sam = self.monitor = None
        if args.regularizer == "sam":
            self.sam = fastreg.optim.SAM(self.optimizer, self.model, args.weight, args.micro_batch_size)
        elif args.regularizer == "monitor":
            self.monitor = fastreg.Monitor(self.model, micro_batch_size=args.micro_batch_size, seed=args.seed)
        elif args.regularizer in PENALTIES:
            self.reg = regularizer(self.model, args)
        self.run = torch.compile(self.model) if args.compile else self.model
        # What a resumed run must have in common with the one that it continues.
        free = ("checkpoint", "every", "resume", "jsonl", "parallel")
        self.settings = {name: str(value) for name, value in vars(args).items() if name not in free}

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over all tokens, and the logits."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            logits = self.run(x)
            return F.cross_entropy(logits.flatten(0, 1), y.flatten()), logits

    def backward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Leave gradients in ``.grad``; the loss, and what the regularizer measured."""

        def plain() -> Tensor:
            loss, _ = self.loss(x, y)
            loss.backward()
            return loss.detach()

        self.optimizer.zero_grad()
        if self.reg is None:
            loss = plain() if self.sam is None else self.sam.backward(plain)
            return loss, {} if self.monitor is None else self.monitor.step()
        loss = self._penalised(x, y)
        loss.backward()
        return loss.detach(), self.reg.metrics

    def _penalised(self, x: Tensor, y: Tensor) -> Tensor:
        if self.args.method == "perturb":
            return self.reg(lambda: self.loss(x, y)[0])
        if self.args.parallel != "fsdp2":
            return self.reg(*self.loss(x, y))
        # A double backward needs the parameters of both its passes; only the second, loss.backward(), may free them.
        self.model.set_reshard_after_backward(False)
        loss = self.reg(*self.loss(x, y))
        self.model.set_reshard_after_backward(True)
        return loss

    def save(self, step: int, rank: int) -> None:
        """Write ``step-...`` in the folder, whole or not at all, in the place of earlier ones."""
        path = self.args.checkpoint / f"step-{step:08d}"
        partial, own = path.with_suffix(".partial"), self.reg or self.monitor
        dcp.save(self._states(), checkpoint_id=partial)
        if rank:
            return
        torch.save({"settings": self.settings, "own": own and own.state_dict()}, partial / "run.pt")
        partial.rename(path)
        for other in set(path.parent.glob("step-*")) - {path}:
            shutil.rmtree(other)

    def load(self) -> int:
        """Continue from the last checkpoint; its step."""
        path = max(self.args.checkpoint.glob(WHOLE))
        run, states = torch.load(path / "run.pt"), self._states()
        if run["settings"] != self.settings:
            raise FastregError(f"pretrain: --resume must come with {run['settings']}, got {self.settings}")
        dcp.load(states, checkpoint_id=path)
        model, optimizer = states.values()
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        if run["own"] is not None:
            (self.reg or self.monitor).load_state_dict(run["own"])
        return int(path.name.removeprefix("step-"))

    def _states(self) -> dict[str, object]:
        return dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer), strict=True))


def parallel(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model on all ranks."""
    if args.parallel == "ddp":
        return DistributedDataParallel(model)
    if args.parallel == "fsdp2":
        exact = args.regularizer in PENALTIES and args.method == "exact"
        for module in (*model.blocks, model):
            fully_shard(module, reshard_after_forward=not exact)
    return model


def regularizer(model: nn.Module, args: argparse.Namespace) -> fastreg.Regularizer:
    """The penalty that was asked for. Ranks draw the same random numbers, so that one state serves them all."""
    fisher = args.regularizer == "fisher"
    penalty = fastreg.FisherTrace(args.weight, args.seed) if fisher else fastreg.GradNorm(args.weight)
    return fastreg.Regularizer(
        model, penalty, micro_batch_size=args.micro_batch_size, method=args.method, seed=args.seed
    )


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a fiftieth of the steps, then a cosine down to a tenth of the peak."""
    warm_up = max(1, steps // 50)
    cosine = math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))
    return peak * (step / warm_up if step < warm_up else 0.55 + 0.45 * cosine)


def train(args: argparse.Namespace, device: torch.device, rank: int, ranks: int) -> Trainer:
    """Train from the start, or from the last checkpoint."""
    config = MODELS[args.preset]
    tokens, trainer = _text.load(args.data, config.vocab, config.context + 1), Trainer(args, device)
    start, since = trainer.load() if args.resume else 0, time.perf_counter()
    with ExitStack() as stack:
        sinks = [stack.enter_context(sink) for sink in logs(args.jsonl, start)] if rank == 0 else []
        for step in range(start + 1, args.steps + 1):
            batch = _text.batch(tokens, args.batch_size, config.context, args.seed * 2**32 + step)
            found = one_step(trainer, step, *(part.chunk(ranks)[rank].to(device) for part in batch))
            if step % LOGGED == 0 or step == args.steps:
                speed = (step - start) * batch[0].numel() / (time.perf_counter() - since)
                values = mean_over_ranks(found) | {"tokens_per_s": speed}
                for sink in sinks:
                    sink.write(step, values)
            if args.checkpoint is not None and (step % args.every == 0 or step == args.steps):
                trainer.save(step, rank)
    return trainer


def one_step(trainer: Trainer, step: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One step of the optimizer; what was measured, as 0-d tensors."""
    lr = rate(step, trainer.args.steps, trainer.args.lr)
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
    loss, measured = trainer.backward(x, y)
    norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    norm = norm.full_tensor() if trainer.args.parallel == "fsdp2" else norm
    return {"loss": loss, "gradient_norm": norm, "lr": torch.tensor(lr), **measured}


def mean_over_ranks(found: dict[str, Tensor]) -> dict[str, float]:
    """Means of 0-d tensors."""
    values = torch.stack([value.detach().double().to(found["loss"].device) for value in found.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(found, values.tolist(), strict=True))


def logs(path: Path | None, start: int) -> list[Sink]:
    """Standard output, and a file of JSON lines, without those that a run wrote after its last checkpoint."""
    if path is not None and path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= start))
    return [TerminalSink(sys.stdout), *([] if path is None else [JSONLSink(path)])]


def main(argv: Sequence[str] | None = None) -> Trainer:
    """Train as the options say, in this process or among those of torchrun."""
    args, rank, ranks = parse(argv)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if args.parallel is None:
        return train(args, device, rank, ranks)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    trainer = train(args, device, rank, ranks)
    dist.destroy_process_group()
    return trainer


if __name__ == "__main__":
    main()
