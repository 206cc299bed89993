from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from oracle import relative_error, seed

import fade_kernels_triton
from fade_core import get_quantizer
from fade_core.errors import ConfigError, InputError
from fade_core.packed import Packed
from fade_core.testing import check_kernel
from fade_kernels_triton import check_fused_parity, fused_int4_sdpa, int4_sdpa, parity
from fade_kernels_triton.parity import PROBLEMS, check_ops


def problem(device, *, dim=128, heads=6, kv_heads=2, queries=1, tiles=2, axis="channel", dtype=torch.float16):
    """Arguments of the functions, and the float64 answer."""
    keys, values = torch.randn(2, 2, kv_heads, tiles * 64, dim, device=device)
    query = torch.randn(2, heads, queries, dim, device=device).to(dtype)
    sides = [
        get_quantizer("uniform", head_dim=dim, bits=4, side=side, axis=own, tile=64)
        for side, own in (("key", axis), ("value", "token"))
    ]
    packed = [quantizer.encode(x) for quantizer, x in zip(sides, (keys, values), strict=True)]
    k, v = (
        quantizer.decode(Packed(p.fields, p.length, torch.float64)).repeat_interleave(heads // kv_heads, 1)
        for quantizer, p in zip(sides, packed, strict=True)
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(query.double(), k, v)
    return (query, *(p.fields[name] for p in packed for name in ("codes4", "meta"))), wanted


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused(axis, dtype, device):
    seed()
    arguments, wanted = problem(device, axis=axis, dtype=dtype, queries=2)
    found = fused_int4_sdpa(*arguments)
    assert found.dtype == dtype
    assert relative_error(found, wanted) < 4 * torch.finfo(dtype).eps
    assert torch.equal(int4_sdpa(*arguments), found)
    assert relative_error(int4_sdpa(*arguments, force_triton=False), wanted) < torch.finfo(dtype).eps


def test_more_queries_than_one_launch_takes(device):
    seed()
    arguments, wanted = problem(device, queries=11, heads=2)
    assert relative_error(fused_int4_sdpa(*arguments), wanted) < 2e-3


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_torch_takes_what_the_kernel_does_not(axis):
    seed()
    arguments, wanted = problem("cpu", axis=axis, dim=40, dtype=torch.float32)
    assert relative_error(int4_sdpa(*arguments), wanted) < 1e-5
    with pytest.raises(ConfigError, match=r"head_dim 40|float32|Triton|CUDA"):
        int4_sdpa(*arguments, force_triton=True)


def test_an_axis_that_shapes_do_not_tell(device):
    seed()
    for axis in ("token", "channel"):
        arguments, wanted = problem(device, dim=64, axis=axis)
        with pytest.raises(InputError, match="axis"):
            int4_sdpa(*arguments)
        assert relative_error(int4_sdpa(*arguments, axis=axis), wanted) < 2e-3


@pytest.mark.parametrize(
    ("at", "change"),
    [
        (0, lambda q: q[:, :5]),
        (0, lambda q: q[0]),
        (0, lambda q: q[..., :64]),
        (1, lambda k: k.int()),
        (2, lambda s: s[:, :1]),
        (3, lambda v: v.transpose(-1, -2)),
        (4, lambda s: s.expand(-1, -1, -1, 2, -1)),
    ],
)
def test_shapes_that_do_not_fit_are_named(at, change):
    arguments = list(problem("cpu")[0])
    arguments[at] = change(arguments[at])
    with pytest.raises(InputError, match=r"needed|must be"):
        int4_sdpa(*arguments)


def test_parity_here(device):
    report = check_fused_parity(device, seed())
    assert report.ok, report
    assert len(report.cases) >= len(PROBLEMS)
    assert report.to_dict()["ok"]
    assert all(0 < case.error < 0.01 for case in report.cases)


@pytest.mark.slow
def test_every_op_is_checked_here(device, monkeypatch):
    from fade_kernels_triton.encode import TritonEncode

    found = check_ops(device, seed())
    assert set(found) == {"append", "encode", "dequantize", "attention_mass"}
    assert all(check.passed for checks in found.values() for check in checks), found
    run = TritonEncode.__call__

    def wrong(self, quantizer, tokens):
        return run(self, quantizer, tokens * 1.5)

    monkeypatch.setattr(TritonEncode, "__call__", wrong)
    monkeypatch.setattr(parity, "check_kernel", lambda k, **o: check_kernel(k, **o) if k.op == "encode" else [])
    again = check_ops(device, seed())
    assert [check.name for check in again["encode"] if not check.passed] == ["encoding"]


def test_parity_where_nothing_can_run():
    with pytest.raises(ConfigError, match="TRITON_INTERPRET"):
        check_fused_parity("meta")


@pytest.mark.slow
def test_the_command_says_why_it_cannot_run():
    """A fresh process without the interpreter: on a machine without a GPU the reason, with one the table."""
    code = "import os; os.environ.pop('TRITON_INTERPRET', None); import sys; sys.argv = ['fade', 'check-kernels']; "
    done = subprocess.run(
        [sys.executable, "-c", code + "from fade_core.cli import main; main()"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if torch.cuda.is_available():
        assert done.returncode == 0, done.stderr
        assert "passed" in done.stdout
    else:
        assert done.returncode == 2
        assert "CUDA" in done.stderr


def test_names_are_imported_on_first_use():
    code = "import sys, fade_kernels_triton.plugin; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="nothing"):
        fade_kernels_triton.nothing  # noqa: B018
