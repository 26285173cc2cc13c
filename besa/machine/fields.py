"""What annotations promise: a configuration's fields and a public function's arguments, refused in a sentence each.

The meaning of a configuration's fields is written below each of them, where `help()` and Jupyter's `?` show it.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from beartype import BeartypeConf, FrozenDict
from beartype.door import is_bearable
from beartype.vale import IsInstance
from jaxtyping import jaxtyped
from pydantic import ConfigDict, InstanceOf, PydanticUserError, TypeAdapter, ValidationError

Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])

Positive = Annotated[float, Gt(0), Le(1e6)]
"""Of steps and weights of terms: far beyond, what optimizers make of them overflows."""
Count = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(-(2**63)), Lt(2**64)]
"""What torch's generators take."""

_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_NO_STAND_INS = BeartypeConf(  # True is no number, a name no sequence of its letters
    hint_overrides=FrozenDict(
        {int: Annotated[int, ~IsInstance[bool]], Sequence[str]: Annotated[Sequence[str], ~IsInstance[str]]}
    )
)
_SIGNS = {Gt: "> {.gt}", Ge: ">= {.ge}", Lt: "< {.lt}", Le: "<= {.le}"}
_WORDS = {
    "NoneType": "None",
    "bool": "True or False",
    "int": "an integer",
    "float": "a finite number",
    "str": "a string",
    "Sequence": "a tuple or list",
    "dtype": "a torch.dtype",
    "PreTrainedModel": "a model as besa.load_model gives it (of peft: model.merge_and_unload())",
    "PreTrainedTokenizerBase": "a tokenizer as besa.load_model gives it",
    "Method": "a method: besa.Besa(), Wanda(), SparseGPT() or Magnitude()",
    "Report": "what besa.prune returned",
    "Reconstruct": "besa.Reconstruct('closed') or ('block')",
    "Quantize": "besa.Quantize(bits=4)",
    "FineTune": "besa.FineTune('low-rank') or ('full')",
    "collections.abc.Mapping[tuple[int, str], torch.Tensor]": "keep-masks {(block, projection): weight != 0, ...}",
    "Int64[Tensor, 'n_samples seq_len']": "int64 token ids (n_samples, seq_len) as besa.calibration_windows makes them",
    "Int64[Tensor, 'n_tokens']": "int64 token ids (n_tokens,) as besa.test_tokens makes them",
    "Bool[Tensor, 'rows columns']": "a bool tensor (rows, columns), True = keep",
}
"""What a type is called where something else was given, and where to get it."""


def check_fields(configuration: Any) -> None:
    """Refuse fields that their annotations do not admit; it is, or is called by, a dataclass's `__post_init__`.

    A class that is derived from a checked one needs nothing for its own fields to be checked. Nothing is converted but
    numpy's scalars, into the numbers of Python that they are.

    Raises:
        ValueError: a sentence for each such field: its name, its value, what it may be.
    """
    fields = [field for field in dataclasses.fields(configuration) if field.init]
    values = {field.name: getattr(configuration, field.name) for field in fields}
    given = {field.name: values[field.name] for field in fields if values[field.name] is not field.default}
    for name, value in _checked(given, _hints(type(configuration)), _fault_of_field).items():
        object.__setattr__(configuration, name, value)


def checked(function: Function) -> Function:
    """Decorate a public function: arguments that their annotations do not admit are refused before it starts.

    The function then raises a ValueError with a sentence for each of them: its name, its value, what it may be.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments |= _checked(bound.arguments, _hints(function), _fault_of_argument)
        return function(*bound.args, **bound.kwargs)

    return call


def _checked(
    given: Mapping[str, Any], hints: dict[str, Any], fault_of: Callable[[Any, Any], list[Any]]
) -> dict[str, Any]:
    """The values, numpy's scalars as Python's; `fault_of` finds in a value what an annotation does not admit."""
    values = {name: _plain(value) for name, value in given.items()}
    problems = []
    for name, value in values.items():
        for fault in fault_of(value, hints.get(name, Any)):
            part = "" if fault is value else "with "
            problems.append(f"{name} {part}{_shown(fault)} is not {_words(hints[name])}")
    if problems:
        raise ValueError("; ".join(problems))
    return values


@functools.cache
def _hints(of: Any) -> dict[str, Any]:
    """Annotations by name; of a class that names in them what is not there at run time, its nearest base's."""
    for each in getattr(of, "__mro__", (of,)):
        with suppress(NameError):
            return get_type_hints(each, include_extras=True)
    return {}


@functools.cache
def _adapter(hint: Any) -> TypeAdapter:
    try:
        return TypeAdapter(InstanceOf[hint] if dataclasses.is_dataclass(hint) else hint, config=_STRICT)
    except PydanticUserError:  # of a class that somebody derived: pydantic cannot check everything
        return TypeAdapter(Any)


def _fault_of_field(value: Any, hint: Any) -> list[Any]:
    """All of it or the first entry that is wrong, if any is, as pydantic finds it: bounds count, and every entry."""
    try:
        valid = _adapter(hint).validate_python(value)
    except ValidationError as error:
        return [error.errors(include_url=False)[0]["input"]]
    return [] if _alike(value, valid) else [value]


def _alike(value: Any, valid: Any) -> bool:
    """Whether a number was taken as it is, or as 1 for 1.0; not a fraction or a tensor as its float, nor 4.0 as 4."""
    if isinstance(valid, tuple):
        return all(map(_alike, value, valid))
    return not isinstance(valid, int | float) or isinstance(value, (type(valid), int))


def _fault_of_argument(value: Any, hint: Any) -> list[Any]:
    """All of it, if it is wrong, as beartype finds it: in a time that does not grow with the value."""
    with jaxtyped("context"):  # axes have no names that a caller's own annotations could share
        return [] if is_bearable(value, hint, conf=_NO_STAND_INS) else [value]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(_plain, value)) if type(value) is tuple else value


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"of {value.dtype} {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _words(hint: Any) -> str:
    """What an annotation admits: "'row', 'layer' or an integer >= 1"."""
    *others, last = _choices(hint)
    return f"{', '.join(others)} or {last}" if others else last


def _choices(hint: Any) -> list[str]:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [choice for part in parts for choice in _choices(part)]
    if origin is Literal:
        return [repr(part) for part in parts]
    if origin is Annotated:
        limits = [_SIGNS[type(limit)].format(limit) for limit in parts[1:] if type(limit) in _SIGNS]
        return [" ".join([_words(parts[0]), " and ".join(limits)]).strip()]
    name = getattr(origin or hint, "__name__", str(hint))
    entries = f", each entry {_words(parts[0])}" if origin in (tuple, Sequence) else ""
    return [(_WORDS.get(str(hint)) or _WORDS.get(name) or f"a {name}") + entries]


def documented(cls: Class) -> Class:
    """Decorate a dataclass: its docstring lists all fields, its bases' too, each with the text that stands below it.

    Python keeps no docstring of a field; it is read from the source, and where there is none to read (a frozen
    application, `python -OO`), the docstring stays as it is.
    """
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            meanings |= _below(base)
    lines = [f"{field.name}: {meanings[field.name]}" for field in dataclasses.fields(cls) if field.name in meanings]
    if lines and cls.__doc__:
        indents = {"initial_indent": " " * 4, "subsequent_indent": " " * 8}
        listed = [textwrap.fill(line, width=100, break_on_hyphens=False, **indents) for line in lines]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__), "", "Args:", *listed])
    return cls


def _below(cls: type) -> dict[str, str]:
    """Field -> the string below it, in the body of this class alone."""
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except OSError:
        return {}
    pairs = zip(body.body, body.body[1:])
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }
