from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sealing import seal, unsealed
from torch.utils._python_dispatch import TorchDispatchMode

from fade_core.errors import CheckpointError, ConfigError, InputError
from fade_core.interfaces import QuantizerContext, RunLayout
from fade_core.packed import Packed
from fade_core.testing import check_quantizer
from fade_quant_rotated import CalibratedConfig, CalibratedQuantizer, Calibration
from fade_quant_rotated.allocation import WIDTHS, saved_by_planes, water_fill
from fade_quant_rotated.calibration import CALIBRATION_FILE, SideCalibration, load_calibration
from fade_quant_rotated.klt import weighted_klt
from fade_quant_rotated.lloyd_max import LEVELS, gaussian_distortion, uniform_levels
from fade_quant_rotated.planes import PlaneStream, fits_planes
from fade_quant_rotated.streams import StreamLayout

HEADS, DIM, LAYERS = 3, 64, 2


def covariance(*shape: int, decay: float = 0.9) -> torch.Tensor:
    """Random covariances whose eigenvalues fall geometrically."""
    q, _ = torch.linalg.qr(torch.randn(*shape, shape[-1], dtype=torch.float64))
    values = decay ** torch.arange(shape[-1], dtype=torch.float64)
    return q * values @ q.transpose(-1, -2)


def side_calibration(heads: int = HEADS, dim: int = DIM) -> tuple[SideCalibration, torch.Tensor, torch.Tensor]:
    """A calibration of random statistics, and the mean and covariance behind it."""
    cov, metric = covariance(heads, dim), covariance(heads, dim, decay=0.97)
    mean = torch.randn(heads, dim, dtype=torch.float64)
    transform, variance = weighted_klt(cov, metric)
    length = transform.norm(dim=-2)
    weight = torch.tensor([4.0**h for h in range(heads)], dtype=torch.float64)
    found = SideCalibration(
        mean.float(),
        (transform / length[:, None]).half(),
        (variance.sqrt() / length).float(),
        torch.ones(heads, dim),
        (variance * weight[:, None]).float(),
    )
    return found, mean, cov


def tokens(mean: torch.Tensor, cov: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    root = torch.linalg.cholesky(cov + 1e-9 * torch.eye(cov.shape[-1]))
    x = torch.randn(batch, *mean.shape[:1], length, mean.shape[-1], dtype=torch.float64)
    return (x @ root.transpose(-1, -2) + mean[:, None]).float()


def calibration(heads: int = HEADS, dim: int = DIM) -> Calibration:
    sides = {s: {layer: side_calibration(heads, dim)[0] for layer in range(LAYERS)} for s in ("key", "value")}
    return Calibration(
        sides, dim, heads, LAYERS, torch.randn(LAYERS, 16), {"bits": 2.5, "widths": [0, 1, 2, 3, 4], "group": 1}
    )


@pytest.fixture
def file(tmp_path: Path, seed: int) -> str:
    path = tmp_path / "calibration.safetensors"
    calibration().save(path)
    return str(path)


# --- the pieces ---
def test_klt_is_uncorrelated_and_measures_errors_in_the_metric(seed: int) -> None:
    cov, metric = covariance(2, 24), covariance(2, 24, decay=0.95)
    transform, variance = weighted_klt(cov, metric)
    moved = transform.transpose(-1, -2) @ cov @ transform
    torch.testing.assert_close(moved, torch.diag_embed(variance), atol=1e-9 * float(variance.max()), rtol=1e-6)
    assert bool((variance.diff(dim=-1) <= 1e-15).all())
    error = torch.randn(2, 1, 24, dtype=torch.float64)
    inside = (error @ transform).square().sum(-1)
    outside = (error @ metric @ error.transpose(-1, -2)).squeeze(-1)
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("widths", "group"), [(WIDTHS, 1), ((0, 2, 4), 16), ((0, 1, 3), 4)])
def test_water_filling_is_the_best_of_many_and_keeps_to_its_budget(widths: tuple, group: int, seed: int) -> None:
    worth = torch.rand(2, 3, 64).exp2().pow(12).sort(-1, descending=True)[0]
    for bits in (0.5, 1.3, 2.0):
        given = water_fill(worth, bits, widths, group)
        assert set(given.flatten().tolist()) <= set(widths)
        assert bits - max(widths) * group / worth.numel() <= float(given.double().mean()) <= bits + 1e-9
        assert bool((given.diff(dim=-1) <= 0).all())
        assert torch.equal(given, given.unflatten(-1, (-1, group))[..., :1].expand(2, 3, -1, group).flatten(-2))
        distortion = torch.tensor([gaussian_distortion(b) for b in range(9)])
        best = float((worth * distortion[given]).sum())
        grouped = given.unflatten(-1, (-1, group))[..., 0].flatten()
        for _ in range(200):  # no exchange of bits between two groups is better
            a, b = torch.randint(len(grouped), (2,)).tolist()
            up = [w for w in widths if w > grouped[a]]
            down = [w for w in widths if w < grouped[b]]
            if not up or not down or a == b:
                continue
            other = grouped.clone()
            other[a], other[b] = up[0], down[-1]
            if int(other.sum()) > int(grouped.sum()):
                continue
            changed = other.view(2, 3, -1).repeat_interleave(group, -1)
            assert float((worth * distortion[changed]).sum()) >= best * (1 - 1e-6)


def test_water_filling_refuses_what_it_cannot_do() -> None:
    worth = torch.ones(1, 64)
    with pytest.raises(ConfigError, match="divide"):
        water_fill(worth, 2, (0, 2), 7)
    with pytest.raises(ConfigError, match="cannot be had"):
        water_fill(worth, 5, (0, 2, 4))
    with pytest.raises(ConfigError, match="must hold 0"):
        water_fill(worth, 2, (1, 2))
    with pytest.raises(ConfigError, match="cannot be packed"):
        water_fill(worth, 2, (0, 7))


@pytest.mark.parametrize("layout", ["token", "channel"])
@pytest.mark.parametrize("tile", [64, 16])
def test_streams_return_every_code_of_every_width(layout: str, tile: int, seed: int) -> None:
    widths = torch.tensor(WIDTHS)[torch.randint(len(WIDTHS), (HEADS, DIM))].sort(-1, descending=True)[0]
    widths[1, 3:] = 0
    stream = StreamLayout(widths, tile, layout)
    shape = (2, 4, tile, len(stream.channels))
    top = torch.cat([torch.full((stop - start,), 2**width) for width, start, stop in stream.runs])
    codes = (torch.rand(shape) * top).to(torch.int32)
    rows = stream.pack(codes)
    assert rows.shape == (2, HEADS, 4, stream.row)
    assert torch.equal(stream.unpack(rows), codes)
    words = int(widths.sum()) * tile // 16
    assert 0 <= stream.row * HEADS - words < HEADS
    index = torch.stack([torch.randperm(4 * tile)[: 2 * tile] for _ in range(2 * HEADS)]).view(2, HEADS, -1)
    wanted = (
        stream.values(codes, torch.float32).flatten(2, 3).gather(2, index[..., None].expand(-1, -1, -1, stream.kept))
    )
    found = stream.values(stream.unpack(stream.select(rows, index)), torch.float32).flatten(2, 3)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("layout", ["token", "channel"])
@pytest.mark.parametrize(("tile", "dim"), [(64, 64), (128, 40), (16, 16)])
def test_planes_return_every_code_of_every_width(layout: str, tile: int, dim: int, seed: int) -> None:
    widths = torch.tensor([0, 2, 4, 6, 8])[torch.randint(5, (HEADS, dim))].sort(-1, descending=True)[0]
    widths[0, 0], widths[1, :] = 4, 0
    assert fits_planes(widths, "uniform", tile) and not fits_planes(0 * widths, "uniform", tile)
    stream = PlaneStream(widths, tile, layout)
    top = torch.cat([torch.full((stop - start,), 2**width) for width, start, stop in stream.runs])
    codes = (torch.rand(2, 4, tile, len(stream.channels)) * top).to(torch.int32)
    rows = stream.pack(codes)
    assert rows.shape == (2, HEADS, 4, stream.row) and stream.row % 16 == 0
    planes = -(-int(widths.sum()) // 32)
    assert 0 <= stream.row * HEADS - planes * 2 * tile < 16 * HEADS
    assert torch.equal(stream.unpack(rows), codes)


def test_which_widths_are_planes(seed: int) -> None:
    even = torch.tensor([[4] * 16 + [2] * 32 + [0] * 16, [8] * 16 + [6] * 16 + [0] * 32])
    assert fits_planes(even, "gaussian", 64) and fits_planes(even, "uniform", 64)
    assert fits_planes(even.roll(1, -1), "uniform", 64) and not fits_planes(even.roll(1, -1), "gaussian", 64)
    assert not fits_planes(even + (even == 4).int(), "uniform", 64)
    planes = 1 * 2 + 2 + 4 + 3
    assert fits_planes(even, "uniform", 64, planes * 64) and not fits_planes(even, "uniform", 64, planes * 64 - 16)
    assert not fits_planes(even, "uniform", 64, planes * 64 + 8)


def test_heads_read_no_more_planes_than_they_must(seed: int) -> None:
    """Rests share planes, of which there are as few as can be; hardly ever does a head read more than the fullest needs."""
    beyond = []
    for _ in range(20):
        widths = (2 * torch.randint(5, (8, 40))).sort(-1, descending=True)[0] * (torch.rand(8, 1) < 0.9)
        widths[0, 0] = 2
        stream = PlaneStream(widths, 64, "token")
        counts = widths.sum(-1) // 2
        assert len(stream.slots) == -(-int(counts.sum()) // 16)
        planes, slots, scales = stream.table()
        held = [
            len({int(p) for p, own in zip(planes[h], slots[h, :, :, 1], strict=True) if (own >= 0).any()})
            for h in range(8)
        ]
        beyond.append(max(held) - -(-int(counts.max()) // 16))
        assert torch.equal((slots[..., 1] >= 0).sum((1, 2)), counts)
        assert torch.equal(scales > 0, slots[..., 1] >= 0)
    assert max(beyond) <= 1 and beyond.count(0) > 15


@pytest.mark.parametrize(("layout", "word"), [("token", 5 * 16 + 8), ("channel", 8 * 8 + 5)])
def test_planes_lie_in_memory_as_documented(layout: str, word: int) -> None:
    """docs/formats.md: widths 0, 2, 4 in groups of 16; channel 8 of head 1 has 4 bits, those of token 37 are found."""
    widths = torch.tensor([[4] * 32 + [2] * 16 + [0] * 16, [4] * 16 + [2] * 32 + [0] * 16])
    stream = PlaneStream(widths, 64, layout)
    assert (stream.words, stream.row, len(stream.slots)) == (1152, 576, 9)
    codes = torch.zeros(1, 1, 64, 96, dtype=torch.int32)
    at = int((stream.channels == 1 * stream.kept + 8).nonzero())
    codes[0, 0, 37, at] = 0b1101
    rows = stream.pack(codes)
    assert rows.count_nonzero() == 2
    high, low = 5 * 128 + word, 6 * 128 + word
    assert [int(rows[0, w // 576, 0, w % 576]) for w in (high, low)] == [3 << 8, 1 << 8]


def test_rests_of_heads_share_a_plane_as_documented() -> None:
    """docs/formats.md: 8 slots of head 0 and 4 of head 1 share the last plane."""
    widths = torch.tensor([[8, 6, 4, 4] + [2] * 13 + [0] * 3, [4] * 4 + [2] * 12 + [0] * 4])
    stream = PlaneStream(widths, 64, "token")
    assert (stream.words, stream.row, len(stream.slots)) == (3 * 128, 192, 3)
    head, channel, shift = stream.slots.unbind(-1)
    assert head.tolist() == [[0] * 16, [1] * 16, [0] * 8 + [1] * 4 + [0] * 4]
    assert channel[0].tolist() == [0, 0, 1, 0, 1, 2, 3, *range(9)]
    assert shift[0].tolist() == [6, 4, 4, 2, 2, 2, 2] + [0] * 9
    assert channel[2].tolist()[:12] == [*range(9, 17), *range(12, 16)] and shift[2].tolist() == [0] * 12 + [31] * 4


class NothingIsRead(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: numbers that depend on what tensors say."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        flags = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
        )
        assert not flags, f"{func} by flags"
        assert func not in (aten.nonzero.default, aten._local_scalar_dense.default), str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("widths", [[0, 2, 4], [0, 1, 2, 3, 5]])
def test_codes_are_read_without_asking_the_host(widths: list[int], seed: int) -> None:
    found, mean, cov = side_calibration()
    given = torch.tensor(widths)[torch.randint(len(widths), (HEADS, DIM // 16))].sort(-1, descending=True)[0]
    given[0, 0] = max(widths)
    for side in ("key", "value"):
        quantizer = CalibratedQuantizer(found, given.repeat_interleave(16, -1), side)  # type: ignore[arg-type]
        packed = quantizer.encode(tokens(mean, cov, 2, 100))
        with NothingIsRead():
            quantizer.scores(torch.randn(2, HEADS, 3, DIM), packed)
            quantizer.combine(torch.rand(2, HEADS, 3, 100), packed)


def read_runs(layout: RunLayout, packed: Packed) -> torch.Tensor:
    """``RunLayout`` as its docstring has it, word by word: what is coded, float32 ``[B, H, n * tile, kept]``."""
    codes, gain = packed.fields["codes"], packed.fields["gain"]
    batch, heads, tiles, row = codes.shape
    assert row == layout.row
    stream = codes.transpose(1, 2).reshape(batch, tiles, heads * row).int() & 0xFFFF
    kept = layout.widths.shape[1]
    found = torch.zeros(batch, heads, tiles, layout.tile, kept, dtype=torch.int32)
    token = torch.arange(layout.tile)
    for head, blocks in enumerate(layout.blocks.tolist()):
        for start, columns, first, own, channel, bits in blocks:
            if not own:
                continue
            rows = layout.tile * bits // 16
            column = first + torch.arange(own)
            word = (
                (token % rows)[:, None] * columns + column
                if layout.layout == "token"
                else column * rows + (token % rows)[:, None]
            )
            fields = (stream[..., start + word] >> (bits * (token // rows))[:, None]) & (2**bits - 1)
            place = found[:, head, :, :, channel : channel + own]
            place.copy_((place << bits) | fields)
    levels = layout.levels[(1 << layout.widths)[:, None, None] + found]
    gains = torch.cat([gain & 15, gain >> 4], -1).long()  # [B, H, n, tile]
    by_head = layout.gains[:, None, :].expand(-1, tiles, -1).expand(batch, -1, -1, -1)
    return (levels * by_head.gather(3, gains)[..., None]).flatten(2, 3)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("widths", [WIDTHS, (0, 2, 4)])
@pytest.mark.parametrize("levels", ["gaussian", "uniform"])
def test_runs_say_where_codes_lie_and_what_they_are_worth(widths: tuple, side: str, levels: str, seed: int) -> None:
    found, mean, cov = side_calibration()
    group = 16 if widths == (0, 2, 4) else 1
    given = torch.tensor(widths)[torch.randint(len(widths), (HEADS, DIM // group))].sort(-1, descending=True)[0]
    given[1, 2:] = 0
    given[0, 0] = max(widths)
    quantizer = CalibratedQuantizer(found, given.repeat_interleave(group, -1), side, levels=levels)  # type: ignore[arg-type]
    packed = quantizer.encode(tokens(mean, cov, 2, 150))
    layout = quantizer.runs()
    assert layout is not None and quantizer.runs() is layout
    inside, gain = quantizer._unpacked(packed, slice(None), torch.float32)
    torch.testing.assert_close(read_runs(layout, packed), inside * gain[..., None])


def test_a_layer_without_bits_stores_gains_only(seed: int) -> None:
    found, mean, cov = side_calibration()
    quantizer = CalibratedQuantizer(found, torch.zeros(HEADS, DIM, dtype=torch.long))
    x = tokens(mean, cov, 1, 100)
    packed = quantizer.encode(x)
    assert packed.fields["codes"].shape == (1, HEADS, 2, 0)
    torch.testing.assert_close(quantizer.decode(packed), mean.float()[None, :, None].expand_as(x))


# --- levels ---
@pytest.mark.parametrize(("bits", "most"), [(1, 1.001), (2, 1.012), (3, 1.09), (4, 1.22)])
def test_uniform_levels_are_even_and_the_best_of_their_kind(bits: int, most: float) -> None:
    grid = torch.special.ndtri((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)

    def error(scale: float) -> float:
        levels = torch.tensor(uniform_levels(bits), dtype=torch.float64) * scale
        codes = torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2)
        return float((levels[codes] - grid).square().mean())

    assert error(1.0) < min(error(0.98), error(1.02))
    assert gaussian_distortion(bits) * 0.999 < error(1.0) < gaussian_distortion(bits) * most
    steps = torch.tensor(uniform_levels(bits)).diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps))
    assert sum(LEVELS["uniform"](bits)) == pytest.approx(0, abs=1e-12)


# --- the quantizer ---
@pytest.mark.parametrize(("levels", "most"), [("gaussian", 1.1), ("uniform", 1.3)])
@pytest.mark.parametrize("side", ["key", "value"])
def test_error_on_gaussian_tokens_is_what_water_filling_promised(
    side: str, levels: str, most: float, seed: int
) -> None:
    found, mean, cov = side_calibration()
    widths = water_fill(found.worth, 2.0)
    quantizer = CalibratedQuantizer(found, widths, side, levels=levels)
    x = tokens(mean, cov, 2, 1024)
    error = quantizer.decode(quantizer.encode(x)) - x
    inside = (error @ found.transform.float() / found.deviation[:, None]).square().mean((0, 2))
    distortion = torch.tensor([gaussian_distortion(b) for b in range(9)])
    promised = (found.worth * distortion[widths]).sum(-1)
    ratio = (found.worth * inside).sum(-1) / promised
    assert bool(((ratio > 0.8) & (ratio < most)).all()), ratio  # a searched gain does a little better than a fixed one


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(("widths", "group"), [((0, 2, 4), 16), ((0, 2, 4, 6, 8), 1), ((0, 2, 6, 8), 4)])
def test_planes_tell_what_every_bit_is_worth(side: str, widths: tuple, group: int, seed: int) -> None:
    """Tokens read word by word, by the layout alone, are those that the quantizer decodes."""
    found, mean, cov = side_calibration()
    quantizer = CalibratedQuantizer(found, water_fill(found.worth, 1.7, widths, group), side, levels="uniform")
    layout = quantizer.planes()
    assert layout is not None and layout is quantizer.planes()
    x = tokens(mean, cov, 1, 128)
    packed = quantizer.encode(x)
    stream = packed.fields["codes"].transpose(1, 2).flatten(2)[0]  # [n, words]: row after row
    rows = layout.tile // 8
    y = torch.zeros(HEADS, 128, layout.deviation.shape[1])
    for head in range(HEADS):
        low = packed.fields["gain"][0, head] & 15
        code = torch.cat([low, packed.fields["gain"][0, head] >> 4], -1).flatten()
        gain = torch.exp2((code.float() - layout.gain_zero) / layout.gain_steps + layout.usual[head])
        for word, slots, scales in zip(layout.planes[head], layout.slots[head], layout.scales[head], strict=True):
            words = stream[:, word : word + rows * 16].int()
            block = words.unflatten(-1, (rows, 16)) if side == "key" else words.unflatten(-1, (16, rows)).mT
            fields = torch.stack([block >> 2 * j & 3 for j in range(8)], 1).flatten(0, 2)
            for column, ((channel, shift), scale) in enumerate(zip(slots, scales, strict=True)):
                width = quantizer.widths[head, channel]
                step = layout.steps[head, channel]
                assert scale == step * 2.0**shift if shift >= 0 else scale == 0
                assert shift < width == layout.widths[head, channel]
                y[head, :, channel] += (fields[:, column] - 1.5) * scale * gain
    again = layout.mean[:, None] + (y * layout.deviation[:, None]) @ layout.inverse.float()
    torch.testing.assert_close(again[None], quantizer.decode(packed), atol=1e-5, rtol=1e-5)


def test_planes_are_of_one_state_of_uniform_levels_and_even_widths(seed: int) -> None:
    found, _, _ = side_calibration()
    even = water_fill(found.worth, 1.7, (0, 2, 4), 16)
    quantizer = CalibratedQuantizer(found, even, levels="uniform")
    before = quantizer.planes()
    quantizer.load_state_dict({**quantizer.state_dict(), "usual": quantizer.state_dict()["usual"] + 1})
    after = quantizer.planes()
    assert before is not None and after is not None
    assert torch.equal(after.usual, before.usual + 1)
    assert CalibratedQuantizer(found, even).planes() is None
    assert CalibratedQuantizer(found, water_fill(found.worth, 2.0), levels="uniform").planes() is None
    assert CalibratedQuantizer(found, torch.zeros(HEADS, DIM, dtype=torch.long), levels="uniform").planes() is None


def test_a_state_says_where_slots_are_and_older_ones_are_refused(seed: int) -> None:
    """Codes of even widths that were not alike over 16 channels used to lie in runs, and would be read wrongly."""
    found, _, _ = side_calibration()
    widths = water_fill(found.worth, 1.7, (0, 2, 4, 6, 8))
    quantizer = CalibratedQuantizer(found, widths, levels="uniform")
    state = quantizer.state_dict()
    quantizer.load_state_dict(state)
    without = {name: held for name, held in state.items() if name != "slots"}
    with pytest.raises(CheckpointError, match=r"older version.*'slots'"):
        quantizer.load_state_dict(without)
    with pytest.raises(CheckpointError, match=r"'slots'"):
        quantizer.load_state_dict({**state, "slots": state["slots"].flip(0)})
    assert "slots" not in CalibratedQuantizer(found, water_fill(found.worth, 1.7, (0, 2, 4), 16)).state_dict()


@pytest.mark.parametrize(("widths", "group"), [((0, 2, 4, 6, 8), 1), ((0, 4, 8), 4), ((0, 2, 8), 16)])
def test_what_planes_save_is_what_their_widths_save(widths: tuple, group: int, seed: int) -> None:
    worth = torch.rand(HEADS, DIM).exp2().pow(12).sort(-1, descending=True)[0]
    saved = saved_by_planes(worth, 32, widths, group)
    error = torch.tensor([gaussian_distortion(b) for b in range(9)], dtype=torch.float64)
    assert bool((saved.diff() <= 1e-12 * saved[0]).all())
    assert float(saved.sum()) == pytest.approx(float(worth.double().sum() * (1 - error[widths[-1]])))
    for planes in (1, 5, 12):
        given = water_fill(worth, planes * 32 / worth.numel(), widths, group)
        held = float((worth.double() * (1 - error[given])).sum())
        assert held <= float(saved[:planes].sum()) * (1 + 1e-9)
        if int(given.sum()) == planes * 32:
            assert held == pytest.approx(float(saved[:planes].sum()))


def test_no_layer_is_left_without_planes(seed: int) -> None:
    """Kernels read none whose keys or values have no bits at all."""
    made = calibration()
    poor = made.sides["value"][1]
    made.sides["value"][1] = dataclasses.replace(poor, worth=poor.worth * 1e-9)  # type: ignore[index]
    widths = made.plan(1.5, (0, 2, 4), levels="uniform").widths
    assert int(widths["value"][1].sum()) == 32
    assert int(made.plan(1.5, (0, 2, 4)).widths["value"][1].sum()) == 0


@pytest.mark.parametrize("bits", [1.4, 2.1, 3.3])
@pytest.mark.parametrize("tile", [64, 128])
def test_a_plan_of_whole_planes_keeps_to_its_bits_and_loses_little(bits: float, tile: int, seed: int) -> None:
    made = calibration()
    widths = (0, 2, 4, 6, 8)
    plan = made.plan(bits, widths, levels="uniform", tile=tile)
    worth = torch.stack([side.worth for sides in made.sides.values() for side in sides.values()])
    given = torch.stack([own for sides in plan.widths.values() for own in sides.values()])
    assert bool((given.sum((1, 2)) % 32 == 0).all())
    held = [
        CalibratedQuantizer(made.sides[side][layer], own, side, tile, levels="uniform").bits_per_element
        for side, sides in plan.widths.items()
        for layer, own in sides.items()
    ]
    assert bits - 0.12 < sum(held) / len(held) <= bits
    error = torch.tensor([gaussian_distortion(b) for b in range(9)])
    free = water_fill(worth, float(given.double().mean()), widths)
    assert float((worth * error[given]).sum()) < 1.1 * float((worth * error[free]).sum())


def test_heads_share_their_bits_unevenly_and_all_are_counted(seed: int) -> None:
    found, mean, cov = side_calibration()
    widths = water_fill(found.worth, 1.5)
    assert len(set(widths.sum(-1).tolist())) == HEADS
    quantizer = CalibratedQuantizer(found, widths)
    packed = quantizer.encode(tokens(mean, cov, 2, 192))
    assert packed.nbytes * 8 == pytest.approx(quantizer.bits_per_element * 2 * HEADS * 192 * DIM, rel=1e-12)
    assert 1.5 <= quantizer.bits_per_element < 1.5 + 4 / DIM + 0.01


@pytest.mark.parametrize("levels", ["gaussian", "uniform"])
def test_conformance(file: str, levels: str, seed: int) -> None:
    config = CalibratedConfig(file=file, levels=levels)

    def build(context: QuantizerContext) -> CalibratedQuantizer:
        return config.build(QuantizerContext(DIM, context.side, 64, 0, LAYERS, HEADS))  # type: ignore[return-value]

    about_a_mean = {"extreme_values": "tokens are coded about a mean: zeros come back as a small error"}
    results = check_quantizer(build, seed=seed, head_dims=(DIM,), expected_failures=about_a_mean)
    assert all(result.passed for result in results), [r for r in results if not r.passed]


def test_transforms_and_bias_are_what_scores_and_combine_do(seed: int) -> None:
    found, mean, cov = side_calibration()
    quantizer = CalibratedQuantizer(found, water_fill(found.worth, 2.5), "value")
    x = tokens(mean, cov, 2, 64 * 35)  # more than one chunk
    packed = quantizer.encode(x)
    decoded = quantizer.decode(packed).double()
    query, weights = torch.randn(2, HEADS, 4, DIM), torch.rand(2, HEADS, 4, x.shape[2])
    scale = float(decoded.abs().max())
    torch.testing.assert_close(
        quantizer.scores(query, packed).double(),
        query.double() @ decoded.transpose(-1, -2),
        atol=1e-4 * scale,
        rtol=1e-4,
    )
    torch.testing.assert_close(
        quantizer.combine(weights, packed).double(), weights.double() @ decoded, atol=1e-3 * scale, rtol=1e-4
    )
    short = weights[..., :1500]
    torch.testing.assert_close(
        quantizer.combine(short, packed).double(), short.double() @ decoded[:, :, :1500], atol=1e-3 * scale, rtol=1e-4
    )


# --- file and configuration ---
def test_file_round_trip_and_joint_bits(file: str) -> None:
    loaded = load_calibration(file)
    again = Calibration.load(file)
    for side in ("key", "value"):
        for layer in range(LAYERS):
            for name, tensor in vars(loaded.sides[side][layer]).items():
                assert torch.equal(tensor, getattr(again.sides[side][layer], name))
    bits = []
    for layer in range(LAYERS):
        for side in ("key", "value"):
            quantizer = CalibratedConfig(file=file).build(QuantizerContext(DIM, side, 64, layer, LAYERS, HEADS))
            bits.append(quantizer.bits_per_element)
    assert 2.45 < sum(bits) / len(bits) <= 2.5
    own = CalibratedConfig(file=file, side_bits=1.5, widths=(0, 2, 4), group=16)
    bits = [own.build(QuantizerContext(DIM, "key", 64, n, LAYERS, HEADS)).bits_per_element for n in range(LAYERS)]
    assert 1.3 < sum(bits) / len(bits) <= 1.5
    assert CalibratedConfig(file=file, side_bits=1.5).with_bits(4) == CalibratedConfig(
        file=file, bits=4, side_bits=None
    )


def test_configuration_refuses_and_says_what_to_do(file: str, tmp_path: Path) -> None:
    def build(heads: int = HEADS, dim: int = DIM, layer: int = 0, layers: int = LAYERS, **fields: object) -> None:
        CalibratedConfig(**{"file": file, **fields}).build(QuantizerContext(dim, "key", 64, layer, layers, heads))

    build()
    with pytest.raises(CheckpointError, match="head_dim 128"):
        build(dim=128)
    with pytest.raises(CheckpointError, match="fade calibrate"):
        build(heads=4)
    with pytest.raises(CheckpointError, match="3 layers"):
        build(layers=3)
    with pytest.raises(CheckpointError, match="fade calibrate"):
        build(file=str(tmp_path / "missing.safetensors"))
    with pytest.raises(ConfigError, match="layer 7"):
        build(layer=7)
    with pytest.raises(ConfigError, match="widths"):
        build(bits=7.5)
    with pytest.raises(ConfigError, match="exclude each other"):
        build(bits=2, side_bits=2)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, str(other))
    with pytest.raises(CheckpointError, match="not a calibration"):
        build(file=str(other))
    other.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a safetensors"):
        build(file=str(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"has format 2, this version of FADE reads format 1.*fade calibrate"),
        ({"format": ...}, "has format None"),
        ({"kind": "fade-kv-cache"}, "is not a calibration; found 'fade-kv-cache'"),
        ({"head_dim": 10**9}, "head_dim: input should be less than or equal to 65536"),
        ({"head_dim": DIM + 1}, r"damaged: tensor .* was expected.*fade calibrate"),
        ({"num_kv_heads": True}, "num_kv_heads: true/false is not a value here"),
        ({"num_layers": LAYERS - 1}, "damaged: layers"),
        ({"layers": [1, 0]}, "damaged: layers"),
        ({"layers": list(range(9))}, "damaged: tensor .* is missing"),
        ({"defaults": {"bits": -1.0, "widths": [0, 4], "group": 1}}, "defaults.bits: input should be greater than 0"),
        (
            {"defaults": {"bits": 2.0, "widths": [0, 4.5], "group": 1}},
            "defaults.widths.1: input should be a valid integer",
        ),
        ({"defaults": {"bits": 2.0, "widths": [0, 4], "group": 1, "more": 1}}, "unknown field 'more'"),
        ({"notes": ...}, "notes: this field is needed"),
    ],
)
def test_a_header_that_cannot_be_right_is_refused(
    file: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    header, tensors = unsealed(Path(file))
    header = {name: value for name, value in (header | change).items() if value is not ...}
    with pytest.raises(CheckpointError, match=message):
        CalibratedConfig(file=str(seal(tmp_path / "changed", header, tensors))).build(
            QuantizerContext(DIM, "key", 64, 0, LAYERS, HEADS)
        )


def test_tensors_that_are_not_what_the_header_asks_for_are_refused(file: str, tmp_path: Path, seed: int) -> None:
    header, tensors = unsealed(Path(file))
    changed, name = tmp_path / "changed", "1.value.worth"
    for odd in (None, tensors[name][:1], tensors[name].double(), tensors[name] * torch.nan):
        others = {n: t for n, t in tensors.items() if n != name} | ({} if odd is None else {name: odd.contiguous()})
        with pytest.raises(CheckpointError, match=r"damaged.*1\.value\.worth.*fade calibrate"):
            Calibration.load(seal(changed, header, others))
    with pytest.raises(CheckpointError, match=r"damaged: tensor 'surprise'"):
        Calibration.load(seal(changed, header, tensors | {"surprise": torch.zeros(1)}))


def test_damage_and_files_without_a_checksum_are_refused(file: str, tmp_path: Path, seed: int) -> None:
    content, changed = Path(file).read_bytes(), tmp_path / "changed"
    for at in torch.randint(len(content), (20,), generator=torch.Generator().manual_seed(seed)).tolist():
        changed.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=r"is damaged|has no checksum"):
            load_calibration(changed)
    header, tensors = unsealed(Path(file))
    save_file(tensors, changed, {"fade": json.dumps(header)})  # as files were before they had one
    with pytest.raises(CheckpointError, match=r"has no checksum: an older version of FADE wrote it.*fade calibrate"):
        load_calibration(changed)
    CALIBRATION_FILE.write(changed, {n: v for n, v in header.items() if n not in ("kind", "format")}, tensors)
    assert changed.read_bytes() == content


def test_another_models_sketch_is_refused(file: str) -> None:
    loaded = Calibration.load(file)
    loaded.check_model(loaded.sketch * 1.01)
    with pytest.raises(CheckpointError, match="another model"):
        loaded.check_model(torch.randn_like(loaded.sketch))
    with pytest.raises(CheckpointError, match="another model"):
        loaded.check_model(torch.randn(1, 16))


def test_wrong_number_of_heads_is_refused(seed: int) -> None:
    found, _, _ = side_calibration()
    quantizer = CalibratedQuantizer(found, water_fill(found.worth, 2.0))
    with pytest.raises(InputError, match="3 KV heads"):
        quantizer.encode(torch.randn(1, 2, 64, DIM))
