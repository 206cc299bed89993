"""What commands that learn from text share: files, pieces of text, a progress bar, peak memory. Plugins may import it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from fade_core.errors import InputError

Thing = TypeVar("Thing")


@contextmanager
def steps(what: str, memory: Peak) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr for the length of the block, sampling memory as it moves."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            memory.sample()
            progress.update(task, completed=done, total=total)

        yield advance


class Peak:
    """Highest memory of this process (CPU) or of its tensors (CUDA), in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.sample()

    def sample(self) -> None:
        """Note the peak so far."""
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
            return
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_folder(output: Path) -> None:
    """Raises ``InputError`` if ``output`` cannot be written for want of a folder."""
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}")


def read_text(path: Path) -> str:
    """The file's text. Raises ``InputError`` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path} cannot be read: {error}") from error


def pieces_of(tokenizer: Any, texts: Sequence[str], length: int) -> list[tuple[Tensor, int]]:
    """All whole pieces of ``length`` token ids, int64 ``[length]``, with the number of the text that each is from.

    Each begins with the tokenizer's beginning-of-sequence token if it has one, as a prompt would.
    """
    start = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    body = length - len(start)
    found = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [(torch.tensor(start + ids[at : at + body]), number) for at in range(0, len(ids) - body + 1, body)]
    return found


def spread(things: list[Thing], wanted: int) -> list[Thing]:
    """At most ``wanted`` of them, evenly spread, in their order."""
    if len(things) <= wanted:
        return things
    return [things[(2 * i + 1) * len(things) // (2 * wanted)] for i in range(wanted)]
