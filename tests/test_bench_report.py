"""bench/report.py, compare.py and roofline.py on results whose verdicts are known beforehand."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import compare
import documents
import report
import roofline
import tables
import targets
from fastreg.benchmark.measure import Spread
from fastreg.benchmark.report import Row, document, write_json
from fastreg.errors import FastregError
from op_cases import OpCase

Json = dict[str, object]
MACHINE = {
    "device": "Test CPU", "cpu": "Test CPU", "cores": 2, "system": {"torch_threads": 2},
    "versions": {"torch": "9.9.9"}, "commit": "abc1234", "date": "2000-01-02T03:04:05+00:00",
}  # fmt: skip
H200 = {**MACHINE, "device": "NVIDIA H200"}
SETTINGS = {"command": "python bench/suite.py", "rounds": 11, "dtype": "float32"}


def timed(method: str, low: float, middle: float, high: float, quantity: str, part: str = "penalty", **more) -> Row:
    """A row in which the plain step takes 10 ms and 100 MiB."""
    row = Row("mlp", 32, method, error_float64=1e-15, quantity=quantity, part=part)
    spread = Spread(low, middle, high)
    seconds = Spread(*(1e-2 * one for one in (low, middle, high)))
    return replace(row, **{"ratio": spread, "seconds": seconds, "flops_ratio": 1.5, "peak_bytes": 100 << 20, **more})


ROWS = [
    timed("plain", 1, 1, 1, "loss"),
    timed("exact", 2.2, 2.3, 2.4, "grad_norm", ours=True, peak_bytes=190 << 20),
    timed("fisher", 1.9, 2.05, 2.2, "fisher", ours=True),
    timed("functorch", 4.5, 4.6, 4.8, "grad_norm"),
    timed("sequential", 22, 23, 25, "grad_norm"),
    timed("functorch_compiled", 2.28, 2.45, 2.6, "grad_norm"),
    timed("plain", 1, 1, 1, "loss", part="sam"),
    timed("sam", 2.15, 2.2, 2.25, "sam", part="sam", ours=True),
    timed("package_sam", 1.95, 2.0, 2.05, "sam", part="sam"),
    Row("mlp", 32, "opacus", "wrong", error_float64=0.02, quantity="sample_norms", part="penalty"),
    Row("mlp", 32, "backpack", "failed", message="RuntimeError: no rule | for it", part="penalty"),
    Row("mlp", 32, "torchjd", "skipped", message="samples interact", part="penalty"),
    Row("mlp", 32, "curvlinops", "not installed", part="sam"),
]
CURVE = [
    timed(name, 0.9 * value, value, 1.1 * value, "grad_norm", "scaling", curve="mlp width", at=at, ours=name == "exact")
    for name, values in {"exact": (2.5, 2.0, 1.8), "functorch": (9.0, 7.0, 6.0)}.items()
    for at, value in zip((128, 512, 2048), values, strict=True)
]
CURVE.append(Row("mlp", 32, "sequential", "skipped", message="30 s a step", part="scaling", curve="mlp width", at=2048))
# 2e6 bytes at 1e9 per second are 2 ms, 4e6 operations at 1e10 are 0.4 ms.
KERNEL = {"op": "segment_sum", "case": "R=8", "dtype": "float32", "flops": 4_000_000, "bytes": 2_000_000, "error": 1e-7}
KERNELS = [
    {**KERNEL, "implementation": "native", "seconds": {"p20": 0.003, "p50": 0.004, "p80": 0.005}},
    {**KERNEL, "implementation": "reference", "seconds": {"p20": 0.007, "p50": 0.008, "p80": 0.009}},
    {**KERNEL, "implementation": "triton", "seconds": None, "error": 0.5},
]
CEILINGS = {"bytes_per_s": 1e9, "flops_per_s": 1e10}


def written(path: Path, rows: list[Row] = ROWS, machine: Json = MACHINE, **more: object) -> Path:
    """A results file."""
    write_json(path, document(rows, machine, SETTINGS))
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return path


@pytest.fixture
def whole(tmp_path: Path) -> documents.Document:
    return documents.read(written(tmp_path / "cpu.json", ROWS + CURVE, ceilings=CEILINGS, kernels=KERNELS))


def line(text: str, start: str) -> str:
    """The only line of a text that begins so."""
    (found,) = [one for one in text.splitlines() if one.startswith(start)]
    return found


def test_tables_say_who_won_and_who_lost(whole: documents.Document) -> None:
    text = report.report([whole], {})
    exact = "| **exact** | 1e-15 | 23.0 [22.0-24.0] | **2.30 [2.20-2.40]** | 1.50 | 190 |"
    assert f"{exact} level with `functorch_compiled` |" in text
    assert "| fisher | 1e-15 | 20.5 [19.0-22.0] | 2.05 [1.90-2.20] | 1.50 | 100 |  |" in text
    assert "| 2.20 [2.15-2.25] | 1.50 | 100 | **1.10 times slower** than `package_sam` |" in line(text, "| sam ")
    assert "| opacus | 2e-02 | wrong: not timed |" in text
    assert "Test CPU, 2 threads, torch 9.9.9, float32, commit abc1234, 2000-01-02." in text


def test_losses_are_listed_and_nothing_else(whole: documents.Document) -> None:
    assert tables.losses([whole]) == (
        "* Cost of SAM and m-SAM, mlp, m = 32: `sam` is **1.10 times slower** than `package_sam`."
    )


def test_faster_beyond_noise_is_said_in_figures(tmp_path: Path) -> None:
    rows = [row for row in ROWS if row.method != "functorch_compiled"]
    text = report.report([documents.read(written(tmp_path / "a.json", rows))], {})
    assert "2.00 times faster than `functorch`" in line(text, "| **exact** ")


def test_ours_is_not_bold_behind_another_of_ours(tmp_path: Path) -> None:
    rows = [*ROWS[:6], timed("exact_compiled", 1.7, 1.8, 1.9, "grad_norm", ours=True)]
    text = report.report([documents.read(written(tmp_path / "a.json", rows))], {})
    assert line(text, "| **exact_compiled** ") and line(text, "| exact ")


def test_what_was_not_timed_has_its_reason(whole: documents.Document) -> None:
    text = tables.not_timed([whole])
    assert "| opacus | mlp, m = 32 | wrong by 2e-02 in float64 |" in text
    assert "| backpack | mlp, m = 32 | failed: `RuntimeError: no rule / for it` |" in text
    assert "| torchjd | mlp, m = 32 | skipped: `samples interact` |" in text
    assert "| curvlinops | mlp, m = 32 | not installed |" in text
    assert "| sequential | mlp width = 2048 | skipped: `30 s a step` |" in text
    assert len(text.splitlines()) == 7


def test_curves_have_a_column_per_value(whole: documents.Document) -> None:
    text = tables.curve_table(CURVE)
    assert text.splitlines() == [
        "| | 128 | 512 | 2048 |", "| --- | --- | --- | --- |", "| exact | 2.50 | 2.00 | 1.80 |",
        "| functorch | 9.00 | 7.00 | 6.00 |", "| sequential | - | - | skipped |",
    ]  # fmt: skip


def test_operations_are_held_against_their_floor(whole: documents.Document) -> None:
    text = tables.kernel_table(whole)
    assert "| segment_sum | R=8 | native | 4000 [3000-5000] | 2.00 | memory | 1e-07 |" in text
    assert "| segment_sum | R=8 | triton | wrong: not timed | | | 5e-01 |" in text


@pytest.mark.parametrize(
    "what, models, measured, verdict",
    [
        ("GradNorm", "MLP", "exact on mlp, m = 32: 2.30", "missed by 0.30"),
        ("GradNorm", "conv", "", "not measured"),
        ("FisherTrace", "MLP", "fisher on mlp, m = 32: 2.05", "reached"),
        ("peak memory, GradNorm", "any", "exact on mlp, m = 32: 1.90", "reached"),
        ("GradNorm against a double backward per micro-batch", "MLP", "exact on mlp, m = 32: 10.00", "reached"),
        ("GradNorm against compiled torch.func", "any", "exact on mlp, m = 32: 1.07", "missed by 0.03"),
        ("memory-bound ops against torch's composition", "ops", "segment_sum R=8 float32: 2.00", "reached"),
        ("outer_apply against two torch.bmm", "ops", "", "not measured"),
    ],
)
def test_targets(whole: documents.Document, what: str, models: str, measured: str, verdict: str) -> None:
    found = line(targets.table([whole]), f"| CPU | {what} | {models} |")
    assert found.split(" | ")[-2:] == [measured, f"{verdict} |"]


def test_targets_of_another_device_are_not_met_by_this_one(whole: documents.Document) -> None:
    of_h200 = [one for one in targets.table([whole]).splitlines() if one.startswith("| H200")]
    assert len(of_h200) > 10 and all(one.endswith("| not measured |") for one in of_h200)


def test_bandwidth_is_a_share_of_the_measured_ceiling(tmp_path: Path) -> None:
    path = written(tmp_path / "gpu.json", ROWS, H200, ceilings=CEILINGS, kernels=KERNELS)
    text = targets.table([documents.read(path)])
    # 2e6 bytes in 4 ms are half of 1e9 per second.
    assert "segment_sum R=8 float32: 0.50 | missed by 0.35 |" in line(text, "| H200 | memory-bound")
    assert "10.00 | reached |" in line(text, "| H200 | GradNorm against a double")
    assert line(text, "| H200 | m-SAM").endswith("| not measured |")


def test_the_newest_file_with_a_cell_is_shown(tmp_path: Path) -> None:
    slower = [timed("plain", 1, 1, 1, "loss"), timed("exact", 3, 3, 3, "grad_norm", ours=True)]
    later = {**MACHINE, "date": "2000-02-02T00:00:00+00:00", "commit": "def5678"}
    files = [written(tmp_path / "new.json", slower, later), written(tmp_path / "old.json")]
    found = {cell.part: cell for cell in documents.cells([documents.read(path) for path in files])}
    assert found["penalty"].document.machine["commit"] == "def5678" and len(found["penalty"].rows) == 2
    assert found["sam"].document.machine["commit"] == "abc1234"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "must be a JSON file"),
        ("", "must be a JSON file"),
        ("[1]", "must hold a JSON object, got a list"),
        ("{}", "of schema 2, got .* with schema None"),
        ('{"schema": 1, "rows": []}', "with schema 1"),
        ('{"schema": 2}', "something is missing or unknown: 'rows'"),
        ('{"schema": 2, "machine": {}, "settings": {}, "rows": [{"colour": 1}]}', "something is missing or unknown"),
    ],
)
def test_odd_files_are_refused_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "odd.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and "odd.json" in said and "(write" in said


def test_no_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([]) == 1
    assert "FILE must be at least one results file, got none" in capsys.readouterr().err


def words(svg: Path) -> list[str]:
    """The texts of a figure."""
    return ["".join(one.itertext()).strip() for one in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_figures_hold_what_was_measured(tmp_path: Path, whole: documents.Document) -> None:
    path = written(tmp_path / "a.json", ROWS + CURVE, ceilings=CEILINGS, kernels=KERNELS)
    assert report.main([str(path), "--out", str(tmp_path / "one")]) == 0
    figures = tmp_path / "one" / "figures"
    shown = {one.stem: words(one) for one in figures.glob("*.svg")}
    assert shown.keys() == {"cpu-penalty", "cpu-sam", "cpu-mlp-width", "cpu-roofline"}
    assert {"exact", "functorch", "2.30", "mlp, m = 32", "Gradient-norm penalties"} <= set(shown["cpu-penalty"])
    assert "plain" not in shown["cpu-penalty"] and "opacus" not in shown["cpu-penalty"]
    assert {"exact", "functorch", "128", "2048", "width"} <= set(shown["cpu-mlp-width"])
    assert {"segment_sum", "segment_sum  R=8", "native", "reference"} <= set(shown["cpu-roofline"])
    assert all(any(whole.caption in word for word in found) for found in shown.values())
    for png in (figures / f"{name}.png" for name in shown):
        assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 5000
    linked = re.findall(r"\]\((\S+\.png)\)", (tmp_path / "one" / "report.md").read_text())
    assert sorted(linked) == sorted(f"figures/{name}.png" for name in shown)


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", ROWS + CURVE, ceilings=CEILINGS, kernels=KERNELS)
    for folder in ("one", "two"):
        assert report.main([str(path), "--out", str(tmp_path / folder)]) == 0
    files = [one for one in sorted((tmp_path / "one").rglob("*")) if one.is_file()]
    assert len(files) == 9
    for one in files:
        assert one.read_bytes() == (tmp_path / "two" / one.relative_to(tmp_path / "one")).read_bytes(), one.name


def scaled(rows: list[Row], factor: float, *methods: str) -> list[Row]:
    """The rows with the ratio of some methods changed."""
    return [
        replace(row, ratio=Spread(*(factor * one for one in asdict(row.ratio).values())))
        if row.method in methods and row.ratio else row
        for row in rows
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rows, status, said",
    [
        (ROWS, 0, "13 the same, 0 not."),
        (scaled(ROWS, 1.2, "exact"), 1, "| penalty: mlp, m = 32, exact | 2.3 | 2.76 | 1.20 | slower |"),
        (scaled(ROWS, 0.8, "exact"), 0, "| penalty: mlp, m = 32, exact | 2.3 | 1.84 | 0.80 | faster |"),
        # Six per cent, within the intervals.
        (scaled(ROWS, 1.06, "exact"), 0, "13 the same, 0 not."),
        # Beyond the intervals (2.15 to 2.25), but less than five per cent.
        ([replace(r, ratio=Spread(2.26, 2.27, 2.28)) if r.method == "sam" else r for r in ROWS], 0, "13 the same"),
        (scaled(ROWS, 1.5, "functorch"), 0, "functorch (not ours) | 4.6 | 6.9 | 1.50 | slower |"),
        ([row for row in ROWS if row.method != "fisher"], 0, "| penalty: mlp, m = 32, fisher | | | | gone |"),
        ([*ROWS, timed("hvp", 2, 2, 2, "hvp", ours=True)], 0, "| penalty: mlp, m = 32, hvp | | | | new |"),
        ([replace(r, ratio=None, status="wrong") if r.method == "exact" else r for r in ROWS], 1, "no longer timed"),
    ],
    ids=["equal", "slower", "faster", "noise", "small", "peer", "gone", "new", "wrong"],
)
def test_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Row], status: int, said: str
) -> None:
    old, new = written(tmp_path / "old.json"), written(tmp_path / "new.json", rows)
    assert compare.main([str(old), str(new)]) == status
    assert said in capsys.readouterr().out


def test_compare_of_a_curve_and_its_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = scaled(CURVE, 1.3, "exact")
    files = [str(written(tmp_path / "old.json", CURVE)), str(written(tmp_path / "new.json", new))]
    assert compare.main(files) == 1
    assert "| mlp width = 512, exact | 2 | 2.6 | 1.30 | slower |" in capsys.readouterr().out
    assert compare.main([*files, "--threshold", "0.4"]) == 0


def test_compare_of_operations_is_to_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def times(factor: float) -> list[Json]:
        """The native op slowed down; the machine twice as slow for all."""
        slow = {"native": 2 * factor, "reference": 2}
        return [{**one, "seconds": {q: slow[one["implementation"]] * s for q, s in one["seconds"].items()}}
                for one in KERNELS[:2]]  # fmt: skip

    old = written(tmp_path / "old.json", ceilings=CEILINGS, kernels=KERNELS[:2])
    same = written(tmp_path / "same.json", ceilings=CEILINGS, kernels=times(1.0))
    slower = written(tmp_path / "slower.json", ceilings=CEILINGS, kernels=times(2.0))
    assert compare.main([str(old), str(same)]) == 0
    assert "0 not." in capsys.readouterr().out
    assert compare.main([str(old), str(slower)]) == 1
    assert "| segment_sum, R=8, float32, native | 0.5 | 1 | 2.00 | slower |" in capsys.readouterr().out


def test_compare_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = written(tmp_path / "old.json"), written(tmp_path / "new.json", scaled(ROWS, 1.2, "exact"))
    compare.main([str(old), str(new), "--json"])
    by_name = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert by_name["penalty: mlp, m = 32, exact"]["verdict"] == "slower" and len(by_name) == len(ROWS)


@pytest.mark.parametrize("other", [{"device": "Other"}, {"system": {"torch_threads": 1}}], ids=["device", "threads"])
def test_compare_refuses_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str], other: Json) -> None:
    old, new = written(tmp_path / "old.json"), written(tmp_path / "new.json", ROWS, {**MACHINE, **other})
    assert compare.main([str(old), str(new)]) == 2
    assert "pass --any-machine" in capsys.readouterr().err
    assert compare.main([str(old), str(new), "--any-machine"]) == 0


def of_pytest(path: Path, op: float, machine: float = 1.0) -> Path:
    """A file as pytest-benchmark writes it: an op and its reference, in milliseconds."""
    found = []
    for method, middle in {"reference": 2.0 * machine, "native": op * machine}.items():
        stats = {"q1": 0.95e-3 * middle, "median": 1e-3 * middle, "q3": 1.05e-3 * middle}
        info = {"method": method, "ours": method != "reference"}
        found.append({"fullname": f"ops::{method}", "group": "sum", "stats": stats, "extra_info": info})
    path.write_text(json.dumps({"benchmarks": found, "machine_info": {"fastreg": MACHINE}}))
    return path


@pytest.mark.parametrize("op, machine, status", [(1, 1, 0), (1, 3, 0), (1.05, 1, 0), (1.3, 1, 1), (0.7, 2, 0)])
def test_compare_of_two_files_of_pytest_benchmark(tmp_path: Path, op: float, machine: float, status: int) -> None:
    old, new = of_pytest(tmp_path / "old.json", 1.0), of_pytest(tmp_path / "new.json", op, machine)
    assert compare.main([str(old), str(new)]) == status


def tiny(wrong: bool) -> OpCase:
    """A sum of segments with a rival that is right, or not."""
    def draw(dtype: torch.dtype, device: str) -> tuple[object, ...]:
        return torch.randn(6, 3, dtype=dtype, device=device), [0, 2, 6]

    def rival(x: torch.Tensor, offsets: list[int]) -> torch.Tensor:
        return torch.stack([x[a:b].sum(0) for a, b in pairwise(offsets)]) + wrong

    return OpCase("segment_sum", "tiny", draw, elements=24, flops=18, rivals={"torch.stack": rival})


@pytest.mark.parametrize("wrong", [False, True])
def test_roofline_times_what_is_right(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastreg.benchmark.measure.ROUND_SECONDS", 1e-4)
    rows = {row["implementation"]: row for row in roofline.kernels([tiny(wrong)], "cpu", 2)}
    assert {"reference", "torch.stack"} <= rows.keys()
    assert rows["reference"]["bytes"] == 96 and rows["reference"]["flops"] == 18
    assert 0 < rows["reference"]["seconds"]["p20"] <= rows["reference"]["seconds"]["p80"] < 1
    assert (rows["torch.stack"]["seconds"] is None) == wrong == (rows["torch.stack"]["error"] > 0.1)


def test_roofline_adds_to_a_file_and_refuses_that_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 22)
    monkeypatch.setattr(roofline, "MATMUL_SIZE", 64)
    monkeypatch.setattr(roofline, "CPU_CASES", [tiny(False)])
    path, threads = tmp_path / "new.json", str(torch.get_num_threads())
    assert roofline.main([str(path), "--threads", threads, "--rounds", "1"]) == 0
    found = documents.read(path)
    assert found.rows == () and {row["op"] for row in found.kernels} == {"segment_sum"}
    assert 1e7 < found.ceilings["bytes_per_s"] < 1e13 and 1e7 < found.ceilings["flops_per_s"] < 1e14
    other = written(tmp_path / "other.json")
    before = other.read_text()
    assert roofline.main([str(other), "--threads", threads]) == 1
    assert "device Test CPU, where here it is" in capsys.readouterr().err and other.read_text() == before


def test_the_page_and_the_readme_are_those_of_the_results() -> None:
    """Otherwise: ``python bench/report.py --docs``."""
    drawn: report.Drawings = {}
    found = [documents.read(path) for path in report.current()]
    assert report.page(found, drawn) == report.PAGE.read_text(encoding="utf-8")
    text = report.README.read_text(encoding="utf-8")
    assert report.readme(found, text) == text
    assert {path.name for path in report.FIGURES.iterdir()} == {f"{n}.{kind}" for n in drawn for kind in ("png", "svg")}


def test_a_readme_without_markers_is_refused(whole: documents.Document) -> None:
    with pytest.raises(FastregError, match="benchmarks: begin"):
        report.readme([whole], "# fastreg")
