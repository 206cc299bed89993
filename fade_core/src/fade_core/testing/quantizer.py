"""Conformance of quantizers: shapes, bytes, determinism, and attention in packed space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from fade_core.errors import CheckpointError, ConfigError, InputError
from fade_core.interfaces import Quantizer, QuantizerConfig, QuantizerContext, Side
from fade_core.packed import Packed, PackedFormat, planes_of, unpack_codes, unpack_meta
from fade_core.plugins.resolve import resolve
from fade_core.testing.checks import (
    CheckFailedError,
    CheckResult,
    NotApplicableError,
    Suite,
    fresh_seed,
    require,
    require_close,
    require_equal,
    require_raises,
    shuffled,
    unchanged,
)

BATCH, HEADS = 2, 3
HEAD_DIMS = (64, 128, 80)
FLOAT32_EPS = torch.finfo(torch.float32).eps

QuantizerFactory = Callable[[QuantizerContext], Quantizer]


@dataclass
class QuantizerCase:
    """A quantizer under test and the generator of its inputs."""

    build: QuantizerFactory
    generator: torch.Generator
    head_dims: tuple[int, ...] = HEAD_DIMS

    def contexts(self) -> Iterator[QuantizerContext]:
        """Every head dimension and side that the quantizer takes; at least one must work."""
        refused = []
        for head_dim in self.head_dims:
            for side in get_args(Side):
                context = QuantizerContext(head_dim, side, num_kv_heads=HEADS)
                try:
                    self.build(context)
                except ConfigError as error:
                    refused.append(str(error))
                else:
                    yield context
        if len(refused) == 2 * len(self.head_dims):
            raise CheckFailedError(f"no head_dim of {self.head_dims} is accepted: {refused[0]}")

    def each(self) -> Iterator[tuple[Quantizer, QuantizerContext]]:
        """A fresh quantizer for every context."""
        for context in self.contexts():
            yield self.build(context), context

    def tokens(self, length: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random tokens ``[B, H, T, D]`` with an offset and a few large channels, as keys have."""
        x = torch.randn(BATCH, HEADS, length, head_dim, generator=self.generator)
        x = x + 0.5 * torch.randn(1, HEADS, 1, head_dim, generator=self.generator)
        x[..., 1] *= 6
        return x.to(dtype)


def check_quantizer(
    quantizer: QuantizerConfig | type[QuantizerConfig] | str | QuantizerFactory,
    *,
    seed: int | None = None,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    expected_failures: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    only: tuple[str, ...] = (),
) -> list[CheckResult]:
    """Check a quantizer against ``fade_core.interfaces.Quantizer``.

    Args:
        quantizer: its configuration (object, class, or the name it is installed under), or a function from a
            ``QuantizerContext`` to a quantizer.
        seed: of the inputs; ``None`` draws one.
        head_dims: to try; a ``ConfigError`` refuses one, at least one must work.
        expected_failures: checks that are known to fail, with the reason.
        progress: called as checks are done.
        only: names of the checks to run; empty for all.
    """
    build = _factory(quantizer)
    return QUANTIZER_CHECKS.run(
        lambda generator: QuantizerCase(build, generator, head_dims),
        fresh_seed() if seed is None else seed,
        expected_failures,
        progress,
        only,
    )


def read_words(packed: Packed, format: PackedFormat) -> Tensor:
    """Decode ``[B, H, T, D]`` float32 as a kernel does: words and metadata alone, by the format, no quantizer."""
    codes: Tensor | None = None
    for width in planes_of(format.bits):
        plane = unpack_codes(packed.fields[f"codes{width}"], width, format.layout, torch.int64)
        codes = plane if codes is None else codes * 2**width + plane
    if codes is None:
        raise ConfigError(f"{format} has no planes")
    if format.layout == "channel":
        codes = codes.transpose(-1, -2)
    levels = torch.arange(2.0**format.bits) if format.levels is None else torch.tensor(format.levels)
    x = levels[codes]  # [B, H, n, tile, D]
    scale, minimum = (half.float() for half in unpack_meta(packed.fields["meta"]))
    if format.axis == "token":
        scale, minimum = (m.transpose(-1, -2).repeat_interleave(format.group, -1) for m in (scale, minimum))
    else:
        scale, minimum = (m.repeat_interleave(format.group, -2) for m in (scale, minimum))
    return (x * scale + minimum).flatten(2, 3)[:, :, : packed.length]


# --- the checks ---


def fields(case: QuantizerCase) -> None:
    """Encoded fields have the names, shapes and dtypes of field_shapes()."""
    for quantizer, context in case.each():
        for length in (quantizer.tile, 3 * quantizer.tile - 5):
            packed = quantizer.encode(case.tokens(length, context.head_dim))
            shapes = quantizer.field_shapes()
            require(packed.fields.keys() == shapes.keys(), f"fields {sorted(packed.fields)}, promised {sorted(shapes)}")
            tiles = -(-length // quantizer.tile)
            for name, (shape, dtype) in shapes.items():
                found, wanted = packed.fields[name], (BATCH, HEADS, tiles, *shape)
                require(tuple(found.shape) == wanted, f"field {name!r}: shape {tuple(found.shape)}, promised {wanted}")
                # full precision takes the model's dtype
                ok = found.dtype == dtype or (quantizer.format is None and dtype.is_floating_point)
                require(ok, f"field {name!r}: {found.dtype}, promised {dtype}")
            require(packed.length == length, f"Packed.length is {packed.length} after {length} tokens")


def field_bytes(case: QuantizerCase) -> None:
    """nbytes is the sum of the fields, and bits_per_element what a whole tile takes."""
    for quantizer, context in case.each():
        packed = quantizer.encode(case.tokens(2 * quantizer.tile, context.head_dim))
        held = sum(field.numel() * field.element_size() for field in packed.fields.values())
        require(quantizer.nbytes(packed) == held, f"nbytes {quantizer.nbytes(packed)}, the fields hold {held}")
        bits = 8 * held / (BATCH * HEADS * 2 * quantizer.tile * context.head_dim)
        claimed = quantizer.bits_per_element
        require(abs(bits - claimed) <= 1e-6 * bits, f"bits_per_element {claimed}, a tile really takes {bits}")


def decoding(case: QuantizerCase) -> None:
    """Decoding gives back [B, H, T, D] in the dtype that was encoded, finite and closer to the tokens than zeros."""
    for quantizer, context in case.each():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = case.tokens(quantizer.tile, context.head_dim, dtype)
            found = quantizer.decode(quantizer.encode(x))
            require(found.shape == x.shape, f"decoded {tuple(found.shape)} from {tuple(x.shape)}")
            require(found.dtype == dtype, f"decoded {found.dtype} from {dtype}")
            error = float((found.double() - x.double()).norm() / x.double().norm())
            require(error < 1, f"relative error {error:.3g} on random tokens; zeros would give 1")


def odd_lengths(case: QuantizerCase) -> None:
    """Any number of tokens is encoded; a last tile that is not full decodes as if it were."""
    for quantizer, context in case.each():
        tile = quantizer.tile
        for length in (1, 2, tile - 1, tile, tile + 1, 2 * tile + 7):
            x = case.tokens(length, context.head_dim)
            found = quantizer.decode(quantizer.encode(x))
            require(found.shape == x.shape, f"{length} tokens decoded to {tuple(found.shape)}")
            require(bool(found.isfinite().all()), f"{length} tokens decoded to values that are not finite")


def determinism(case: QuantizerCase) -> None:
    """The same tokens give the same fields, from one quantizer twice and from two built alike."""
    for quantizer, context in case.each():
        x = case.tokens(quantizer.tile + 3, context.head_dim)
        first = quantizer.encode(x)
        for who, other in (("encoding again", quantizer), ("a second quantizer", case.build(context))):
            again = other.encode(x)
            for name in first.fields:
                require_equal(_live(again, name, other), _live(first, name, quantizer), f"{who}: field {name!r}")
            require_equal(other.decode(again), quantizer.decode(first), who)


def inputs_kept(case: QuantizerCase) -> None:
    """No method changes a tensor that it was given."""
    for quantizer, context in case.each():
        x = case.tokens(quantizer.tile, context.head_dim)
        query = torch.randn(BATCH, HEADS, 3, context.head_dim, generator=case.generator)
        weights = torch.rand(BATCH, HEADS, 3, quantizer.tile, generator=case.generator)
        kept = [unchanged("encode", x)]
        packed = quantizer.encode(x)
        kept.append(unchanged("decode, scores and combine", *packed.fields.values(), query, weights))
        quantizer.decode(packed)
        quantizer.scores(query, packed)
        quantizer.combine(weights, packed)
        for check in kept:
            check()


def tiles_apart(case: QuantizerCase) -> None:
    """A tile's fields depend on its own tokens only: tiles encoded alone or together are the same."""
    for quantizer, context in case.each():
        tile = quantizer.tile
        x = case.tokens(3 * tile, context.head_dim)
        together = quantizer.encode(x)
        for number in range(3):
            alone = quantizer.encode(x[:, :, number * tile : (number + 1) * tile])
            for name, field in alone.fields.items():
                require_equal(together.fields[name][:, :, number : number + 1], field, f"tile {number}, field {name!r}")


def rows_apart(case: QuantizerCase) -> None:
    """A row's fields depend on that row only."""
    for quantizer, context in case.each():
        x = case.tokens(quantizer.tile, context.head_dim)
        together = quantizer.encode(x)
        alone = quantizer.encode(x[1:])
        for name, field in alone.fields.items():
            require_equal(together.fields[name][1:], field, f"row 1, field {name!r}")


def padding_does_not_leak(case: QuantizerCase) -> None:
    """Tokens sliced out of a buffer full of NaN encode as their copy does."""
    for quantizer, context in case.each():
        length = quantizer.tile + 5
        x = case.tokens(length, context.head_dim)
        buffer = torch.full((BATCH, HEADS, 3 * quantizer.tile, context.head_dim + 8), torch.nan)
        view = buffer[:, :, 4 : 4 + length, : context.head_dim]
        view.copy_(x)
        found = quantizer.decode(quantizer.encode(view))
        require(bool(found.isfinite().all()), "NaN around the tokens came through")
        require_equal(found, quantizer.decode(quantizer.encode(x)), "a view of a larger buffer")


def extreme_values(case: QuantizerCase) -> None:
    """Zeros, constants and values at the end of float16 decode to finite values."""
    for quantizer, context in case.each():
        shape = (BATCH, HEADS, quantizer.tile, context.head_dim)
        for what, x in (
            ("zeros", torch.zeros(shape)),
            ("a constant", torch.full(shape, -3.25)),
            ("tiny values", 1e-7 * case.tokens(quantizer.tile, context.head_dim)),
            ("values near 60000", case.tokens(quantizer.tile, context.head_dim).clamp(-1, 1) * 6e4),
        ):
            found = quantizer.decode(quantizer.encode(x))
            require(bool(found.isfinite().all()), f"{what} decoded to values that are not finite")
            bound = 4 * float(x.abs().max()) * context.head_dim**0.5
            require(float(found.abs().max()) <= bound, f"{what} decoded to {float(found.abs().max()):.3g}")


def packed_scores(case: QuantizerCase) -> None:
    """scores() equals the queries times the decoded keys, up to float32 rounding."""
    for quantizer, context in case.each():
        if context.side != "key":
            continue
        for length, queries in ((quantizer.tile, 1), (2 * quantizer.tile + 7, 5)):
            packed = quantizer.encode(case.tokens(length, context.head_dim))
            query = torch.randn(BATCH, HEADS, queries, context.head_dim, generator=case.generator)
            keys = quantizer.decode(packed)
            found = quantizer.scores(query, packed)
            wanted = query.double() @ keys.double().transpose(-1, -2)
            require_close(found, wanted, _rounding(query, keys, context.head_dim), f"scores of {length} tokens")


def packed_sums(case: QuantizerCase) -> None:
    """combine() equals the weights times the decoded values, up to float32 rounding."""
    for quantizer, context in case.each():
        if context.side != "value":
            continue
        for length, queries in ((quantizer.tile, 1), (2 * quantizer.tile + 7, 5)):
            packed = quantizer.encode(case.tokens(length, context.head_dim))
            weights = torch.rand(BATCH, HEADS, queries, length, generator=case.generator)
            values = quantizer.decode(packed)
            found = quantizer.combine(weights, packed)
            wanted = weights.double() @ values.double()
            require_close(found, wanted, _rounding(weights, values, length), f"sums of {length} tokens")


def kernel_view(case: QuantizerCase) -> None:
    """What a kernel computes from the words alone, with the transforms around it, equals scores() and combine()."""
    seen = False
    for quantizer, context in case.each():
        if quantizer.format is None:
            continue
        seen = True
        length = quantizer.tile + 5
        packed = quantizer.encode(case.tokens(length, context.head_dim))
        words = read_words(packed, quantizer.format)
        if context.side == "key":
            query = torch.randn(BATCH, HEADS, 3, context.head_dim, generator=case.generator)
            moved, bias = quantizer.transform_query(query), quantizer.query_bias(query)
            found = moved @ words.transpose(-1, -2) + (0 if bias is None else bias)
            tolerance = _rounding(moved, words, context.head_dim)
            require_close(found, quantizer.scores(query, packed), 2 * tolerance, "scores from the words")
        else:
            weights = torch.rand(BATCH, HEADS, 3, length, generator=case.generator)
            found = quantizer.transform_output(weights @ words, weights.sum(-1, keepdim=True))
            tolerance = _rounding(weights, words, length) * context.head_dim**0.5
            require_close(found, quantizer.combine(weights, packed), 2 * tolerance, "sums from the words")
    if not seen:
        raise NotApplicableError("format is None: no kernel reads these fields")


def selection(case: QuantizerCase) -> None:
    """select() moves single tokens without touching their codes, or refuses with InputError."""
    for quantizer, context in case.each():
        tile = quantizer.tile
        packed = quantizer.encode(case.tokens(3 * tile, context.head_dim))
        index = torch.stack(
            [
                torch.stack([torch.randperm(3 * tile, generator=case.generator)[: 2 * tile] for _ in range(HEADS)])
                for _ in range(BATCH)
            ]
        )
        if not quantizer.moves_tokens:
            require_raises(InputError, "select() with moves_tokens = False", lambda: quantizer.select(packed, index))  # noqa: B023
            continue
        found = quantizer.select(packed, index)
        wanted = quantizer.decode(packed).gather(2, index[..., None].expand(-1, -1, -1, context.head_dim))
        require(found.length == 2 * tile, f"select() of {2 * tile} tokens has length {found.length}")
        require_equal(quantizer.decode(found), wanted, "selected tokens")
        require_raises(
            InputError,
            "select() of a number of tokens that fills no tile",
            lambda: quantizer.select(packed, index[..., : tile + 1]),  # noqa: B023
        )


def order(case: QuantizerCase) -> None:
    """Where single tokens can move, permuting the tokens permutes what is decoded and nothing else."""
    movable = False
    for quantizer, context in case.each():
        if not quantizer.moves_tokens:
            continue
        movable = True
        x = case.tokens(2 * quantizer.tile, context.head_dim)
        permuted = shuffled(2 * quantizer.tile, case.generator)
        plain = quantizer.decode(quantizer.encode(x))
        require_equal(quantizer.decode(quantizer.encode(x[:, :, permuted])), plain[:, :, permuted], "permuted tokens")
    if not movable:
        raise NotApplicableError("moves_tokens is False: tokens of a tile share metadata")


def state(case: QuantizerCase) -> None:
    """state_dict() of one quantizer makes another decode the same; a state that does not fit is a CheckpointError."""
    for quantizer, context in case.each():
        x = case.tokens(quantizer.tile + 1, context.head_dim)
        packed = quantizer.encode(x)
        saved = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
        other = case.build(context)
        other.load_state_dict(saved)
        require_equal(other.decode(packed), quantizer.decode(packed), "after load_state_dict()")
        held = sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
        require(quantizer.state_bytes() == held, f"state_bytes() {quantizer.state_bytes()}, the state holds {held}")
        for name, tensor in saved.items():
            wrong = {**saved, name: torch.zeros([side + 1 for side in tensor.shape] or [2], dtype=tensor.dtype)}
            require_raises(
                CheckpointError,
                f"a state whose {name!r} has another shape",
                lambda: other.load_state_dict(wrong),  # noqa: B023
            )


def wrong_input(case: QuantizerCase) -> None:
    """Tensors of a wrong shape or dtype raise InputError."""
    for quantizer, context in case.each():
        x = case.tokens(4, context.head_dim)
        for what, bad in (
            ("a head of another size", torch.cat([x, x], dim=-1)),
            ("three dimensions", x[0]),
            ("no tokens", x[:, :, :0]),
            ("whole numbers", x.to(torch.int32)),
        ):
            require_raises(InputError, what, lambda: quantizer.encode(bad))  # noqa: B023


QUANTIZER_CHECKS: Suite[QuantizerCase] = Suite(
    (
        *(fields, field_bytes, decoding, odd_lengths, determinism, inputs_kept, tiles_apart, rows_apart),
        *(padding_does_not_leak, extreme_values, packed_scores, packed_sums, kernel_view, selection, order, state),
        wrong_input,
    )
)


def _factory(quantizer: Any) -> QuantizerFactory:
    if isinstance(quantizer, str):
        quantizer = resolve("quantizers", {"kind": quantizer})
    if isinstance(quantizer, type) and issubclass(quantizer, QuantizerConfig):
        quantizer = quantizer.model_validate({})
    if isinstance(quantizer, QuantizerConfig):
        config = quantizer
        return lambda context: config.build(replace(context))
    if callable(quantizer):
        factory: QuantizerFactory = quantizer
        return factory
    raise InputError(f"a quantizer configuration, its name or a factory is needed; found {quantizer!r}")


def _live(packed: Packed, name: str, quantizer: Quantizer) -> Tensor:
    """A field without its last tile if that is not full: what fills it up does not count."""
    return packed.fields[name][:, :, : packed.length // quantizer.tile]


def _rounding(left: Tensor, right: Tensor, terms: int) -> float:
    """What float32 may be off in sums of ``terms`` products, in any order and with a rotation on either side."""
    return 8 * FLOAT32_EPS * terms * float(left.abs().max()) * float(right.abs().max())
