"""Running ``fade`` inside the test's own process."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner, Result

from fade_core.cli.app import build_app

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse. " * 4


_parameters = functools.cache(typer.main.get_params_from_function)
"""Signatures of commands, each of which is read once: every command's is whenever one runs."""


def run(*arguments: object) -> Result:
    """What ``fade ARGUMENTS`` does, on a terminal wide enough for every table."""
    with pytest.MonkeyPatch.context() as here:
        here.setattr(typer.main, "get_params_from_function", _parameters)
        return CliRunner(env={"COLUMNS": "250"}).invoke(build_app(), [str(a) for a in arguments])


def ok(result: Result) -> str:
    """The standard output of a command that worked."""
    assert result.exit_code == 0, result.output
    return result.stdout


def data(result: Result) -> Any:
    """The JSON that a command printed."""
    return json.loads(ok(result))
