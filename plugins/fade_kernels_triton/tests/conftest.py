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
    """Triton's interpreter takes most of its time to make again what it has: kernels do the same without."""
    if os.environ.get("TRITON_INTERPRET") != "1" or _missing():
        yield
        return
    with pytest.MonkeyPatch.context() as here:
        _patch_once_a_launch(here)
        _know_types(here)
        _know_constants(here)
        _broadcast_less(here)
        yield


def _patch_once_a_launch(here: pytest.MonkeyPatch) -> None:
    """It patches ``triton.language`` at every call within a kernel, with functions that copy their arguments."""
    from triton import language
    from triton.runtime import interpreter

    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    checked = language.load.__code__  # of what asks a function of the language for the argument that it is given here
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

    def patch_attribute(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = member.__wrapped__ if getattr(member, "__code__", None) is checked else member

        def call(*args: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **options)

        scope.set_attr(owner, name, call)

    here.setattr(interpreter, "_patch_lang", patch_once)
    here.setattr(interpreter, "_patch_attr", patch_attribute)
    here.setattr(interpreter._LangPatchScope, "restore", restore_all)


def _know_types(here: pytest.MonkeyPatch) -> None:
    """It works out the type and shape of each tensor, and looks names of types up in lists."""
    from triton import language
    from triton.runtime import interpreter

    core, dtype = language.core, interpreter._get_np_dtype
    known = functools.cache(dtype)  # it makes a table of all types whenever it is asked for one
    shapes: dict[tuple[int, ...], Any] = {}
    types: dict[tuple[int, ...], Any] = {}
    blocks: dict[tuple[int, ...], Any] = {}
    new_tensor, new_block, equal = core.tensor.__init__, core.block_type.__init__, core.dtype.__eq__

    def dtype_of(kind: Any) -> Any:
        return dtype(kind) if kind.scalar.is_ptr() else known(kind.scalar)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = (*type.shape.values,) if type.is_block() else ()
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

    def of_elements(self: Any, scalar: Any) -> Any:
        key = (id(scalar), *self.shape.values)
        if key not in blocks:
            blocks[key] = core.block_type(scalar, self.shape)
        return blocks[key]

    def one_of(names: list[str]) -> Any:
        found = frozenset(names)
        return lambda self: self.name in found

    here.setattr(interpreter, "_get_np_dtype", dtype_of)
    here.setattr(core.tensor, "__init__", tensor)
    here.setattr(core.block_type, "__init__", block_type)
    here.setattr(core.block_type, "with_element_ty", of_elements)
    here.setattr(core.dtype, "__eq__", lambda self, other: self is other or equal(self, other))
    here.setattr(core.dtype, "is_int", one_of(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES))
    here.setattr(core.dtype, "is_int_signed", one_of(core.dtype.SINT_TYPES))
    here.setattr(core.dtype, "is_int_unsigned", one_of(core.dtype.UINT_TYPES))
    here.setattr(core.dtype, "is_floating", one_of(core.dtype.FP_TYPES))


def _know_constants(here: pytest.MonkeyPatch) -> None:
    """It works out anew what type an operation on two types has, and makes each number in a kernel a tensor, twice."""
    from triton import language
    from triton.language.semantic import TritonSemantic

    core, check = language.core, TritonSemantic.binary_op_type_checking_impl
    results: dict[tuple[Any, ...], Any] = {}
    constants: dict[tuple[Any, ...], Any] = {}

    def common(self: Any, left: Any, right: Any, division: bool) -> Any:
        key = (id(left), id(right), division)  # types of scalars live as long as the language
        if key not in results:
            results[key] = self.computation_type_impl(left, False, right, False, division)
        return results[key]

    def checked(
        self: Any, lhs: Any, rhs: Any, left_ptr: bool = False, right_ptr: bool = False, arithmetic: bool = True,
        division: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        whole = (lhs, rhs, left_ptr, right_ptr, arithmetic, division)
        left, right = (x.type.scalar if isinstance(x, core.tensor) else None for x in (lhs, rhs))
        known = [kind for kind in (left, right) if kind is not None]
        if not arithmetic or not known or any(kind.is_ptr() for kind in known):
            return check(self, *whole)
        if len(known) == 2:
            of = common(self, left, right, division)
            lhs = lhs if left is of else self.cast(lhs, of)
            rhs = rhs if right is of else self.cast(rhs, of)
        else:
            number, other = (rhs, lhs) if left else (lhs, rhs)
            key = (id(left), id(right), type(number), number, division)
            if key not in constants:  # found as it is, of a tensor without a shape
                one = self.scalar_constant(1, dtype=left or right)
                pair = check(self, *((one, number) if left else (number, one)), *whole[2:])
                constants[key] = pair[1] if left else pair[0]
            constant = constants[key]
            other = other if other.type.scalar is constant.type else self.cast(other, constant.type)
            lhs, rhs = (other, constant) if left else (constant, other)
        return self.broadcast_impl_value(lhs, rhs)

    here.setattr(TritonSemantic, "binary_op_type_checking_impl", checked)


def _broadcast_less(here: pytest.MonkeyPatch) -> None:
    """It broadcasts operands that are of one shape, and works out whether integers overflow, to then say nothing of it."""
    import numpy as np
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    broadcast = TritonSemantic.broadcast_impl_value

    def filled(self: Any, scalar: Any, like: Any) -> Any:
        handle = scalar.handle
        data = np.empty((*like.shape.values,), interpreter._get_np_dtype(handle.dtype))
        data.fill(handle.data.item())
        return self.tensor(
            interpreter.TensorHandle(data, handle.dtype.scalar), like.with_element_ty(scalar.type.scalar)
        )

    def alike(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = lhs.type, rhs.type
        if left.is_block() != right.is_block():
            return (lhs, filled(self, rhs, left)) if left.is_block() else (filled(self, lhs, right), rhs)
        if not left.is_block() or left.shape.values == right.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    assert not interpreter.interpreter_builder.options.debug  # without it overflows are not reported
    here.setattr(TritonSemantic, "broadcast_impl_value", alike)
    here.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda self, lhs, rhs, operation: None)


@pytest.fixture
def device() -> str:
    """Where kernels run here: a CUDA device, or the CPU by way of Triton's interpreter."""
    if reason := _missing():
        pytest.skip(reason)
    return "cuda" if torch.cuda.is_available() else "cpu"
