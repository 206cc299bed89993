"""Shared by this plugin's tests: seeds that are printed, and models that tell what they rotate."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

APPLY_FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_emb")
_rows: list[tuple[str, str, float, float]] = []


@pytest.fixture
def seed() -> int:
    """FADE_SEED, or a new one; printed so that a failure can be repeated."""
    chosen = int(os.environ.get("FADE_SEED", time.time_ns() % 2**31))
    print(f"FADE_SEED={chosen}")
    torch.manual_seed(chosen)
    return chosen


@pytest.fixture
def report() -> Callable[[str, str, float, float], None]:
    """Add a line (family, scheme, short and long error) to the table that ``pytest -v`` ends with."""
    return lambda *row: _rows.append(row)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _rows or terminalreporter.verbosity < 1:
        return
    terminalreporter.section("relative error of rotate against the model's own embedding, float32")
    terminalreporter.write_line("| family | scheme of its layers | trained length | to 131,072 |\n|---|---|---|---|")
    for family, scheme, short, far in _rows:
        terminalreporter.write_line(f"| {family} | {scheme} | {short:.1e} | {far:.1e} |")


@dataclass(frozen=True)
class Rotation:
    """One tensor on its way through a model's own embedding: ``[B, H, T, R]`` before and after."""

    layer: int
    before: Tensor
    after: Tensor


@pytest.fixture
def watch() -> Callable[[nn.Module, Tensor], list[Rotation]]:
    """Run a model at given positions and return every query and key that its own embedding rotated."""

    def run(model: nn.Module, positions: Tensor) -> list[Rotation]:
        batch, length = positions.shape[-2:]
        tokens = torch.randint(5, 90, (batch, length))
        with _recording(model, length) as found, torch.no_grad():
            model(input_ids=tokens, position_ids=positions, use_cache=False)
        return found

    return run


@contextmanager
def _recording(model: nn.Module, length: int) -> Iterator[list[Rotation]]:
    found: list[Rotation] = []
    layer = -1

    def enter(module: nn.Module, inputs: Any) -> None:
        nonlocal layer
        layer = module.layer_idx

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def apply(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            outputs = (result,) if isinstance(result, Tensor) else result
            for before, after in zip([*args, *kwargs.values()], outputs, strict=False):
                found.append(Rotation(layer, _heads_first(before, length), _heads_first(after, length)))
            return result

        return apply

    hooks = [m.register_forward_pre_hook(enter) for m in model.modules() if hasattr(m, "layer_idx")]
    files = {sys.modules[type(m).__module__] for m in model.modules() if "Attention" in type(m).__name__}
    originals = [(f, name, getattr(f, name)) for f in files for name in APPLY_FUNCTIONS if hasattr(f, name)]
    for file, name, function in originals:
        setattr(file, name, recorded(function))
    try:
        yield found
    finally:
        for file, name, function in originals:
            setattr(file, name, function)
        for hook in hooks:
            hook.remove()


def _heads_first(x: Tensor, length: int) -> Tensor:
    x = x.detach().clone()
    return x if x.shape[2] == length else x.transpose(1, 2)
