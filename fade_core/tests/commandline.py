"""Running ``fade`` inside the test's own process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from fade_core.cli.app import build_app

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse. " * 4


def run(*arguments: object) -> Result:
    """What ``fade ARGUMENTS`` does, on a terminal wide enough for every table."""
    return CliRunner(env={"COLUMNS": "250"}).invoke(build_app(), [str(a) for a in arguments])


def ok(result: Result) -> str:
    """The standard output of a command that worked."""
    assert result.exit_code == 0, result.output
    return result.stdout


def data(result: Result) -> Any:
    """The JSON that a command printed."""
    return json.loads(ok(result))
