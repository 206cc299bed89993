"""Which implementation runs an op: named in the configuration, or the fastest that supports the case."""

from __future__ import annotations

from typing import Any, get_args

import torch
from pydantic import GetJsonSchemaHandler, field_validator
from pydantic_core import CoreSchema

from fade_core.errors import ConfigError, PluginError
from fade_core.interfaces import Kernel, KernelConfig, Op
from fade_core.packed import PackedFormat
from fade_core.plugins import default_registry
from fade_core.support.validation import not_provided

AUTO = "auto"
OPS: tuple[Op, ...] = get_args(Op)

Refusals = list[tuple[str, str]]


class KernelSelection(KernelConfig):
    """``[kernel]`` of a configuration: an implementation for all ops, and exceptions op by op.

    Attributes:
        kind: implementation of every op that it implements ("torch", "triton"); "auto" takes, for each op, the one of
            highest priority that supports the case.
        append: implementation of this op alone; ``None`` follows ``kind``.
        decode_attention: as ``append``.
        dequantize: as ``append``.
        attention_mass: as ``append``.
        encode: as ``append``.
    """

    kind: str = AUTO
    append: str | None = None
    decode_attention: str | None = None
    dequantize: str | None = None
    attention_mass: str | None = None
    encode: str | None = None

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        registry = default_registry()
        if kind != AUTO and kind not in registry.names("kernels"):
            _provided(kind)  # raises: nothing is registered under a name without its op
        return kind

    @field_validator(*OPS)
    @classmethod
    def _known_name(cls, name: str | None, info: Any) -> str | None:
        if name not in (None, AUTO):
            _provided(f"{info.field_name}:{name}")
        return name

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler(schema)
        properties = handler.resolve_ref_schema(described)["properties"]
        registry = default_registry()
        properties["kind"]["enum"] = [AUTO, *registry.names("kernels")]
        for op in OPS:
            properties[op]["anyOf"] = [{"enum": [AUTO, *registry.kernels(op)]}, {"type": "null"}]
        return described

    def wanted(self, op: Op) -> str:
        """Implementation that the configuration asks for ``op``, or "auto"."""
        name: str | None = getattr(self, op)
        if name is not None:
            return name
        return self.kind if default_registry().has("kernels", f"{op}:{self.kind}") else AUTO


def _provided(name: str) -> None:
    """Refuse a kernel that nothing, or more than one plugin, provides, as a problem beside others."""
    try:
        default_registry().get("kernels", name)
    except PluginError as error:
        raise not_provided(error) from None


def choose_kernel(
    op: Op,
    config: KernelConfig,
    format: PackedFormat | None,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Kernel, Refusals]:
    """The implementation of ``op`` for one case, and why the others that were asked first refused.

    Raises:
        ConfigError: if the implementation that the configuration names refuses, or if none supports the case.
        PluginError: if two plugins provide the implementation that the configuration names.
    """
    selection = config if isinstance(config, KernelSelection) else KernelSelection(kind=config.kind)
    registry, wanted = default_registry(), selection.wanted(op)
    if wanted == AUTO:
        candidates = sorted(registry.kernels(op).values(), key=lambda kernel: (-kernel.priority, kernel.name))
    else:
        candidates = [registry.get("kernels", f"{op}:{wanted}")]
    refusals: Refusals = []
    for kernel in candidates:
        support = kernel.supports(format, head_dim, device, dtype)
        if support:
            return kernel, refusals
        refusals.append((kernel.name, support.reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals) or "none is installed"
    remedy = f'; kernel.{op} = "auto" takes another' if wanted != AUTO else ""
    raise ConfigError(
        f"no implementation of {op} for head_dim={head_dim}, {dtype} on {device}, format {format}: {reasons}{remedy}"
    )
