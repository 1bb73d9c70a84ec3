"""What pytest-benchmark's JSON says of machine and commit, in the words of the other results files."""

from __future__ import annotations

from fastreg.benchmark import machine

Json = dict[str, object]


def pytest_benchmark_update_machine_info(machine_info: Json) -> None:
    """Device, threads and versions, which ``bench/compare.py`` looks at."""
    machine_info["fastreg"] = machine.describe("cpu")


def pytest_benchmark_update_commit_info(commit_info: Json) -> None:
    """The commit that fastreg is imported from, with a ``+`` where files differ from it."""
    commit_info["fastreg"] = machine.commit()
