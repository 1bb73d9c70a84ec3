"""``fastreg env``: what is installed, what is missing, why, and what to do about it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

import fastreg
from fastreg import kernel_report
from fastreg._version import __version__
from fastreg.cli_output import add_json, deliver
from fastreg.kernels import explain, registry

# What an optional package is for, and how to get it; the others come with fastreg.
PACKAGES = {
    "torch": None,
    "triton": ("kernels for GPUs", "pip install triton, on Linux"),
    "numpy": None,
    "scipy": ("noise measures and their tests", "pip install 'fastreg[demo]'"),
    "scikit-learn": ("the digits of train and recipe", "pip install 'fastreg[demo]'"),
    "matplotlib": ("figures", "pip install 'fastreg[demo]'"),
    "tqdm": ("progress bars on a terminal", "pip install 'fastreg[demo]'"),
    "accelerate": ("its training loop", "pip install 'fastreg[integrations]'"),
    "lightning": ("its Trainer", "pip install 'fastreg[integrations]'"),
    "transformers": ("its Trainer", "pip install 'fastreg[integrations]'"),
    "tensorboard": ("TensorBoardSink", "pip install 'fastreg[logging]'"),
    "wandb": ("WandbSink", "pip install 'fastreg[logging]'"),
}
NATIVE_MODULES = {"_C": "C++ kernels for CPUs", "_cuda": "C++ kernels for NVIDIA GPUs"}
NOT_BUILT = "not built, or its build failed (run `pip install .` in fastreg's source folder)"


@dataclass(frozen=True)
class NativeModule:
    """One compiled module: what it is for, whether it loads, and how it was built or why it is absent."""

    purpose: str
    present: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """Everything ``fastreg env`` prints; ``ops`` is op -> device -> backend -> why not (None: runs)."""

    versions: dict[str, str | None]
    system: dict[str, str | int | None]
    devices: list[dict[str, str | float]]
    modules: dict[str, NativeModule]
    ops: dict[str, dict[str, dict[str, str | None]]]


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str | None]:
    """Version of Python and of every package fastreg uses; None if it is not installed."""
    versions: dict[str, str | None] = {"fastreg": __version__, "python": platform.python_version()}
    return versions | {name: package_version(name) for name in PACKAGES}


def _version_words(name: str, version: str | None) -> str:
    if version is not None:
        return version
    purpose, remedy = PACKAGES.get(name) or ("needed", "reinstall fastreg")
    return f"not installed: {purpose} ({remedy})"


def build_info() -> dict[str, dict[str, bool | str]]:
    """What the last build of this installation recorded about each native module."""
    path = Path(fastreg.__file__).with_name("_build_info.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def native_module(name: str) -> NativeModule:
    """State of ``fastreg.<name>``, by importing it."""
    purpose = NATIVE_MODULES[name]
    recorded = build_info().get(name, {"detail": NOT_BUILT})
    if find_spec(f"fastreg.{name}") is None:
        return NativeModule(purpose, False, str(recorded["detail"]))
    try:
        module = importlib.import_module(f"fastreg.{name}")
    except ImportError as error:
        return NativeModule(purpose, False, f"does not load: {error} (reinstall fastreg)")
    if module.version() != __version__:
        stale = f"stale: built from fastreg {module.version()} (reinstall fastreg)"
        return NativeModule(purpose, True, stale)
    return NativeModule(purpose, True, str(recorded["detail"]))


def system() -> dict[str, str | int | None]:
    """Platform, threads that torch and the C++ kernels use, instruction set, forced backend."""
    facts: dict[str, str | int | None] = {
        "platform": platform.platform(),
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "FASTREG_BACKEND": os.environ.get("FASTREG_BACKEND"),
    }
    if native_module("_C").present:
        cpu = importlib.import_module("fastreg._C")
        facts |= {"openmp_threads": cpu.max_threads(), "isa": cpu.isa()}
    return facts


def code_arch(index: int) -> int | None:
    """Architecture of the ``fastreg._cuda`` code the driver loads on a device (900 for sm_90a)."""
    if not native_module("_cuda").present:
        return None
    cuda = importlib.import_module("fastreg._cuda")
    with torch.cuda.device(index):
        arch = torch.zeros(1, dtype=torch.int32, device="cuda")
        cuda.code_arch(arch.data_ptr(), torch.cuda.current_stream().cuda_stream)
        return int(arch.item())


def devices() -> list[dict[str, str | float]]:
    """The CPU, then every CUDA device with its capability, memory and loaded code."""
    found: list[dict[str, str | float]] = [{"device": "cpu", "name": platform.machine()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        entry: dict[str, str | float] = {
            "device": f"cuda:{index}",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        arch = code_arch(index)
        found.append(entry if arch is None else entry | {"code_arch": str(arch)})
    return found


def op_backends(device: str) -> dict[str, dict[str, str | None]]:
    """Per op, each backend and why it would not run the op's largest float32 example (None: it runs)."""

    def size(example: tuple[object, ...]) -> int:
        return sum(item.numel() for item in example if isinstance(item, torch.Tensor))

    table = {}
    for name, op in sorted(registry().items()):
        example = max(op.examples(torch.float32, device), key=size)
        table[name] = {candidate.name: candidate.reason for candidate in explain(name, *example)}
    return table


def collect() -> Report:
    """Look at everything once."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    tables = {kind: op_backends(kind) for kind in kinds}
    ops = {name: {kind: tables[kind][name] for kind in kinds} for name in tables["cpu"]}
    modules = {name: native_module(name) for name in NATIVE_MODULES}
    return Report(package_versions(), system(), devices(), modules, ops)


def _section(title: str, rows: Mapping[str, object]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""]


def _backends_line(backends: dict[str, str | None]) -> str:
    return "; ".join(name if reason is None else f"not {name}: {reason}" for name, reason in backends.items())


def format_report(report: Report) -> str:
    """The report as text, one section per field."""
    versions = {name: _version_words(name, version) for name, version in report.versions.items()}
    found = {
        str(entry["device"]): ", ".join(f"{value}" for key, value in entry.items() if key != "device")
        for entry in report.devices
    }
    modules = {
        f"fastreg.{name}": f"{'present' if module.present else 'absent'}: {module.detail} [{module.purpose}]"
        for name, module in report.modules.items()
    }
    ops = {
        f"{name} ({kind})": _backends_line(backends)
        for name, kinds in report.ops.items()
        for kind, backends in kinds.items()
    }
    lines = _section("versions", versions) + _section("system", report.system)
    lines += _section("devices", found) + _section("native modules", modules)
    return "\n".join([*lines, *_section("ops: backends in order of preference", ops)]).rstrip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``fastreg env``."""
    add_json(parser)
    parser.add_argument(
        "--kernels",
        nargs="*",
        metavar="OP",
        help="compile the Triton kernels (of all ops, or of those named) for sm_80 and sm_90, no GPU needed, and show "
        "registers, local and shared memory and matrix instructions; status 1 if one of them is amiss",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 also when something optional is missing, since that is what it reports."""
    if args.kernels is not None:
        return kernel_report.run(args.kernels, args.json)
    report = collect()
    if args.json:
        deliver(asdict(report), True)
    else:
        print(format_report(report))
    return 0
