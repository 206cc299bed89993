"""Loading models: a hub id, a folder, a GGUF file, or a small model that PyPI wheels carry."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache
from transformers import logging as transformers_logging

from fade_core.errors import InputError
from fade_core.models.wheels import WHEEL_MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KNOWN = " or ".join(repr(alias) for alias in WHEEL_MODELS)
_INSTALL_GGUF = 'pip install "gguf>=0.10"'
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        name_or_path: a hub id, a folder that ``save_pretrained`` wrote, a ``.gguf`` file, or an alias of
            ``WHEEL_MODELS``: "smollm2", "gemma3-270m".
        dtype: of the weights; "auto" takes the checkpoint's own, and for GGUF float32 (bfloat16 on a GPU).
        device: "auto" takes the GPU if there is one.
        options: passed on to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        InputError: if nothing of that name can be loaded; the message says what to install or to write.
    """
    where = resolve_device(device)
    source, gguf_file = _locate(str(name_or_path))
    loading = {"gguf_file": gguf_file} if gguf_file else {}
    with hidden_progress_bars():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **loading)
            model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
                source, dtype=_dtype(dtype, where, bool(gguf_file)), **loading, **options
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"model {str(name_or_path)!r} cannot be loaded: {_first_line(error)}. A hub id, a folder that "
                f"save_pretrained() wrote, a .gguf file, {_KNOWN} would work"
            ) from error
    return cast("PreTrainedModel", model.to(where).eval()), tokenizer


def load_skeleton(name_or_path: str | Path) -> PreTrainedModel:
    """A model without weights (on the meta device): enough to plan a cache for it.

    Raises:
        InputError: if its config cannot be read.
    """
    source, gguf_file = _locate(str(name_or_path))
    with hidden_progress_bars():
        try:
            config = AutoConfig.from_pretrained(source, **({"gguf_file": gguf_file} if gguf_file else {}))
            with torch.device("meta"):
                return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config).eval())
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"the config of {str(name_or_path)!r} cannot be read: {_first_line(error)}") from error


def exact_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache that ``generate()`` would make by itself: what FADE is compared with."""
    return DynamicCache(config=model.config)


def quantized_cache(model: PreTrainedModel, backend: str, bits: int | None, residual: int) -> QuantizedCache:
    """transformers' own compressed cache: a peer.

    Args:
        model: whose cache it is.
        backend: "quanto", "hqq" or "fp8".
        bits: width of a code; ``None`` for "fp8", which has one.
        residual: newest tokens in full precision; "fp8" has none.

    Raises:
        ImportError: if the backend's package is missing.
    """
    options = {} if bits is None else {"nbits": bits, "residual_length": residual}
    return QuantizedCache(backend, model.config, **options)


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model was trained for (``max_position_embeddings``), or ``None`` where its config is silent."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@contextlib.contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """Silence the bars and log messages of transformers inside the block; nothing else changes."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # one of its bars cannot be switched off
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _locate(name: str) -> tuple[str, str | None]:
    """What ``from_pretrained`` takes: a folder or hub id, and the GGUF file in it."""
    if name in WHEEL_MODELS:
        path = WHEEL_MODELS[name].path()
    elif name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"model {name!r}: there is no such file")
    else:
        folder = Path(name).expanduser()
        if folder.is_file():
            raise InputError(f"model {name!r} is a file but not a .gguf file; give the folder that holds config.json")
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise InputError(f"model {name!r} is a folder without config.json; save_pretrained() writes one")
        if not folder.exists() and name.startswith(("/", ".", "~")):
            raise InputError(f"model {name!r}: there is no such folder")
        return str(folder) if folder.exists() else name, None
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"model {name!r} is a GGUF file, and the package that reads it is missing: {_INSTALL_GGUF}")
    return str(path.parent), path.name


def resolve_device(device: torch.device | str) -> torch.device:
    """The device that ``device`` means; "auto" is the GPU if there is one. Raises ``InputError`` for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is unknown; 'auto', 'cpu', 'cuda' or 'cuda:1' would work") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for and this machine has no CUDA device; use 'cpu'")
    return found


def _dtype(dtype: torch.dtype | str, device: torch.device, gguf: bool) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return (torch.bfloat16 if device.type == "cuda" else torch.float32) if gguf else "auto"
    if dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; choose one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


__all__ = [
    "context_length",
    "exact_cache",
    "load_model",
    "load_skeleton",
    "quantized_cache",
]
