"""The ``fade`` command line."""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``fade`` script."""
    from fade_core.cli.app import build_app

    build_app()()
