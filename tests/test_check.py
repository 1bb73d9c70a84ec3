"""``fastreg.check`` and its command: the report, and what it refuses."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastreg
from fastreg.cli import main
from fastreg.errors import FastregError, UnsupportedOperation

ROOT = Path(__file__).resolve().parent.parent


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, generator=draw), torch.randint(3, (8,), generator=draw)


def test_every_parameter_is_reported_with_its_rule() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))
    report = fastreg.check(model, F.cross_entropy, batch(), micro_batch_size=3)
    assert [p.name for p in report.parameters] == [name for name, _ in model.named_parameters()]
    assert all(p.rules and p.forms for p in report.parameters)
    assert (report.samples, report.micro_batches, report.micro_batch_size) == (8, 3, 3)
    assert all(p.grad is None for p in model.parameters())
    assert "self-test passed" in str(report)


def test_a_parameter_used_twice_is_joined_and_an_idle_one_is_said_to_be_so() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.idle, self.head = nn.Linear(5, 5), nn.Parameter(torch.ones(2)), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))

    by_name = {p.name: p for p in fastreg.check(Twice(), F.cross_entropy, batch()).parameters}
    assert by_name["body.weight"].rules == ("Linear", "Linear")
    assert by_name["body.weight"].forms == ("joined over uses",)
    assert by_name["idle"].rules == ()


def test_an_unknown_operation_is_refused_by_name() -> None:
    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(x, self.centres)

    with pytest.raises(UnsupportedOperation, match="'centres'.*cdist.*test_check.py"):
        fastreg.check(Distance(), F.cross_entropy, batch())


def test_a_loss_per_sample_is_refused() -> None:
    with pytest.raises(FastregError, match="scalar"):
        fastreg.check(nn.Linear(5, 3), lambda o, t: F.cross_entropy(o, t, reduction="none"), batch())


def test_the_command_prints_a_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    assert main(["check", "examples.tiny_gpt:problem"]) == 0
    assert "blocks.0" in capsys.readouterr().out
    assert main(["check", "examples.tiny_gpt:problem", "--json", "--micro-batch-size", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["micro_batches"] == 4
    assert {"name", "shape", "rules", "forms"} == set(report["parameters"][0])


@pytest.mark.parametrize("path", ["nonsense", "no_such_module:f", "json:no_such_name"])
def test_a_wrong_factory_is_an_error_and_no_traceback(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", path]) == 1
    assert "error: check:" in capsys.readouterr().err


def test_the_example_lowers_the_gradient_norms(capsys: pytest.CaptureFixture[str]) -> None:
    norms = runpy.run_path(str(ROOT / "examples" / "one_line.py"))["main"]()
    assert sum(norms[-10:]) < 0.7 * sum(norms[:10])
    assert "step  40" in capsys.readouterr().out
