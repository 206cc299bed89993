"""What ``update`` returns instead of keys and values: stand-ins that attention reads in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map

from fade_core.cache.inspection import dense, dense_shape

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
            cls, dense_shape(layer, side), dtype=layer.dtype, device=layer.device
        )
        handle.layer, handle.side = layer, side
        return handle

    def materialise(self) -> Tensor:
        """The dequantised tokens, a plain tensor of the handle's shape."""
        return dense(self.layer, self.side)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Handle({self.side}s of layer {self.layer.index}, shape={tuple(self.shape)})"

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

    def __init__(self, layer: TieredLayer, stepping: bool) -> None:
        self.layer, self.stepping = layer, stepping

    def to(self, *_: Any, **__: Any) -> CompiledHandle:
        """Itself: the tokens stay where they are."""
        return self


def is_handle(value: Any) -> bool:
    """Whether attention got FADE's stand-in rather than real keys."""
    return isinstance(value, Handle)
