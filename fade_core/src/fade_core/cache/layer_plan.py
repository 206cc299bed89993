"""What a layer of the cache is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fade_core.eviction.plan import EvictionPlan
from fade_core.interfaces import Event, Kernel, RopeScheme
from fade_core.ops.attention import TorchAttentionMass, TorchDecodeAttention
from fade_core.storage.codec import Codec
from fade_core.support.checks import FiniteCheck


@dataclass
class LayerPlan(EvictionPlan):
    """What a layer is made of, built once by the cache: an ``EvictionPlan``, and what moves and reads the tokens.

    Attributes:
        attention: "fade" if FADE's attention function drives the layer, "stock" if any other does.
        on_nonfinite: "raise" or "zero".
        kernel: implementation of ``decode_attention``.
        mass_kernel: implementation of ``attention_mass``, for kernels that give no probabilities.
        codec: how prompts are packed and tiers unpacked.
        emit: where events go.
        on_failure: called with the layer's index and length when it refuses input in the middle of a forward pass; says
            what became of the cache.
        rope: rotary embedding by which survivors of an eviction are read at contiguous positions; ``None`` where they keep
            theirs, or carry none.
        finite: refuses what is not finite; shared by the layers of a cache.
    """

    attention: str = "fade"
    on_nonfinite: str = "raise"
    kernel: Kernel = field(default_factory=TorchDecodeAttention)
    mass_kernel: Kernel = field(default_factory=TorchAttentionMass)
    codec: Codec = field(default_factory=Codec)
    emit: Callable[[Event], None] = lambda event: None
    on_failure: Callable[[int, int], str] = lambda index, length: ""
    rope: RopeScheme | None = None
    finite: FiniteCheck = field(default_factory=FiniteCheck)
