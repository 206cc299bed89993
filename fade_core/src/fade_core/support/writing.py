"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fade_core.errors import FadeError


@contextmanager
def replacing(path: str | Path, refusal: type[FadeError]) -> Iterator[Path]:
    """An empty file beside ``path`` that takes its place after the block; if the block raises, ``path`` stays as it was.

    A link stays a link: what it leads to is replaced. The file has the permissions of the one that it replaces.

    Args:
        path: what is to be written.
        refusal: class of the error for a file that cannot be written.

    Raises:
        FadeError: a ``refusal`` that says why: no such folder, no permission, a full disk, something else than a file.
    """
    try:
        target = Path(path).resolve()
        mode = target.stat().st_mode if target.exists() else None
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # links in a circle; what is no path at all
        raise _refused(path, error, refusal) from error
    if mode is not None and not target.is_file():  # a folder, a device, a pipe
        raise refusal(f"{path} cannot be written: it is there and is no file; name a file")
    if mode is not None and not os.access(target, os.W_OK):
        raise refusal(f"{path} cannot be written: it is read-only; name another file, or make it writable")
    temporary = target.with_name(f".fade-{secrets.token_hex(6)}.tmp")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise _refused(path, error, refusal) from error
    try:
        mode = temporary.stat().st_mode if mode is None else mode
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # after a power cut the name leads to the old file or to the whole new one
        temporary.replace(target)
    except OSError as error:
        raise _refused(path, error, refusal) from error
    finally:
        temporary.unlink(missing_ok=True)


def _refused(path: object, error: Exception, refusal: type[FadeError]) -> FadeError:
    reason = getattr(error, "strerror", None) or error
    return refusal(
        f"{path!s:.300} cannot be written: {reason}; name a file in a folder that has room and may be written to"
    )
