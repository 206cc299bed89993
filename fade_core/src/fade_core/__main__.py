"""``python -m fade_core``: the command ``fade`` where its script is not on the path."""

from fade_core.cli import main

main()
