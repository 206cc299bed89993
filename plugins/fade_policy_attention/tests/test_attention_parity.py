"""Every policy, as the cache feeds it, against the same definition written over dense attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_run import Dense, Heard, dense_run, heard_run, left_padded, tiny_model
from torch import Tensor

WINDOW, KERNEL = 24, 5
Definition = Callable[[Dense, Tensor], Tensor]
"""Scores ``[B, H_kv, T]`` of a dense run; the tensor ``[T]`` says how much each query counts among the latest ones."""


def normalised_h2o(dense: Dense, latest: Tensor) -> Tensor:
    tokens = dense.real.shape[1]
    seen_by = (dense.real[:, :, None] & torch.ones(tokens, tokens).tril().bool()).sum(1)
    return (dense.of_group() * dense.real[:, None, :, None]).sum(2) / seen_by[:, None].clamp_min(1)


def snapkv(pool: str) -> Definition:
    def definition(dense: Dense, latest: Tensor) -> Tensor:
        window = (dense.of_group() * latest[:, None]).sum(2)
        if pool == "mean":
            return torch.nn.functional.avg_pool1d(window, KERNEL, 1, KERNEL // 2)
        return torch.nn.functional.max_pool1d(window, KERNEL, 1, KERNEL // 2)

    return definition


def tova(dense: Dense, latest: Tensor) -> Tensor:
    return dense.attention[:, :, -1].mean(1, keepdim=True).expand(-1, dense.keys.shape[1], -1)


def expected_attention(covariance: bool, values: bool) -> Definition:
    def definition(dense: Dense, latest: Tensor) -> Tensor:
        groups = dense.queries.shape[1] // dense.keys.shape[1]
        found = torch.zeros(dense.keys.shape[:3], dtype=torch.float64)
        for row, real in enumerate(dense.real):
            for head, queries in enumerate(dense.queries[row]):
                keys, weights = dense.keys[row, head // groups], latest * real
                mean = weights @ queries / weights.sum()
                logits = keys @ mean
                if covariance:
                    spread = (queries - mean).T @ torch.diag(weights) @ (queries - mean) / weights.sum()
                    logits = logits + torch.einsum("td,de,te->t", keys, spread, keys) / 2
                found[row, head // groups] += logits.masked_fill(~real, -torch.inf).softmax(-1) / groups
        return found * dense.values.norm(dim=-1) if values else found

    return definition


def key_norm(dense: Dense, latest: Tensor) -> Tensor:
    return -dense.keys.norm(dim=-1)


def keydiff(dense: Dense, latest: Tensor) -> Tensor:
    directions = torch.nn.functional.normalize(dense.keys, dim=-1) * dense.real[:, None, :, None]
    mean = directions.sum(2, keepdim=True) / dense.real.sum(1)[:, None, None, None]
    return -torch.cosine_similarity(dense.keys, mean, dim=-1)


POLICIES: dict[str, tuple[dict[str, Any], Definition]] = {
    "normalised_h2o": ({}, normalised_h2o),
    "snapkv": ({"window": WINDOW, "kernel": KERNEL}, snapkv("mean")),
    "snapkv max": ({"window": WINDOW, "kernel": KERNEL, "pool": "max"}, snapkv("max")),
    "tova": ({}, tova),
    "expected_attention": ({"window": WINDOW}, expected_attention(True, True)),
    "expected_attention mean": ({"window": WINDOW, "covariance": False}, expected_attention(False, True)),
    "expected_attention keys": ({"window": WINDOW, "values": False}, expected_attention(True, False)),
    "key_norm": ({}, key_norm),
    "keydiff": ({}, keydiff),
}


def check(heard: Heard, wanted: Tensor, real: Tensor) -> None:
    """Every real token was scored, and as wanted.

    Statistics are float32 sums of some two hundred terms; exponents of some ten amplify what they are off by that much.
    """
    assert torch.equal((heard.positions >= 0).sum(-1), real.sum(-1, keepdim=True).expand(-1, wanted.shape[1]))
    found = heard.by_position(wanted)
    bound = 1024 * torch.finfo(torch.float32).eps * float((wanted * real[:, None]).abs().max())
    assert float(((found - wanted) * real[:, None]).abs().max()) <= bound


@pytest.mark.parametrize("name", POLICIES)
def test_a_prompt_is_scored_as_the_dense_definition_says(name: str, seed: int, generator: torch.Generator) -> None:
    model, (fields, definition) = tiny_model(seed), POLICIES[name]
    ids, mask = left_padded((150, 97, 40), generator)
    policy = {"kind": name.split(maxsplit=1)[0], "budget": 48, **fields}
    cache, heard = heard_run(model, ids, mask, policy, prompt=150)
    assert [(h.layer, h.length) for h in heard] == [(0, 150), (1, 150)]
    latest = (torch.arange(150) >= 150 - WINDOW).double()
    for layer, dense in zip(heard, dense_run(model, ids, mask), strict=True):
        check(layer, definition(dense, latest), dense.real)
    assert all(bool((layer.held.tier_map()[0] == -1).any()) for layer in cache.tiered)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_the_first_ranking_in_decoding_is_scored_as_the_dense_definition_says(
    name: str, step: int, seed: int, generator: torch.Generator
) -> None:
    """Nothing has been evicted before it, so that the dense run is what the model saw."""
    model, (fields, definition) = tiny_model(seed), POLICIES[name]
    prompt, new = 60, 30
    ids, mask = left_padded((prompt + new, prompt + new - 13), generator)
    policy = {"kind": name.split(maxsplit=1)[0], "budget": 75, "every": new, **fields}
    cache, heard = heard_run(model, ids, mask, policy, prompt=prompt, step=step)
    last = [h for h in heard if h.length > prompt]
    assert [(h.layer, h.length) for h in last] == [(0, prompt + new), (1, prompt + new)]
    passes_after = torch.arange(new - 1, -1, -1) // step  # queries of one pass are equally old
    latest = torch.cat(
        [
            (torch.arange(prompt) >= prompt - WINDOW) * (1 - 1 / WINDOW) ** new,
            (1 - 1 / WINDOW) ** (step * passes_after.double()),
        ]
    )
    for layer, dense in zip(last, dense_run(model, ids, mask), strict=True):
        check(layer, definition(dense, latest), dense.real)
    assert all(bool((layer.held.tier_map()[0] == -1).any()) for layer in cache.tiered)
