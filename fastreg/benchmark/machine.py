"""What a timing was made on: hardware, versions, commit and date."""

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import fastreg
from fastreg.environment import package_versions, system

CPU_INFO = Path("/proc/cpuinfo")


def describe(device: str) -> dict[str, object]:
    """Everything about this machine and build that a figure depends on."""
    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": system(),
        "versions": package_versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    """Name of the device that runs the steps."""
    return cpu_name() if device == "cpu" else torch.cuda.get_device_name(device)


def cpu_name() -> str:
    """The processor's model name."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the checkout that fastreg is imported from, ``+`` if files differ from it.

    None for an installed package, for a checkout without a commit, or where git is missing.
    """
    root = Path(fastreg.__file__).parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or None
