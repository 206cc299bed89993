"""The conformance kit: what the core brings passes, and every check catches the fault that it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from fade_core.builtin.quantizers.uniform import UniformConfig, UniformQuantizer
from fade_core.builtin.telemetry import Collector
from fade_core.errors import CheckpointError, ConfigError, FadeError, InputError
from fade_core.interfaces import (
    Event,
    EvictionPolicy,
    Kernel,
    LayerView,
    Op,
    PolicyConfig,
    Quantizer,
    QuantizerContext,
    RopeScheme,
    Support,
    TelemetrySink,
)
from fade_core.ops.reference import AttentionOutput, FullSegment, PackedSegment, TorchAppend, decode_attention
from fade_core.packed import Packed, PackedFormat
from fade_core.plugins import Registry, use_registry
from fade_core.plugins.hookspecs import hookimpl
from fade_core.storage.codec import TorchDequantize, TorchEncode
from fade_core.testing import (
    check_component,
    check_kernel,
    check_names,
    check_policy,
    check_quantizer,
    check_rope,
    check_telemetry_sink,
)
from fade_core.testing import kernel as kernel_checks
from fade_core.testing.checks import CheckResult, Suite
from fade_core.testing.component import read_fields
from fade_core.testing.quantizer import read_words


def failed(results: list[CheckResult]) -> set[str]:
    return {result.name for result in results if not result.passed}


def wrong(results: list[CheckResult]) -> str:
    return "\n".join(f"{r.name} (seed {r.seed}): {r.message}" for r in results if not r.passed)


# --- what the core brings ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(("axis", "group"), [("token", 0), ("token", 16), ("channel", 0), ("channel", 16)])
def test_uniform_quantizers_conform(bits: int, axis: Any, group: int) -> None:
    results = check_quantizer(UniformConfig(bits=bits, axis=axis, group=group), head_dims=(64, 80))
    assert not failed(results), wrong(results)


@pytest.mark.parametrize(
    "component",
    [
        *("policies:h2o", "policies:ema", "policies:position", "quantizers:uniform"),
        *(
            "kernels:decode_attention:torch",
            "kernels:attention_mass:torch",
            "kernels:append:torch",
            "kernels:encode:torch",
            "kernels:dequantize:torch",
            "telemetry:jsonl",
        ),
    ],
)
def test_built_in_components_conform(component: str) -> None:
    report = check_component(component)
    assert report.ok, wrong(list(report.results))
    assert tuple(result.name for result in report.results) == check_names(component)


def test_a_sink_that_keeps_events_conforms() -> None:
    results = check_telemetry_sink(Collector)
    assert not failed(results), wrong(results)


# --- quantizers with one fault each ---


class Faulty(UniformQuantizer):
    """A good quantizer, from which the faulty ones are made."""

    kind: ClassVar[str] = "faulty"


class WrongShapes(Faulty):
    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: ((1, *shape), dtype) for name, (shape, dtype) in super().field_shapes().items()}


class FlatteringBits(Faulty):
    @property
    def bits_per_element(self) -> float:
        return super().bits_per_element - 0.25  # metadata forgotten


class WrongDtype(Faulty):
    def decode(self, packed: Packed) -> Tensor:
        return super().decode(packed).float()


class WholeTilesOnly(Faulty):
    def encode(self, x: Tensor) -> Packed:
        if x.dim() == 4 and x.shape[2] % self.tile and x.shape[2]:
            raise ValueError("whole tiles please")
        return super().encode(x)


class Random(Faulty):
    def encode(self, x: Tensor) -> Packed:
        packed = super().encode(x)
        return replace(packed, fields={**packed.fields, "codes4": torch.randint_like(packed.fields["codes4"], 2**15)})


class InPlace(Faulty):
    def encode(self, x: Tensor) -> Packed:
        packed = super().encode(x)
        x.mul_(0.5)
        return packed


class SharedScale(Faulty):
    """Scales by the largest value of everything it is given: tiles are no longer apart."""

    def encode(self, x: Tensor) -> Packed:
        packed = super().encode(x)
        factor = x.abs().max().item() if x.numel() else 0.0
        return replace(packed, fields={**packed.fields, "meta": packed.fields["meta"] + int(factor * 1000)})


class CountsRows(Faulty):
    """Encodes a row differently when it is not alone."""

    def encode(self, x: Tensor) -> Packed:
        return super().encode(x * (1 + 0.01 * x.shape[0]) if x.is_floating_point() else x)


class ReadsBeyond(Faulty):
    """Looks at the whole buffer that the tokens are a view of."""

    def encode(self, x: Tensor) -> Packed:
        if x.dim() == 4 and not x.is_contiguous():
            whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # type: ignore[call-overload]
            x = x + 0 * whole.sum()
        return super().encode(x)


class DividesByRange(Faulty):
    def decode(self, packed: Packed) -> Tensor:
        found = super().decode(packed)
        spread = found.amax(-1, keepdim=True) - found.amin(-1, keepdim=True)
        return found * (spread / spread).to(found.dtype)


class WrongScores(Faulty):
    def scores(self, query: Tensor, packed: Packed) -> Tensor:
        return super().scores(query, packed) * (1 + 1e-3)


class WrongSums(Faulty):
    def combine(self, weights: Tensor, packed: Packed) -> Tensor:
        return super().combine(weights, packed) + 1e-3 * weights.sum(-1, keepdim=True)


class ForgottenRotation(Faulty):
    """scores() and decode() agree, but a kernel would rotate the query for codes that are not rotated."""

    def transform_query(self, query: Tensor) -> Tensor:
        return query.roll(1, -1)

    def transform_output(self, output: Tensor, weight_sum: Tensor) -> Tensor:
        return output.roll(1, -1)


class Requantizes(Faulty):
    def select(self, packed: Packed, index: Tensor) -> Packed:
        if index.shape[-1] % self.tile:
            raise InputError("whole tiles")
        moved = self.decode(packed).gather(2, index[..., None].expand(-1, -1, -1, self.head_dim))
        return self.encode(moved + 1e-3)


class ClaimsToMove(Faulty):
    """Shares a scale between the tokens of a tile and says that they can be parted."""

    def __init__(self, head_dim: int, **options: Any) -> None:
        super().__init__(head_dim, **{**options, "axis": "channel"})
        self.moves_tokens = True

    def select(self, packed: Packed, index: Tensor) -> Packed:
        return Requantizes.select(self, packed, index)  # type: ignore[arg-type]


class LosesState(Faulty):
    def __init__(self, head_dim: int, **options: Any) -> None:
        super().__init__(head_dim, **options)
        self.offset = torch.zeros(head_dim)
        self.drawn = torch.randn(head_dim)

    def state_dict(self) -> dict[str, Tensor]:
        return {"offset": self.drawn}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state["offset"].shape != self.offset.shape:
            raise CheckpointError("another head_dim")

    def decode(self, packed: Packed) -> Tensor:
        return super().decode(packed) + self.drawn.to(packed.dtype)


class TakesAnything(Faulty):
    def encode(self, x: Tensor) -> Packed:
        if x.dim() == 3:
            x = x[None]
        return super().encode(x)


@pytest.mark.parametrize(
    ("quantizer", "caught_by"),
    [
        (WrongShapes, "fields"),
        (FlatteringBits, "field_bytes"),
        (WrongDtype, "decoding"),
        (WholeTilesOnly, "odd_lengths"),
        (Random, "determinism"),
        (InPlace, "inputs_kept"),
        (SharedScale, "tiles_apart"),
        (CountsRows, "rows_apart"),
        (ReadsBeyond, "padding_does_not_leak"),
        (DividesByRange, "extreme_values"),
        (WrongScores, "packed_scores"),
        (WrongSums, "packed_sums"),
        (ForgottenRotation, "kernel_view"),
        (Requantizes, "selection"),
        (ClaimsToMove, "order"),
        (LosesState, "state"),
        (TakesAnything, "wrong_input"),
    ],
)
def test_each_fault_of_a_quantizer_is_caught(quantizer: type[Faulty], caught_by: str) -> None:
    def build(context: QuantizerContext) -> Quantizer:
        layout: Literal["token", "channel"] = "token" if context.side == "key" else "channel"
        return quantizer(context.head_dim, layout=layout)

    results = check_quantizer(build, head_dims=(64,))
    assert caught_by in failed(results), wrong(results)


def test_a_quantizer_may_refuse_some_head_dimensions_but_not_all() -> None:
    def picky(context: QuantizerContext) -> Quantizer:
        if context.head_dim != 64:
            raise ConfigError(f"head_dim={context.head_dim} is not 64")
        return UniformQuantizer(64, layout="token" if context.side == "key" else "channel")

    assert not failed(check_quantizer(picky))
    results = check_quantizer(picky, head_dims=(80, 96))
    assert "decoding" in failed(results)
    assert "is not 64" in wrong(results)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("layout", ["token", "channel"])
def test_words_are_read_as_the_format_says(bits: int, axis: Any, layout: Any) -> None:
    quantizer = UniformQuantizer(64, bits, axis, 16, layout=layout)
    packed = quantizer.encode(torch.randn(2, 3, 70, 64))
    assert isinstance(quantizer.format, PackedFormat)
    assert torch.allclose(read_words(packed, quantizer.format), quantizer.decode(packed), atol=1e-6)


# --- policies with one fault each ---


class Recency(EvictionPolicy):
    """A good policy, from which the faulty ones are made."""

    kind: ClassVar[str] = "recency"

    def score(self, view: LayerView) -> Tensor:
        return view.positions.float()


class WrongShape(Recency):
    def score(self, view: LayerView) -> Tensor:
        return super().score(view).mean(1)


class Whole(Recency):
    def score(self, view: LayerView) -> Tensor:
        return view.positions


class Undeclared(Recency):
    def score(self, view: LayerView) -> Tensor:
        return view.statistic("mass")


class Untracked(Recency):
    statistics = ("love",)


class Noisy(Recency):
    def score(self, view: LayerView) -> Tensor:
        return torch.rand_like(super().score(view))


class Scribbles(Recency):
    def score(self, view: LayerView) -> Tensor:
        view.keys.zero_()
        return super().score(view)


class BySlot(Recency):
    def score(self, view: LayerView) -> Tensor:
        return torch.arange(view.positions.shape[-1]).float().expand(view.positions.shape)


class NormalisesOverGarbage(Recency):
    def score(self, view: LayerView) -> Tensor:
        return view.keys.norm(dim=-1) / view.keys.norm(dim=-1).mean(-1, keepdim=True)


class NormalisesOverRows(Recency):
    def score(self, view: LayerView) -> Tensor:
        return super().score(view) / view.positions.float().mean()


class NotReallyPositional(Recency):
    positional = True

    def score(self, view: LayerView) -> Tensor:
        return -view.positions.float()


class Spendthrift(Recency):
    """Gives every head what it has, whatever the budget."""

    def allocate(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        return (scores > -torch.inf).sum(-1)


class Stingy(Recency):
    def allocate(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        return (budget // 2)[:, None].expand(scores.shape[:2])


class BlindToWhatThereIs(Recency):
    """Gives all heads' budget to the first, however few tokens that has."""

    def allocate(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        heads = scores.shape[1]
        return torch.nn.functional.pad(budget[:, None] * heads, (0, heads - 1))


class EvenHanded(Recency):
    """A good one: the same for all heads, as far as they have it, and the rest to whoever has more."""

    def allocate(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        held = (scores > -torch.inf).sum(-1)
        found = torch.zeros_like(held)
        for _ in range(scores.shape[-1]):
            left = (budget * scores.shape[1] - found.sum(1))[:, None]
            hungry = found < held
            found = found + (hungry & (hungry.cumsum(1) <= left)).long()
        return found


@pytest.mark.parametrize(
    ("policy", "caught_by"),
    [
        (WrongShape, "shapes"),
        (Whole, "shapes"),
        (Undeclared, "statistics_declared"),
        (Untracked, "statistics_declared"),
        (Noisy, "determinism"),
        (Scribbles, "inputs_kept"),
        (BySlot, "order"),
        (NormalisesOverGarbage, "empty_slots_ignored"),
        (NormalisesOverRows, "rows_apart"),
        (NotReallyPositional, "positional"),
        (Spendthrift, "allocation"),
        (Stingy, "allocation"),
        (BlindToWhatThereIs, "allocation"),
    ],
)
def test_each_fault_of_a_policy_is_caught(policy: type[Recency], caught_by: str) -> None:
    results = check_policy(policy)
    assert caught_by in failed(results), wrong(results)
    assert not failed(check_policy(Recency))
    assert not failed(check_policy(EvenHanded))


# --- rope ---


class Turn(RopeScheme):
    """A plain rotary embedding written as complex numbers, from which the faulty ones are made."""

    kind: ClassVar[str] = "turn"

    def __init__(self) -> None:
        self.frequencies = 1e4 ** -torch.linspace(0, 1, 32)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        if x.shape[-1] != 64:
            raise InputError(f"64 channels are needed; found {x.shape[-1]}")
        return self._turn(x, positions[..., None] * self.frequencies)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rotate(x, -positions)

    def _turn(self, x: Tensor, angle: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (32, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)


class FloatOut(Turn):
    def _turn(self, x: Tensor, angle: Tensor) -> Tensor:
        return super()._turn(x.float(), angle)


class RotatesTwice(Turn):
    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rotate(x, positions)


class ShiftsBackwards(Turn):
    def shift(self, x: Tensor, offset: Tensor) -> Tensor:
        return self.rotate(x, -offset)


class SquaredPositions(Turn):
    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().rotate(x, positions**2 // 64)


class RowsOnly(Turn):
    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().rotate(x, positions if positions.dim() == 1 else positions[:, :1, :1])


class Remembers(Turn):
    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        self.frequencies = self.frequencies * 0.999
        return super().rotate(x, positions)


class TurnsInPlace(Turn):
    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        found = super().rotate(x, positions)
        x.copy_(found)
        return found


class CountsFromFirst(Turn):
    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().rotate(x, positions - positions[..., :1])


class MixesTokens(Turn):
    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().rotate(x + 0 * x.mean(2, keepdim=True), positions)


class Folds(Turn):
    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().rotate(x[..., :64], positions)


@pytest.mark.parametrize(
    ("scheme", "caught_by"),
    [
        (FloatOut, "shapes"),
        (RotatesTwice, "round_trip"),
        (ShiftsBackwards, "shifting"),
        (SquaredPositions, "relative"),
        (RowsOnly, "broadcasting"),
        (Remembers, "determinism"),
        (TurnsInPlace, "inputs_kept"),
        (CountsFromFirst, "order"),
        (MixesTokens, "tokens_apart"),
        (Folds, "wrong_input"),
    ],
)
def test_each_fault_of_a_rope_scheme_is_caught(scheme: type[Turn], caught_by: str) -> None:
    good = check_rope(Turn)
    assert not failed(good), wrong(good)
    results = check_rope(scheme)
    assert caught_by in failed(results), wrong(results)


# --- kernels ---


class Oracle(Kernel):
    """The oracle itself, from which the faulty ones are made."""

    name: ClassVar[str] = "mine"
    op: ClassVar[Op] = "decode_attention"

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        return Support(True)

    def __call__(self, *args: Any, **kwargs: Any) -> AttentionOutput:
        return decode_attention(*args, **kwargs)


class NoReason(Oracle):
    def supports(self, format: PackedFormat | None, *rest: Any) -> Support:
        return Support(False)


class Elsewhere(Oracle):
    def supports(self, format: PackedFormat | None, *rest: Any) -> Support:
        return Support(False, "needs a device that computes with light")


class IgnoresMask(Oracle):
    def __call__(self, query: Tensor, segments: Any, *args: Any, **kwargs: Any) -> AttentionOutput:
        bare = [replace(s, mask=None, plain=False) if isinstance(s, PackedSegment) else s for s in segments]
        return decode_attention(query, bare, *args, **kwargs)


class IgnoresWindowMask(Oracle):
    def __call__(self, query: Tensor, segments: Any, *args: Any, **kwargs: Any) -> AttentionOutput:
        bare = [replace(s, mask=None, plain=False) if isinstance(s, FullSegment) else s for s in segments]
        return decode_attention(query, bare, *args, **kwargs)


class IgnoresSinks(Oracle):
    def __call__(self, *args: Any, sinks: Any = None, **kwargs: Any) -> AttentionOutput:
        return decode_attention(*args, **kwargs)


class HalfSums(Oracle):
    """Sums values in float16: right for short contexts, wrong for long flat ones."""

    def __call__(self, query: Tensor, segments: Any, *args: Any, **kwargs: Any) -> AttentionOutput:
        found = decode_attention(query, segments, *args, **kwargs)
        tokens = sum(s.store.tiles * 64 for s in segments if isinstance(s, PackedSegment))
        return replace(found, output=found.output + 1e-5 * max(0, tokens - 2000))


class NeedsTiles(Oracle):
    def __call__(self, query: Tensor, segments: Any, *args: Any, **kwargs: Any) -> AttentionOutput:
        if not isinstance(segments[0], PackedSegment):
            raise RuntimeError("no tiles")
        return decode_attention(query, segments, *args, **kwargs)


class ScalesQuery(Oracle):
    def __call__(self, query: Tensor, segments: Any, scaling: float, *args: Any, **kwargs: Any) -> AttentionOutput:
        return decode_attention(query.mul_(scaling), segments, 1.0, *args, **kwargs)


class OneHeadGroup(Oracle):
    def __call__(self, query: Tensor, segments: Any, *args: Any, **kwargs: Any) -> AttentionOutput:
        found = decode_attention(query, segments, *args, **kwargs)
        return found if query.shape[1] != 14 else replace(found, output=found.output.roll(1, 1))


class Jitters(Oracle):
    """A few last places apart at every other call: too little for agreement, and never rounded away."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> AttentionOutput:
        found = decode_attention(*args, **kwargs)
        self.calls += 1
        return replace(found, output=found.output * (1 + 2.0**-20 * (self.calls % 2)))


@pytest.mark.parametrize(
    ("kernel", "caught_by"),
    [
        (NoReason, "support"),
        (IgnoresMask, "agreement"),
        (IgnoresWindowMask, "several_queries"),
        (IgnoresSinks, "softcap_and_sinks"),
        (OneHeadGroup, "head_shapes"),
        (HalfSums, "long_and_flat"),
        (NeedsTiles, "window_only"),
        (ScalesQuery, "inputs_kept"),
        (Jitters, "determinism"),
    ],
)
def test_each_fault_of_a_kernel_is_caught(kernel: type[Oracle], caught_by: str) -> None:
    results = check_kernel(kernel, device="cpu")
    assert caught_by in failed(results), wrong(results)


class Exact(Oracle):
    """Computes in float64, from decoded tokens, and rounds once."""

    def __call__(self, query: Tensor, segments: Any, *args: Any, **kwargs: Any) -> AttentionOutput:
        found = decode_attention(query.double(), [kernel_checks._double(s) for s in segments], *args, **kwargs)
        return replace(found, output=found.output.to(query.dtype))


def test_what_is_exact_is_computed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, errors = kernel_checks._pairs, []

    def noted(*args: Any) -> Iterator[tuple[Tensor, Tensor, Tensor, str]]:
        for found, oracle, wanted, what in pairs(*args):
            errors.append(float((found.double() - wanted).abs().max() / wanted.abs().max()))
            yield found, oracle, wanted, what

    monkeypatch.setattr(kernel_checks, "_pairs", noted)
    assert not failed(check_kernel(Exact, device="cpu", dtype=torch.float32))
    assert len(errors) > 10
    assert max(errors) <= torch.finfo(torch.float32).eps / 2


def test_a_kernel_that_does_not_run_here_says_so_and_is_not_green_by_silence() -> None:
    results = check_kernel(Elsewhere)
    assert not failed(results)
    outcomes = {result.outcome for result in results if result.name != "support"}
    assert outcomes == {"not applicable"}
    others = [result for result in results if result.name not in ("support", "appending", "encoding", "decoding")]
    assert all("computes with light" in result.message for result in others)


# --- telemetry ---


class Counting(TelemetrySink):
    """A good sink, from which the faulty ones are made."""

    def __init__(self) -> None:
        self.seen = 0

    def emit(self, event: Event) -> None:
        self.seen += 1


class KnowsTwoKinds(Counting):
    def emit(self, event: Event) -> None:
        {"encode": 1, "evict": 2}[event.kind]


class Pops(Counting):
    def emit(self, event: Event) -> None:
        event.detail.pop("nested", None)  # type: ignore[attr-defined]


class Full(Counting):
    def emit(self, event: Event) -> None:
        super().emit(event)
        if self.seen > 500:
            raise MemoryError


class ClosesOnce(Counting):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise ValueError("already closed")
        self.closed = True


@pytest.mark.parametrize(
    ("sink", "caught_by"),
    [(KnowsTwoKinds, "every_kind"), (Pops, "events_kept"), (Full, "many_events"), (ClosesOnce, "closing")],
)
def test_each_fault_of_a_sink_is_caught(sink: Callable[[], TelemetrySink], caught_by: str) -> None:
    assert not failed(check_telemetry_sink(Counting))
    results = check_telemetry_sink(sink)
    assert caught_by in failed(results), wrong(results)


# --- the kit itself ---


def test_expected_failures_carry_a_reason_and_must_really_fail() -> None:
    reasons = {"order": "pools over neighbours", "empty_slots_ignored": "counts slots"}
    announced = check_policy(BySlot, expected_failures=reasons)
    assert not failed(announced), wrong(announced)
    assert {r.name: r.expected_failure for r in announced if r.outcome == "expected failure"} == reasons
    stale = check_policy(Recency, expected_failures={"order": "pools over neighbours"})
    assert failed(stale) == {"order"}
    with pytest.raises(InputError, match="needs a reason"):
        check_policy(Recency, expected_failures={"order": " "})
    with pytest.raises(InputError, match="no check 'ordre'"):
        check_policy(Recency, expected_failures={"ordre": "x"})


def test_the_seed_makes_a_run_repeatable() -> None:
    assert check_policy(Noisy, seed=5)[2] != check_policy(Noisy, seed=6)[2]
    assert check_policy(WrongShape, seed=5) == check_policy(WrongShape, seed=5)


@pytest.mark.parametrize("component", ["h2o", "policies:", "policy", "cheese:brie"])
def test_what_is_no_component_is_explained(component: str) -> None:
    with pytest.raises(InputError, match="KIND:NAME"):
        check_component(component)


def test_unknown_names_and_fields_are_explained() -> None:
    with pytest.raises(FadeError, match="h2o"):
        check_component("policies:h20")
    with pytest.raises(FadeError, match="say which op"):
        check_component("kernels:torch")
    with pytest.raises(ConfigError, match=r"policies:ema: decay.*--set FIELD=VALUE"):
        check_component("policies:ema", fields={"decay": 3})
    with pytest.raises(InputError, match="no fields"):
        check_component("kernels:decode_attention:torch", fields={"x": 1})
    assert read_fields(["bits=2", 'axis="token"', "path=a b"]) == {"bits": 2, "axis": "token", "path": "a b"}
    with pytest.raises(InputError, match="FIELD=VALUE"):
        read_fields(["bits"])


def test_fields_reach_the_component() -> None:
    assert check_component("quantizers:uniform", fields={"bits": 2, "axis": "channel"}).ok


def test_a_configuration_class_is_built_with_its_defaults() -> None:
    class OddConfig(PolicyConfig):
        kind: Literal["odd"] = "odd"

        def build(self) -> EvictionPolicy:
            return Recency()

    assert not failed(check_policy(OddConfig))
    assert not failed(check_policy(OddConfig()))
    assert not failed(check_policy(Recency()))


def test_every_check_says_what_it_makes_sure_of() -> None:
    from fade_core.testing import component

    for suite in component._SUITES.values():
        assert isinstance(suite, Suite)
        for check in suite.checks:
            first = (check.__doc__ or "").strip()
            assert first.endswith("."), check.__name__


# --- the pytest plugin ---

pytest_plugins = ("pytester",)

PLUGIN = ("-p", "fade_core.testing.pytest_plugin", "-p", "no:cacheprovider")


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    pytester.makeini("[pytest]\n")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return lambda *arguments: pytester.runpytest_inprocess(*PLUGIN, *arguments)


def test_the_plugin_collects_one_test_a_check(run: Callable[..., pytest.RunResult]) -> None:
    found = run("--fade-component", "policies:h2o", "--fade-seed", "7", "-v")
    count = len(check_names("policies:h2o"))
    found.assert_outcomes(passed=count - 2, skipped=2)  # neither positional nor allocating
    found.stdout.fnmatch_lines(["*--fade-seed 7*", "*policies:h2o-shapes*PASSED*"])


class NoisyConfig(PolicyConfig):
    kind: Literal["noisy"] = "noisy"

    def build(self) -> EvictionPolicy:
        return Noisy()


class NoisyPlugin:
    @staticmethod
    @hookimpl
    def fade_policies() -> list[type[PolicyConfig]]:
        return [NoisyConfig]


def test_a_failing_check_is_a_failing_test(run: Callable[..., pytest.RunResult]) -> None:
    random = ("determinism", "order", "empty_slots_ignored", "rows_apart")
    with use_registry(Registry([NoisyPlugin()], entry_points=False)):
        found = run("--fade-component", "policies:noisy")
        assert found.ret == 1
        assert found.parseoutcomes()["failed"] == len(random)
        found.stdout.fnmatch_lines(["*policies:noisy-determinism*"])
        excuses = [f"--fade-expected-failure=policies:noisy.{check}=random on purpose" for check in random]
        announced = run("--fade-component", "policies:noisy", *excuses)
        assert announced.ret == 0, announced.stdout.str()
        assert announced.parseoutcomes()["xfailed"] == len(random)


def test_a_users_own_tests_run_beside(run: Callable[..., pytest.RunResult], pytester: pytest.Pytester) -> None:
    own = pytester.makepyfile("def test_mine(): pass")
    applicable = len(check_names("policies:position")) - 1  # it allocates nothing
    assert run("--fade-component", "policies:position", str(own)).parseoutcomes()["passed"] == 1 + applicable
    alone = run("--fade-component", "policies:position")
    assert alone.parseoutcomes()["passed"] == applicable


@pytest.mark.slow
def test_the_plugin_works_in_a_process_of_its_own(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\n")
    found = pytester.runpytest_subprocess(*PLUGIN, "--fade-component", "policies:position")
    found.assert_outcomes(passed=len(check_names("policies:position")) - 1, skipped=1)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((), "at least one --fade-component"),
        (("--fade-component", "policies:h20"), "h2o"),
        (("--fade-component", "h2o"), "KIND:NAME"),
        (("--fade-component", "policies:h2o", "--fade-expected-failure", "policies:h2o.nothing=x"), "CHECK=REASON"),
        (("--fade-component", "policies:h2o", "--fade-set", "policies:ema.decay=0.5"), "FIELD=VALUE"),
    ],
)
def test_a_run_that_makes_no_sense_is_a_usage_error(
    run: Callable[..., pytest.RunResult], arguments: tuple[str, ...], wanted: str
) -> None:
    found = run(*arguments)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert wanted in found.stderr.str() + found.stdout.str()


def test_fields_are_passed_on(run: Callable[..., pytest.RunResult]) -> None:
    found = run("--fade-component", "quantizers:uniform", "--fade-set", "quantizers:uniform.bits=2", "-q")
    assert found.ret == 0
    refused = run("--fade-component", "quantizers:uniform", "--fade-set", "quantizers:uniform.bits=7", "-q")
    assert refused.ret == 1


class KeepsTheGap(TorchAppend):
    """Encodes the oldest tile and leaves it in the window's place."""

    name: ClassVar[str] = "keeps-the-gap"

    def __call__(self, keys: Tensor, values: Tensor, held: Any, rule: Any) -> None:
        before = held.keys.clone()
        super().__call__(keys, values, held, rule)
        held.keys[:, :, rule.n_sink] = before[:, :, rule.n_sink]


class WrongSide(TorchAppend):
    """Takes a value for a key."""

    name: ClassVar[str] = "wrong-side"

    def __call__(self, keys: Tensor, values: Tensor, held: Any, rule: Any) -> None:
        super().__call__(values, keys, held, rule)


class ForgetsPositions(TorchAppend):
    """Takes tokens in and leaves their positions to others."""

    name: ClassVar[str] = "forgets-positions"

    def __call__(self, keys: Tensor, values: Tensor, buffers: Any, rule: Any) -> None:
        super().__call__(keys, values, replace(buffers, positions=buffers.positions.clone()), rule)


class LiesInRuns(TorchAppend):
    """Does not read the table."""

    name: ClassVar[str] = "lies-in-runs"

    def __call__(self, keys: Tensor, values: Tensor, buffers: Any, rule: Any) -> None:
        ids = torch.arange(buffers.ids.numel(), dtype=torch.int32).view_as(buffers.ids)
        super().__call__(keys, values, replace(buffers, ids=ids), rule)


@pytest.mark.parametrize("kernel", [KeepsTheGap, WrongSide, ForgetsPositions, LiesInRuns])
def test_a_faulty_append_is_found(kernel: type[TorchAppend]) -> None:
    results = check_kernel(kernel)
    assert failed(results) == {"appending"}


class WritesEverywhere(TorchEncode):
    """Writes tiles that have no place, too."""

    name: ClassVar[str] = "writes-everywhere"

    def __call__(self, quantizer: Any, tokens: Tensor, into: Any = None) -> Any:
        into = into and replace(into, ids=torch.where(into.ids < 0, (len(into.fields["meta"]) - 1), into.ids))
        return super().__call__(quantizer, tokens, into)


class ReadsInOrder(TorchDequantize):
    """Does not read the table."""

    name: ClassVar[str] = "reads-in-order"

    def __call__(self, quantizer: Any, packed: Any, ids: Any = None) -> Any:
        return super().__call__(quantizer, packed, None if ids is None else torch.arange(ids.numel()).view_as(ids))


@pytest.mark.parametrize(
    ("kernel", "check"), [(WritesEverywhere, "encoding"), (ReadsInOrder, "decoding")], ids=["encode", "dequantize"]
)
def test_a_kernel_that_misreads_a_table_is_found(kernel: Any, check: str) -> None:
    assert failed(check_kernel(kernel)) == {check}
