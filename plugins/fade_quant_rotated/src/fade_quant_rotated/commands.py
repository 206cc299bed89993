"""``fade calibrate`` and ``fade train-codebook``: learn from text how a model's cache can be coded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import Tensor

from fade_core.errors import InputError
from fade_core.training import Peak, check_folder, pieces_of, read_text, spread, steps
from fade_quant_rotated.allocation import WIDTHS
from fade_quant_rotated.calibrate import calibrate
from fade_quant_rotated.codebook import save_codebooks
from fade_quant_rotated.training import train_codebooks

Texts = Annotated[list[Path], typer.Option("--text", help="UTF-8 text file; may be given several times.")]
Model = Annotated[str, typer.Option("--model", "-m", help='Hub id, folder, .gguf file, "smollm2" or "gemma3-270m".')]
Length = Annotated[int, typer.Option(min=128, help="Tokens read at once.")]
MaxTokens = Annotated[int, typer.Option(min=128, help="Most tokens to read; spread evenly over the text.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]


Reach = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Positions further on that the file is for; default: 8192, or as many as the model was trained at.",
    ),
]


def calibrate_command(
    text: Texts,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the calibration (.safetensors).")],
    model: Model = "smollm2",
    bits: Annotated[float, typer.Option(help="Default average bits an element, everything counted.")] = 2.0,
    widths: Annotated[str, typer.Option(help='Default code widths; "0,2,4,6,8" suits kernels.')] = ",".join(
        map(str, WIDTHS)
    ),
    group: Annotated[int, typer.Option(min=1, help="Default channels that share a width.")] = 1,
    length: Length = 1024,
    max_tokens: MaxTokens = 16384,
    reach: Reach = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Learn from text how a model's keys and values can be coded in few bits: forward passes only, no gradients."""
    kinds = parse_widths(widths)
    from fade_core import load_model  # brings transformers, which `fade --help` does without

    texts = [read_text(path) for path in text]
    check_folder(output)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    pieces = cut(tokenizer, texts, length, max_tokens)
    memory, started = Peak(loaded.device), time.perf_counter()
    with steps("reading texts", memory) as advance:
        found = calibrate(loaded, pieces, bits, kinds, group, progress=advance, reach=reach)
    seconds = time.perf_counter() - started
    found.save(output)
    plan = found.plan(bits, kinds, group)
    Console().print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB from {found.notes['tokens']:,} tokens in {seconds:.0f} s, "
        f"peak memory {memory.peak / 1e9:.2f} GB (model included). At {bits:g} bits, keys take "
        f"{plan.average('key'):.2f} and values {plan.average('value'):.2f} bits a channel. Use it with\n"
        f'  keys = {{ kind = "calibrated", file = "{output}" }}\n'
        f'  values = {{ kind = "calibrated", file = "{output}" }}',
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def train_codebook_command(
    text: Texts,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the codebooks (.safetensors).")],
    model: Model = "smollm2",
    sub_dim: Annotated[int, typer.Option(min=1, help="Channels of a sub-vector.")] = 4,
    num_centroids: Annotated[int, typer.Option(help="Centroids of a sub-vector, a power of two up to 256.")] = 256,
    length: Length = 1024,
    max_tokens: MaxTokens = 16384,
    seed: Annotated[int, typer.Option(help="Of the sampling and of k-means.")] = 0,
    reach: Reach = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Train product-quantization codebooks for a model's keys and values (kind = "pq")."""
    from fade_core import load_model  # brings transformers, which `fade --help` does without

    texts = [read_text(path) for path in text]
    check_folder(output)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    pieces = cut(tokenizer, texts, length, max_tokens)
    memory, started = Peak(loaded.device), time.perf_counter()
    with steps("reading texts, k-means", memory) as advance:
        books = train_codebooks(loaded, pieces, sub_dim, num_centroids, seed=seed, progress=advance, reach=reach)
    save_codebooks(books, output)
    one = next(iter(books.values()))
    Console().print(
        f"{output}: {len(books)} codebooks, {sum(book.nbytes for book in books.values()) / 1e6:.1f} MB, from "
        f"{sum(len(piece) for piece in pieces):,} tokens in {time.perf_counter() - started:.0f} s, peak memory "
        f"{memory.peak / 1e9:.2f} GB (model included). {(one.num_centroids.bit_length() - 1) / one.sub_dim:g} bits an "
        f"element. Use it with\n"
        f'  keys = {{ kind = "pq", file = "{output}", sub_dim = {sub_dim}, num_centroids = {num_centroids} }}',
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def cut(tokenizer: Any, texts: list[str], length: int, max_tokens: int) -> list[Tensor]:
    """Pieces of ``length`` token ids, evenly spread over ``texts``, at most ``max_tokens`` in all.

    Each piece begins with the tokenizer's beginning-of-sequence token if it has one, as a prompt would. Texts that are
    too short to fill one are left out, which is said on stderr.

    Raises:
        InputError: if no text fills a piece.
    """
    found = pieces_of(tokenizer, texts, length)
    if not found:
        raise InputError(f"no text holds {length} tokens; give longer ones, or a smaller --length")
    read = {number for _, number in found}
    start = int(getattr(tokenizer, "add_bos_token", False))
    short = [
        start + len(tokenizer(text, add_special_tokens=False)["input_ids"])
        for number, text in enumerate(texts)
        if number not in read
    ]
    if short:
        Console(stderr=True).print(
            f"{len(short)} of {len(texts)} texts hold fewer than {length} tokens and are left out; --length {min(short)} "
            "would read them all",
            soft_wrap=True,
            highlight=False,
        )
    return [ids for ids, _ in spread(found, max(1, max_tokens // length))]


def parse_widths(widths: str) -> tuple[int, ...]:
    """``"0,2,4"`` to ``(0, 2, 4)``. Raises ``InputError`` for anything else."""
    try:
        return tuple(int(part) for part in widths.split(","))
    except ValueError as error:
        raise InputError(f"--widths {widths!r} must be whole numbers separated by commas, such as 0,2,4") from error
