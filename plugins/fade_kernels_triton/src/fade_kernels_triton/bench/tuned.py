"""The file that ``fade bench tune`` writes, a row at a time."""

from __future__ import annotations

import os
from pathlib import Path

from fade_core.errors import ConfigError
from fade_kernels_triton.config import VARIABLE
from fade_kernels_triton.configfile import ConfigFile, read_file, user_file, write_file
from fade_kernels_triton.launch import DecodeConfig, LaunchCase


class TunedFile:
    """Rows found for one GPU, beside those that the file had.

    Args:
        output: the file; ``None`` for the user's own for this GPU.
        gpu: name of the GPU.

    Raises:
        ConfigError: if the file is there and cannot be read, or is of another GPU: before hours are spent, not after.
    """

    def __init__(self, output: Path | None, gpu: str) -> None:
        self.own = user_file(gpu)
        self.path = output or self.own
        self.held = read_file(self.path) if self.path.exists() else ConfigFile(gpu, ())
        if self.held.gpu != gpu:
            raise ConfigError(
                f"kernel configurations {self.path} are of {self.held.gpu!r}, and this GPU is {gpu!r}. Name another "
                f"file: --output"
            )
        write_file(self.path, self.held)

    def keep(self, case: LaunchCase, config: DecodeConfig) -> None:
        """Write the row of ``case``, at once: an interrupted run keeps what it has found."""
        self.held = self.held.with_row(case, config)
        write_file(self.path, self.held)

    def advice(self) -> str:
        """Where the rows are, and what has to be set for FADE to read them."""
        named = os.environ.get(VARIABLE)
        read = Path(named).expanduser() if named else self.own
        if read.absolute() == self.path.absolute():
            return f"written: {self.path}; FADE reads it from now on"
        return f"written: {self.path}; FADE reads {read} until {VARIABLE}={self.path} is set"
