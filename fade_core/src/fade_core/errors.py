"""Every error FADE raises on purpose. Each says what was wrong, what was found and what would work."""

from __future__ import annotations

LONGEST = 2000
"""Characters of a message: what was found may be a whole file, and nobody reads that."""


class FadeError(Exception):
    """Base of all errors that FADE raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(shortened(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(FadeError, ValueError):
    """A configuration value, file or combination that cannot work."""


class PluginError(FadeError):
    """A plugin that cannot be loaded, or two plugins that contradict each other."""


class UnknownComponentError(PluginError, KeyError):
    """A component name that nothing installed provides."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class MissingDistributionError(FadeError, ImportError):
    """A name that another of FADE's distributions provides, which is not installed; the message says which."""


class InputError(FadeError, ValueError):
    """A tensor or argument that was refused before anything changed."""


class NonFiniteError(InputError):
    """NaN or infinity among the keys or values of a layer."""


class UnsupportedModelError(FadeError, ValueError):
    """A model whose attention FADE cannot compress; the message says why and what to do instead."""


class CheckpointError(FadeError, ValueError):
    """A saved cache, codebook or calibration that does not belong here."""


def shortened(message: str, most: int = LONGEST) -> str:
    """The message without its middle, if it is too long: what was wrong stands at its beginning, what works at its end."""
    if len(message) <= most:
        return message
    return f"{message[: most - most // 4 - 7]} [...] {message[-(most // 4) :]}"
