"""Conformance of RoPE schemes: a rotation that depends on positions as the interface says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.interfaces import RopeConfig, RopeScheme
from fade_core.plugins.resolve import resolve
from fade_core.testing.checks import (
    CheckResult,
    Suite,
    fresh_seed,
    require,
    require_close,
    require_equal,
    require_raises,
    shuffled,
    unchanged,
)

BATCH, HEADS, HEAD_DIM, TRAINED = 2, 3, 64, 4096


@dataclass
class RopeCase:
    """A scheme under test and the generator of its inputs."""

    build: Callable[[], RopeScheme]
    head_dim: int
    generator: torch.Generator

    def tokens(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random ``[B, H, T, D]``."""
        return torch.randn(BATCH, HEADS, count, self.head_dim, generator=self.generator).to(dtype)

    def positions(self, *shape: int, top: int = 1024) -> Tensor:
        """Random positions, far below the trained length."""
        return torch.randint(0, top, shape, generator=self.generator)


def check_rope(
    scheme: RopeConfig | type[RopeConfig] | RopeScheme | str | Callable[[], RopeScheme],
    *,
    model_config: Any = None,
    head_dim: int | None = None,
    seed: int | None = None,
    expected_failures: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    only: tuple[str, ...] = (),
) -> list[CheckResult]:
    """Check a RoPE scheme against ``fade_core.interfaces.RopeScheme``.

    Args:
        scheme: its configuration (object, class, or the name it is installed under), the scheme itself, or a function
            that builds it.
        model_config: what the configuration is built for; ``None`` for a Llama-like one of 64 channels a head that
            names the scheme.
        head_dim: channels of a head; ``None`` reads them from ``model_config``.
        seed: of the inputs; ``None`` draws one.
        expected_failures: checks that are known to fail, with the reason.
        progress: called as checks are done.
        only: names of the checks to run; empty for all.
    """
    build, config = _factory(scheme, model_config)
    return ROPE_CHECKS.run(
        lambda generator: RopeCase(build, head_dim or _head_dim(config), generator),
        fresh_seed() if seed is None else seed,
        expected_failures,
        progress,
        only,
    )


def model_config_for(kind: str) -> Any:
    """A model's config that names the RoPE scheme ``kind``, with parameters for any of the usual ones."""
    parameters: dict[str, Any] = {
        "rope_type": "default" if kind in ("auto", "mrope") else kind,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "short_factor": [1.0 + 0.01 * i for i in range(HEAD_DIM // 2)],
        "long_factor": [2.0 + 0.05 * i for i in range(HEAD_DIM // 2)],
    }
    if kind == "mrope":
        parameters["mrope_section"] = [8, 12, 12]
    geometry: dict[str, Any] = {
        "model_type": "qwen2_vl_text" if kind == "mrope" else "llama",
        "head_dim": HEAD_DIM,
        "hidden_size": 4 * HEAD_DIM,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": 2,
        "max_position_embeddings": 4 * TRAINED if kind in ("yarn", "longrope", "llama3") else TRAINED,
    }
    if kind != "none":
        geometry |= {"rope_theta": 10000.0, "rope_parameters": parameters}
    return SimpleNamespace(**geometry)


# --- the checks ---


def shapes(case: RopeCase) -> None:
    """rotate, unrotate and shift keep shape and dtype, for one token and odd lengths."""
    scheme = case.build()
    for count in (1, 7, 33):
        for dtype in (torch.float32, torch.bfloat16):
            x = case.tokens(count, dtype)
            for name in ("rotate", "unrotate", "shift"):
                found = getattr(scheme, name)(x, case.positions(count))
                require(found.shape == x.shape, f"{name}: {tuple(found.shape)} from {tuple(x.shape)}")
                require(found.dtype == dtype, f"{name}: {found.dtype} from {dtype}")


def round_trip(case: RopeCase) -> None:
    """unrotate undoes rotate."""
    scheme, x, positions = case.build(), case.tokens(33), case.positions(33)
    require_close(scheme.unrotate(scheme.rotate(x, positions), positions), x, _tolerance(x), "unrotate(rotate(x))")


def shifting(case: RopeCase) -> None:
    """shift by o takes what was rotated at p to what rotate gives at p + o, both ways."""
    scheme, x, positions = case.build(), case.tokens(33), case.positions(33)
    for sign in (1, -1):
        start = positions if sign > 0 else positions + 1024
        offset = sign * case.positions(33)
        wanted = scheme.rotate(x, start + offset)
        found = scheme.shift(scheme.rotate(x, start), offset)
        require_close(found, wanted, _tolerance(x, 2048), f"shift by {'positive' if sign > 0 else 'negative'} offsets")


def relative(case: RopeCase) -> None:
    """Inner products of rotated queries and keys depend on their distance only."""
    scheme = case.build()
    query, key = case.tokens(9), case.tokens(9)
    at, other, offset = case.positions(9), case.positions(9), 1000
    here = (scheme.rotate(query, at) * scheme.rotate(key, other)).sum(-1)
    there = (scheme.rotate(query, at + offset) * scheme.rotate(key, other + offset)).sum(-1)
    tolerance = _tolerance(query, 2048) * float(key.abs().max()) * case.head_dim
    require_close(there, here, tolerance, f"inner products moved by {offset} positions")


def broadcasting(case: RopeCase) -> None:
    """Positions [T], [B, 1, T] and [B, H, T], int32 or int64, mean the same."""
    scheme, x, positions = case.build(), case.tokens(9), case.positions(9)
    wanted = scheme.rotate(x, positions)
    for shape in ((1, 1, 9), (BATCH, 1, 9), (BATCH, HEADS, 9)):
        require_equal(scheme.rotate(x, positions.expand(shape)), wanted, f"positions {shape}")
    require_equal(scheme.rotate(x, positions.to(torch.int32)), wanted, "int32 positions")
    require_equal(scheme.rotate(x, positions.to(torch.int64)), wanted, "int64 positions")


def determinism(case: RopeCase) -> None:
    """The same tokens rotate the same, by one scheme twice and by two built alike."""
    scheme, x, positions = case.build(), case.tokens(9), case.positions(9)
    wanted = scheme.rotate(x, positions)
    scheme.rotate(case.tokens(3), case.positions(3, top=TRAINED))
    require_equal(scheme.rotate(x, positions), wanted, "rotating again")
    require_equal(case.build().rotate(x, positions), wanted, "a second scheme")


def inputs_kept(case: RopeCase) -> None:
    """No method changes a tensor that it was given."""
    scheme, x, positions = case.build(), case.tokens(9), case.positions(9)
    check = unchanged("rotate, unrotate and shift", x, positions)
    scheme.rotate(x, positions)
    scheme.unrotate(x, positions)
    scheme.shift(x, positions)
    check()


def order(case: RopeCase) -> None:
    """Permuting tokens with their positions permutes the result."""
    scheme, x, positions = case.build(), case.tokens(33), case.positions(33)
    permuted = shuffled(33, case.generator)
    found = scheme.rotate(x[:, :, permuted], positions[permuted])
    require_equal(found, scheme.rotate(x, positions)[:, :, permuted], "permuted tokens")


def tokens_apart(case: RopeCase) -> None:
    """A token's rotation depends on its own position only: NaN in another token stays there."""
    scheme, x, positions = case.build(), case.tokens(9), case.positions(9)
    wanted = scheme.rotate(x, positions)
    spoiled = x.clone()
    spoiled[:, :, 4] = torch.nan
    found = scheme.rotate(spoiled, positions)
    keep = torch.arange(9) != 4
    require_equal(found[:, :, keep], wanted[:, :, keep], "tokens beside one that is NaN")


def wrong_input(case: RopeCase) -> None:
    """A head of another size raises InputError (a scheme that rotates nothing may take it)."""
    scheme, x = case.build(), case.tokens(4)
    if torch.equal(scheme.rotate(x, torch.full((4,), 77)), x):
        return
    wide = torch.cat([x, x], dim=-1)
    require_raises(InputError, "a head of another size", lambda: scheme.rotate(wide, torch.arange(4)))


ROPE_CHECKS: Suite[RopeCase] = Suite(
    (
        *(shapes, round_trip, shifting, relative, broadcasting, determinism, inputs_kept, order, tokens_apart),
        wrong_input,
    )
)


def _factory(scheme: Any, model_config: Any) -> tuple[Callable[[], RopeScheme], Any]:
    if isinstance(scheme, str):
        scheme = resolve("rope_schemes", {"kind": scheme})
    if isinstance(scheme, type) and issubclass(scheme, RopeConfig):
        scheme = scheme.model_validate({})
    if isinstance(scheme, RopeConfig):
        described = scheme
        config = model_config if model_config is not None else model_config_for(described.kind)
        return lambda: described.build(config), config
    if isinstance(scheme, RopeScheme):
        return lambda: scheme, model_config
    if callable(scheme):
        return scheme, model_config
    raise InputError(f"a RoPE scheme, its configuration or its name is needed; found {scheme!r}")


def _head_dim(config: Any) -> int:
    if config is None:
        return HEAD_DIM
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = getattr(text, "head_dim", None)
    return int(found or text.hidden_size // text.num_attention_heads)


def _tolerance(x: Tensor, top: int = 1024) -> float:
    """Angles up to ``top`` radians are rounded in float32; so is each product."""
    eps = torch.finfo(torch.float32).eps
    return float(x.abs().max()) * eps * (4 * top + 32) * math.sqrt(2)
