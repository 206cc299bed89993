"""What ``update`` returns instead of keys and values: a stand-in that attention reads in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from fade_core.cache.layer import TieredLayer


class Handle(Tensor):
    """The keys or values of a layer, ``[B, H_kv, T, D]`` in name only.

    FADE's attention takes the layer out of it and reads packed tiers. Any other operation gets the dequantised tokens,
    so stock attention works too, at the price of materialising one layer.
    """

    layer: TieredLayer
    side: str

    @staticmethod
    def __new__(cls, layer: TieredLayer, side: str) -> Handle:
        """A handle on ``layer``'s "key" or "value" tokens."""
        handle: Handle = Tensor._make_wrapper_subclass(
            cls, layer.shown_shape(side), dtype=layer.dtype, device=layer.device
        )
        handle.layer, handle.side = layer, side
        return handle

    def materialise(self) -> Tensor:
        """The dequantised tokens, a plain tensor of the handle's shape."""
        return self.layer.shown(self.side)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Handle({self.side}s of layer {self.layer.index}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.materialise() if isinstance(value, Handle) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def is_handle(value: Any) -> bool:
    """Whether attention got FADE's stand-in rather than real keys."""
    return isinstance(value, Handle) and not torch.compiler.is_compiling()
