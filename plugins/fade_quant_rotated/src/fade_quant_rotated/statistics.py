"""Streaming statistics of a model's attention: what the calibrated quantizer needs to know, from forward passes only.

For a query ``t`` and a key ``j`` outside sinks and window, ``w_tj = a_tj^2 |W_o (v_j - o_t)|^2`` says how far
the layer's output moves when that one logit moves (``a``: attention probability, ``o``: the head's output). Keys and
queries are averaged under ``w``, values under ``a_tj^2``. Attention is computed in blocks of queries, so nothing larger
than ``[H_q, block, T]`` is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fade_core.errors import ConfigError, InputError, NonFiniteError, UnsupportedModelError
from fade_quant_rotated.reach import Turns

PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names of the linear layer after attention."""

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class LayerSums:
    """Running sums of one layer in float64, ``D`` key and ``E`` value channels; all divided only in ``moments``.

    Attributes:
        key_weight: ``[H_kv]``, sum of ``w``.
        key_mean: ``[H_kv, D]``, sum of ``w k``.
        key_square: ``[H_kv, D, D]``, sum of ``w k k^T``.
        query_square: ``[H_kv, D, D]``, sum of ``w q q^T`` of scaled queries: the metric of a logit's squared error.
        value_weight: ``[H_kv]``, sum of ``a^2``.
        value_mean: ``[H_kv, E]``, sum of ``a^2 v``.
        value_square: ``[H_kv, E, E]``, sum of ``a^2 v v^T``.
        metric: ``[H_kv, E, E]``, ``W_o^T W_o`` averaged over the query heads of the group.
        key_plain: ``[H_kv, D + 1, D + 1]``, sum of ``(k, 1) (k, 1)^T`` over the tokens past the sinks, unweighted.
        value_plain: ``[H_kv, E + 1, E + 1]``, the same of values.
    """

    key_weight: Tensor
    key_mean: Tensor
    key_square: Tensor
    query_square: Tensor
    value_weight: Tensor
    value_mean: Tensor
    value_square: Tensor
    metric: Tensor
    key_plain: Tensor
    value_plain: Tensor

    @classmethod
    def empty(cls, dim: int, metric: Tensor) -> LayerSums:
        """Sums of nothing, for ``dim`` key channels and a metric ``[H_kv, G, E, E]``."""
        heads, _, _, width = metric.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=metric.device)

        return cls(
            zeros(heads),
            zeros(heads, dim),
            zeros(heads, dim, dim),
            zeros(heads, dim, dim),
            zeros(heads),
            zeros(heads, width),
            zeros(heads, width, width),
            metric.double().mean(1),
            zeros(heads, dim + 1, dim + 1),
            zeros(heads, width + 1, width + 1),
        )

    def add(self, keys: Tensor, values: Tensor, weight_k: Tensor, weight_v: Tensor, sinks: int = 0) -> None:
        """Add float64 tokens ``[H_kv, T, D]`` and their weights ``[H_kv, T]``; the first ``sinks`` are no plain ones."""
        self.key_weight += weight_k.sum(-1)
        self.value_weight += weight_v.sum(-1)
        for x, weight, mean, square, plain in (
            (keys, weight_k, self.key_mean, self.key_square, self.key_plain),
            (values, weight_v, self.value_mean, self.value_square, self.value_plain),
        ):
            weighted = x * weight[..., None]
            mean += weighted.sum(1)
            square += weighted.transpose(-1, -2) @ x
            one = torch.nn.functional.pad(x[:, sinks:], (0, 1), value=1.0)
            plain += one.transpose(-1, -2) @ one

    def turned(self, turns: Turns) -> LayerSums:
        """The sums as they would be, on average, after each of some rotations of keys and queries."""
        plain = self.key_plain.clone()
        plain[:, :-1, :-1] = turns.average(plain[:, :-1, :-1])
        plain[:, :-1, -1] = plain[:, -1, :-1] = plain[:, :-1, -1] @ turns.mean.T
        return replace(
            self,
            key_mean=self.key_mean @ turns.mean.T,
            key_square=turns.average(self.key_square),
            query_square=turns.average(self.query_square),
            key_plain=plain,
        )

    def moments(self, residual: float = 1.0) -> LayerMoments:
        """What the sums come to; ``residual`` is the squared norm of the stream that the layer adds to."""
        key_mean = self.key_mean / self.key_weight[:, None]
        value_mean = self.value_mean / self.value_weight[:, None]
        return LayerMoments(
            key_weight=self.key_weight / residual,
            key_mean=key_mean,
            key_cov=_central(self.key_square, self.key_weight, key_mean),
            query_square=self.query_square / self.key_weight[:, None, None],
            value_weight=self.value_weight / residual,
            value_mean=value_mean,
            value_cov=_central(self.value_square, self.value_weight, value_mean),
            metric=self.metric,
            key_spread=_about(self.key_plain, key_mean),
            value_spread=_about(self.value_plain, value_mean),
        )


@dataclass(frozen=True)
class LayerMoments:
    """Weighted moments of one layer (float64, shapes as in ``LayerSums``); covariances are central.

    ``key_spread`` and ``value_spread`` are the unweighted second moments about the weighted means.
    ``key_weight`` and ``value_weight`` are sums a text, divided by the residual stream's squared norm: the price of a
    unit of squared logit error, or of squared output error, relative to what the layer adds to.
    """

    key_weight: Tensor
    key_mean: Tensor
    key_cov: Tensor
    query_square: Tensor
    value_weight: Tensor
    value_mean: Tensor
    value_cov: Tensor
    metric: Tensor
    key_spread: Tensor
    value_spread: Tensor


class Collector:
    """Gathers ``LayerSums`` while a model runs; its ``attention`` stands in for the model's attention function.

    Args:
        sinks: leading tokens that stay in full precision: no error to weigh.
        window: newest tokens that stay in full precision.
        block: queries handled at once.
    """

    def __init__(self, sinks: int = 4, window: int = 64, block: int = 256) -> None:
        self.sinks, self.window, self.block = sinks, window, block
        self.layers: dict[int, LayerSums] = {}
        self.begin()

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None = None,
        sinks_logit: Tensor | None = None,
        sliding_window: int | None = None,
    ) -> Tensor:
        """Causal attention of one text: query ``[1, H_q, T, D]``, keys and values ``[1, H_kv, T, D]``.

        Returns:
            the heads' outputs ``[1, T, H_q, E]``; layers with a sliding window are computed but not gathered.

        Raises:
            NonFiniteError: if a layer's queries, keys or values are not finite.
            InputError: if more than one text is given.
        """
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if query.shape[0] != 1:
            raise InputError(f"calibration takes one text at a time; found a batch of {query.shape[0]}")
        for name, tensor in (("queries", query), ("keys", key), ("values", value)):
            if not bool(tensor.isfinite().all()):
                raise NonFiniteError(
                    f"{name} of layer {layer} are not finite: nothing can be calibrated. Load the model in float32 or "
                    f"bfloat16 (float16 overflows in some models) and check the weights and the text"
                )
        q, k, v = query[0].float() * scaling, key[0].float(), value[0].float()
        heads, length, _ = k.shape
        q = q.unflatten(0, (heads, -1))  # [H_kv, G, T, D]
        gather = sliding_window is None
        if gather:
            sums = self._sums(layer, module, q, v)
            metric = self._metrics[layer]  # [H_kv, G, E, E]
            movement = Movement(v, metric)
        out = torch.empty(*q.shape[:3], v.shape[-1], device=q.device)
        at = torch.arange(length, device=q.device)
        weight_k, weight_v = torch.zeros(2, heads, length, dtype=torch.float64, device=q.device)
        for start in range(0, length, self.block):
            rows = at[start : start + self.block, None]
            logits = by_group(q[:, :, start : start + self.block], k.transpose(-1, -2))
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            hidden = at > rows
            if sliding_window is not None:
                hidden = hidden | (at <= rows - sliding_window)
            logits.masked_fill_(hidden, -torch.inf)
            if sinks_logit is not None:
                extra = sinks_logit.float().view(heads, -1, 1, 1).expand(-1, -1, len(rows), 1)
                a = torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
            else:
                a = logits.softmax(-1)
            o = by_group(a, v)
            out[:, :, start : start + self.block] = o
            if not gather:
                continue
            a = a.square_().masked_fill_((at < self.sinks) | (at > rows - self.window), 0)
            weight_v += a.sum((1, 2)).double()
            w = a.mul_(movement(o))
            weight_k += w.sum((1, 2)).double()
            squares = q[:, :, start : start + self.block].double() * w.sum(-1).double().sqrt()[..., None]
            sums.query_square += (squares.transpose(-1, -2) @ squares).sum(1)
        if gather:
            sums.add(k.double(), v.double(), weight_k, weight_v, self.sinks)
        return out.flatten(0, 1).transpose(0, 1)[None].to(query.dtype)

    def residual(self, layer: int, hidden: Tensor) -> None:
        """Note the residual stream ``[1, T, hidden]`` that enters layer ``layer``."""
        norm = hidden[0, self.sinks :].float().square().sum(-1).median()
        self._residual[layer] = self._residual.get(layer, 0.0) + float(norm)

    def begin(self) -> None:
        """Forget everything gathered."""
        self.layers.clear()
        self._metrics: dict[int, Tensor] = {}
        self._residual: dict[int, float] = {}

    def moments(self, turns: Callable[[int, LayerSums], LayerSums] = lambda _, sums: sums) -> dict[int, LayerMoments]:
        """Weighted moments of every layer gathered.

        Args:
            turns: what a layer's sums would be over all positions that moments are to serve.
        """
        return {layer: self._moments(layer, turns(layer, sums)) for layer, sums in sorted(self.layers.items())}

    # --- inside ---
    def _sums(self, layer: int, module: nn.Module, q: Tensor, v: Tensor) -> LayerSums:
        if layer not in self.layers:
            heads, group, _, dim = q.shape
            metric = output_metric(module, heads, group, v.shape[-1], q.device)
            if not bool(metric.isfinite().all()):
                raise NonFiniteError(
                    f"the output projection of {type(module).__name__} holds NaN or infinity: nothing can be calibrated. "
                    "Check the weights"
                )
            self._metrics[layer] = metric
            self.layers[layer] = LayerSums.empty(dim, self._metrics[layer])
        return self.layers[layer]

    def _moments(self, layer: int, sums: LayerSums) -> LayerMoments:
        residual = self._residual.get(layer, 0.0)
        if not residual:
            raise ConfigError(f"the residual stream of layer {layer} was not seen; hook the decoder layers")
        if bool((sums.key_weight <= 0).any()) or bool((sums.value_weight <= 0).any()):
            raise InputError(
                f"layer {layer} never attends past its sinks ({self.sinks}) and window ({self.window}) on this text; "
                f"use longer texts"
            )
        return sums.moments(residual)


class Movement:
    """``|W_o (v_j - o_t)|^2``: how far a head's output moves, seen from the residual stream, when a logit moves.

    Args:
        values: float32 ``v`` ``[H_kv, T, E]``.
        metric: ``W_o^T W_o`` of each query head, ``[H_kv, G, E, E]``.
    """

    def __init__(self, values: Tensor, metric: Tensor) -> None:
        self.values, self.metric = values, metric
        heads = [(values @ metric[:, g]).mul_(values).sum(-1) for g in range(metric.shape[1])]
        self.own = torch.stack(heads, 1)  # [H_kv, G, T]

    def __call__(self, outputs: Tensor) -> Tensor:
        """``[H_kv, G, q, T]`` of heads' outputs ``[H_kv, G, q, E]``."""
        om = outputs @ self.metric
        cross = by_group(om, self.values.transpose(-1, -2))
        return cross.mul_(-2).add_(self.own[:, :, None]).add_((om * outputs).sum(-1)[..., None]).clamp_min_(0)


def by_group(grouped: Tensor, shared: Tensor) -> Tensor:
    """``[H_kv, G, q, X] @ [H_kv, X, Y]``: what a group shares is not repeated for each of its heads."""
    result: Tensor = (grouped.flatten(1, 2) @ shared).unflatten(1, grouped.shape[1:3])
    return result


def output_metric(module: nn.Module, heads: int, group: int, width: int, device: torch.device) -> Tensor:
    """``W_o^T W_o`` of each query head, float32 ``[H_kv, G, E, E]``.

    Raises:
        UnsupportedModelError: if the attention module has no output projection that can be read.
    """
    weight = output_projection(module, heads * group * width).detach()
    parts = weight.to(device).unflatten(1, (-1, width)).transpose(0, 1)  # [H_q, hidden, E]
    result: Tensor = product(parts.mT, parts).unflatten(0, (heads, group))
    return result


_SUMS_IN_FLOAT32 = torch.version.cuda is not None and hasattr(torch.ops.aten.bmm, "dtype")


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, ``[N, X, Y] @ [N, Y, Z]``, with sums and result in float32 whatever the dtype of both."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and _SUMS_IN_FLOAT32:
        found: Tensor = torch.bmm(a, b, out_dtype=torch.float32)
        return found
    return a.float() @ b.float()


def readable(weight: Tensor) -> bool:
    """Whether the numbers of ``weight`` are what the layer multiplies by: loaded, and not packed in few bits."""
    return weight.device.type != "meta" and weight.dtype in _PLAIN


def output_projection(attention: nn.Module, features: int) -> Tensor:
    """Weight ``[hidden, features]`` of the linear layer after the heads.

    Raises:
        UnsupportedModelError: if there is none, or its numbers cannot be read.
    """
    for name in PROJECTIONS:
        module = getattr(attention, name, None)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != features:
            continue
        if not readable(weight):
            raise UnsupportedModelError(
                f"{name} of {type(attention).__name__} is {weight.dtype} on {weight.device}, which calibration cannot "
                f"read; load the model in float32 or bfloat16 on one device, or use kind='rotated'"
            )
        return weight
    found = {name: tuple(parameter.shape) for name, parameter in attention.named_parameters()}
    raise UnsupportedModelError(
        f"{type(attention).__name__} has no output projection that calibration recognises (a linear o_proj, out_proj, "
        f"dense, c_proj or wo with {features} inputs); found {found}. Use kind='rotated', which needs no calibration"
    )


def _central(square: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    cov = square / weight[:, None, None] - mean[:, :, None] * mean[:, None, :]
    return (cov + cov.transpose(-1, -2)) / 2


def _about(plain: Tensor, mean: Tensor) -> Tensor:
    """Second moment about ``mean``, from sums of ``(x, 1) (x, 1)^T``."""
    moments = plain / plain[:, -1:, -1:]
    first = moments[:, :-1, -1]
    cross = first[:, :, None] * mean[:, None, :]
    return moments[:, :-1, :-1] - cross - cross.transpose(-1, -2) + mean[:, :, None] * mean[:, None, :]
