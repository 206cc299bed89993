"""The base of every component's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fade_core.support.validation import CheckedModel

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema


class ComponentConfig(CheckedModel):
    """Base of every component's configuration: frozen, unknown fields refused, chosen by its ``kind`` literal."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler(schema)
        discriminator = "tier" if "tier" in cls.model_fields else "kind"
        required = handler.resolve_ref_schema(described).setdefault("required", [])
        if discriminator not in required:  # a default does not make it optional: it says which component this is
            required.insert(0, discriminator)
        return described
