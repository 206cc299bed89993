"""What a prompt tells about a layer: the statistics of calibration, from a sample of the prompt's own queries.

All is enqueued and nothing is read back: the host does not wait for the GPU here. Large products take numbers of 16 bits
where the model has no more, with sums in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fade_core.errors import UnsupportedModelError
from fade_core.interfaces import PromptView
from fade_quant_rotated.reach import REACH, turns_of
from fade_quant_rotated.statistics import LayerMoments, LayerSums, output_metric, product

QUERIES = 512
"""Queries of all rows together that are looked at, spread evenly over those that see tokens outside sinks and window."""

ROW_QUERIES = 128
"""Queries of a row that are looked at, at least: each row has its own subject.

SmolLM2, three texts side by side, error of attention's output after the prompt with free widths: 0.00100 at 21 a row, 0.00083
at 43, 0.00074 at 85, 0.00072 at 128, 0.00068 at 171, 0.00071 at 192.
"""

TOKENS = 4096
"""Tokens of all rows together whose unweighted moments are taken, spread evenly over those outside the sinks."""

EVEN = 0.05
"""Weight that all tokens share evenly, beside what attention gives them: a prompt has few tokens that matter much."""

DRIFT = 0.4
"""Share of the mean key's energy that counts as variance where it is not known how positions turn keys.

Channels that the rotary embedding turns slowly look constant in a short prompt: they would get no bits, and be wrong for every
token of a long answer. Where the embedding is known, moments are averaged over the positions to come instead.
"""

OTHER = 0.2
"""Share of covariances that is drawn to their diagonals: a long answer speaks of other things than its prompt.

SmolLM2, 2,048 tokens of other texts after a prompt of 1,024, 2.1 bits of any widths: the KL of the last quarter is 0.0195
without it, 0.0171 at 0.1, 0.0146 at 0.2; that of the first 256 tokens 0.0020, 0.0019 and 0.0021. ``compact``, two texts of
4,096 tokens after a prompt of 1,024: 0.00325 and, over the last 512, 0.0113 at 0.2, 0.00341 and 0.0130 at 0.1.
"""

STRETCHES = 4
"""Parts of the queries that are looked at together, whose masks are only laid over tokens that some of a part see."""

TINY = 1e-30
"""Weight of a query whose logits move nothing, so that a head that attends to sinks and window only has moments."""


def moments_of(
    prompt: PromptView,
    queries: int | None = None,
    even: float = EVEN,
    drift: float = DRIFT,
    reach: int = REACH,
    shrink: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[LayerMoments, Tensor]:
    """Moments of a layer over the real tokens of all rows, weighted as in ``statistics``, and what they rest on.

    Args:
        prompt: the layer's attention.
        queries: queries to look at, of all rows together; by default ``QUERIES``, and ``ROW_QUERIES`` of each row.
        even: share of keys' and values' weight that goes to all tokens alike.
        drift: share of the mean key's energy that counts as variance, where ``prompt.rope`` is not known.
        reach: positions to come over which moments are averaged, where it is.
        shrink: factor of how far covariances are drawn to their diagonals (``shrunk``).
        dtype: of probabilities and of tokens about their mean; by default bfloat16 where a GPU has tokens of 16 bits, whose
            rounding about zero is no finer, else float32.

    Returns:
        The moments, and float64 ``[3]`` for ``shortcoming``: tokens outside the sinks, those of them that have queries, and
        whether all is finite. On the prompt's device.
    """
    layer = _Layer(prompt, dtype)
    sums = layer.sums(max(QUERIES, ROW_QUERIES * layer.rows) if queries is None else queries, even)
    if prompt.rope is not None:
        sums, drift = sums.turned(turns_of(prompt.rope, prompt.keys.shape[3], prompt.keys.device, reach)), 0.0
    moments = sums.moments()
    turned = drift * torch.diag_embed(_turning(moments.key_mean))
    key_cov, value_cov = (shrunk(cov, layer.tokens, shrink) for cov in (moments.key_cov, moments.value_cov))
    finite = (moments.key_mean.sum() + moments.query_square.sum() + moments.value_mean.sum()).isfinite()
    facts = torch.stack([layer.tokens, layer.asked, finite.double()])
    return replace(moments, key_cov=key_cov + turned, value_cov=value_cov), facts


def shortcoming(facts: list[float], needed: int, group: int) -> str:
    """Why nothing can be learnt, or "".

    Args:
        facts: as ``moments_of`` returns them.
        needed: tokens outside the sinks that it takes, and queries of them, all heads of a group counted.
        group: query heads a KV head.
    """
    tokens, asked, finite = facts
    if tokens < needed:
        return f"the prompt has {tokens:.0f} tokens outside the sinks, {needed} are needed to learn from"
    if asked * group < needed:
        return f"{asked:.0f} tokens came at once, {-(-needed // group)} are needed to learn what is asked of a layer"
    return "" if finite else "the prompt's attention is not finite"


def shrunk(cov: Tensor, tokens: Tensor, factor: float = 1.0) -> Tensor:
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


class _Side:
    """Keys or values ``[B, H, T, D]`` about a centre, in ``slots`` slots: ``T``, and empty ones.

    Attributes:
        centre: float32 ``[H, D]``, near the mean of the tokens past the sinks.
        wide: ``[B * H, slots, D + room]`` in ``dtype``, zero past ``D``.
        x: tokens minus ``centre``, the first ``D`` of ``wide``.
        plain: float64 ``[H, D + 1, D + 1]``, sum of ``(x, 1) (x, 1)^T`` over a sample of the tokens past the sinks.
    """

    def __init__(
        self, tokens: Tensor, index: Tensor, there: Tensor, dtype: torch.dtype, slots: int, room: int = 0
    ) -> None:
        self.rows, (_, _, total, dim) = len(tokens), tokens.shape
        some = _take(tokens, index).float()  # [B, H, m, D]
        counted = there[:, None, :, None].expand(self.rows, -1, -1, 1).float()  # [B, 1, m, 1]
        centre = (some * counted).sum((0, 2)) / counted.sum().clamp_min(1)
        rounded = centre.to(tokens.dtype)  # any centre will do, as long as it is the same everywhere
        self.centre = rounded.float()
        wide = torch.empty((*tokens.shape[:2], slots, dim + room), dtype=dtype, device=tokens.device)
        torch.sub(tokens, rounded[:, None], out=wide[:, :, :total, :dim])
        wide[..., dim:] = wide[:, :, total:] = 0
        self.wide = wide.flatten(0, 1)
        self.x = self.wide[..., :dim]
        some = torch.cat([some - self.centre[:, None], torch.ones_like(some[..., :1])], -1) * counted
        some = some.transpose(0, 1).flatten(1, 2)  # [H, B * m, D + 1]
        self.plain = self._about_zero((some.mT @ some).double())

    def weighted(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums (float64) of weights ``[B, H, T]``, of tokens by them ``[H, D]``, and of their squares ``[H, D, D]``.

        Weights are rounded once, before any sum, so that the covariance is that of some tokens: never negative.
        """
        root = weight.sqrt().flatten(0, 1).to(self.x.dtype)  # [B * H, T]
        x = self.x * root[..., None]
        total = root.float().square().sum(-1)[:, None, None]
        first = product(root[:, None], x)  # [B * H, 1, D]
        joint = torch.cat([torch.cat([product(x.mT, x), first], 1), torch.cat([first, total], 2).mT], 2)
        joint = self._about_zero(joint.unflatten(0, (self.rows, -1)).double().sum(0))
        return joint[:, -1, -1], joint[:, :-1, -1], joint[:, :-1, :-1]

    def _about_zero(self, joint: Tensor) -> Tensor:
        """Sums ``[H, D + 1, D + 1]`` of ``(x, 1) (x, 1)^T`` as they are without the centre."""
        shift = torch.diag_embed(torch.ones_like(joint[:, 0]))
        shift[:, :-1, -1] = self.centre
        return shift @ joint @ shift.mT


class Stretch(NamedTuple):
    """Queries that follow one another.

    Attributes:
        queries: which they are, of those that are looked at together.
        first: they see all real tokens before this one.
        stop: and none from this one on.
    """

    queries: slice
    first: int
    stop: int


class _Layer:
    """One pass over a prompt.

    ``real``, ``past`` (real and past the sinks) and ``place`` (a token's number in its row) are ``[B or 1, slots]``: of the
    tokens, and of empty slots up to a multiple of 8, as tensor cores read numbers of 16 bits.
    """

    def __init__(self, prompt: PromptView, dtype: torch.dtype | None) -> None:
        self.prompt, keys = prompt, prompt.keys
        self.rows, self.heads, self.total, self.dim = keys.shape
        self.device, self.group = keys.device, prompt.queries.shape[1] // self.heads
        narrow = keys.is_cuda and keys.dtype.itemsize == 2
        self.dtype = dtype or (torch.bfloat16 if narrow else torch.float32)
        asked = prompt.queries.shape[2]
        self.first = self.total - asked
        self.slots = self.total + -self.total % 8
        real = self._in_slots(prompt.visible(torch.arange(asked - 1, asked, device=self.device))[:, 0, 0])
        self.place = real.cumsum(-1) - 1
        self.past = real & (self.place >= prompt.n_sink)
        window = (self.place[:, -1:] + 1 - prompt.n_sink) // 4
        self.window = window.clamp_max(prompt.recent_window)  # [B or 1, 1]
        self.most_window = max(0, min(prompt.recent_window, (self.total - prompt.n_sink) // 4))
        self.able = (real & (self.place >= prompt.n_sink + self.window))[:, self.first : self.total]
        alike = self.rows // len(real)
        self.tokens = self.past.sum().double() * alike
        self.asked = self.past[:, self.first :].sum().double() * alike

    def sums(self, queries: int, even: float) -> LayerSums:
        """``LayerSums`` of the layer, from ``queries`` queries."""
        prompt = self.prompt
        sample = _spread(self.past, min(self.total, -(-TOKENS // self.rows)))
        room = 1 + self.group * (1 if self.dtype == torch.float32 else 2)  # for what ``_Weights`` knows of a token
        room += -(prompt.values.shape[3] + room) % 8  # tensor cores read rows of multiples of 8 numbers of 16 bits
        given = *sample, self.dtype, self.slots
        keys, values = _Side(prompt.keys, *given), _Side(prompt.values, *given, room)
        metric = _metric(prompt)
        weights = _Weights(self, keys, values, metric)
        index, there = _spread(self.able, min(self.able.shape[1], -(-queries // self.rows)))
        count = index.shape[1]
        most = max(16, 4 * self.dim // self.group)  # whose logits are four times as many as the keys' numbers
        block = -(-count // -(-count // most))
        for start in range(0, count, block):
            part = slice(start, start + block)
            weights.add(index[:, part], there[:, part], self._stretches(start, min(part.stop, count), count))
        number = self.past.sum(-1)[:, None, None].clamp_min(1)
        shares = [
            (weight + (even * weight.sum(-1, keepdim=True) + TINY) / number) * self.past[:, None]
            for weight in (weights.keys, weights.values)
        ]
        (key_weight, key_mean, key_square), (value_weight, value_mean, value_square) = (
            side.weighted(weight) for side, weight in zip((keys, values), shares, strict=True)
        )
        return LayerSums(
            key_weight=key_weight,
            key_mean=key_mean,
            key_square=key_square,
            query_square=weights.query_square,
            value_weight=value_weight,
            value_mean=value_mean,
            value_square=value_square,
            metric=metric.double().mean(1),
            key_plain=keys.plain,
            value_plain=values.plain,
        )

    def _stretches(self, start: int, stop: int, count: int) -> list[Stretch]:
        """The queries from ``start`` on before ``stop``, of ``count``, and what is known of the tokens that they see."""
        base = max(self.first, self.prompt.n_sink + self.most_window)  # the first of those ``able``
        able = self.total - base
        if not self.prompt.causal or able < count:
            return [Stretch(slice(0, stop - start), 0, self.slots)]

        def at(number: int) -> int:
            """Where that query is, or one before; as ``_spread`` has it."""
            return base + number * (able - 1) // max(1, count - 1)

        found, step = list[Stretch](), -(-(stop - start) // STRETCHES)
        for first in range(start, stop, step):
            end = min(first + step, stop)
            past = at(end - 1) + 2  # what the last of them sees, or one more; products like multiples of 8
            found.append(Stretch(slice(first - start, end - start), at(first), min(self.slots, past + -past % 64)))
        return found

    def _in_slots(self, of_tokens: Tensor) -> Tensor:
        """bool ``[..., T]`` with ``False`` for empty slots."""
        return torch.nn.functional.pad(of_tokens, (0, self.slots - self.total))

    def seen(self, index: Tensor) -> Tensor:
        """bool ``[B or 1, H or 1, q, slots]`` of what the queries ``index`` ``[B or 1, q]`` see."""
        shown = self._in_slots(self.prompt.visible(index.flatten()))
        if len(index) > 1:  # each row has its own queries
            shown = shown.unflatten(2, tuple(index.shape)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return shown

    def attention(self, q: Tensor, keys: _Side, seen: Tensor, stretches: list[Stretch]) -> Tensor:
        """Probabilities ``[B, H, G, q, t]`` of scaled queries ``[B, H, G, q, D]`` that see ``[B or 1, H or 1, q, t]``."""
        prompt, flat = self.prompt, q.to(self.dtype).flatten(0, 1).flatten(1, 2)  # [B * H, G * q, D]
        plain = not prompt.softcap and prompt.sink_logits is None
        x = keys.x[:, : seen.shape[-1]].mT
        # one number that all logits of a query lack, because keys are about their centre, changes no probability
        logits = flat @ x if plain else product(flat, x)
        logits = logits.view(*q.shape[:-1], -1)
        if not plain:
            logits += (q * keys.centre[:, None, None]).sum(-1, keepdim=True)
        if prompt.softcap:
            logits = prompt.softcap * torch.tanh(logits / prompt.softcap)
        for part, first, _ in stretches:
            logits[..., part, first:].masked_fill_(~seen[:, :, None, part, first:], -torch.inf)
        if prompt.sink_logits is None:
            return logits.softmax(-1).to(self.dtype)
        extra = prompt.sink_logits.float().view(self.heads, self.group, 1, 1).expand(*q.shape[:-1], 1)
        return torch.cat([logits, extra], -1).softmax(-1)[..., :-1].to(self.dtype).contiguous()


class _Weights:
    """``w_tj = a_tj^2 |W_o (v_j - o_t)|^2`` and ``a_tj^2``, summed over queries and over tokens.

    The square is taken apart, ``|W_o v_j|^2 - 2 v_j^T M o_t + o_t^T M o_t`` with ``M = W_o^T W_o``: so all sums are products
    with the squared probabilities, and nothing but these is ever as large as queries times tokens.

    Attributes:
        keys: float32 ``[B, H, slots]``, sum of ``w`` over queries and heads of the group.
        values: float32 ``[B, H, slots]``, sum of ``a^2``.
        query_square: float64 ``[H, D, D]``, sum of ``w q q^T``.
    """

    def __init__(self, layer: _Layer, keys: _Side, values: _Side, metric: Tensor) -> None:
        self.layer, self.sides = layer, (keys, values)
        rows, heads, dim = layer.rows, layer.heads, layer.dim
        self.keys, self.values = torch.zeros(2, rows, heads, layer.slots, device=layer.device)
        self.query_square = torch.zeros(heads, dim, dim, dtype=torch.float64, device=layer.device)
        ridge = 1e-6 * metric.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).double() + TINY  # heads of no output
        square = metric.double() + torch.diag_embed(ridge.expand(-1, -1, metric.shape[-1]))
        root = torch.linalg.cholesky_ex(square).L.to(layer.dtype)  # [H, G, E, E]
        self.metric = root.float() @ root.float().mT  # as rounded: what is taken apart must come together
        x = values.x.unflatten(0, (rows, heads))
        moved = [torch.linalg.vector_norm(x @ root[:, g], dim=-1, dtype=torch.float32) for g in range(layer.group)]
        self.own = torch.stack(moved, -1).square().flatten(0, 1)  # |W_o v|^2, [B * H, T, G]
        halves, width = _halves(self.own, layer.dtype), values.x.shape[-1]
        self.halves, self.known = halves.shape[-1], values.wide  # the tokens, 1, and what their squares come to
        self.known[..., width] = 1
        self.known[..., width + 1 : width + 1 + self.halves] = halves

    def add(self, index: Tensor, there: Tensor, stretches: list[Stretch]) -> None:
        """Look at the queries ``index`` ``[B or 1, q]``, of which ``stretches`` tell what they see.

        Those that are not ``there`` have no say.
        """
        stop = stretches[-1].stop
        layer, (keys, values), group = self.layer, self.sides, self.layer.group
        q = (_take(layer.prompt.queries, index).float() * layer.prompt.scaling).unflatten(1, (layer.heads, -1))
        a = layer.attention(q, keys, layer.seen(index)[..., :stop] | ~there[:, None, :, None], stretches)
        x = values.x[:, :stop]
        outputs = product(_flat(a), x)  # [B * H, G * q, E], about the centre
        if layer.prompt.sink_logits is not None:
            rest = 1 - a.sum(-1, keepdim=True, dtype=torch.float32)
            outputs -= _flat(rest * values.centre[:, None, None])
        turned = _flat(outputs.view(*q.shape[:-1], -1) @ self.metric)
        size = (turned * outputs).sum(-1, keepdim=True)  # [B * H, G * q, 1]
        newest = layer.place.gather(1, layer.first + index) - layer.window  # [B or 1, q]
        middle = layer.past[:, None, :stop] & (layer.place[:, None, :stop] <= newest[..., None]) & there[..., None]
        a[..., : layer.prompt.n_sink] = 0
        for part, first, end in stretches:
            near = slice(max(0, first - layer.most_window), end)  # before are those of the middle, after none
            a[..., part, near].masked_fill_(~middle[:, None, None, part, near], 0)
        a = _flat(a.square_())  # [B * H, G * q, t]
        width, head = x.shape[-1], torch.eye(group, device=layer.device).repeat_interleave(q.shape[3], 0)
        asked = _padded(torch.cat([turned, size, head.expand(len(a), -1, -1)], -1))
        given = _joined(product(a.mT, _halves(asked, layer.dtype)), asked.shape[-1])  # [B * H, t, E + 1 + G]
        squares = given[..., width + 1 : width + 1 + group]
        w = (squares * self.own[:, :stop]).sum(-1) - 2 * (given[..., :width] * x).sum(-1) + given[..., width]
        self.keys[..., :stop] += w.clamp_min(0).view(*q.shape[:2], -1)
        self.values[..., :stop] += squares.sum(-1).view(*q.shape[:2], -1)
        known = product(a, self.known[:, :stop])  # [B * H, G * q, E + 1 + G]
        own = _joined(known[..., width + 1 : width + 1 + self.halves], group)
        w = (own * head).sum(-1) - 2 * (known[..., :width] * turned).sum(-1) + known[..., width] * size[..., 0]
        w = (w.clamp_min(0) + TINY).view(q.shape[:-1]) * there[:, None, None]
        q = (q * w.sqrt()[..., None]).transpose(0, 1).flatten(1, 3).double()  # [H, B * G * q, D]
        self.query_square += q.mT @ q


def _spread(able: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` of the places of bool ``[R, N]`` that are set, spread evenly over each row, or all: int64 ``[R, count]``.

    Also bool ``[R, count]``, which of them there are: a row may have fewer.
    """
    number = able.cumsum(-1)
    there, each = number[:, -1:], torch.arange(count, device=able.device)
    rank = torch.where(there > count, (each * (there - 1) + (count - 1) // 2) // max(1, count - 1), each)
    index = torch.searchsorted(number, rank.minimum(there - 1) + 1)
    return index.clamp_max(able.shape[1] - 1), each < there


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` ``[B or 1, m]`` of ``[B, H, T, D]``."""
    if len(index) == 1:
        return x[:, :, index[0]]
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _flat(x: Tensor) -> Tensor:
    """``[B, H, G, q, X]`` to ``[B * H, G * q, X]``."""
    return x.flatten(0, 1).flatten(1, 2)


def _padded(x: Tensor) -> Tensor:
    """Zeros after the last dimension until it is a multiple of 8, as tensor cores read numbers of 16 bits."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))


def _halves(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 ``[..., C]`` as ``[..., C]`` or, in fewer bits, as what ``[..., 2 * C]`` ``_joined`` adds up to."""
    if dtype == x.dtype:
        return x
    high = x.to(dtype)
    return torch.cat([high, (x - high).to(dtype)], -1)


def _joined(x: Tensor, count: int) -> Tensor:
    """Undo ``_halves`` of ``count`` channels."""
    return x if x.shape[-1] == count else x[..., :count] + x[..., count:]


def _metric(prompt: PromptView) -> Tensor:
    """``W_o^T W_o`` of each query head ``[H_kv, G, E, E]``; the identity where the projection cannot be read."""
    heads, width = prompt.values.shape[1], prompt.values.shape[3]
    group = prompt.queries.shape[1] // heads
    plain = torch.eye(width, device=prompt.keys.device).expand(heads, group, -1, -1)
    try:
        metric = output_metric(prompt.module, heads, group, width, prompt.keys.device)
    except UnsupportedModelError:
        return plain
    return torch.where(metric.isfinite().all(), metric, plain)
