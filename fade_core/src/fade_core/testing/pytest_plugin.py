"""A pytest plugin that collects the conformance checks of installed components as tests.

``pytest -p fade_core.testing.pytest_plugin --fade-component policies:knorm``
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fade_core.errors import FadeError

if TYPE_CHECKING:
    from fade_core.testing.checks import CheckReport

CHECKS = Path(__file__).with_name("conformance.py")
COMPONENTS = pytest.StashKey[tuple[str, ...]]()
EXPECTED = pytest.StashKey[dict[str, dict[str, str]]]()
FIELDS = pytest.StashKey[dict[str, dict[str, Any]]]()
SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the conformance run."""
    group = parser.getgroup("fade", "FADE conformance")
    group.addoption(
        "--fade-component",
        action="append",
        default=[],
        metavar="KIND:NAME",
        help="component to check, such as policies:knorm or quantizers:uniform; may be given several times",
    )
    group.addoption(
        "--fade-expected-failure",
        action="append",
        default=[],
        metavar="KIND:NAME.CHECK=REASON",
        help="a check that is known to fail, with the reason",
    )
    group.addoption(
        "--fade-set",
        action="append",
        default=[],
        metavar="KIND:NAME.FIELD=VALUE",
        help="a field of a component's configuration",
    )
    group.addoption("--fade-seed", type=int, default=None, help="seed of the inputs; default: drawn and printed")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; a run that names no component is a usage error."""
    from fade_core.testing.checks import fresh_seed
    from fade_core.testing.component import check_names

    components: tuple[str, ...] = tuple(dict.fromkeys(config.getoption("--fade-component")))
    if not components:
        raise pytest.UsageError("the FADE conformance plugin needs at least one --fade-component KIND:NAME")
    try:
        for component in components:
            check_names(component)
        config.stash[FIELDS] = _fields(config.getoption("--fade-set"), components)
        config.stash[EXPECTED] = _expected(config.getoption("--fade-expected-failure"), components)
    except FadeError as error:
        raise pytest.UsageError(str(error)) from error
    seed = config.getoption("--fade-seed")
    config.stash[COMPONENTS] = components
    config.stash[SEED] = fresh_seed() if seed is None else seed
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args[:] = []
    config.args.append(str(CHECKS))


def pytest_report_header(config: pytest.Config) -> str:
    """The seed, so that a failure can be run again."""
    components = config.stash[COMPONENTS]
    return f"FADE conformance: {', '.join(components)}; --fade-seed {config.stash[SEED]}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for every check of every component."""
    from fade_core.testing.component import check_names

    if {"fade_component", "fade_check"} <= set(metafunc.fixturenames):
        cases = [(name, check) for name in metafunc.config.stash[COMPONENTS] for check in check_names(name)]
        ids = [f"{name}-{check}" for name, check in cases]
        metafunc.parametrize(("fade_component", "fade_check"), cases, ids=ids)


@pytest.fixture
def fade_report(request: pytest.FixtureRequest, fade_component: str, fade_check: str) -> CheckReport:
    """The report of one check of one component."""
    from fade_core.testing.component import check_component

    stash = request.config.stash
    expected = {
        check: reason for check, reason in stash[EXPECTED].get(fade_component, {}).items() if check == fade_check
    }
    return check_component(
        fade_component,
        fields=stash[FIELDS].get(fade_component),
        seed=stash[SEED],
        expected_failures=expected,
        only=(fade_check,),
    )


def _fields(options: list[str], components: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    from fade_core.testing.component import read_fields

    found: dict[str, dict[str, Any]] = {}
    for option in options:
        component, _, field = option.partition(".")
        if component not in components:
            raise pytest.UsageError(
                f"--fade-set {option!r} is not KIND:NAME.FIELD=VALUE of a component that is checked"
            )
        found.setdefault(component, {}).update(read_fields([field]))
    return found


def _expected(options: list[str], components: tuple[str, ...]) -> dict[str, dict[str, str]]:
    from fade_core.testing.component import check_names

    found: dict[str, dict[str, str]] = {}
    for option in options:
        place, _, reason = option.partition("=")
        component, _, check = place.rpartition(".")
        if component not in components or check not in check_names(component) or not reason.strip():
            raise pytest.UsageError(
                f"--fade-expected-failure {option!r} is not KIND:NAME.CHECK=REASON of a component that is checked"
            )
        found.setdefault(component, {})[check] = reason
    return found
