"""Which launch configuration a call gets: the user's own for this GPU before those that are shipped."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path

import torch

from fade_core.errors import ConfigError
from fade_kernels_triton.configfile import ConfigFile, parse, read_file, user_file
from fade_kernels_triton.device import gpu_name, overlaps
from fade_kernels_triton.launch import DecodeConfig, LaunchCase

VARIABLE = "FADE_KERNEL_CONFIGS"
"""Environment variable that names a file to take instead of the user's own for this GPU, whatever GPU it is of."""


@cache
def shipped() -> ConfigFile:
    """What ``configs.json`` says."""
    return parse(files(__package__).joinpath("configs.json").read_text(encoding="utf-8"), "configs.json")


@cache
def own(device: torch.device) -> ConfigFile | None:
    """The user's own configurations for ``device``: the file that ``FADE_KERNEL_CONFIGS`` names, else ``user_file``.

    Raises:
        ConfigError: for a file that cannot be read, has a row that cannot work or, not named by the variable, is of
            another GPU.
    """
    if named := os.environ.get(VARIABLE):
        return read_file(Path(named).expanduser())
    gpu = gpu_name(device)
    path = user_file(gpu)
    if not gpu or not path.is_file():
        return None
    found = read_file(path)
    if found.gpu != gpu:
        raise ConfigError(
            f"kernel configurations {path} are of {found.gpu!r}; this GPU is {gpu!r}. Delete the file and run "
            f"fade bench tune, or set {VARIABLE} to it to have it taken all the same"
        )
    return found


@lru_cache(maxsize=512)
def lookup(case: LaunchCase, device: torch.device) -> DecodeConfig:
    """The tuned configuration nearest to ``case``: same format if there is one, then the user's own, then nearest in size.

    Files are read at a process's first launch on a device; what changes in them later is not seen.

    Args:
        case: what is launched.
        device: where; a configuration that its compute capability does not take is changed so that it does.

    Raises:
        ConfigError: as ``own``.
    """
    mine = own(device)
    rows = [(False, *row) for row in (mine.decode if mine else ())] + [(True, *row) for row in shipped().decode]
    _, _, config = min(rows, key=lambda row: (case.format_distance(row[1]), row[0], case.size_distance(row[1])))
    return config if overlaps(device) else replace(config, overlap=False)
