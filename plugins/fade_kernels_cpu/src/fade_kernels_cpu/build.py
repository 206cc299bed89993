"""Compiling the native code for this machine, once, and loading it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from fade_kernels_cpu.layouts import SIZED

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
TUNED = ("-march=native", "-mcpu=native")
"""Ways to ask for all that the processor can do; a compiler knows one of them."""

SECONDS = 300


class BuildError(Exception):
    """The native code cannot run here; the message says why and what would help."""


def compiler() -> str:
    """Path of the C++ compiler: ``CXX``, or the first of ``COMPILERS`` that is there.

    Raises:
        BuildError: if there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        if found := shutil.which(name):
            return found
    looked = f"CXX={wanted}" if wanted else ", ".join(COMPILERS)
    raise BuildError(f"no C++ compiler ({looked}); install one, such as g++, or set CXX to its path")


def folder() -> Path:
    """Where compiled code is kept: ``FADE_CACHE_DIR``, else ``fade`` in the user's cache folder."""
    given = os.environ.get("FADE_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else home / "fade"


@cache
def library() -> ctypes.CDLL:
    """The compiled code. Compiled by the first process that asks, some seconds; others load its file.

    Raises:
        BuildError: without a compiler, or if it fails.
    """
    tool = compiler()
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    facts = tool, _version(tool), FLAGS, platform.machine(), _processor(), torch.__version__
    name = f"attention-{hashlib.sha256(text + repr(facts).encode()).hexdigest()[:16]}.so"
    path = folder() / name
    if not path.exists():
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            compile_to(path, tool)
        except OSError as error:
            raise BuildError(
                f"{path.parent} cannot be written ({error}); set FADE_CACHE_DIR to a folder that can"
            ) from error
    return load(path)


def compile_to(path: Path, tool: str) -> None:
    """Compile the sources to ``path``, which is there as a whole or not at all. Raises ``BuildError``."""
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        made = Path(place) / path.name
        failures = []
        for tuned in TUNED:
            command = [tool, *FLAGS, tuned, "-o", str(made), str(SOURCES / "attention.cpp"), *_threads_of_torch()]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
            except subprocess.CalledProcessError as error:
                failures.append(error.stderr.strip()[-400:])
            except subprocess.TimeoutExpired as error:
                raise BuildError(f"{tool} was not done within {SECONDS} s") from error
            else:
                made.replace(path)
                return
    raise BuildError(f"{tool} failed: {failures[0]}")


def load(path: Path) -> ctypes.CDLL:
    """The compiled code of ``path``. Raises ``BuildError`` for a file that is not ours."""
    try:
        native = ctypes.CDLL(str(path))
        native.fade_sizes.restype = ctypes.c_int64
        sizes = [native.fade_sizes(number) for number in range(len(SIZED))]
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded ({error}); delete it, and it is compiled again") from error
    if sizes != [ctypes.sizeof(layout) for layout in SIZED]:
        raise BuildError(f"{path} was compiled from other sources; delete it, and it is compiled again")
    return native


def _threads_of_torch() -> list[str]:
    """torch's own OpenMP, if it brings one: two pools of threads would take turns on the same cores."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]]


def _version(tool: str) -> str:
    found = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=SECONDS, check=False)
    return found.stdout


def _processor() -> str:
    """What the processor can do, as Linux tells it: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
