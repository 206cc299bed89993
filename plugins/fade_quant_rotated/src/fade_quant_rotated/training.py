"""Training codebooks on what a model really caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fade_core import rope_scheme_of
from fade_core.errors import InputError, UnsupportedModelError
from fade_quant_rotated.codebook import PQCodebook, check_size
from fade_quant_rotated.reach import reach_of, turned_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VECTORS = 65536
"""Most vectors a layer and side that are kept for k-means."""


def train_codebooks(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    sub_dim: int = 4,
    num_centroids: int = 256,
    sinks: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    reach: int | None = None,
) -> dict[str, PQCodebook]:
    """Codebooks of every full-attention layer, named ``"LAYER.keys"`` and ``"LAYER.values"``.

    Args:
        model: a decoder-only transformers model.
        texts: token ids, int64 ``[T]`` each.
        sub_dim: channels of a sub-vector.
        num_centroids: centroids of a sub-vector.
        sinks: leading tokens to leave out: they stay in full precision.
        seed: of the sampling and of k-means.
        progress: called with the steps done and the steps in all.
        reach: positions that the codebooks are for, beside those that are read, as for ``calibrate``.

    Raises:
        InputError: too few tokens for that many centroids.
        UnsupportedModelError: a model whose cache holds no full-attention layer.
    """
    check_size(num_centroids)
    found = _vectors(model, texts, sinks, seed, progress, len(texts))
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no full-attention layer to train codebooks for")
    books, generator = {}, torch.Generator().manual_seed(seed)
    reach = reach_of(model.config.get_text_config(decoder=True), reach)
    for number, (name, vectors) in enumerate(found.items()):
        layer, _, side = name.partition(".")
        scheme = rope_scheme_of(model, int(layer)) if side == "keys" else None
        if scheme is not None:
            vectors = turned_apart(scheme, vectors, reach, generator)
        books[name] = PQCodebook.train(vectors, sub_dim, num_centroids, seed)
        if progress is not None:
            progress(len(texts) + number + 1, len(texts) + len(found))
    return books


@torch.no_grad()
def _vectors(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    sinks: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
    total: int,
) -> dict[str, Tensor]:
    """Vectors ``[N, D]`` by name, sampled evenly over texts where there are more than ``VECTORS``."""
    from transformers import DynamicCache

    if not texts or min(len(text) for text in texts) <= sinks:
        raise InputError(f"every text must be longer than the {sinks} sink tokens")
    kept: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    share = max(1, VECTORS // len(texts))
    for number, text in enumerate(texts):
        cache = DynamicCache(config=model.config)
        getattr(model, "base_model", model)(text.view(1, -1).to(model.device), past_key_values=cache, use_cache=True)
        for layer, held in enumerate(cache.layers):
            if getattr(held, "is_sliding", False) or getattr(held, "keys", None) is None:
                continue
            for side, tensor in (("keys", held.keys), ("values", held.values)):
                vectors = tensor[0, :, sinks:].flatten(0, 1)
                if len(vectors) > share:
                    vectors = vectors[torch.randperm(len(vectors), generator=generator)[:share].to(vectors.device)]
                kept.setdefault(f"{layer}.{side}", []).append(vectors.float().cpu())
        if progress is not None:
            progress(number + 1, total + 2 * len(cache.layers))
    return {name: torch.cat(parts) for name, parts in kept.items()}
