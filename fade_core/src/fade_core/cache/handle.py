"""What ``update`` returns instead of keys and values: stand-ins that attention reads in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.cache_utils import CacheLayerMixin


class Handle(Tensor):
    """The keys or values of a layer, ``[B, H_kv, T, D]`` in name only.

    FADE's attention takes the layer out of it and reads packed tiers. Any other operation gets the dequantised tokens,
    so stock attention works too, at the price of materialising one layer.
    """

    layer: CacheLayerMixin
    materialise: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, layer: CacheLayerMixin, shape: Sequence[int], like: Tensor, materialise: Callable[[], Tensor]
    ) -> Handle:
        """A handle on tokens of ``layer``.

        Args:
            layer: the layer that attention reads.
            shape: ``[B, H_kv, T, D]``, whatever is stored.
            like: gives dtype and device.
            materialise: gives the dequantised tokens, a plain tensor of this shape.
        """
        handle: Handle = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        handle.layer, handle.materialise = layer, materialise
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Handle({type(self.layer).__name__}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.materialise() if isinstance(value, Handle) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class CompiledHandle:
    """What ``update`` returns inside a compiled graph: FADE's attention takes the layer out of it.

    Args:
        layer: the layer that has taken the new tokens in.
        stepping: whether it did so by its op, as a step of one token; else attention is eager too.
    """

    def __init__(self, layer: CacheLayerMixin, stepping: bool) -> None:
        self.layer, self.stepping = layer, stepping

    def to(self, *_: Any, **__: Any) -> CompiledHandle:
        """Itself: the tokens stay where they are."""
        return self
