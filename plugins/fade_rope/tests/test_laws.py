"""What must hold of any rotation by position, whatever its frequencies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fade_core.errors import InputError
from fade_rope import NoRope, scheme_from_config
from fade_rope.verification import relative_error

TRAINED = 2048
HEAD = 24
ROUNDING = 2e-6  # a few units in the last place of float32

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "ntk": {"factor": 2.5},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1 + i / 9 for i in range(12)], "long_factor": [3 + i / 3 for i in range(12)]},
    "proportional": {"partial_rotary_factor": 0.25},
    "mrope": {"mrope_section": [4, 4, 4]},
}
PARAMETERS["longrope"] |= {"original_max_position_embeddings": TRAINED, "factor": 4.0}


def scheme_of(name: str, adjacent: bool = False) -> Any:
    kind = "default" if name in ("partial", "mrope") else name
    model_type = "qwen2_vl_text" if name == "mrope" else "glm" if adjacent else "llama"
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **PARAMETERS[name]}
    return scheme_from_config(
        SimpleNamespace(
            model_type=model_type, head_dim=HEAD, max_position_embeddings=TRAINED, rope_parameters=parameters
        )
    )


def angle_rounding(scheme: Any, *positions: Tensor) -> float:
    """How far the angles of a model may be from the true ones: half a unit in the last place, each."""
    furthest = sum(float(p.abs().max()) for p in positions)
    return furthest * float(getattr(scheme, "inner", scheme).inv_freq.abs().max()) * 2**-24


@st.composite
def cases(draw: Any, largest: int = TRAINED - 1) -> tuple[Any, Tensor, Tensor]:
    """A scheme, tokens ``[B, H, T, D]`` and positions in one of the accepted layouts."""
    scheme = scheme_of(draw(st.sampled_from(sorted(PARAMETERS))), draw(st.booleans()))
    b, h, t = (draw(st.integers(1, most)) for most in (3, 3, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from([(t,), (b, t), (b, h, t), (1, h, 1), (b, 1, t), (1,), ()]))
    positions = torch.randint(0, largest + 1, shape, generator=generator)
    return scheme, torch.randn(b, h, t, HEAD, generator=generator), positions


def offsets(positions: Tensor, amount: int) -> Tensor:
    """An offset a token that keeps every position between 0 and the trained length."""
    return torch.clamp(positions + amount, 0, TRAINED - 1) - positions


@settings(max_examples=80, deadline=None)
@given(cases(largest=200_000))
def test_unrotate_undoes_rotate(case: tuple[Any, Tensor, Tensor]) -> None:
    scheme, x, positions = case
    kept = x.clone()
    assert relative_error(scheme.unrotate(scheme.rotate(x, positions), positions), x) <= ROUNDING
    assert torch.equal(x, kept)


@settings(max_examples=80, deadline=None)
@given(cases(largest=200_000))
def test_rotate_changes_the_norm_by_the_attention_scaling(case: tuple[Any, Tensor, Tensor]) -> None:
    scheme, x, positions = case
    inner = getattr(scheme, "inner", scheme)
    turned = scheme.rotate(x, positions)[..., : inner.rotary_dim]
    before, after = x[..., : inner.rotary_dim].norm(dim=-1), turned.norm(dim=-1)
    assert torch.allclose(after, before * scheme.attention_scaling, rtol=1e-5)
    assert torch.equal(scheme.rotate(x, positions)[..., inner.rotary_dim :], x[..., inner.rotary_dim :])


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(-TRAINED, TRAINED))
def test_shift_is_rotate_at_the_new_positions(case: tuple[Any, Tensor, Tensor], amount: int) -> None:
    scheme, x, positions = case
    offset = offsets(positions, amount)
    rotated, wanted = scheme.rotate(x, positions), scheme.rotate(x, positions + offset)
    assert relative_error(scheme.shift(rotated, offset, positions=positions), wanted) <= ROUNDING
    blind = ROUNDING + angle_rounding(scheme, positions, positions + offset)
    assert relative_error(scheme.shift(rotated, offset), wanted) <= blind


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(-900, 900), st.integers(-900, 900))
def test_shifts_add_up(case: tuple[Any, Tensor, Tensor], first: int, second: int) -> None:
    scheme, x, positions = case
    rotated = scheme.rotate(x, positions)
    twice = scheme.shift(scheme.shift(rotated, first), second)
    assert relative_error(twice, scheme.shift(rotated, first + second)) <= ROUNDING
    assert relative_error(scheme.shift(scheme.shift(rotated, first), -first), rotated) <= ROUNDING


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(PARAMETERS)), st.integers(2, 40), st.integers(0, 2**31))
def test_many_shifts_stay_close(name: str, step: int, seed: int) -> None:
    """Re-positioning at every reassign must not drift."""
    scheme, generator = scheme_of(name), torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 5, HEAD, generator=generator)
    moved, total = scheme.rotate(x, 100), 0
    for _ in range(32):
        amount = int(torch.randint(-step, step + 1, (1,), generator=generator))
        moved, total = scheme.shift(moved, amount), total + amount
    assert relative_error(moved, scheme.shift(scheme.rotate(x, 100), total)) <= ROUNDING


@settings(max_examples=50, deadline=None)
@given(cases(largest=900), st.integers(0, 900))
def test_scores_see_distances_only(case: tuple[Any, Tensor, Tensor], amount: int) -> None:
    scheme, key, positions = case
    query = torch.randn_like(key)
    near = (scheme.rotate(query, 950) * scheme.rotate(key, positions)).sum(-1)
    far = (scheme.rotate(query, 950 + amount) * scheme.rotate(key, positions + amount)).sum(-1)
    size = (query.norm(dim=-1) * key.norm(dim=-1)) * scheme.attention_scaling**2
    bound = ROUNDING + 2 * angle_rounding(scheme, torch.tensor(950 + amount), positions + amount)
    assert ((near - far).abs() <= size * bound).all()


@settings(max_examples=50, deadline=None)
@given(cases(largest=200_000))
def test_layouts_of_positions_mean_the_same(case: tuple[Any, Tensor, Tensor]) -> None:
    scheme, x, positions = case
    rows = positions[:, None] if positions.dim() == 2 else positions
    full = rows.expand(x.shape[:3])
    length = int(full.max()) + 1  # one forward pass
    whole = scheme.rotate(x, positions)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            alone = scheme.rotate(x[b : b + 1, h : h + 1], full[b, h], length=length)
            assert relative_error(alone, whole[b : b + 1, h : h + 1]) <= ROUNDING


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_arithmetic_is_float32_and_the_dtype_comes_back(name: str, dtype: torch.dtype, seed: int) -> None:
    scheme = scheme_of(name)
    x = torch.randn(2, 3, 5, HEAD).to(dtype)
    positions = torch.randint(0, TRAINED, (2, 3, 5))
    for found, wide in [
        (scheme.rotate(x, positions), scheme.rotate(x.float(), positions)),
        (scheme.unrotate(x, positions), scheme.unrotate(x.float(), positions)),
        (scheme.shift(x, positions - 7), scheme.shift(x.float(), positions - 7)),
    ]:
        assert found.dtype == dtype
        assert torch.equal(found, wide.to(dtype))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_no_tokens_are_no_problem(name: str) -> None:
    scheme, nothing = scheme_of(name), torch.empty(2, 3, 0, HEAD)
    at = torch.empty(2, 3, 0, dtype=torch.int64)
    for found in (scheme.rotate(nothing, at), scheme.shift(nothing, at), scheme.shift(nothing, at, positions=at)):
        assert found.shape == nothing.shape


@pytest.mark.parametrize(
    ("x", "positions", "says"),
    [
        (torch.randn(2, 3, 5, HEAD - 1), torch.arange(5), rf"D={HEAD}.*\(2, 3, 5, {HEAD - 1}\)"),
        (torch.randn(3, 5, HEAD), torch.arange(5), r"\[B, H, T, D=24\].*\(3, 5, 24\)"),
        (torch.ones(2, 3, 5, HEAD, dtype=torch.int64), torch.arange(5), "floating.*int64"),
        (torch.randn(2, 3, 5, HEAD), torch.arange(4), r"\(4,\).*\[T=5\]"),
        (torch.randn(2, 3, 5, HEAD), torch.zeros(3, 5, dtype=torch.int64), r"\(3, 5\).*\[B=2, T=5\]"),
        (torch.randn(2, 3, 5, HEAD), torch.zeros(2, 4, 5, dtype=torch.int64), r"\[B=2, H=3, T=5\]"),
        (torch.randn(2, 3, 5, HEAD), torch.zeros(1, 2, 3, 5, dtype=torch.int64), r"give \[T\], \[B, T\]"),
        (torch.randn(2, 3, 5, HEAD), torch.rand(5), "integers; found torch.float32"),
        (torch.randn(2, 3, 5, HEAD), torch.ones(5, dtype=torch.bool), "integers; found torch.bool"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, positions: Tensor, says: str) -> None:
    scheme = scheme_of("yarn")
    for method in (scheme.rotate, scheme.unrotate, scheme.shift):
        with pytest.raises(InputError, match=says):
            method(x, positions)


def test_axes_of_positions_must_be_three() -> None:
    with pytest.raises(InputError, match=r"give \[3, B, H, T\]"):
        scheme_of("mrope").rotate(torch.randn(1, 2, 5, HEAD), torch.zeros(2, 1, 1, 5, dtype=torch.int64))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_gradients_are_rotated_back(name: str, seed: int) -> None:
    scheme, weight = scheme_of(name), torch.randn(1, 2, 5, HEAD)
    x, positions = torch.randn(1, 2, 5, HEAD, requires_grad=True), torch.randint(0, TRAINED, (5,))
    (scheme.rotate(x, positions) * weight).sum().backward()
    turned = getattr(scheme, "inner", scheme).rotary_dim
    wanted = scheme.unrotate(weight, positions)
    wanted[..., :turned] *= scheme.attention_scaling**2
    assert relative_error(x.grad, wanted) <= ROUNDING


def test_no_rope_returns_what_it_gets() -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.float16)
    scheme = NoRope()
    assert scheme.rotate(x, 5) is scheme.unrotate(x, 5) is scheme.shift(x, -5) is x
