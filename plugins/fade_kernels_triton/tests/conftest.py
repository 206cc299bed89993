from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when kernels are defined
torch.set_num_threads(1)


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


def _missing() -> str:
    """Why kernels cannot run here; empty if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return ""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device, and Triton was imported before its interpreter could be asked for"
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return f"the interpreter of Triton {version('triton')} does not work with NumPy {version('numpy')}"
    return ""


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """Triton's interpreter takes two thirds of its time to make again what it has: kernels do the same without.

    It patches ``triton.language`` at every call within a kernel, and works out the type and shape of each tensor.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or _missing():
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    patch, restore, dtype = interpreter._patch_lang, interpreter._LangPatchScope.restore, interpreter._get_np_dtype
    known = functools.cache(dtype)  # it makes a table of all types whenever it is asked for one
    patched: set[frozenset[str]] = set()

    @functools.cache
    def modules(function: Any) -> frozenset[str]:
        return frozenset(m.__name__ for m in function.__globals__.values() if m is language or m is language.core)

    def patch_once(function: Any) -> Any:
        if (names := modules(function)) in patched:
            return interpreter._LangPatchScope()
        patched.add(names)
        return patch(function)

    def restore_all(scope: Any) -> None:
        """The end of a launch: what a call patches for itself is never restored."""
        patched.clear()
        restore(scope)

    def dtype_of(kind: Any) -> Any:
        return dtype(kind) if kind.scalar.is_ptr() else known(kind.scalar)

    shapes: dict[tuple[int, ...], Any] = {}
    types: dict[tuple[int, ...], Any] = {}
    new_tensor, new_block = language.core.tensor.__init__, language.core.block_type.__init__

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = shapes[shape]
        else:
            new_tensor(self, handle, type)
            shapes[shape] = self.shape, self.numel

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *(size.value if isinstance(size, language.constexpr) else size for size in shape))
        if key not in types:
            new_block(self, element_ty, shape)
            types[key] = dict(vars(self))  # with the type of the elements: no other can come to have its id
        vars(self).update(types[key])

    with pytest.MonkeyPatch.context() as here:
        here.setattr(interpreter, "_patch_lang", patch_once)
        here.setattr(interpreter._LangPatchScope, "restore", restore_all)
        here.setattr(interpreter, "_get_np_dtype", dtype_of)
        here.setattr(language.core.tensor, "__init__", tensor)
        here.setattr(language.core.block_type, "__init__", block_type)
        yield


@pytest.fixture
def device() -> str:
    """Where kernels run here: a CUDA device, or the CPU by way of Triton's interpreter."""
    if reason := _missing():
        pytest.skip(reason)
    return "cuda" if torch.cuda.is_available() else "cpu"
