"""Conformance of eviction policies: scores that depend on the tokens and on nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.eviction.attention_tracker import QUERY_STATISTICS, STATISTICS
from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig
from fade_core.plugins.resolve import resolve
from fade_core.testing.checks import (
    CheckResult,
    NotApplicableError,
    Suite,
    fresh_seed,
    require,
    require_close,
    require_equal,
    shuffled,
    unchanged,
)

_SHAPES = ((1, 1, 1, 8), (2, 3, 37, 16), (3, 2, 130, 64))


@dataclass
class Tokens:
    """Random live tokens and the statistics of queries beside them, from which views are made."""

    positions: Tensor
    keys: Tensor
    values: Tensor
    statistics: dict[str, Tensor]
    queries: dict[str, Tensor]
    length: int

    def view(
        self, names: tuple[str, ...] = STATISTICS + QUERY_STATISTICS, *, positions_only: bool = False
    ) -> LayerView:
        """A view of them with the statistics ``names``."""
        return LayerView(
            self.positions,
            self.length,
            layer=1,
            num_layers=4,
            statistics={name: tensor for name, tensor in self.statistics.items() if name in names},
            queries={name: tensor for name, tensor in self.queries.items() if name in names},
            keys=None if positions_only else lambda: self.keys,
            values=None if positions_only else lambda: self.values,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """``change`` applied to every tensor that has ``[B, H, T]`` first."""
        statistics = {name: change(tensor) for name, tensor in self.statistics.items()}
        return replace(
            self,
            positions=change(self.positions),
            keys=change(self.keys),
            values=change(self.values),
            statistics=statistics,
        )

    def row(self, index: int) -> Tokens:
        """The tokens of one row."""
        part = slice(index, index + 1)
        queries = {name: tensor[part] for name, tensor in self.queries.items()}
        return replace(self.map(lambda tensor: tensor[part]), queries=queries)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.positions, self.keys, self.values, *self.statistics.values(), *self.queries.values()]


@dataclass
class PolicyCase:
    """A policy under test and the generator of its inputs."""

    build: Callable[[], EvictionPolicy]
    generator: torch.Generator

    def tokens(self, batch: int, heads: int, count: int, dim: int) -> Tokens:
        """Random tokens, positions ascending with gaps, all live."""
        length = 2 * count
        draw = torch.rand(batch, heads, length, generator=self.generator)
        positions = draw.argsort(-1)[..., :count].sort(-1).values
        keys, values = (torch.randn(batch, heads, count, dim, generator=self.generator) for _ in range(2))
        mass = {name: torch.rand(batch, heads, count, generator=self.generator) for name in STATISTICS}
        mass["seen"] = (length - positions).float()
        mean = torch.randn(batch, 2 * heads, dim, generator=self.generator) / math.sqrt(dim)
        root = torch.randn(batch, 2 * heads, dim, dim, generator=self.generator) / dim
        queries = {"query_mean": mean, "query_covariance": root @ root.mT}
        return Tokens(positions, keys, values, mass, queries, length)


def check_policy(
    policy: PolicyConfig | type[PolicyConfig] | EvictionPolicy | str | Callable[[], EvictionPolicy],
    *,
    seed: int | None = None,
    expected_failures: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    only: tuple[str, ...] = (),
) -> list[CheckResult]:
    """Check an eviction policy against ``fade_core.interfaces.EvictionPolicy``.

    Args:
        policy: its configuration (object, class, or the name it is installed under), the policy itself, or a function
            that builds it.
        seed: of the inputs; ``None`` draws one.
        expected_failures: checks that are known to fail, with the reason.
        progress: called as checks are done.
        only: names of the checks to run; empty for all.
    """
    build = _factory(policy)
    return POLICY_CHECKS.run(
        lambda generator: PolicyCase(build, generator),
        fresh_seed() if seed is None else seed,
        expected_failures,
        progress,
        only,
    )


# --- the checks ---


def shapes(case: PolicyCase) -> None:
    """Scores are floating point [B, H_kv, T], one token and odd lengths included, and finite for live tokens."""
    policy = case.build()
    for shape in _SHAPES:
        found = policy.score(case.tokens(*shape).view())
        require(isinstance(found, Tensor), f"score() returned {type(found).__name__}")
        require(tuple(found.shape) == shape[:3], f"scores {tuple(found.shape)} for tokens {shape[:3]}")
        require(found.is_floating_point(), f"scores are {found.dtype}; floating point is needed")
        require(bool(found.isfinite().all()), "scores of live tokens are not all finite")


def statistics_declared(case: PolicyCase) -> None:
    """score() reads no statistic that `statistics` does not name, and names only what is tracked."""
    policy = case.build()
    tracked = STATISTICS + QUERY_STATISTICS
    unknown = sorted(set(policy.statistics) - set(tracked))
    require(not unknown, f"statistics {unknown} are not tracked; there are {', '.join(tracked)}")
    policy.score(case.tokens(2, 2, 9, 16).view(tuple(policy.statistics)))


def determinism(case: PolicyCase) -> None:
    """The same view scores the same, by one policy twice and by two built alike."""
    tokens = case.tokens(2, 3, 37, 16)
    policy = case.build()
    first = policy.score(tokens.view())
    require_equal(policy.score(tokens.view()), first, "scoring again")
    require_equal(case.build().score(tokens.view()), first, "a second policy")


def inputs_kept(case: PolicyCase) -> None:
    """score() changes nothing that the view shows."""
    tokens = case.tokens(2, 3, 37, 16)
    check = unchanged("score()", *tokens.tensors())
    case.build().score(tokens.view())
    check()


def order(case: PolicyCase) -> None:
    """Permuting the tokens of a view permutes their scores and nothing else."""
    tokens = case.tokens(2, 3, 37, 16)
    permuted = shuffled(37, case.generator)
    policy = case.build()
    wanted = policy.score(tokens.view())[:, :, permuted]
    found = policy.score(tokens.map(lambda tensor: tensor[:, :, permuted]).view())
    require_close(found, wanted, _rounding(wanted), "permuted tokens")


def empty_slots_ignored(case: PolicyCase) -> None:
    """What lies in slots with position -1, NaN included, changes no live token's score."""
    tokens = case.tokens(2, 3, 24, 16)
    policy = case.build()
    wanted = policy.score(tokens.view())

    def with_garbage(tensor: Tensor) -> Tensor:
        shape = (*tensor.shape[:2], 13, *tensor.shape[3:])
        garbage = torch.full(shape, torch.nan) if tensor.is_floating_point() else torch.full(shape, -1)
        return torch.cat([garbage[:, :, :5].to(tensor.dtype), tensor, garbage[:, :, 5:].to(tensor.dtype)], dim=2)

    padded = tokens.map(with_garbage)
    found = policy.score(padded.view())[:, :, 5:29]
    require_close(found, wanted, _rounding(wanted), "scores beside empty slots")


def rows_apart(case: PolicyCase) -> None:
    """A row's scores depend on that row only."""
    tokens = case.tokens(3, 2, 37, 16)
    policy = case.build()
    wanted = policy.score(tokens.view())[1:2]
    found = policy.score(tokens.row(1).view())
    require_close(found, wanted, _rounding(wanted), "a row alone")


def positional(case: PolicyCase) -> None:
    """A policy that says it is positional needs nothing but positions, and newer tokens never score lower."""
    policy = case.build()
    if not policy.positional:
        raise NotApplicableError("positional is False")
    tokens = case.tokens(2, 3, 37, 16)
    scores = policy.score(tokens.view((), positions_only=True))
    require(bool((scores.diff(dim=-1) >= 0).all()), "an older token scores higher than a newer one")


def rowwise(case: PolicyCase) -> None:
    """A policy that says it is rowwise needs nothing but positions, statistics and lengths; a layer's number is no matter."""
    policy = case.build()
    if not policy.rowwise:
        raise NotApplicableError("rowwise is False")
    tokens = case.tokens(3, 2, 37, 16)
    bare = tokens.view(tuple(name for name in policy.statistics if name in STATISTICS), positions_only=True)
    bare.layer, bare.num_layers = 0, 1
    wanted = policy.score(tokens.view())
    require_close(policy.score(bare), wanted, _rounding(wanted), "scores without keys, values and the layer's number")


def allocation(case: PolicyCase) -> None:
    """allocate() spends each row's budget on tokens that compete, and no more of a head's than there are."""
    policy = case.build()
    heads = 3
    tokens = case.tokens(2, heads, 40, 16)
    view = tokens.view()
    scores = policy.score(view).float()
    stays = (torch.rand(scores.shape, generator=case.generator) < 0.3) | (tokens.positions < 4)
    competing = scores.masked_fill(stays, -torch.inf)
    held = (~stays).sum(-1)
    for share in (0.0, 0.4, 1.0):
        budget = (held.sum(1) * share / heads).long()
        found = policy.allocate(view, competing, budget)
        if found is None:
            raise NotApplicableError("allocate() leaves every head the same")
        require(tuple(found.shape) == (2, heads), f"allocated {tuple(found.shape)}; [B, H_kv] = {(2, heads)} is needed")
        require(not found.is_floating_point(), f"allocated {found.dtype}; whole numbers are needed")
        require(bool(((found >= 0) & (found <= held)).all()), "a head got less than nothing or more than it has")
        require_equal(found.sum(1), budget * heads, "the sum over heads")


POLICY_CHECKS: Suite[PolicyCase] = Suite(
    (
        shapes,
        statistics_declared,
        determinism,
        inputs_kept,
        order,
        empty_slots_ignored,
        rows_apart,
        positional,
        rowwise,
        allocation,
    )
)


def _factory(policy: Any) -> Callable[[], EvictionPolicy]:
    if isinstance(policy, str):
        policy = resolve("policies", {"kind": policy})
    if isinstance(policy, type) and issubclass(policy, PolicyConfig):
        policy = policy.model_validate({})
    if isinstance(policy, PolicyConfig):
        return policy.build
    if isinstance(policy, EvictionPolicy):
        return lambda: policy
    if callable(policy):
        factory: Callable[[], EvictionPolicy] = policy
        return factory
    raise InputError(f"a policy, its configuration or its name is needed; found {policy!r}")


def _rounding(scores: Tensor) -> float:
    """What float32 reductions in another order may be off."""
    return 64 * torch.finfo(torch.float32).eps * max(1e-30, float(scores.abs().max())) * math.sqrt(scores.shape[-1])
