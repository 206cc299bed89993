"""Mean and covariance of the latest queries against their definition over all of them at once."""

from __future__ import annotations

import pytest
import torch
from tiny import fresh_seed
from torch import Tensor

from fade_core.eviction.query_moments import QueryMoments

B, H, D = 3, 4, 6


def defined(queries: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and covariance of ``[B, H, Q, D]`` under ``[B, Q]``, in float64."""
    shares = (weights / weights.sum(-1, keepdim=True))[:, None, :, None]
    mean = (queries * shares).sum(2)
    apart = queries - mean[:, :, None]
    return mean, (apart * shares).mT @ apart


@pytest.mark.parametrize("far", [0.0, 300.0])
@pytest.mark.parametrize("keep", [1.0, 0.7, 0.0])
def test_passes_add_up(keep: float, far: float) -> None:
    """Also where the mean is much longer than the spread, as keys and queries with a bias have it."""
    torch.manual_seed(fresh_seed())
    sizes = (5, 1, 9, 2)
    given = [far + torch.randn(B, H, size, D, dtype=torch.float64) for size in sizes]
    real = [torch.rand(B, size) < 0.8 for size in sizes]
    real[0][0], real[-1][:, 0] = False, True  # a row that begins as padding alone; one query at least at the end
    moments = QueryMoments(covariance=True)
    for queries, chosen in zip(given, real, strict=True):
        moments.observe(queries, keep, chosen)
    weights = torch.cat([keep ** (len(sizes) - 1 - n) * chosen for n, chosen in enumerate(real)], 1).double()
    mean, covariance = defined(torch.cat(given, 2), weights)
    found = moments.statistics()
    scale = 64 * torch.finfo(torch.float32).eps
    assert float((found["query_mean"] - mean).abs().max()) <= scale * (far + 1)
    assert float((found["query_covariance"] - covariance).abs().max()) <= scale * (far + 8) * 2


def test_no_covariance_unless_it_is_asked_for() -> None:
    moments = QueryMoments(covariance=False)
    assert moments.statistics() == moments.tensors() == {}
    moments.observe(torch.randn(B, H, 3, D), 1.0)
    assert set(moments.statistics()) == {"query_mean"}
    assert set(moments.tensors()) == {"weight", "mean"}


@pytest.mark.parametrize("covariance", [True, False])
def test_rows_are_picked_taken_back_and_saved(covariance: bool) -> None:
    torch.manual_seed(fresh_seed())
    moments = QueryMoments(covariance)
    moments.observe(torch.randn(B, H, 7, D), 1.0)
    first = {name: tensor.clone() for name, tensor in moments.tensors().items()}
    moments.observe(torch.randn(B, H, 2, D), 0.5)
    assert not torch.equal(moments.tensors()["mean"], first["mean"])
    moments.restore(first)
    assert all(torch.equal(moments.tensors()[name], tensor) for name, tensor in first.items())
    again = QueryMoments(covariance)
    again.load(moments.tensors(), torch.device("cpu"))
    index = torch.tensor([2, 0, 0, 1])
    moments.select_rows(index)
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, first[name])
        assert torch.equal(moments.tensors()[name], tensor[index])


@pytest.mark.parametrize("covariance", [True, False])
def test_rows_join_behind_and_count_on_their_own(covariance: bool) -> None:
    torch.manual_seed(fresh_seed())
    moments, other, fresh = (QueryMoments(covariance) for _ in range(3))
    fresh.join(QueryMoments(covariance), (2, 1))
    assert fresh.tensors() == {}
    moments.observe(torch.randn(B, H, 7, D), 1.0)
    other.observe(torch.randn(2, H, 5, D), 1.0)
    apart = [{name: t.clone() for name, t in each.tensors().items()} for each in (moments, other)]
    moments.join(other, (B, 2))
    for name, tensor in moments.tensors().items():
        assert torch.equal(tensor, torch.cat([part[name] for part in apart]))
    moments.join(fresh, (B + 2, 1))  # a row that has not seen a query weighs nothing
    queries = torch.randn(B + 3, H, 4, D)
    moments.observe(queries, 0.5)
    fresh.observe(queries[-1:], 0.5)
    fresh.join(moments, (1, B + 3))
    for found in fresh.statistics().values():
        assert torch.equal(found[0], found[-1])
