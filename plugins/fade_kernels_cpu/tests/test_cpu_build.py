from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fade_kernels_cpu import build, kernel
from fade_kernels_cpu.kernel import CpuDecodeAttention


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing remembered."""
    monkeypatch.setenv("FADE_CACHE_DIR", str(tmp_path / "cache"))
    kernel._unbuilt.cache_clear()
    build.library.cache_clear()
    yield tmp_path
    kernel._unbuilt.cache_clear()
    build.library.cache_clear()


def tool(folder: Path, script: str) -> str:
    """A compiler that does as ``script`` says."""
    path = folder / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def reason() -> str:
    answer = CpuDecodeAttention().supports(None, 64, torch.device("cpu"), torch.float32)
    assert not answer
    return answer.reason


def quick(folder: Path, made: str, first: str = "") -> str:
    """A compiler that knows what comes out: ``made``."""
    return tool(folder, f'{first}\nwhile [ "$1" != -o ]; do shift; done\ncp "{made}" "$2"')


@pytest.fixture(scope="module")
def made() -> str:
    """The code that the other tests run, compiled for real where that has not been done yet."""
    return str(build.library()._name)


def test_it_is_compiled_once_and_loaded_by_the_next_process(
    made: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", quick(place, made))
    build.library()
    (found,) = (place / "cache").iterdir()
    assert found.suffix == ".so"
    build.library.cache_clear()

    def refuse(path: Path, tool: str) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build, "compile_to", refuse)
    build.library()


def test_without_a_compiler_it_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(place))
    assert "no C++ compiler (g++, clang++, c++); install one" in reason()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", tool(place, 'echo "fatal: out of memory" >&2; exit 1'))
    assert "fatal: out of memory" in reason()
    assert not list((place / "cache").iterdir())


def test_a_compiler_is_asked_again_without_what_it_does_not_know(
    made: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = 'case "$*" in *-march=native*) echo "unknown argument" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", quick(place, made, refusing))
    build.library()
    assert len(list((place / "cache").iterdir())) == 1


def test_a_file_that_is_not_ours_is_named(place: Path) -> None:
    broken = place / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(build.BuildError, match=r"broken.so cannot be loaded .*; delete it"):
        build.load(broken)


def test_a_folder_that_cannot_be_made_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("FADE_CACHE_DIR", str(place / "file" / "cache"))
    assert "set FADE_CACHE_DIR to a folder that can" in reason()
