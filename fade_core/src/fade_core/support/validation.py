"""Checked models: frozen, no unknown field, no bool for a number, and errors that a person can read."""

from __future__ import annotations

import difflib
import re
import reprlib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from fade_core.errors import LONGEST, ConfigError, FadeError, PluginError, UnknownComponentError, shortened

_SHOWN = 8
"""Problems that an error tells one by one."""
_HINTED = 64
"""Longest name that a similar one is looked for: the search takes the square of it."""


class Problem(NamedTuple):
    """One thing that is wrong with a configuration: the path to it, what it is, and the error that it would be alone."""

    where: tuple[str, ...]
    what: str
    kind: type[FadeError] = ConfigError


class InvalidConfigError(ConfigError):
    """A ``ConfigError`` that still knows where each problem is, so that an enclosing model can prefix its own path.

    Args:
        problems: all of them; the message tells the first.
        source: what the message begins with, such as a file's name.
    """

    def __init__(self, problems: list[Problem], source: str = "") -> None:
        self.problems, self.source = problems, source
        each = (LONGEST - 300) // min(len(problems), _SHOWN)
        lines = [_line(problem, each) for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"and {len(problems) - _SHOWN:,} more problems")
        super().__init__(source + "\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems, self.source)  # not the message, as other exceptions are made from


class InvalidComponentError(InvalidConfigError, PluginError):
    """The same where two plugins provide what a configuration names."""


class InvalidNameError(InvalidConfigError, UnknownComponentError):
    """The same where nothing installed provides what a configuration names."""


def invalid(problems: list[Problem]) -> InvalidConfigError:
    """The error for ``problems``, which is a ``PluginError`` as well if one of them is."""
    kinds = {problem.kind for problem in problems}
    if UnknownComponentError in kinds:
        return InvalidNameError(problems)
    return InvalidComponentError(problems) if PluginError in kinds else InvalidConfigError(problems)


def not_provided(error: PluginError) -> InvalidConfigError:
    """What a registry says of a name, as a problem that does not hide others; it stays the error that it was."""
    kind = UnknownComponentError if isinstance(error, UnknownComponentError) else PluginError
    return invalid([Problem((), str(error), kind)])


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``known``, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1) if len(str(name)) <= _HINTED else []
    return f"; did you mean {near[0]!r}?" if near else ""


def problems_of(error: ValidationError) -> list[Problem]:
    """Path and plain message of every problem, those of nested components included."""
    found: list[Problem] = []
    for entry in error.errors(include_url=False):
        where = tuple(str(part) for part in entry["loc"] if part != "[key]")
        cause = entry.get("ctx", {}).get("error")
        if isinstance(cause, InvalidConfigError):
            found += [problem._replace(where=where + problem.where) for problem in cause.problems]
        elif isinstance(cause, Exception):
            found.append(Problem(where, str(cause)))
        else:
            message = _WANTED.get(entry["type"]) or entry["msg"][:1].lower() + entry["msg"][1:]
            found.append(Problem(where, f"{message}; found {shown(entry['input'])}"))
    return found


_WANTED = {
    **dict.fromkeys(("tuple_type", "list_type"), "a list is needed"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a table of fields is needed"),
    "missing": "this field is needed",
}
"""Messages in the words of a configuration file, by pydantic's name of the error."""


class CheckedModel(BaseModel):
    """Base of every configuration: immutable, closed, and strict about what is a number.

    Construction, ``model_validate`` and ``model_validate_json`` raise ``ConfigError`` with one line a problem.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    other_names: ClassVar[tuple[str, ...]] = ()
    """Names besides the fields that a ``mode="before"`` validator of the class understands and replaces."""

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise invalid(problems_of(error)) from error

    # pydantic then validates nested models natively instead of calling ``__init__`` again
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, raising ``ConfigError``."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise invalid(problems_of(error)) from error

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's, raising ``ConfigError``."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise invalid(problems_of(error)) from error

    @model_validator(mode="wrap")
    @classmethod
    def _closed_and_strict(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Refuse unknown fields and booleans for numbers, and report them together with whatever else is wrong."""
        if not isinstance(data, Mapping):
            return handler(data)
        problems: list[Problem] = []
        usable: dict[str, Any] = {}
        for name, value in data.items():
            field = cls.model_fields.get(name)
            if field is None and name not in cls.other_names:
                hint = cls._hint(name) if len(problems) < _SHOWN else ""
                problems.append(Problem((), f"unknown field {shown(name)}{hint}"))
            elif field is not None and isinstance(value, bool) and not admits(field.annotation, bool):
                problems.append(Problem((str(name),), f"true/false is not a value here; found {value!r}"))
            else:
                usable[name] = value
        try:
            model = handler(usable)
        except ValidationError as error:
            problems += problems_of(error)
        if problems:
            raise invalid(problems)
        return model

    @classmethod
    def _hint(cls, name: object) -> str:
        near = did_you_mean(name, [*cls.model_fields, *cls.other_names])
        return f"{near} (known: {', '.join(cls.model_fields)})"


def admits(annotation: Any, wanted: type) -> bool:
    """Whether ``annotation`` (unions, ``Annotated``, ``Literal`` and ``Any`` included) allows a ``wanted``."""
    if annotation is Any or annotation is wanted:
        return True
    origin = get_origin(annotation)
    if origin is Literal:
        return any(isinstance(option, wanted) for option in get_args(annotation))
    if origin is Annotated:
        return admits(get_args(annotation)[0], wanted)
    if origin in (Union, types.UnionType):
        return any(admits(option, wanted) for option in get_args(annotation))
    return False


def _explain_share(value: Any) -> Any:
    """Let through a count of tokens or a fraction of the context; say what is wrong with any other number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a number of tokens or a fraction of the context is needed; found {shown(value)}")
    if isinstance(value, int) and not 1 <= value <= LARGEST:
        raise ValueError(f"a number of tokens must be at least 1 and at most {LARGEST}; found {shown(value)}")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"a fraction lies above 0 and is at most 1 (tokens are whole numbers); found {value}")
    return value


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def bytes_of(text: str) -> int:
    """Bytes that ``"512MiB"`` or ``"1.5 GB"`` means. Raises ``ValueError`` for anything else, and for less than a byte."""
    found = re.fullmatch(_SIZE, text)
    if found is None or not 1 <= float(found[1]) * _UNITS[found[2]] < 2**63:
        raise ValueError(f'bytes are written like "512MiB" (units: {", ".join(_UNITS)}); found {shown(text)}')
    return int(float(found[1]) * _UNITS[found[2]])


def _explain_budget(value: Any) -> Any:
    if isinstance(value, str):
        bytes_of(value)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f'tokens, a fraction of the context or bytes such as "512MiB" are needed; found {shown(value)}'
        )
    return _explain_share(value)


def _explain_capacity(value: Any) -> Any:
    if isinstance(value, str) and value != "rest":
        raise ValueError(f'tokens, a fraction of the context or "rest" is needed; found {shown(value)}')
    return value if value == "rest" else _explain_share(value)


def _explain_window(value: Any) -> Any:
    if value != "all" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST):
        raise ValueError(f'a number of queries (at least 1) or "all" is needed; found {shown(value)}')
    return value


LARGEST = 2**31 - 1
"""Tokens are counted, and their positions kept, in 32 bits."""

Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
"""A positive whole number (no bool, no string, no float)."""
WholeNumber = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
"""A whole number, zero included."""
Fraction = Annotated[float, Field(strict=True, gt=0, le=1)]
"""A share above 0 and at most 1."""
Share = Annotated[Count | Fraction, BeforeValidator(_explain_share)]
"""Tokens (int) or a fraction of the context (float)."""
Capacity = Annotated[Count | Fraction | Literal["rest"], BeforeValidator(_explain_capacity)]
"""Tokens (int), a fraction of the context (float), or "rest" for no bound."""
_SIZE = r"^\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*$"
Budget = Annotated[Count | Fraction | Annotated[str, Field(pattern=_SIZE)], BeforeValidator(_explain_budget)]
"""Tokens (int), a fraction of the context (float), or bytes of the whole cache (such as "512MiB")."""
Window = Annotated[Count | Literal["all"], BeforeValidator(_explain_window)]
"""Queries (int) or "all"."""


def _line(problem: Problem, most: int) -> str:
    path, what = shortened(".".join(problem.where), 100), shortened(problem.what, most)
    if problem.kind is not ConfigError:  # a name that nothing provides, or two plugins do
        return f"{what} (in {path})" if path else what
    return f"{path}: {what}" if path else what


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother, self.maxstring = 3, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """What messages say that was found: the beginning of it, however large or deep it is."""
    return shortened(_Shown().repr(value), 80)
