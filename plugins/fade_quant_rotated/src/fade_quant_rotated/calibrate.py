"""Calibrating a model: a few forward passes over text, no gradients; every layer's attention is watched as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fade_core import rope_scheme_of
from fade_core.errors import InputError, UnsupportedModelError
from fade_core.interfaces import RopeScheme, Side
from fade_quant_rotated.allocation import WIDTHS, check_widths
from fade_quant_rotated.calibration import Calibration, SideCalibration
from fade_quant_rotated.klt import weighted_klt
from fade_quant_rotated.reach import reach_of, turns_of
from fade_quant_rotated.statistics import PROJECTIONS, Collector, LayerMoments, LayerSums, readable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "fade-calibrate"
"""What the watching attention function is registered as."""

TOKENS_A_CHANNEL = 4
"""Fewest tokens a channel for a covariance that is worth anything."""

KEY_FACTOR = 3.0
"""Worth of keys against values beyond first order: at a given average, this split had the least KL."""

_SKETCH = 16
_SKETCHED = 65536


def calibrate(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    bits: float = 2.0,
    widths: Sequence[int] = WIDTHS,
    group: int = 1,
    sinks: int = 4,
    window: int = 64,
    progress: Callable[[int, int], None] | None = None,
    reach: int | None = None,
) -> Calibration:
    """Watch ``model`` read ``texts`` and learn the transforms of its keys and values.

    Args:
        model: a decoder-only transformers model in evaluation mode, float32 or bfloat16.
        texts: token ids, int64 ``[T]`` each, longer than ``sinks + window``; 8,000 tokens in all are a good start.
        bits: default average of the file, an element, everything counted; any other can be asked for later.
        widths: default widths of the file.
        group: default group of the file.
        sinks: leading tokens that the cache will keep in full precision.
        window: newest tokens that the cache will keep in full precision.
        progress: called with the texts done and the texts in all.
        reach: positions that the file is for, beside those that are read: keys carry their position, and what texts tell is
            averaged over the positions to come by the model's rotary embedding (``fade_quant_rotated.reach``; with fade-rope
            installed, where frequencies do not change with the length). By default 8,192, or as many as it was trained at.

    Raises:
        InputError: too few tokens, or texts that are too short.
        NonFiniteError: a layer's queries, keys or values are not finite.
        UnsupportedModelError: a model whose attention cannot be watched.
        ConfigError: ``bits`` that ``widths`` cannot give.
    """
    check_widths(widths)
    short = [len(text) for text in texts if len(text) <= sinks + window]
    if short or not texts:
        raise InputError(
            f"calibration texts must be longer than sinks and window ({sinks} + {window} tokens); found "
            f"{short[:3] if short else 'no text'}"
        )
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = sum(len(text) - sinks - window for text in texts)
    if tokens < TOKENS_A_CHANNEL * head_dim:
        raise InputError(
            f"{tokens} tokens lie outside sinks and window, too few to calibrate {head_dim} channels a head: at least "
            f"{TOKENS_A_CHANNEL * head_dim} are needed, and 8,000 or more are better. Give more or longer texts"
        )
    reach = reach_of(config, reach)
    schemes: dict[int, RopeScheme | None] = {}

    def turned(layer: int, sums: LayerSums) -> LayerSums:
        scheme = schemes[layer] = rope_scheme_of(model, layer)
        square = sums.key_square
        return sums if scheme is None else sums.turned(turns_of(scheme, square.shape[-1], square.device, reach))

    collector = Collector(sinks, window)
    with watching(model, collector), torch.no_grad():
        body = getattr(model, "base_model", model)
        for number, text in enumerate(texts):
            body(text.view(1, -1).to(model.device), use_cache=False)
            if progress is not None:
                progress(number + 1, len(texts))
    moments = collector.moments(turned)
    sides: dict[Side, dict[int, SideCalibration]] = {
        "key": {layer: side_of(found, "key") for layer, found in moments.items()},
        "value": {layer: side_of(found, "value") for layer, found in moments.items()},
    }
    heads, dim = next(iter(sides["key"].values())).mean.shape
    if any(side.mean.shape != (heads, dim) for layers in sides.values() for side in layers.values()):
        raise UnsupportedModelError(
            "calibration needs one head geometry for keys and values of all layers; use kind='rotated' for this model"
        )
    sketch = sketch_of(model)
    if sketch is None:
        raise UnsupportedModelError(
            f"the output projections of {type(model).__name__} cannot be read, by which a calibration recognises its "
            "model; calibrate it with all weights loaded, unquantized"
        )
    found = Calibration(
        sides,
        head_dim=dim,
        num_kv_heads=heads,
        num_layers=config.num_hidden_layers,
        sketch=sketch,
        defaults={"bits": bits, "widths": list(widths), "group": group},
        notes={
            "model": _name_of(model),
            "architecture": type(model).__name__,
            "texts": len(texts),
            "tokens": sum(len(text) for text in texts),
            "sinks": sinks,
            "window": window,
            "reach": max(reach if all(schemes.values()) else 0, *(len(text) for text in texts)),
        },
    )
    found.plan(bits, widths, group)
    return found


def _name_of(model: PreTrainedModel) -> str:
    """A hub id as it is, a folder's last part: where a model lies on this machine is nobody's business."""
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).exists() else name


@contextmanager
def watching(model: PreTrainedModel, collector: Collector) -> Iterator[None]:
    """Run ``model`` with ``collector``'s attention inside the block. Raises ``UnsupportedModelError`` if it refuses."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        return collector.attention(module, query, key, value, factor, softcap, s_aux, sliding_window), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = str(model.config._attn_implementation)
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not let its attention be watched ({error}); use kind='rotated', which needs "
            f"no calibration"
        ) from error
    hooks = [
        parent.register_forward_pre_hook(_noting(collector, layer), with_kwargs=True)
        for layer, (parent, _) in attention_modules(model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def attention_modules(model: nn.Module) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Decoder layer and attention module by layer index. Raises ``UnsupportedModelError`` if there is none."""
    found: dict[int, tuple[nn.Module, nn.Module]] = {}
    for parent in model.modules():
        for child in parent.children():
            layer = getattr(child, "layer_idx", None)
            if isinstance(layer, int) and hasattr(child, "k_proj" if hasattr(child, "k_proj") else "qkv_proj"):
                found.setdefault(layer, (parent, child))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention modules with a layer_idx and k_proj or qkv_proj; calibration "
            f"cannot watch it. Use kind='rotated', which needs no calibration"
        )
    return found


def sketch_of(model: nn.Module) -> Tensor | None:
    """Random projections ``[layers, 16]`` (float32) of each layer's output projection: a model's fingerprint.

    ``None`` where a projection cannot be read: on the meta device (offloaded), or packed in few bits.
    """
    rows = []
    for _, (_, attention) in sorted(attention_modules(model).items()):
        named = (getattr(getattr(attention, name, None), "weight", None) for name in PROJECTIONS)
        weight = next((w for w in named if isinstance(w, Tensor)), None)
        if weight is None or not readable(weight):
            return None
        flat = weight.detach().flatten()
        flat = flat[:: max(1, flat.numel() // _SKETCHED)][:_SKETCHED].float().cpu()
        rows.append(flat @ _signs(len(flat)))
    return torch.stack(rows)


@lru_cache(maxsize=4)
def _signs(count: int) -> Tensor:
    return torch.randint(0, 2, (count, _SKETCH), generator=torch.Generator().manual_seed(0)).float() * 2 - 1


def _noting(collector: Collector, layer: int) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        collector.residual(layer, args[0] if args else kwargs["hidden_states"])

    return note


def side_of(moments: LayerMoments, side: Side) -> SideCalibration:
    """The transform of keys (in the metric of the queries) or values (in that of the output projection), on the CPU."""
    if side == "key":
        found = weighted_klt(moments.key_cov, moments.query_square)
    else:
        found = weighted_klt(moments.value_cov, moments.metric)
    calibration = side_from(moments, side, *found)
    return SideCalibration(**{name: tensor.cpu() for name, tensor in vars(calibration).items()})


def side_from(moments: LayerMoments, side: Side, transform: Tensor, variance: Tensor) -> SideCalibration:
    """The calibration of a side by its ``transform`` ``[H, D, D]``, which gives channels of ``variance`` ``[H, D]``."""
    if side == "key":
        mean, spread, worth = moments.key_mean, moments.key_spread, moments.key_weight * KEY_FACTOR
    else:
        mean, spread, worth = moments.value_mean, moments.value_spread, moments.value_weight
    length = transform.norm(dim=-2, keepdim=True)
    unit = transform / length
    usual = (unit * (spread @ unit)).sum(-2)  # mean square of every channel over all tokens
    own = variance / length.squeeze(-2).square()
    return SideCalibration(
        mean=mean.float(),
        transform=unit.half(),
        deviation=own.sqrt().float(),
        spread=(usual / own).float(),
        worth=(worth[:, None] * variance).float(),
    )
