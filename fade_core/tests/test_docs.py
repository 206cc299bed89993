"""What is documented exists, and what exists is documented."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pages import DOCS, blocks, first_column
from tiny import fresh_seed, tiny_llama

from fade_core import FadeConfig, create_tiered_cache
from fade_core.config import LayerOverride, flat_spelling
from fade_core.config.kernel_selection import OPS
from fade_core.plugins import Registry, hookspecs, use_registry

CONFIGURATION = (DOCS / "configuration.md").read_text()
PLUGINS = (DOCS / "plugins.md").read_text()


@pytest.fixture(autouse=True)
def core_alone() -> Iterator[None]:
    with use_registry(Registry(entry_points=False)):
        yield


def test_every_field_is_documented_with_its_default_and_nothing_else_is() -> None:
    assert first_column(CONFIGURATION, "field") == list(FadeConfig.model_fields)
    for name in ("n_sink", "recent_window", "tile", "observation_window"):
        assert f"| `{name}` | {FadeConfig.model_fields[name].default} |" in CONFIGURATION
    for name in ("attention", "reposition", "on_nonfinite"):
        assert f'| `{name}` | `"{FadeConfig.model_fields[name].default}"` |' in CONFIGURATION


def test_every_flat_name_is_documented() -> None:
    assert set(first_column(CONFIGURATION, "flat")) == set(flat_spelling.NAMES)
    assert flat_spelling.__doc__ is not None
    for name in flat_spelling.NAMES:
        assert f"``{name}" in flat_spelling.__doc__


@pytest.mark.parametrize(("header", "group"), [("kind", ""), ("tier", "tiers")])
def test_every_built_in_component_is_documented_with_every_field(header: str, group: str) -> None:
    registry = Registry(entry_points=False)
    groups = [group] if group else ["quantizers", "policies", "telemetry_sinks"]
    known = {name: config for g in groups for name, config in registry.all(g).items()}  # type: ignore[arg-type]
    assert sorted(first_column(CONFIGURATION, header)) == sorted(known)
    for config in known.values():
        for field in set(config.model_fields) - {"kind", "tier"}:
            assert f"`{field}`" in CONFIGURATION, f"{config.__name__}.{field}"


def test_overrides_and_ops_are_documented() -> None:
    for name in (*LayerOverride.model_fields, *OPS):
        assert f"`{name}`" in CONFIGURATION


def test_every_hook_is_documented_and_no_other() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("fade_")]
    assert first_column(PLUGINS, "hook") == hooks
    for name in hooks:
        assert getattr(hookspecs, name).__doc__.strip()


@pytest.mark.parametrize("text", blocks(CONFIGURATION, "toml"))
def test_configuration_files_in_the_documentation_work(text: str, tmp_path: Path) -> None:
    path = tmp_path / "fade.toml"
    path.write_text(text)
    config = FadeConfig.from_file(path)
    assert config != FadeConfig() or config.kernel.decode_attention == "torch"
    config.for_layer(0, 8)


def test_python_in_the_documentation_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(fresh_seed())
    given = {"model": model, "inputs": {"input_ids": torch.randint(1, 255, (1, 60))}}
    for text in blocks(CONFIGURATION, "python"):
        with create_tiered_cache(model) as cache:
            exec(compile(text, "configuration.md", "exec"), given | {"cache": cache})
    module = ModuleType("documented")
    monkeypatch.setitem(sys.modules, "documented", module)
    for text in blocks(PLUGINS, "python"):
        exec(compile(text, "plugins.md", "exec"), vars(module))
    assert type(module.config.policy.build()).__name__ == "KNorm"
    assert module.config.policy.kind == "knorm"
    with use_registry(Registry([module], entry_points=False)) as registry:
        assert FadeConfig(**registry.quality_recipes()[-1].fields).keys.bits == 3


def test_the_server_in_the_documentation_works() -> None:
    (text,) = blocks((DOCS / "serving.md").read_text(), "python")
    model = tiny_llama(fresh_seed())
    names = {"model": model, "torch": torch, "prompts": [torch.randint(1, 255, (1, n)) for n in (60, 210, 95)]}
    with torch.no_grad():
        exec(compile(text, "serving.md", "exec"), names)
    assert (names["cache"].get_seq_length(), names["cache"].leading_padding.tolist()) == (95 + 20, [35, 0])


def test_the_project_table_in_the_documentation_is_one() -> None:
    (text,) = blocks(PLUGINS, "toml")
    assert tomllib.loads(text)["project"]["entry-points"]["fade"] == {"policy_knorm": "fade_policy_knorm"}


def test_the_policy_in_the_documentation_takes_at_most_forty_lines() -> None:
    policy = blocks(PLUGINS, "python")[0]
    assert "hookimpl" in policy
    assert len(policy.splitlines()) <= 40
