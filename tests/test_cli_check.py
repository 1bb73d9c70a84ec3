"""``fastreg check`` on models that are refused or fail, and what it says of forms."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreg import check_cli
from fastreg.cli import main
from fastreg.kernels import backend, registry
from fastreg.rules.registry import ROUTES


class Mixed(nn.Module):
    """A layer that is served, two parameters that are not, each hidden behind the other, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 5)
        self.first, self.second = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 3))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) @ torch.linalg.matrix_exp(self.first) @ torch.linalg.pinv(self.second).T


class Coupled(nn.Linear):
    """Subtracts the mean over the batch, so that no sample has a gradient of its own."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs - outputs.mean(0)


class Distances(nn.Linear):
    """``torch.cdist`` has no double backward."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(super().forward(x), torch.ones(3, 3))


def problem_of(model: nn.Module, inputs: Tensor | None = None) -> Callable[[], tuple]:
    def problem() -> tuple:
        print("made")
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randn(8, 5, generator=draw) if inputs is None else inputs
        return model, F.cross_entropy, (drawn, torch.randint(3, (8,), generator=draw))

    return problem


@pytest.fixture(autouse=True)
def problems(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of factories; what the command adds to the path is taken away again."""
    module = ModuleType("problems_of_test")
    torch.manual_seed(0)
    for name, model in (("mixed", Mixed()), ("coupled", Coupled(5, 3)), ("distances", Distances(5, 3))):
        setattr(module, name, problem_of(model))
    module.served = problem_of(nn.Linear(5, 3))
    module.lonely = problem_of(nn.Sequential(nn.Linear(5, 3)))
    tokens = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3))
    module.tokens = problem_of(tokens, torch.arange(16).view(8, 2) % 7)
    module.pair, module.empty = lambda: (1, 2), lambda: None
    monkeypatch.setitem(sys.modules, "problems_of_test", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield module


def document(name: str, capsys: pytest.CaptureFixture[str], status: int) -> dict:
    assert main(["check", f"problems_of_test:{name}", "--json"]) == status
    printed = capsys.readouterr()
    assert "made" in printed.err
    return json.loads(printed.out)


def test_every_refused_parameter_is_named_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    found = document("mixed", capsys, 1)
    assert found["passed"] is False
    assert set(found["refused"]) == {"first", "second"}
    assert "matrix_exp" in found["refused"]["first"] and "pinv" in found["refused"]["second"]
    rules = {entry["name"]: entry["rules"] for entry in found["parameters"]}
    assert rules == {"idle": [], "body.weight": ["Linear"], "body.bias": ["Linear"]}


def test_the_refused_parameters_stand_below_the_table(
    problems: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "problems_of_test:mixed"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("body.weight") and "Linear" in line]
    assert sum(line.startswith("refused: ") for line in lines) == 2
    assert lines[-1] == "2 parameters refused, self-test without them"
    assert all(p.requires_grad for p in problems.mixed()[0].parameters())


def test_a_model_of_refused_parameters_alone(
    problems: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ROUTES, F.linear)
    found = document("lonely", capsys, 1)
    assert set(found) == {"passed", "refused", "backends"} and set(found["refused"]) == {"0.weight", "0.bias"}


def test_a_served_model_passes(capsys: pytest.CaptureFixture[str]) -> None:
    found = document("served", capsys, 0)
    assert found["passed"] is True and found["refused"] == {}
    assert {entry["name"] for entry in found["parameters"]} == {"weight", "bias"}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("coupled", "must equal plain autograd's"), ("distances", "must have a double backward, got: the derivative for")],
)
def test_a_failed_self_test_ends_with_status_1(name: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(name, capsys, 1)
    assert set(found) == {"error"} and complaint in found["error"]


@pytest.mark.parametrize("name", ["pair", "empty"])
def test_a_factory_of_something_else_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"problems_of_test:{name}"]) == 1
    assert f"problems_of_test:{name} must return (model, loss_fn, (inputs, targets)), got" in capsys.readouterr().err


def test_the_backends_are_those_that_ran(capsys: pytest.CaptureFixture[str]) -> None:
    ran = {(name, i.name): 0 for name, op in registry().items() for i in op.implementations}

    def counted(key: tuple[str, str], fn: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            ran[key] += 1
            return fn(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, op in registry().items():
            spies = [replace(i, fn=counted((name, i.name), i.fn)) for i in op.implementations]
            patch.setitem(op.__dict__, "implementations", tuple(spies))
        found = document("tokens", capsys, 0)["backends"]
    assert {(op, backend) for op, backends in found.items() for backend in backends} == {k for k, n in ran.items() if n}
    assert {"outer_sqnorm", "index_sqnorm"} <= set(found)
    with backend("reference"):
        forced = document("tokens", capsys, 0)["backends"]
    assert forced and all(names == ["reference"] for names in forced.values())
    assert main(["check", "problems_of_test:tokens"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("backend ")]
    assert len(lines) == len({name for names in found.values() for name in names})
    assert any(line.startswith(f"backend {found['outer_sqnorm'][0]}: ") and "outer_sqnorm" in line for line in lines)


def test_every_form_that_a_rule_reports_is_explained_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    models = [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), shared, nn.Tanh(), shared), torch.randn(4, 4)),
        (nn.Sequential(nn.Embedding(7, 4), nn.Flatten()), torch.randint(7, (4, 1))),
        (nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.LazyLinear(4)), torch.randn(4, 1, 6, 6)),
    ]
    targets = torch.randint(4, (4,))
    models[-1][0](models[-1][1])
    forms = {
        form.split()[0]
        for model, inputs in models
        for entry in check_cli.examine((model, F.cross_entropy, (inputs, targets)), 1)[0].parameters
        for form in entry.forms
    }
    assert len(forms) >= 4 and forms <= set(check_cli.FORMS)
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {form} " in text for form in check_cli.FORMS)
