"""A model's small operations in fewer launches, while a step of it is recorded.

RMS norms and the rotary embedding are some twenty launches of a layer in transformers' own code, as many as all of its
products and its attention together. With the weights of a model in half precision each launch only waits for the next.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

ROTARY = "apply_rotary_pos_emb"


class LeanModules:
    """What may stand in for parts of ``model``: only what gives the same on a random input, to the dtype's own rounding.

    Args:
        model: half precision on one device; in other dtypes nothing stands in for anything.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.norms: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        self.rotaries: list[tuple[Any, _Rotary]] = []
        if model.dtype not in (torch.float16, torch.bfloat16):
            return
        known: dict[Any, bool | None] = {}
        for module in model.modules():
            source = sys.modules[type(module).__module__]
            if hasattr(source, ROTARY) and source not in [owner for owner, _ in self.rotaries]:
                rotary = _rotary_of(source, model)
                if rotary is not None:
                    self.rotaries.append((source, rotary))
            if _looks_like_a_norm(module):
                kind = type(module), module.weight.shape, module.weight.dtype
                if kind not in known:
                    known[kind] = _centred(module)
                centred = known[kind]
                if centred is not None:
                    self.norms.append((module, _norm(module, centred)))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model runs with what stands in."""
        plain = [(owner, getattr(owner, ROTARY)) for owner, _ in self.rotaries]
        try:
            for module, forward in self.norms:
                module.forward = forward
            for owner, rotary in self.rotaries:
                setattr(owner, ROTARY, rotary)
            yield
        finally:
            for module, _ in self.norms:
                vars(module).pop("forward", None)
            for (owner, lean), (_, rotary) in zip(self.rotaries, plain, strict=True):
                setattr(owner, ROTARY, rotary)
                lean.forget()


def _looks_like_a_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module)
    hooked = module._forward_hooks or module._forward_pre_hooks
    return named and not hooked and isinstance(weight, Tensor) and weight.dim() == 1 and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _norm(module: Any, centred: bool) -> Callable[[Tensor], Tensor]:
    """The forward of an RMS norm in one launch; ``centred``: its weight counts from one (Gemma's does)."""
    weight = (1 + module.weight.float()).to(module.weight.dtype) if centred else module.weight
    return lambda x: rms_norm(x, weight.shape, weight, _epsilon(module))


def _centred(module: nn.Module) -> bool | None:
    """Which ``_norm`` a norm is, by what it gives for random tokens; ``None`` if neither."""
    weight: Any = module.weight
    tokens = _random((4, len(weight)), weight.dtype, weight.device)
    wanted = module(tokens)
    for centred in (False, True):
        if _agrees(_norm(module, centred)(tokens), wanted):
            return centred
    return None


class _Rotary:
    """``apply_rotary_pos_emb`` over queries and keys together: four launches for ten.

    Args:
        plain: transformers' own, for what this one does not know.
    """

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.forget()

    def forget(self) -> None:
        """Let go of what the layers of a pass share."""
        self._sin = self._signed = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        if rest or options or q.dim() != 4 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
            return self.plain(q, k, cos, sin, *rest, **options)
        half = q.shape[-1] // 2
        if self._sin is not sin:
            self._sin, self._signed = sin, torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, None]
        both = torch.cat([q, k], 1)  # [B, H_q + H_kv, Q, D]
        turned = torch.addcmul(both * cos[:, None], both.roll(half, -1), self._signed)
        return turned[:, : q.shape[1]], turned[:, q.shape[1] :]


def _rotary_of(source: Any, model: PreTrainedModel) -> _Rotary | None:
    """A stand-in for the rotary function of the module ``source``; ``None`` if it computes something else."""
    found = _Rotary(getattr(source, ROTARY))
    text = model.config.get_text_config(decoder=True)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query, key = (_random((2, heads, 1, dim), model.dtype, model.device) for heads in (4, 2))
    angles = _random((2, 1, dim // 2), torch.float32, model.device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(model.dtype), angles.sin().to(model.dtype)
    try:
        wanted, given = found.plain(query, key, cos, sin), found(query, key, cos, sin)
    except (TypeError, RuntimeError, ValueError):  # another function by that name
        return None
    found.forget()
    return found if all(map(_agrees, given, wanted)) else None


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers that take none from whoever samples tokens."""
    return torch.randn(shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(0))


def _agrees(found: Tensor, wanted: Tensor) -> bool:
    """Whether ``found`` is ``wanted`` but for three roundings, of the numbers themselves or of those they are sums of."""
    bound = 3 * torch.finfo(wanted.dtype).eps * wanted.float().abs().clamp_min(1)
    return found.dtype == wanted.dtype and bool(((found.float() - wanted.float()).abs() <= bound).all())
