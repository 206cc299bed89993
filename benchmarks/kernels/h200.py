"""Check and time the decode kernel on a GPU, in one go.

    PYTHONPATH=fade_core/src:plugins/fade_kernels_triton/src python benchmarks/kernels/h200.py --budget 400

Parity comes first: the relative error to float64 attention over the dequantised values must stay within twice that of
bf16 attention over the same values. Only formats that pass are timed. A time is that of one layer inside a CUDA graph
that runs as many layers, each with buffers of its own, as it takes to move several times the L2 cache; the baseline
(the faster of torch's flash and cuDNN attention, bf16) is timed the same way. Results are printed, and written as JSON
lines under ``$OUT`` if that is set. ``--tune`` tries launch configurations instead of taking the tuned ones.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
for source in ("fade_core/src", "plugins/fade_kernels_triton/src"):
    if str(ROOT / source) not in sys.path:
        sys.path.insert(0, str(ROOT / source))

from fade_core.packed import Packed  # noqa: E402
from fade_core.quantizers.uniform import UniformQuantizer  # noqa: E402
from fade_kernels_triton.config import Case as TunedCase  # noqa: E402
from fade_kernels_triton.config import DecodeConfig, lookup  # noqa: E402
from fade_kernels_triton.decode import decode_attention  # noqa: E402
from fade_kernels_triton.operands import PackedTier, Window  # noqa: E402

DEVICE = "cuda"
MEGABYTE = 2**20
TRAFFIC = 700 * MEGABYTE
"""Bytes that the layers of one timed graph read: many times the L2 cache."""

MAX_LAYERS = 64
Emit = Callable[[dict[str, object]], None]


@dataclass(frozen=True)
class Case:
    """One decode problem: rows, heads, context, format."""

    rows: int
    heads: int
    kv_heads: int
    dim: int
    context: int
    bits: int = 4
    axis: str = "channel"
    tile: int = 64
    q_len: int = 1
    dtype: str = "bfloat16"
    window: int = 0
    table: bool = False
    ragged: bool = False
    flat: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def columns(self) -> int:
        return self.heads // self.kv_heads * self.q_len

    @property
    def name(self) -> str:
        shape = f"{self.rows}x{self.context} {self.heads}/{self.kv_heads} d{self.dim}"
        return f"{shape} int{self.bits}-{self.axis}-{self.tile}"


@dataclass
class Problem:
    """A case's tensors."""

    case: Case
    query: Tensor
    tier: PackedTier
    window: Window | None

    def run(self, config: DecodeConfig | None = None) -> Tensor:
        return decode_attention(self.query, [self.tier], self.window, config=config)[0]

    def again(self) -> Problem:
        """The same problem in memory of its own."""
        tier, window = self.tier, self.window
        copy = replace(
            tier,
            keys={n: f.clone() for n, f in tier.keys.items()},
            values={n: f.clone() for n, f in tier.values.items()},
        )
        if window is not None:
            window = replace(window, keys=window.keys.clone(), values=window.values.clone())
        return Problem(self.case, self.query.clone(), copy, window)

    @property
    def nbytes(self) -> int:
        fields = [*self.tier.keys.values(), *self.tier.values.values()]
        if self.window is not None:
            fields += [self.window.keys, self.window.values]
        return sum(f.numel() * f.element_size() for f in fields)


def quantizers(case: Case) -> tuple[UniformQuantizer, UniformQuantizer]:
    key = UniformQuantizer(case.dim, case.bits, case.axis, tile=case.tile, layout="token")  # type: ignore[arg-type]
    return key, UniformQuantizer(case.dim, case.bits, "token", tile=case.tile, layout="channel")


def build(case: Case) -> Problem:
    """Random keys with a channel-wise mean, random values, encoded row by row to keep temporaries small."""
    key_quantizer, value_quantizer = quantizers(case)
    shape = (1, case.kv_heads, case.context, case.dim)
    parts: list[list[dict[str, Tensor]]] = [[], []]
    mean = torch.randn(1, case.kv_heads, 1, case.dim, device=DEVICE)
    for _ in range(case.rows):
        for i, quantizer in enumerate((key_quantizer, value_quantizer)):
            x = torch.randn(shape, device=DEVICE)
            parts[i].append(quantizer.encode(x + mean if i == 0 else x).fields)
    keys, values = ({n: torch.cat([p[n] for p in side]) for n in side[0]} for side in parts)
    tiles = case.context // case.tile
    count = torch.full((case.rows, case.kv_heads), tiles, dtype=torch.int32, device=DEVICE)
    if case.ragged:
        count = torch.randint(tiles // 3, tiles + 1, count.shape, dtype=torch.int32, device=DEVICE)
    table = None
    if case.table:
        total = case.rows * case.kv_heads * tiles
        order = torch.randperm(total, device=DEVICE)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(total, device=DEVICE)
        keys = {n: f.flatten(0, 2)[order].contiguous() for n, f in keys.items()}
        values = {n: f.flatten(0, 2)[order].contiguous() for n, f in values.items()}
        table = inverse.view(case.rows, case.kv_heads, tiles).to(torch.int32)
    tier = PackedTier(key_quantizer.fmt, value_quantizer.fmt, keys, values, count, table)
    query = torch.randn(case.rows, case.heads, case.q_len, case.dim, device=DEVICE)
    query = (query * (0.05 if case.flat else 1.5)).to(case.torch_dtype)
    window = None
    if case.window:
        full = [
            torch.randn(case.rows, case.kv_heads, case.window, case.dim, device=DEVICE).to(case.torch_dtype)
            for _ in range(2)
        ]
        length = torch.full((case.rows,), case.window, dtype=torch.int32, device=DEVICE)
        window = Window(full[0], full[1], length)
    return Problem(case, query, tier, window)


def errors(problem: Problem, config: DecodeConfig | None) -> tuple[float, float, float]:
    """Relative error of the kernel, of bf16 attention over the same values, and the kernel's worst row and head."""
    case, tier = problem.case, problem.tier
    found = problem.run(config)
    quantizer_k, quantizer_v = quantizers(case)
    wanted, rounded = torch.empty_like(found, dtype=torch.float64), torch.empty_like(found, dtype=torch.float64)
    group = case.heads // case.kv_heads
    for b in range(case.rows):
        for h in range(case.kv_heads):
            n = int(tier.count[b, h])
            if tier.table is not None:
                at = tier.table[b, h, :n].long()
                sides = [{name: f[at][None, None] for name, f in side.items()} for side in (tier.keys, tier.values)]
            else:
                sides = [{name: f[b : b + 1, h : h + 1, :n] for name, f in s.items()} for s in (tier.keys, tier.values)]
            keys = quantizer_k.decode(Packed(sides[0], n * case.tile, torch.float32))[0, 0]
            values = quantizer_v.decode(Packed(sides[1], n * case.tile, torch.float32))[0, 0]
            if problem.window is not None:
                keys = torch.cat([keys, problem.window.keys[b, h].float()])
                values = torch.cat([values, problem.window.values[b, h].float()])
            query = problem.query[b, h * group : (h + 1) * group]
            mask = torch.ones(case.q_len, keys.shape[0], dtype=torch.bool, device=DEVICE).tril(
                keys.shape[0] - case.q_len
            )
            score = query.double() @ keys.double().T / math.sqrt(case.dim)
            weight = torch.softmax(score.masked_fill(~mask, float("-inf")), -1)
            wanted[b, h * group : (h + 1) * group] = weight @ values.double()
            rounded[b, h * group : (h + 1) * group] = F.scaled_dot_product_attention(
                query.bfloat16()[None],
                keys.bfloat16()[None, None].expand(1, group, -1, -1),
                values.bfloat16()[None, None].expand(1, group, -1, -1),
                attn_mask=None if case.q_len == 1 else mask,
            )[0].double()

    def relative(x: Tensor) -> Tensor:
        return (x.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)

    mine, theirs = relative(found), relative(rounded)
    whole = float((found.double() - wanted).norm() / wanted.norm())
    reference = float((rounded - wanted).norm() / wanted.norm())
    return whole, reference, float((mine / theirs.clamp_min(1e-9)).max())


def graph_time(calls: list[Callable[[], object]], replays: int = 9) -> float:
    """Microseconds a call of one CUDA graph that makes all ``calls``; median over replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    del graph
    return statistics.median(times)


def layers_for(nbytes: int) -> int:
    return max(2, min(MAX_LAYERS, -(-TRAFFIC // nbytes)))


def baseline(case: Case) -> dict[str, object]:
    """Best bf16 attention of torch, microseconds a layer."""
    shape = (case.rows, case.kv_heads, case.context + case.window, case.dim)
    nbytes = 4 * math.prod(shape)
    layers = layers_for(nbytes)
    query = torch.randn(case.rows, case.heads, case.q_len, case.dim, device=DEVICE, dtype=torch.bfloat16)
    buffers = [[torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)] for _ in range(layers)]
    found: dict[str, object] = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def attend(k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, k, v, enable_gqa=case.heads != case.kv_heads)

        try:
            with sdpa_kernel(backend):
                found[name] = round(graph_time([lambda k=k, v=v: attend(k, v) for k, v in buffers]), 2)
        except RuntimeError as error:
            found[f"{name}_error"] = str(error)[:160]
    times = [t for n, t in found.items() if isinstance(t, float)]
    found["best"] = min(times)
    found["tb_s"] = round(nbytes / min(times) / 1e6, 2)
    return found


def kernel_time(problems: list[Problem], config: DecodeConfig | None, replays: int = 9) -> float:
    return graph_time([lambda p=p: p.run(config) for p in problems], replays)


# --- what is run ---------------------------------------------------------------------------------------------------

PARITY = [
    Case(2, 32, 8, 128, 4096),
    Case(2, 32, 8, 128, 4096, axis="token"),
    Case(2, 32, 8, 128, 4096, bits=2),
    Case(2, 32, 8, 128, 4096, bits=2, tile=128),
    Case(2, 32, 8, 128, 4096, bits=2, axis="token", tile=128),
    Case(1, 32, 8, 128, 32768, flat=True),
    Case(1, 32, 8, 128, 32768, axis="token", flat=True),
    Case(1, 32, 8, 128, 32768, bits=2, tile=128, flat=True),
    Case(3, 32, 8, 128, 4096, window=150, table=True, ragged=True),
    Case(3, 32, 8, 128, 4096, bits=2, axis="token", window=150, table=True, ragged=True, dtype="float16"),
    Case(2, 32, 8, 128, 4096, window=70, q_len=4),
    Case(2, 14, 2, 64, 4096, window=70),
    Case(2, 4, 1, 256, 4096, window=70, dtype="float16"),
    Case(2, 16, 1, 128, 4096, window=70),
    Case(2, 8, 8, 96, 4096, window=70),
    Case(2, 12, 3, 80, 4096, window=70),
]

SHAPES = [
    Case(8, 32, 8, 128, 32768),
    Case(1, 32, 8, 128, 131072),
    Case(1, 32, 8, 128, 32768),
    Case(8, 32, 8, 128, 4096),
    Case(1, 32, 8, 128, 4096),
    Case(8, 14, 2, 64, 32768),
    Case(8, 4, 1, 256, 32768),
]


def variants(shape: Case) -> list[Case]:
    """Formats that a shape is timed in."""
    found = [shape, replace(shape, axis="token")]
    if (shape.dim, shape.context) == (128, 32768) or shape.context == 131072:
        found += [replace(shape, bits=2, tile=128), replace(shape, bits=2)]
    return found


def candidates(case: Case) -> Iterator[DecodeConfig]:
    """Launch configurations worth trying."""
    few = case.rows * case.kv_heads < 64
    for warps, stages in ((1, 3), (1, 2), (1, 4), (2, 3)):
        for resident in (4, 6, 8, 10, 12) if warps == 1 else (3, 4, 6):
            yield DecodeConfig(warps, stages, resident)
            if resident in (6, 8, 10) and stages == 3:
                yield DecodeConfig(warps, stages, resident, overlap=True)
            if stages == 3 and (not few or resident <= 6):
                yield DecodeConfig(warps, stages, resident, fused=True)
    yield DecodeConfig(subnormal=False)
    if few:
        for resident in (1, 2, 3):
            yield DecodeConfig(1, 3, resident, fused=True)
            yield DecodeConfig(1, 3, resident, overlap=True)


def compiled_once(config: DecodeConfig) -> DecodeConfig:
    """Configurations that share compiled code are equal after this."""
    return replace(config, resident=2)


def warm_jobs(cases: list[Case], tune: bool) -> list[tuple[Case, DecodeConfig]]:
    """Distinct compilations behind a list of cases, each on a small problem."""
    jobs: dict[tuple[Case, DecodeConfig], None] = {}
    for case in cases:
        configs = candidates(case) if tune else [_tuned(case)]
        small = replace(case, rows=1, context=4 * case.tile, ragged=False, flat=False)
        for config in configs:
            jobs[(small, compiled_once(config))] = None
    return list(jobs)


def _tuned(case: Case) -> DecodeConfig:
    return lookup(_tuned_case(case))


def _tuned_case(case: Case) -> TunedCase:
    groups = case.rows * case.kv_heads
    return TunedCase(case.bits, case.axis, case.tile, case.dim, case.columns, groups, case.context)


def warm(job: tuple[Case, DecodeConfig]) -> str:
    """Compile one job in a worker; the disk cache carries it over."""
    case, config = job
    try:
        build(case).run(config)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 (reported, and met again in the main process)
        return f"{case.name} {config}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def run_parity(emit: Emit, deadline: float) -> set[tuple[int, str, int]]:
    """Check every parity case; the formats (bits, axis, tile) that failed."""
    failed = set()
    for case in PARITY:
        if time.time() > deadline:
            emit({"skipped": f"parity {case.name}: out of time"})
            continue
        row: dict[str, object] = {"parity": case.name, **_flags(case)}
        try:
            for label, config in (("split", DecodeConfig()), ("fused", DecodeConfig(fused=True, resident=2))):
                mine, reference, worst = errors(build(case), config)
                green = mine <= 2 * reference
                row |= {label: f"{mine:.2e}", "bf16": f"{reference:.2e}", f"{label}_worst_ratio": round(worst, 2)}
                row["green"] = bool(row.get("green", True)) and green
        except Exception as error:  # noqa: BLE001 (one red case must not hide the others)
            row |= {"green": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        if not row["green"]:
            if "error" not in row:
                mine, reference, _ = errors(build(case), DecodeConfig(subnormal=False))
                row["with_normal_codes"] = f"{mine:.2e} against {reference:.2e}"
            failed.add((case.bits, case.axis, case.tile))
        emit(row)
        torch.cuda.empty_cache()
    return failed


def _flags(case: Case) -> dict[str, object]:
    plain = Case(1, 1, 1, 1, 1)
    names = ("q_len", "dtype", "window", "table", "ragged", "flat")
    return {n: getattr(case, n) for n in names if getattr(case, n) != getattr(plain, n)}


def run_timing(emit: Emit, deadline: float, failed: set[tuple[int, str, int]], tune: bool) -> None:
    for shape in SHAPES:
        if time.time() > deadline:
            emit({"skipped": f"timing from {shape.name} on: out of time"})
            return
        bf16 = baseline(shape)
        torch.cuda.empty_cache()
        emit({"baseline": f"{shape.rows}x{shape.context} {shape.heads}/{shape.kv_heads} d{shape.dim}", **bf16})
        for case in variants(shape):
            if time.time() > deadline:
                emit({"skipped": f"timing {case.name}: out of time"})
                continue
            if (case.bits, case.axis, case.tile) in failed:
                emit({"skipped": f"timing {case.name}: parity is not green"})
                continue
            emit(time_case(case, float(bf16["best"]), tune, deadline))  # type: ignore[arg-type]
            torch.cuda.empty_cache()


def time_case(case: Case, best_bf16: float, tune: bool, deadline: float) -> dict[str, object]:
    first = build(case)
    problems = [first, *(first.again() for _ in range(layers_for(first.nbytes) - 1))]
    tried: list[tuple[float, DecodeConfig]] = []
    failures: dict[str, str] = {}
    for config in candidates(case) if tune else [_tuned(case)]:
        if tried and time.time() > deadline:
            break
        try:
            tried.append((kernel_time(problems, config, 5 if tune else 15), config))
        except Exception as error:  # noqa: BLE001 (a configuration that cannot run is one candidate less)
            failures[str(config)] = f"{type(error).__name__}: {str(error)[:160]}"
    if not tried:
        return {"time": case.name, "failures": failures}
    tried.sort(key=lambda pair: pair[0])
    micro, config = tried[0]
    if tune:
        micro = kernel_time(problems, config, 15)
    return {
        "time": case.name,
        "us": round(micro, 2),
        "bf16_us": best_bf16,
        "speedup": round(best_bf16 / micro, 2),
        "tb_s": round(first.nbytes / micro / 1e6, 2),
        "config": asdict(config),
        "tried": [(round(t, 2), _short(c)) for t, c in tried],
        "failures": failures,
        "case": asdict(_tuned_case(case)),
    }


def _short(config: DecodeConfig) -> str:
    flags = "f" * config.fused + "o" * config.overlap + "n" * (not config.subnormal)
    return f"w{config.warps}s{config.stages}r{config.resident}{flags}{config.registers or ''}"


def copy_bandwidth() -> float:
    """TB/s of a large copy, bytes read plus bytes written."""
    source = torch.empty(2**32, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    micro = graph_time([lambda: target.copy_(source)], 7)
    return round(2 * source.numel() / micro / 1e6, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=400, help="seconds in all")
    parser.add_argument("--tune", action="store_true", help="try launch configurations")
    parser.add_argument("--only", default="", help="parity, timing, or both when empty")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1), help="compile processes")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    options = parser.parse_args()
    begun = time.time()
    deadline = begun + options.budget
    rows: list[dict[str, object]] = []
    log = Path(os.environ["OUT"]) / "kernels.jsonl" if os.environ.get("OUT") else None

    def emit(row: dict[str, object]) -> None:
        rows.append(row)
        brief = {k: v for k, v in row.items() if k not in ("case", "tried", "config")}
        if "tried" in row:
            brief["tried"] = [f"{t}:{c}" for t, c in row["tried"][:6]]  # type: ignore[index]
        print(json.dumps(brief), flush=True)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")

    torch.manual_seed(options.seed)
    emit({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "seed": options.seed,
          "copy_tb_s": copy_bandwidth()})  # fmt: skip
    torch.cuda.empty_cache()
    jobs: list[tuple[Case, DecodeConfig]] = []
    if options.only != "timing":
        for case in PARITY:
            small = replace(case, rows=1, context=4 * case.tile, ragged=False, flat=False)
            jobs += [(small, DecodeConfig(resident=2)), (small, DecodeConfig(resident=2, fused=True))]
    if options.only != "parity":
        jobs += warm_jobs([case for shape in SHAPES for case in variants(shape)], options.tune)
    jobs = list(dict.fromkeys(jobs))
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for problem in pool.imap_unordered(warm, jobs):
            if problem:
                emit({"compile_failed": problem})
    emit({"compiled": len(jobs), "seconds": round(time.time() - begun, 1)})
    failed = run_parity(emit, deadline) if options.only != "timing" else set()
    if options.only != "parity":
        run_timing(emit, deadline, failed, options.tune)
    print(f"\n{'case':44} {'us':>8} {'bf16':>8} {'ratio':>6} {'TB/s':>5}  configuration")
    for row in rows:
        if "us" in row:
            config = _short(DecodeConfig(**row["config"]))  # type: ignore[arg-type]
            print(f"{row['time']:44} {row['us']:8} {row['bf16_us']:8} {row['speedup']:6} {row['tb_s']:5}  {config}")
    reds = [row["parity"] for row in rows if row.get("green") is False]
    print(f"parity: {'all green' if not reds else 'RED ' + str(reds)}; {time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
