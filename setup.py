"""Build of the native modules fastreg._C and fastreg._cuda; the rest is in pyproject.toml.

Neither module needs torch: pointers cross as integers, so one build serves any torch.

``fastreg._C`` is built wherever a C++17 compiler and the Python headers exist. ``fastreg._cuda``
follows ``FASTREG_CUDA``: ``auto`` (the default) builds it if nvcc works, ``1`` insists, ``0`` skips it.
A module whose tools are missing is left out and the reason goes into ``fastreg/_build_info.json``,
which ``fastreg env`` shows. Code that its tools reject is an error: only absent tools are excused.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from glob import glob
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, OptionError

VERSION_FILE = "fastreg/_version.py"
BUILD_INFO = "_build_info.json"
# Objects are rebuilt when any of these is newer.
SHARED_INPUTS = [*sorted(glob("csrc/*.h")), "setup.py", VERSION_FILE]

# sm_90a for wgmma and the bulk copy engine; sm_80 with PTX, which newer devices compile at load.
GENCODE = ["arch=compute_90a,code=sm_90a", "arch=compute_80,code=[sm_80,compute_80]"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += [f"-gencode={target}" for target in GENCODE]

COMPILER_HINT = "install a C++17 compiler, on Debian `apt-get install g++`, and reinstall fastreg"
HEADERS_HINT = "install the Python headers, on Debian `apt-get install python3-dev`, and reinstall"
CUDA_HINT = "install the CUDA toolkit or set CUDA_HOME, then reinstall with FASTREG_CUDA=1"


@dataclass(frozen=True)
class Outcome:
    """What became of one native module; ``detail`` is the reason if it was left out."""

    built: bool
    detail: str


def read_version() -> str:
    """Version string of the package, without importing it (that would import torch)."""
    for statement in ast.parse(Path(VERSION_FILE).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "__version__":
            return ast.literal_eval(statement.value)
    raise ValueError(f"setup.py: {VERSION_FILE} must assign __version__")


def is_stale(target: str, inputs: list[str]) -> bool:
    """Whether ``target`` is missing or older than one of ``inputs``."""
    if not os.path.exists(target):
        return True
    return any(os.path.getmtime(path) > os.path.getmtime(target) for path in inputs)


def find_nvcc() -> str | None:
    """Path of nvcc: CUDA_HOME, then PATH, then the toolkit's default folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.path.join(home, "bin", "nvcc")] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def run_nvcc(nvcc: str, arguments: list[str]) -> None:
    """Run nvcc; a failure raises with the last line it printed."""
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        output = (result.stdout + result.stderr).strip()
        print(output, file=sys.stderr)
        last = output.splitlines()[-1] if output else f"exit status {result.returncode}"
        raise CCompilerError(f"nvcc failed: {last}")


class BuildNative(build_ext):
    """``build_ext`` that builds what the machine has tools for and records why not the rest."""

    def run(self) -> None:
        # setuptools clears `inplace` while it builds, so it is read before.
        self._in_source_tree = bool(self.inplace)
        super().run()

    def build_extensions(self) -> None:
        # A build that fails half-way must not leave the account of an earlier one.
        self._remove([BUILD_INFO])
        plans = {"fastreg._C": self._plan_cpu, "fastreg._cuda": self._plan_cuda}
        outcomes = {ext.name: plans[ext.name](ext) for ext in self.extensions}
        left_out = [name for name, outcome in outcomes.items() if not outcome.built]
        self._remove(os.path.basename(self.get_ext_filename(name)) for name in left_out)
        self.extensions = [ext for ext in self.extensions if outcomes[ext.name].built]
        super().build_extensions()
        self._write_build_info(outcomes)

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "fastreg._cuda":
            self._build_cuda(ext)
        else:
            super().build_extension(ext)

    def _plan_cpu(self, ext: Extension) -> Outcome:
        """Probe the compiler, complete the flags, and say whether the module will be built."""
        standard = "/std:c++17" if self.compiler.compiler_type == "msvc" else "-std=c++17"
        if problem := self._probe("int main() { return 0; }", [standard]):
            return Outcome(False, f"no working C++17 compiler: {problem} ({COMPILER_HINT})")
        if problem := self._probe("#include <Python.h>\nint main() { return 0; }", [standard]):
            return Outcome(False, f"Python.h does not compile: {problem} ({HEADERS_HINT})")
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args += ["/O2", "/openmp"]
            return Outcome(True, "OpenMP")
        ext.extra_compile_args += ["-O3", "-fno-math-errno"]
        if problem := self._probe("#include <omp.h>\nint main() { return 0; }", ["-fopenmp"]):
            return Outcome(True, f"one thread: the compiler has no OpenMP ({problem})")
        ext.extra_compile_args.append("-fopenmp")
        ext.extra_link_args.append("-fopenmp")
        return Outcome(True, "OpenMP")

    def _plan_cuda(self, ext: Extension) -> Outcome:
        """Follow FASTREG_CUDA and say whether the module will be built."""
        wanted = os.environ.get("FASTREG_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise OptionError(f"setup.py: FASTREG_CUDA must be auto, 0 or 1, got {wanted!r}")
        if wanted == "0":
            return Outcome(False, f"FASTREG_CUDA=0 at build time ({CUDA_HINT})")
        problem = self._probe_nvcc()
        if problem and wanted == "1":
            raise CCompilerError(f"setup.py: FASTREG_CUDA=1 but {problem} ({CUDA_HINT})")
        if problem:
            return Outcome(False, f"{problem} ({CUDA_HINT})")
        return Outcome(True, "sm_90a, sm_80, PTX for newer")

    def _probe(self, source: str, flags: list[str]) -> str | None:
        """None if the compiler makes a program of ``source``, else what went wrong."""
        link_flags = [] if self.compiler.compiler_type == "msvc" else flags
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "probe.cpp")
            Path(path).write_text(source, encoding="utf-8")
            try:
                objects = self.compiler.compile(
                    [path], output_dir=folder, include_dirs=self.include_dirs, extra_postargs=flags
                )
                self.compiler.link_executable(
                    objects, os.path.join(folder, "probe"), extra_postargs=link_flags, target_lang="c++"
                )
            except (BaseError, CCompilerError) as error:
                # Some setuptools quote the whole command; its first word says enough.
                return re.sub(r"Command '\['([^']+)'.*\]' returned", r"\1 returned", str(error)).rstrip(".")
        return None

    def _probe_nvcc(self) -> str | None:
        """None if nvcc compiles a kernel for every target, else what went wrong."""
        self.nvcc = find_nvcc()
        if self.nvcc is None:
            return "nvcc was not found"
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cu")
            Path(source).write_text("__global__ void probe() {}\n", encoding="utf-8")
            try:
                run_nvcc(self.nvcc, [*NVCC_FLAGS, "-c", source, "-o", source + ".o"])
            except CCompilerError as error:
                return str(error)
        return None

    def _build_cuda(self, ext: Extension) -> None:
        """Compile and link with nvcc, which knows where its headers and static runtime are."""
        target = self.get_ext_fullpath(ext.name)
        folder = os.path.join(self.build_temp, "cuda")
        os.makedirs(folder, exist_ok=True)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        jobs = [(source, os.path.join(folder, Path(source).stem + ".o")) for source in ext.sources]
        with ThreadPool(os.cpu_count() or 1) as pool:
            pool.starmap(self._compile_cuda, jobs)
        objects = [compiled for _, compiled in jobs]
        run_nvcc(self.nvcc, ["-shared", "-cudart=static", *objects, "-o", target])

    def _compile_cuda(self, source: str, compiled: str) -> None:
        if not is_stale(compiled, [source, *SHARED_INPUTS]):
            return
        include_dirs = [pybind11.get_include(), sysconfig.get_path("include")]
        arguments = [*NVCC_FLAGS, *(f"-I{path}" for path in include_dirs)]
        arguments.append(f'-DFASTREG_VERSION="{read_version()}"')
        print(f"nvcc {source}\n", end="", flush=True)
        run_nvcc(self.nvcc, [*arguments, "-c", source, "-o", compiled])

    def _package_folders(self) -> list[Path]:
        """Where built files go: the build tree and, for in-place builds, the source tree too."""
        folders = [Path(self.build_lib, "fastreg")]
        if self._in_source_tree:
            folders.append(Path(self.get_finalized_command("build_py").get_package_dir("fastreg")))
        return folders

    def _remove(self, filenames: Iterable[str]) -> None:
        """Delete what an earlier build left and this one does not make: it must not ship."""
        for filename in filenames:
            for folder in self._package_folders():
                (folder / filename).unlink(missing_ok=True)

    def _write_build_info(self, outcomes: dict[str, Outcome]) -> None:
        modules = {name.rpartition(".")[2]: vars(outcome) for name, outcome in outcomes.items()}
        for folder in self._package_folders():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / BUILD_INFO).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Describe both native modules to setuptools."""
    packages = find_packages(include=["fastreg", "fastreg.*"])
    packages += ["fastreg.kernels"] + [f"fastreg.kernels.{name}" for name in find_packages("kernels")]
    macros = [("FASTREG_VERSION", f'"{read_version()}"')]
    # Headers reach the sdist only through `depends`.
    inputs = [*sorted(glob("csrc/*")), *SHARED_INPUTS]
    cpu = Pybind11Extension(
        "fastreg._C",
        sorted(glob("csrc/*_cpu.cpp")),
        cxx_std=17,
        define_macros=macros,
        depends=inputs,
    )
    cuda = Extension(
        "fastreg._cuda", ["csrc/bind_cuda.cpp", *sorted(glob("csrc/*_cuda.cu"))], depends=inputs
    )
    ParallelCompile(
        needs_recompile=lambda compiled, source: is_stale(compiled, [source, *SHARED_INPUTS])
    ).install()
    setup(
        packages=packages,
        package_dir={"fastreg.kernels": "kernels"},
        ext_modules=[cpu, cuda],
        cmdclass={"build_ext": BuildNative},
    )


main()
