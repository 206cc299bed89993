"""What a prompt tells about a layer: the statistics of calibration, from a sample of the prompt's own queries."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fade_core.errors import NonFiniteError, UnsupportedModelError
from fade_core.interfaces import PromptView
from fade_quant_rotated.reach import REACH, rotations
from fade_quant_rotated.statistics import LayerMoments, LayerSums, Movement, by_group, output_metric

QUERIES = 512
"""Queries of a row that are looked at, spread evenly over those that see tokens outside sinks and window."""

EVEN = 0.05
"""Weight that all tokens share evenly, beside what attention gives them: a prompt has few tokens that matter much."""

DRIFT = 0.4
"""Share of the mean key's energy that counts as variance where it is not known how positions turn keys.

Channels that the rotary embedding turns slowly look constant in a short prompt: they would get no bits, and be wrong for every
token of a long answer. Where the embedding is known, moments are averaged over the positions to come instead.
"""

OTHER = 0.1
"""Share of covariances that is drawn to their diagonals: a long answer speaks of other things than its prompt.

SmolLM2, 2,048 tokens of other texts after a prompt of 1,024, 2.1 bits: the KL of the last quarter is 0.0195 without it, 0.0171
at 0.1, 0.0146 at 0.2; that of the first 256 tokens 0.0020, 0.0019 and 0.0021. In the layout that kernels read, whose channels
share their widths in groups of 16, 0.0355, 0.0310 and 0.0254, and 0.0050, 0.0052 and 0.0070: more costs the first tokens there.
"""

TINY = 1e-30
"""Weight of a query whose logits move nothing, so that a head that attends to sinks and window only has moments."""

TOKENS = 512
"""Tokens whose second moments are summed at once."""


def moments_of(
    prompt: PromptView,
    needed: int,
    queries: int = QUERIES,
    even: float = EVEN,
    drift: float = DRIFT,
    reach: int = REACH,
    shrink: float = 1.0,
) -> LayerMoments | str:
    """Moments of a layer over the real tokens of all rows, weighted as in ``statistics``; or why there are none.

    Args:
        prompt: the layer's attention.
        needed: tokens outside the sinks that it takes, and queries of them, all heads of a group counted.
        queries: most queries of a row to look at.
        even: share of keys' and values' weight that goes to all tokens alike.
        drift: share of the mean key's energy that counts as variance, where ``prompt.rope`` is not known.
        reach: positions to come over which moments are averaged, where it is.
        shrink: factor of how far covariances are drawn to their diagonals (``shrunk``).
    """
    rows, _, total, _ = prompt.keys.shape
    last = torch.tensor([prompt.queries.shape[2] - 1], device=prompt.keys.device)
    real = prompt.visible(last)[:, 0, 0].expand(rows, total)
    place = real.long().cumsum(-1) - 1  # a token's number in its row
    tokens = int((real & (place >= prompt.n_sink)).sum())
    if tokens < needed:
        return f"the prompt has {tokens} tokens outside the sinks, {needed} are needed to learn from"
    group = prompt.queries.shape[1] // prompt.keys.shape[1]
    asked = int((real & (place >= prompt.n_sink))[:, total - prompt.queries.shape[2] :].sum())
    if asked * group < needed:
        return f"{asked} tokens came at once, {-(-needed // group)} are needed to learn what is asked of a layer"
    metric = _metric(prompt)
    sums = LayerSums.empty(prompt.keys.shape[3], metric)
    for row in range(rows):
        _add_row(sums, prompt, row, real[row], place[row], metric, queries, even)
    if not bool(sums.key_weight.isfinite().all()):
        return "the prompt's attention is not finite"
    if prompt.rope is not None:
        sums, drift = sums.turned(rotations(prompt.rope, prompt.keys.shape[3], prompt.keys.device, reach)), 0.0
    moments = sums.moments()
    turned = drift * torch.diag_embed(_turning(moments.key_mean))
    key_cov, value_cov = (shrunk(cov, tokens, shrink) for cov in (moments.key_cov, moments.value_cov))
    return replace(moments, key_cov=key_cov + turned, value_cov=value_cov)


def shrunk(cov: Tensor, tokens: int, factor: float = 1.0) -> Tensor:
    """A covariance ``[..., D, D]`` of ``tokens`` tokens, drawn to its diagonal by ``OTHER`` and ``(D / (tokens + D)) ** 2``.

    Of few tokens a channel, some directions look as if nothing ever went there: they would get no bits and be wrong for
    what comes after the prompt. A quarter at one token a channel, a twenty-fifth at four, soon nothing; beside what answers
    that leave the prompt's subject need at any length.
    """
    dim = cov.shape[-1]
    share = factor * (1 - (1 - OTHER) * (1 - (dim / (tokens + dim)) ** 2))
    return (1 - share) * cov + share * torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))


def _turning(mean: Tensor) -> Tensor:
    """Variance ``[H_kv, D]`` of means ``[H_kv, D]`` turned by any angle in the planes of channels ``i`` and ``i + D / 2``."""
    half = mean.shape[-1] // 2
    energy = (mean[:, :half].square() + mean[:, half : 2 * half].square()) / 2
    return torch.cat([energy, energy, torch.zeros_like(mean[:, 2 * half :])], -1)


def _metric(prompt: PromptView) -> Tensor:
    """``W_o^T W_o`` of each query head ``[H_kv, G, E, E]``; the identity where the projection cannot be read."""
    heads, width = prompt.values.shape[1], prompt.values.shape[3]
    group = prompt.queries.shape[1] // heads
    try:
        return output_metric(prompt.module, heads, group, width, prompt.keys.device)
    except (UnsupportedModelError, NonFiniteError):
        return torch.eye(width, device=prompt.keys.device).expand(heads, group, -1, -1)


def _add_row(
    sums: LayerSums,
    prompt: PromptView,
    row: int,
    real: Tensor,
    place: Tensor,
    metric: Tensor,
    queries: int,
    even: float,
) -> None:
    """Add one row of the batch; ``real`` and ``place`` ``[T]`` say which of its tokens are and where."""
    keys, values = prompt.keys[row].float(), prompt.values[row].float()
    heads, total, dim = keys.shape
    first = total - prompt.queries.shape[2]
    window = min(prompt.recent_window, (int(real.sum()) - prompt.n_sink) // 4)
    able = (real & (place >= prompt.n_sink + window))[first:].nonzero().flatten()
    if not len(able):
        return
    evenly = torch.linspace(0, len(able) - 1, min(queries, len(able)), device=able.device)
    movement = Movement(values, metric)
    weight_k, weight_v = torch.zeros(2, heads, total, dtype=torch.float64, device=keys.device)
    block = max(4, heads * dim // prompt.queries.shape[1])  # whose logits are as large as the keys
    for part in able[evenly.round().long()].split(block):
        seen = prompt.visible(part)
        seen = seen[row if len(seen) > 1 else 0]  # [H_kv or 1, q, T]
        columns = seen.any(1).any(0).nonzero()
        stop = int(columns.max()) + 1 if len(columns) else total  # what none of them sees is not computed
        q = prompt.queries[row, :, part].float().unflatten(0, (heads, -1)) * prompt.scaling  # [H_kv, G, q, D]
        a = _attention(q, keys[:, :stop], seen[..., :stop], prompt)
        outputs = by_group(a, values[:, :stop])
        middle = (place >= prompt.n_sink) & (place <= place[first + part, None] - window)
        a = a.square_() * middle[:, :stop]
        weight_v[:, :stop] += a.sum((1, 2)).double()
        w = a.mul_(movement(outputs, stop))
        weight_k[:, :stop] += w.sum((1, 2)).double()
        squares = q.double() * (w.sum(-1).double() + TINY).sqrt()[..., None]
        sums.query_square += (squares.transpose(-1, -2) @ squares).sum(1)
    kept = (real & (place >= prompt.n_sink)).nonzero().flatten()
    for weight in (weight_k, weight_v):
        weight += (even * weight.sum(-1, keepdim=True) + TINY) / len(kept)
    for part in kept.split(TOKENS):
        sums.add(keys[:, part].double(), values[:, part].double(), weight_k[:, part], weight_v[:, part])


def _attention(q: Tensor, keys: Tensor, seen: Tensor, prompt: PromptView) -> Tensor:
    """Probabilities ``[H_kv, G, q, T]`` of scaled queries ``[H_kv, G, q, D]`` that see ``[H_kv or 1, q, T]``."""
    logits = by_group(q, keys.transpose(-1, -2))
    if prompt.softcap:
        logits = prompt.softcap * torch.tanh(logits / prompt.softcap)
    logits.masked_fill_(~seen[:, None], -torch.inf)
    if prompt.sink_logits is None:
        return logits.softmax(-1)
    extra = prompt.sink_logits.float().view(len(keys), -1, 1, 1).expand(-1, -1, q.shape[2], 1)
    return torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
