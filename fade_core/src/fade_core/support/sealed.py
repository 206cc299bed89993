"""Files of tensors with a header, sealed: a checksum over every byte tells damage before anything is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, NoReturn, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fade_core.errors import CheckpointError, ConfigError
from fade_core.support.validation import CheckedModel, shown
from fade_core.support.writing import replacing


class FileHeader(CheckedModel):
    """What a file says of itself beside its kind and format; subclasses name each field and its bounds."""


H = TypeVar("H", bound=FileHeader)

_BLANK = b"0" * 64
_SEAL = re.compile(rb'\{\\"sha256\\": \\"([0-9a-f]{64})\\"')
"""Where the checksum stands in a file: JSON within the JSON of safetensors. It is taken with zeros in its own place."""
_DEEPEST = 32
"""Tables and lists within one another that a header may have."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileKind(Generic[H]):
    """One kind of file that FADE writes and reads: safetensors, a checked header, a checksum over every byte.

    Attributes:
        name: says in the file what it is ("fade-kv-cache").
        format: raised when the meaning of anything in it changes.
        noun: what messages call it ("a saved FADE cache").
        remedy: how to get one, for messages ("run 'fade calibrate' again").
        header: what its header holds beside name and format; the class refuses what is out of bounds or unknown.
    """

    name: str
    format: int
    noun: str
    remedy: str
    header: type[H]

    def write(self, path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a file whole or not at all; one that is there stays as it is if that fails.

        Raises:
            CheckpointError: for a header that ``read`` would not take, or a file that cannot be written (a full disk, no
                permission, no such folder).
        """
        named = {"kind": self.name, "format": self.format, **header}
        self.checked(named, str(path))
        text = json.dumps({"sha256": _BLANK.decode(), **named}, allow_nan=False)
        with replacing(path, CheckpointError) as temporary:
            try:
                save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, {"fade": text})
            except SafetensorError as error:
                raise CheckpointError(f"{path} cannot be written: {error}") from error
            with temporary.open("r+b") as file:
                place, digest = _digest(file)
                file.seek(place)
                file.write(digest)

    def read(self, path: str | Path, device: torch.device | str = "cpu") -> tuple[H, dict[str, Tensor]]:
        """Header and tensors of a file. On a CPU the tensors are mapped from it: copy what is kept.

        Raises:
            CheckpointError: no such file, another kind or format, damage anywhere, a header that cannot be right.
        """
        found = self._existing(path)
        try:
            with found.open("rb") as file:
                place, digest = _digest(file)
                file.seek(place)
                sealed = place > 0 and file.read(len(digest)) == digest
            with safe_open(found, "pt", device=str(device)) as opened:
                text = (opened.metadata() or {}).get("fade")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()} if sealed else {}  # noqa: SIM118
            if place and not sealed:
                raise SafetensorError("its checksum is not that of what it holds")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is not a safetensors file that FADE wrote, or is damaged: {error}; {self.remedy}"
            ) from error
        if text is None:
            raise CheckpointError(f"{path} is a safetensors file, but not {self.noun}")
        header = _parsed(text, str(path))
        header.pop("sha256", None)
        if not sealed and header.get("kind", self.name) == self.name:
            raise CheckpointError(
                f"{path} has no checksum: an older version of FADE wrote it, or another program has changed it; {self.remedy}"
            )
        return self.checked(header, str(path)), tensors

    def checked(self, header: Mapping[str, Any], what: str) -> H:
        """A header whose every field is within bounds, from what JSON gave; ``what`` names it in messages.

        Raises:
            CheckpointError: another kind or format, or a field that is missing, unknown or out of bounds.
        """
        fields = dict(header)
        kind, version = fields.pop("kind", None), fields.pop("format", None)
        if kind != self.name:
            raise CheckpointError(f"{what} is not {self.noun}; found {shown(kind)}; {self.remedy}")
        if type(version) is not int or version != self.format:
            raise CheckpointError(
                f"{what} has format {shown(version)}, this version of FADE reads format {self.format}; {self.remedy}"
            )
        try:
            return self.header.model_validate(fields)
        except ConfigError as error:
            raise CheckpointError(f"the header of {what} is damaged: {error}; {self.remedy}") from error

    def _existing(self, path: str | Path) -> Path:
        try:
            found = Path(path)
            there = found.is_file()
        except (OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"a path is needed; found {shown(path)}: {error}") from error
        if not there:
            raise CheckpointError(f"there is no file {path}; {self.remedy}")
        return found


def _digest(file: BinaryIO) -> tuple[int, bytes]:
    """Place of a file's checksum, 0 for none, and what it should be."""
    file.seek(0)
    head = file.read(8)
    head += file.read(min(int.from_bytes(head, "little"), 100_000_000))  # what safetensors reads of a header at most
    seal = _SEAL.search(head)
    if seal is None:
        return 0, b""
    place = seal.start(1)
    digest = hashlib.sha256(head[:place] + _BLANK + head[place + len(_BLANK) :])
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return place, digest.hexdigest().encode()


def _parsed(text: str, path: str) -> dict[str, Any]:
    """The table that a header's JSON holds. Raises ``CheckpointError`` for anything else, or one nested too deeply."""
    try:
        found = json.loads(text, parse_constant=_no_number)
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"the header of {path} is damaged: {error}") from error
    level, depth = [found], 0
    while level:
        depth += 1
        tables = [
            list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))
        ]
        level = [inner for table in tables for inner in table]
        if depth > _DEEPEST:
            raise CheckpointError(f"the header of {path} is damaged: it is nested more than {_DEEPEST} deep")
    if not isinstance(found, dict):
        raise CheckpointError(f"the header of {path} is damaged: it is no table")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
