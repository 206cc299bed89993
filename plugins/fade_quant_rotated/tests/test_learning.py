"""Learning from a prompt at the speed of the prompt: in few launches, in numbers of 16 bits, without waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fade_core.interfaces import PromptView
from fade_quant_rotated.allocation import water_fill
from fade_quant_rotated.klt import nearly_klt, weighted_klt
from fade_quant_rotated.learning import Learning
from fade_quant_rotated.lloyd_max import gaussian_distortion
from fade_quant_rotated.prompt import moments_of
from fade_quant_rotated.statistics import product

HEADS, GROUP, DIM, SINKS, WINDOW = 2, 3, 32, 4, 32
BIAS = 60.0
"""Of keys, whose other parts are about 1: as in the first layer of Qwen2.5."""


def view(rows: int = 1, total: int = 400, seed: int = 0, **changes: Any) -> PromptView:
    """A causal layer; keys lie about a large bias, most of their variance along few directions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    fall = 0.8 ** torch.arange(DIM)
    turns = torch.linalg.qr(normal(2, HEADS, DIM, DIM)).Q
    at = torch.arange(total)
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(HEADS * GROUP * DIM, 64, bias=False)
    module.o_proj.weight.data = normal(64, HEADS * GROUP * DIM)
    return PromptView(
        **{
            "queries": normal(rows, HEADS * GROUP, total, DIM),
            "keys": normal(rows, HEADS, total, DIM) * 3 * fall @ turns[0] + BIAS * normal(HEADS, 1, DIM),
            "values": normal(rows, HEADS, total, DIM) * fall @ turns[1] + normal(HEADS, 1, DIM),
            "scaling": DIM**-0.5,
            "softcap": None,
            "sink_logits": None,
            "visible": lambda part: (at <= at[part][:, None])[None, None],
            "module": module,
            "n_sink": SINKS,
            "recent_window": WINDOW,
            **changes,
        }
    )


def in_16_bits(prompt: PromptView) -> PromptView:
    return replace(prompt, **{name: getattr(prompt, name).bfloat16() for name in ("queries", "keys", "values")})


@pytest.mark.parametrize("changes", [{}, {"softcap": 5.0}, {"sink_logits": torch.ones(HEADS * GROUP)}], ids=str)
def test_numbers_of_16_bits_cost_no_more_than_a_models_own_rounding(changes: dict[str, Any], seed: int) -> None:
    """Tokens are taken about their mean first: otherwise nothing would be left of covariances beside the bias."""
    exact = view(rows=2, seed=seed, **changes)
    rounded = in_16_bits(exact)
    every = {"even": 0.0, "shrink": 0.0}
    wanted, _ = moments_of(exact, **every, dtype=torch.float32)
    reference, _ = moments_of(rounded, **every, dtype=torch.float32)
    found, _ = moments_of(rounded, **every, dtype=torch.bfloat16)
    for name, tensor in vars(reference).items():
        own = float((tensor - getattr(wanted, name)).norm())
        error = float((getattr(found, name) - tensor).norm())
        # beside the tokens', probabilities are rounded, to one part in 512
        assert error <= 2 * own + float(tensor.norm()) / 512, (name, error, own)
    likeness = torch.linalg.eigvals(torch.linalg.solve(reference.key_cov, found.key_cov)).real
    assert float((likeness - 1).abs().max()) < 0.05, likeness  # no direction is lost


def test_what_the_host_knows_of_a_causal_mask_changes_nothing(seed: int) -> None:
    for asked in (400, 150):
        prompt = view(seed=seed)
        prompt = replace(
            prompt,
            queries=prompt.queries[:, :, -asked:],
            visible=lambda part, asked=asked: view().visible(torch.arange(400 - asked, 400)[part]),
        )
        for queries in (7, 200):
            whole, cut = (moments_of(replace(prompt, causal=known), queries=queries)[0] for known in (False, True))
            for name, tensor in vars(whole).items():
                torch.testing.assert_close(getattr(cut, name), tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))


class Launches(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_learning_reads_nothing_back_and_does_not_go_row_by_row(seed: int) -> None:
    counted = []
    for rows in (1, 4):
        with Launches() as launches, torch.no_grad():
            Learning(in_16_bits(view(rows, seed=seed)), DIM, 0)
        counted.append(sum(launches.counts.values()))
        waits = (
            "_local_scalar_dense",
            "nonzero",
            "_unique2",
            "masked_select",
            "equal",
            "linalg_eigh",
            "_linalg_check_errors",
        )
        assert not [name for name in launches.counts if name.removeprefix("aten::") in waits]
    assert counted[1] <= counted[0], counted


# --- decomposition ---
def least_error(variance: Tensor, bits: float) -> float:
    """Expected error of channels ``[H, D]`` at an average width."""
    widths = water_fill(variance, bits)
    distortion = torch.tensor([gaussian_distortion(width) for width in range(9)], dtype=torch.float64)
    return float((variance * distortion[widths]).sum())


def steep(count: int, decades: float) -> Tensor:
    """Random covariances ``[count, 48, 48]`` (float64) with eigenvalues over some decades."""
    turns = torch.linalg.qr(torch.randn(count, 48, 48, dtype=torch.float64)).Q
    return turns * torch.logspace(0, -decades, 48, dtype=torch.float64) @ turns.mT


@pytest.mark.parametrize("decades", [0.5, 2.0, 4.0, 8.0])
def test_a_transform_by_products_alone_is_nearly_the_best(decades: float, seed: int) -> None:
    cov, metric = steep(4, decades), steep(4, 2.0)
    _, best = weighted_klt(cov, metric)
    transform, variance, inverse = nearly_klt(cov, metric)
    assert bool((variance.diff(dim=-1) <= 0).all())
    torch.testing.assert_close((transform.mT @ cov @ transform).diagonal(dim1=-2, dim2=-1), variance, rtol=1e-6, atol=0)
    eye = torch.eye(48, dtype=torch.float64).expand_as(cov)
    torch.testing.assert_close(transform @ inverse, eye, rtol=0, atol=1e-8)
    spent = inverse @ metric @ inverse.mT  # what errors of channels cost
    torch.testing.assert_close(spent, eye, rtol=0, atol=0.03)  # but for the floor of the metric
    for bits in (1.5, 2.4, 4.8):
        assert least_error(variance, bits) < 1.04 * least_error(best, bits), bits


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_covariances_of_no_or_one_direction_still_give_a_transform(fill: float) -> None:
    same = torch.full((2, 16, 16), fill, dtype=torch.float64)
    for found in nearly_klt(same, same):
        assert bool(found.isfinite().all())


def test_sides_of_different_sizes_are_learnt_one_by_one(seed: int) -> None:
    prompt = view(seed=seed)
    values = prompt.values[..., : DIM // 2]
    prompt.module.o_proj = torch.nn.Linear(HEADS * GROUP * DIM // 2, 64, bias=False)
    whole, narrow = (Learning(p, DIM, 0).found for p in (view(seed=seed), replace(prompt, values=values)))
    assert not isinstance(whole, str) and not isinstance(narrow, str)
    assert whole["key"].calibration.mean.shape == narrow["key"].calibration.mean.shape == (HEADS, DIM)
    assert narrow["value"].calibration.transform.shape == (HEADS, DIM // 2, DIM // 2)
    for calibration, inverse, worth in (*whole.values(), *narrow.values()):
        assert torch.equal(worth, calibration.worth.double())
        torch.testing.assert_close(inverse, calibration.inverse(), rtol=0, atol=1e-4 * float(inverse.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_in_float32_on_a_gpu_too(dtype: torch.dtype, seed: int) -> None:
    a, b = torch.randn(2, 3, 40, 500, device="cuda").to(dtype)
    wanted = a.double() @ b.mT.double()
    found = product(a, b.mT)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=500 * 2**-24 * float(wanted.abs().max()) + 1e-4)


@pytest.mark.gpu
def test_a_gpu_learns_what_a_cpu_learns(seed: int) -> None:
    def moved(prompt: PromptView, visible: Callable[[Tensor], Tensor]) -> PromptView:
        tensors = {name: getattr(prompt, name).cuda() for name in ("queries", "keys", "values")}
        return replace(prompt, **tensors, visible=visible, module=prompt.module.cuda())

    at = torch.arange(400, device="cuda")
    host = in_16_bits(view(rows=2, seed=seed))
    wanted, _ = moments_of(host, dtype=torch.bfloat16)
    found, _ = moments_of(moved(host, lambda part: (at <= at[part][:, None])[None, None]))
    for name, tensor in vars(wanted).items():
        torch.testing.assert_close(
            getattr(found, name).cpu(), tensor, rtol=0, atol=float(tensor.abs().max()) / 64, msg=name
        )
