"""The registry: built-ins, plugins that work, and plugins that are broken in every way."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from plugin_maker import POLICY_SOURCE, Site, plugin, policy_config, provider

import fade_core
from fade_core import FadeConfig, Kernel, KernelConfig, PolicyConfig, get_policy, get_quantizer, hookimpl, list_plugins
from fade_core.cache.named_caches import configuration
from fade_core.config.kernel_selection import KernelSelection, choose_kernel
from fade_core.errors import ConfigError, PluginError, UnknownComponentError
from fade_core.interfaces import Op, Preset, Support, TelemetrySink, TelemetrySinkConfig
from fade_core.plugins import GROUPS, Registry, default_registry, use_registry
from fade_core.plugins.record import PluginInfo

CPU = torch.device("cpu")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def row(registry: Registry, owner: str) -> PluginInfo:
    """The one row of a distribution."""
    (found,) = [info for info in registry.list_plugins() if info.dist == owner]
    return found


def alone(*modules: Any) -> Registry:
    """A registry of the core and ``modules``, whatever is installed."""
    return Registry(modules, entry_points=False)


# --- built-ins ---


@pytest.mark.parametrize("entry_points", [True, False])
def test_the_core_comes_through_the_same_door_exactly_once(entry_points: bool) -> None:
    registry = Registry(entry_points=entry_points)
    core = row(registry, "fade-core")
    assert (core.status, core.reason, core.module) == ("loaded", "", "fade_core.builtin")
    assert core.version == fade_core.__version__
    assert set(core.components["tiers"]) == {"fp16", "int4", "int2", "evicted", "packed"}
    assert set(core.components["policies"]) == {"position", "h2o", "ema"}
    assert core.components["quantizers"] == ("kivi", "uniform")
    assert {"decode_attention:torch", "attention_mass:torch"} <= set(core.components["kernels"])


def test_the_core_is_there_once_even_if_its_metadata_is_there_twice(site: Site) -> None:
    site.install("fade-core-copy", "", entries="core = fade_core.builtin")
    modules = [info.module for info in Registry().list_plugins()]
    assert modules.count("fade_core.builtin") == 1


def test_every_component_that_is_built_in_can_be_built() -> None:
    for name in default_registry().names("policies"):
        if name in ("position", "h2o", "ema"):
            assert get_policy(name).kind == name
    for bits in (2, 3, 4, 8, 16):
        quantizer = get_quantizer("uniform", head_dim=64, bits=bits, tile=32, side="value")
        assert (quantizer.head_dim, quantizer.tile) == (64, 32)


def test_quantizer_options_reach_the_quantizer() -> None:
    quantizer = get_quantizer("uniform", head_dim=64, bits=2, axis="channel", group=16, side="value")
    assert quantizer.format is not None
    assert (quantizer.format.bits, quantizer.format.axis, quantizer.format.group) == (2, "channel", 16)
    assert quantizer.format.layout == "channel"
    assert get_quantizer("uniform", head_dim=64).format.layout == "token"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_dim": True}, "head_dim=True"),
        ({"head_dim": 64, "side": "left"}, "side='left'"),
        ({"head_dim": 64, "tile": 10}, "tile=10"),
        ({"head_dim": 64, "bits": 5}, "2, 3, 4, 8, 16"),
        ({"head_dim": 64, "gruop": 5}, "did you mean 'group'"),
        ({"head_dim": 64, "group": 48}, "must divide 64"),
    ],
)
def test_a_quantizer_that_cannot_be_is_refused(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        get_quantizer("uniform", **options)


# --- plugins that work ---


def test_an_installed_distribution_is_found(site: Site) -> None:
    module = site.install("fade-mine", POLICY_SOURCE.format(kind="mine"), "2.5", ["fade-core>=0.1,<0.2", "torch"])
    registry = Registry()
    info = row(registry, "fade-mine")
    assert (info.name, info.version, info.module, info.status) == (module, "2.5", module, "loaded")
    assert info.hooks == ("fade_policies",)
    assert info.components == {"policies": ("mine",)}
    with use_registry(registry):
        config = FadeConfig(policy={"kind": "mine", "budget": 0.5})
        assert (config.policy.kind, config.policy.budget) == ("mine", 0.5)
        assert type(config.policy.build()) is type(get_policy("mine"))


@pytest.mark.slow
def test_a_fresh_process_finds_it_too(site: Site, tmp_path: Path) -> None:
    site.install("fade-mine", POLICY_SOURCE.format(kind="mine"))
    (tmp_path / "fade.toml").write_text('policy = { kind = "mine", budget = 300 }')
    code = "import fade_core, sys; print(fade_core.FadeConfig.from_file(sys.argv[1]).policy.budget)"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "fade.toml")],
        env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path]), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "300"


def test_a_plugin_installed_later_is_found_after_reload(site: Site) -> None:
    registry = Registry()
    with pytest.raises(UnknownComponentError, match="'mine'"):
        registry.get("policies", "mine")
    site.install("fade-mine", POLICY_SOURCE.format(kind="mine"))
    with pytest.raises(UnknownComponentError, match="'mine'"):
        registry.get("policies", "mine")
    registry.reload()
    assert registry.get("policies", "mine").model_fields["kind"].default == "mine"


def test_one_module_behind_two_entry_points_is_one_plugin(site: Site) -> None:
    module = "fade_mine"
    site.install("fade-mine", POLICY_SOURCE.format(kind="mine"), entries=f"one = {module}\ntwo = {module}")
    registry = Registry()
    assert row(registry, "fade-mine").status == "loaded"
    assert "mine" in registry.all("policies")


def test_an_entry_point_may_name_an_object(site: Site) -> None:
    source = (
        POLICY_SOURCE.format(kind="mine") + "\n    class Door:\n        fade_policies = staticmethod(fade_policies)"
    )
    site.install("fade-mine", source, entries="door = fade_mine:Door")
    info = row(Registry(), "fade-mine")
    assert (info.status, info.module) == ("loaded", "fade_mine:Door")


def test_use_registry_is_undone_after_an_error() -> None:
    before, inner = default_registry(), alone()
    with pytest.raises(UnknownComponentError), use_registry(inner):
        get_policy("nowhere")
    assert default_registry() is before
    with use_registry(inner):
        assert default_registry() is inner


def test_a_name_may_be_one_of_several_of_a_class() -> None:
    class Config(PolicyConfig):
        kind: Literal["first", "second"] = "first"

    registry = alone(provider("both", "policies", Config))
    assert {"first", "second"} <= set(registry.names("policies"))
    with use_registry(registry):
        assert FadeConfig(policy={"kind": "second"}).policy.kind == "second"


def test_telemetry_sinks_and_eval_tasks_are_components() -> None:
    class Silent(TelemetrySink):
        def emit(self, event: Any) -> None:
            pass

    class SilentConfig(TelemetrySinkConfig):
        kind: Literal["silent"] = "silent"

        def build(self) -> TelemetrySink:
            return Silent()

    class Task:
        name = "mine"

    registry = alone(provider("sinks", "telemetry_sinks", SilentConfig), provider("tasks", "eval_tasks", Task))
    with use_registry(registry):
        (sink,) = FadeConfig(telemetry=[{"kind": "silent"}]).telemetry
        assert isinstance(sink.build(), Silent)
    assert registry.get("eval_tasks", "mine") is Task


def test_presets_of_plugins_are_taken_by_name() -> None:
    mine = Preset("mine", {"n_sink": 7, "keys": {"kind": "uniform", "bits": 2}}, "seven sinks")
    registry = alone(provider("presets", "presets", mine))
    with use_registry(registry):
        assert FadeConfig.preset("mine") == FadeConfig(n_sink=7, keys={"kind": "uniform", "bits": 2})
        assert configuration("mine").n_sink == 7
        with pytest.raises(UnknownComponentError, match="did you mean 'mine'"):
            FadeConfig.preset("mime")
    twice = alone(provider("one", "presets", mine), provider("two", "presets", Preset("mine", {}, "no field")))
    with use_registry(twice):
        with pytest.raises(PluginError, match=r"preset .mine. is provided by .* and by "):
            FadeConfig.preset("mine")
        assert FadeConfig.preset("safe") == FadeConfig.safe()


# --- plugins that are broken ---

BROKEN_IMPORTS = {
    "raises": ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    "exits": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "needs what is missing": ("import a_package_that_nobody_has", "No module named 'a_package_that_nobody_has'"),
    "is no Python": ("def", "SyntaxError"),
    "has no hooks": ("x = 1", "nothing in it is decorated with @hookimpl"),
    "misspells a hook": (
        "from fade_core import hookimpl\n@hookimpl\ndef fade_polices():\n    return []",
        "no hook 'fade_polices'; did you mean 'fade_policies'",
    ),
    "wants what no hook gives": (
        "from fade_core import hookimpl\n@hookimpl\ndef fade_policies(model):\n    return []",
        "model",
    ),
    "declares nonsense": (
        "from fade_core import hookimpl\nFADE_CORE = 'soon'\n@hookimpl\ndef fade_policies():\n    return []",
        "FADE_CORE is a version range such as \">=0.1,<0.2\"; found 'soon'",
    ),
}


@pytest.mark.parametrize("case", BROKEN_IMPORTS)
def test_a_broken_plugin_is_kept_with_its_reason_and_breaks_no_other(site: Site, case: str) -> None:
    source, fragment = BROKEN_IMPORTS[case]
    site.install("fade-broken", source)
    site.install("fade-fine", POLICY_SOURCE.format(kind="fine"))
    registry = Registry()
    broken = row(registry, "fade-broken")
    assert (broken.status, broken.components) == ("failed", {})
    assert fragment in broken.reason
    assert row(registry, "fade-fine").status == row(registry, "fade-core").status == "loaded"
    with use_registry(registry):
        assert FadeConfig(policy={"kind": "fine"}).policy.kind == "fine"
        with pytest.raises(UnknownComponentError, match=r"installed but not working, .*fade-broken"):
            FadeConfig(policy={"kind": "nowhere"})


def test_a_plugin_that_looks_a_component_up_while_it_is_imported_is_told_not_to(site: Site) -> None:
    site.install("fade-hasty", "from fade_core import get_policy\nget_policy('h2o')")
    registry = Registry()
    with use_registry(registry):
        assert get_policy("h2o").kind == "h2o"
    reason = row(registry, "fade-hasty").reason
    assert "fade-hasty 1.0 (fade_hasty) looks one up while it is imported; do that inside a function" in reason


def test_the_reason_says_where_it_happened(site: Site) -> None:
    site.install("fade-broken", "\n\nraise RuntimeError('no licence')")
    assert "fade_broken.py:3)" in row(Registry(), "fade-broken").reason


def raising() -> list[Any]:
    raise OSError("disk on fire")


UNFIT = {
    "not a list": ("policies", lambda: 3, "must return a list; found 3"),
    "not a class": ("policies", lambda: ["h2o"], "subclasses of PolicyConfig; found 'h2o'"),
    "of another group": ("tiers", lambda: [policy_config("x")], "subclasses of TierConfig"),
    "no kernel": ("kernels", lambda: [object], "Kernel objects or classes with a name"),
    "no preset": ("presets", lambda: [{"name": "mine"}], "Preset objects with a name"),
    "preset with a space": ("presets", lambda: [Preset("my own", {}, "")], "small letters, digits and dashes"),
    "nameless task": ("eval_tasks", lambda: [object()], "tasks with a name"),
    "raising": ("quantizers", raising, "fade_quantizers raised OSError: disk on fire"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_hook_that_fails_leaves_the_other_hooks_alone(case: str) -> None:
    group, hook, fragment = UNFIT[case]

    def failing() -> Any:
        return hook()

    failing.__name__ = f"fade_{group}"
    module = provider("half_broken", "rope_schemes" if group == "policies" else "policies")
    setattr(module, failing.__name__, hookimpl(failing))
    fine = policy_config("fine")
    registry = alone(module, provider("fine", "policies", fine))
    info = row(registry, "half_broken")
    assert info.status == "failed"
    assert fragment in info.reason
    assert registry.get("policies", "fine") is fine
    assert row(registry, "fade-core").status == "loaded"


def test_a_configuration_without_a_literal_name_is_explained() -> None:
    class Config(PolicyConfig):
        kind: str = "mine"

    info = row(alone(provider("vague", "policies", Config)), "vague")
    assert 'Config needs a literal name such as kind: Literal["mine"] = "mine"' in info.reason


def test_commands_are_added_by_those_that_can() -> None:
    def fade_commands(app: Any) -> None:
        app.append("mine")

    def failing(app: Any) -> None:
        app.append("half")
        raise KeyError("typer")

    failing.__name__ = "fade_commands"
    registry = alone(plugin("bad", failing), plugin("good", fade_commands))
    app: list[str] = []
    registry.add_commands(app)
    assert sorted(app) == ["half", "mine"]
    assert "fade_commands raised KeyError" in row(registry, "bad").reason
    assert row(registry, "good").status == "loaded"


# --- versions ---


@pytest.mark.parametrize("wanted", [">=0.2", "<0.1", "==7.*", "!=0.1.0"])
def test_a_plugin_for_another_core_is_not_even_imported(site: Site, wanted: str) -> None:
    site.install("fade-old", "raise RuntimeError('imported')", requires=["torch", f"Fade_Core{wanted}"])
    info = row(Registry(), "fade-old")
    assert info.status == "incompatible"
    assert wanted in info.reason
    assert f"this is fade-core {fade_core.__version__}" in info.reason


def test_a_plugin_that_declares_another_core_offers_nothing() -> None:
    registry = alone(plugin("newer", FADE_CORE=">=9"), provider("fine", "policies", policy_config("fine")))
    info = row(registry, "newer")
    assert (info.status, info.hooks) == ("incompatible", ())
    assert "FADE_CORE >=9" in info.reason


@pytest.mark.parametrize(
    "requirement",
    ["fade-core>=0.1,<0.2", "fade-core", "fade-core>=9; extra == 'future'", "fade-core>=9; python_version < '3'"],
)
def test_a_requirement_that_fits_or_does_not_apply_is_no_obstacle(site: Site, requirement: str) -> None:
    site.install("fade-mine", POLICY_SOURCE.format(kind="mine"), requires=[requirement, "weird (not [a requirement"])
    assert row(Registry(), "fade-mine").status == "loaded"


def test_a_core_within_the_declared_range_is_fine() -> None:
    module = provider("mine", "policies", policy_config("mine"))
    module.FADE_CORE = ">=0.1,<0.2"  # type: ignore[attr-defined]
    assert row(alone(module), "mine").status == "loaded"


# --- two plugins, one name ---


def test_a_name_claimed_twice_names_both_owners_and_leaves_the_rest(site: Site) -> None:
    first = site.install("fade-first", POLICY_SOURCE.format(kind="twice"), "1.1")
    second = site.install("fade-second", POLICY_SOURCE.format(kind="twice"), "2.2")
    registry = Registry()
    with use_registry(registry), pytest.raises(PluginError) as caught:
        FadeConfig(policy={"kind": "twice"})
    for owner in ("fade-first 1.1", "fade-second 2.2", f"{first}.MineConfig", f"{second}.MineConfig", "'twice'"):
        assert owner in str(caught.value)
    assert not isinstance(caught.value, UnknownComponentError)
    for dist in ("fade-first", "fade-second"):
        info = row(registry, dist)
        assert info.status == "conflict"
        assert "fade-first" in info.reason
        assert "fade-second" in info.reason
        assert info.components == {"policies": ("twice",)}
    with use_registry(registry):
        assert FadeConfig(policy={"kind": "h2o"}).policy.kind == "h2o"
        assert "twice" not in str(FadeConfig.json_schema())


def test_nobody_takes_a_built_in_name_over() -> None:
    registry = alone(provider("thief", "policies", policy_config("h2o")))
    with use_registry(registry):
        with pytest.raises(PluginError, match=r"fade-core .*H2OConfig and by thief.*H2oConfig"):
            get_policy("h2o")
        assert FadeConfig().policy.kind == "position"
        assert FadeConfig(policy={"kind": "ema"}).policy.kind == "ema"
    assert row(registry, "fade-core").status == row(registry, "thief").status == "conflict"


def test_two_classes_of_one_plugin_conflict_as_well() -> None:
    registry = alone(provider("stutter", "policies", policy_config("mine"), policy_config("mine")))
    with pytest.raises(PluginError, match=r"stutter: .* and by stutter: "):
        registry.get("policies", "mine")


def test_one_class_from_two_modules_is_no_conflict() -> None:
    shared = policy_config("mine")
    registry = alone(provider("one", "policies", shared), provider("two", "policies", shared))
    assert registry.get("policies", "mine") is shared


# --- names nobody knows ---


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_name_lists_the_known_ones(group: Any) -> None:
    registry = alone()
    with pytest.raises(UnknownComponentError) as caught:
        registry.get(group, "decode_attention:nowhere" if group == "kernels" else "nowhere")
    assert "'nowhere'" in str(caught.value)
    for name in registry.names(group):
        assert name in str(caught.value)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(UnknownComponentError, match="did you mean 'position'"):
        get_policy("postion")


@pytest.mark.parametrize(
    ("group", "name", "dist"),
    [
        ("quantizers", "calibrated", "fade-quant-rotated"),
        ("policies", "learned", "fade-policy-learned"),
        ("policies", "snapkv", "fade-policy-attention"),
        ("rope_schemes", "yarn", "fade-rope"),
        ("kernels", "decode_attention:triton", "fade-kernels-triton"),
        ("kernels", "decode_attention:cpu", "fade-kernels-cpu"),
    ],
)
def test_the_plugin_to_install_is_named(group: Any, name: str, dist: str) -> None:
    with pytest.raises(UnknownComponentError, match=f"pip install {dist}"):
        alone().get(group, name)


def test_a_plugin_that_is_there_but_broken_is_not_to_be_installed_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", _only(site.folder))
    site.install("fade-policy-learned", "raise RuntimeError('no licence')", "0.3")
    with pytest.raises(UnknownComponentError) as caught:
        Registry().get("policies", "learned")
    assert "fade-policy-learned 0.3" in str(caught.value)
    assert "no licence" in str(caught.value)
    assert "pip install" not in str(caught.value)


def _only(folder: Path) -> Any:
    """``entry_points`` of the distributions in one folder, as if nothing else were installed."""
    import importlib.metadata as metadata

    def entry_points(group: str) -> list[Any]:
        return [p for dist in metadata.distributions(path=[str(folder)]) for p in dist.entry_points if p.group == group]

    return entry_points


# --- kernels ---


class Slow(Kernel):
    name: ClassVar[str] = "slow"
    op: ClassVar[Op] = "append"

    def supports(self, *case: Any) -> Support:
        return Support(True)

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self.name


class Fast(Slow):
    name: ClassVar[str] = "fast"
    priority: ClassVar[int] = 10

    def supports(self, format: Any, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        return Support(head_dim <= 128, f"head_dim {head_dim} is above 128")


@pytest.fixture
def kernels() -> Any:
    with use_registry(alone(provider("kernels", "kernels", Slow, Fast()))) as registry:
        yield registry


def choose(config: KernelConfig, head_dim: int = 64, op: Op = "append") -> tuple[str, list[tuple[str, str]]]:
    kernel, refusals = choose_kernel(op, config, None, head_dim, CPU, torch.float32)
    return kernel.name, refusals


def test_auto_takes_the_highest_priority_that_supports_the_case(kernels: Registry) -> None:
    assert choose(KernelSelection()) == ("fast", [])
    assert choose(KernelConfig()) == ("fast", [])
    assert choose(KernelSelection(), head_dim=256) == ("slow", [("fast", "head_dim 256 is above 128")])


def test_an_implementation_can_be_named_for_all_ops_or_for_one(kernels: Registry) -> None:
    assert choose(KernelSelection(kind="slow")) == ("slow", [])
    assert choose(KernelSelection(append="slow")) == ("slow", [])
    assert choose(KernelSelection(kind="fast", append="slow")) == ("slow", [])
    assert choose(KernelSelection(kind="slow", append="auto")) == ("fast", [])
    assert choose(KernelSelection(kind="slow"), op="decode_attention") == ("torch", [])  # it has no such op
    assert choose(FadeConfig(kernel={"append": "slow"}).kernel) == ("slow", [])


def test_a_named_implementation_that_refuses_is_an_error_with_its_reason(kernels: Registry) -> None:
    with pytest.raises(ConfigError, match=r"append .*fast: head_dim 256 is above 128.*kernel.append = \"auto\""):
        choose(KernelSelection(kind="fast"), head_dim=256)


def test_an_op_that_nothing_implements_is_an_error(kernels: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda op: {})  # the core implements them all
    with pytest.raises(ConfigError, match=r"dequantize .*none is installed"):
        choose(KernelSelection(), op="dequantize")


@pytest.mark.parametrize("fields", [{"kind": "fats"}, {"append": "fats"}, {"decode_attention": "fast"}])
def test_an_unknown_implementation_is_refused_when_it_is_configured(kernels: Registry, fields: dict[str, str]) -> None:
    with pytest.raises(UnknownComponentError, match="unknown kernel"):
        KernelSelection(**fields)


def test_kernels_that_claim_one_name_are_left_out_by_auto_and_refused_by_name() -> None:
    class Other(Fast):
        pass

    with use_registry(alone(provider("one", "kernels", Slow, Fast), provider("two", "kernels", Other))):
        assert choose(KernelSelection()) == ("slow", [])
        with pytest.raises(PluginError, match=r"one: .*Fast and by two: .*Other"):
            choose(KernelSelection(kind="fast"))


# --- the public face ---

PUBLIC = [
    "FadeConfig",
    "create_tiered_cache",
    "TieredKVCache",
    "load_model",
    "forward_with_tracking",
    "reassign_tiers",
    "apply_tier_assignment",
    "apply_tier_assignment_per_sequence",
    "AttentionTracker",
    "attach_telemetry",
    "JsonlExporter",
    "get_quantizer",
    "get_policy",
    "list_plugins",
    "hookimpl",
    "Quantizer",
    "EvictionPolicy",
    "RopeScheme",
    "Kernel",
    "Tier",
    "LayerView",
    "QuantizerConfig",
    "PolicyConfig",
    "RopeConfig",
    "KernelConfig",
    "TierConfig",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there(name: str) -> None:
    assert callable(getattr(fade_core, name))
    assert name in fade_core.__all__
    assert name in dir(fade_core)


def test_what_is_announced_exists() -> None:
    for name in fade_core.__all__:
        assert getattr(fade_core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'FadeKonfig'"):
        _ = fade_core.FadeKonfig  # type: ignore[attr-defined]


def test_importing_the_package_and_the_marker_imports_nothing_heavy() -> None:
    code = """
        import sys
        from fade_core import hookimpl
        heavy = {"torch", "transformers", "pydantic", "typer", "matplotlib"} & set(sys.modules)
        sys.exit(f"imported {heavy}" if heavy else 0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_list_plugins_shows_the_default_registry() -> None:
    with use_registry(alone(provider("mine", "policies", policy_config("mine")))):
        assert [info.dist for info in list_plugins()] == ["fade-core", "mine"]
