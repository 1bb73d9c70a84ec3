"""Peak memory of one step: allocator statistics on a GPU, resident set on a CPU.

On a CPU the step runs in a process of its own (``python -m fastreg.benchmark.memory``), because a
process that has already run other steps holds memory that the next one reuses unseen.
"""

import argparse
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch

from fastreg.benchmark.methods import METHODS
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import PRESETS

# With a fixed threshold the allocator maps every large block on its own and returns it when it is
# freed, so the resident set follows the live tensors. The default threshold grows as blocks are
# freed, and the resident set then shows what the heap has kept.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
CLEAR_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def measurable(device: str) -> bool:
    """Whether peak memory can be read: on a GPU always, on a CPU where /proc shows it."""
    return device != "cpu" or CLEAR_PEAK.exists()


def on_gpu(step: Step, device: str) -> int:
    """Bytes that ``step`` allocates at its peak, its gradients included, beyond what is held before."""
    step.clear()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step.run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def on_cpu(preset: str, micro_batches: int, method: str, threads: int) -> int:
    """Bytes by which the resident set of a fresh process grows during one step.

    Raises:
        subprocess.CalledProcessError: the step failed in that process.
    """
    command = ["-m", __spec__.name, preset, str(micro_batches), method, "--threads", str(threads)]
    return in_fresh_process(command)


def in_fresh_process(command: list[str]) -> int:
    """The last word that ``python *command`` prints: the :func:`growth` of a step, where blocks go back when freed.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    run = subprocess.run(
        [sys.executable, *command], env={**os.environ, **ALLOCATOR}, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(run.stdout.split()[-1])


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes: ``VmRSS`` now, ``VmHWM`` at its peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def growth(step: Step) -> int:
    """Bytes by which this process's resident set grows during one run of ``step``, its gradients included."""
    # The first call also loads code and fills caches that stay.
    step.run()
    step.clear()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_PEAK.write_text("5")
    before = _resident("VmRSS")
    step.run()
    return _resident("VmHWM") - before


def _measure(preset: str, micro_batches: int, method: str) -> int:
    return growth(METHODS[method].prepare(PRESETS[preset].problem(micro_batches)))


def main() -> None:
    """Print the growth in bytes for one preset, m and method."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("micro_batches", type=int)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(_measure(args.preset, args.micro_batches, args.method))


if __name__ == "__main__":
    main()
