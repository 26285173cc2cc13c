"""Checks at the border: of the fields of configurations, and of the arguments of public functions."""

import dataclasses
import functools
import os
import pkgutil
import sys
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from annotated_types import Ge, Lt
from beartype import BeartypeConf, BeartypeViolationVerbosity, beartype
from pydantic import ConfigDict, ValidationError

Sparsity = Annotated[float, Ge(0), Lt(1)]
C = TypeVar("C", bound=type)

checked = beartype(conf=BeartypeConf(violation_type=TypeError, violation_verbosity=BeartypeViolationVerbosity.MINIMAL))
"""Check arguments by their annotations; an error names the argument, its value and its type in one sentence."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: C) -> C:
    """Make a class a frozen dataclass whose fields pydantic checks; an error is one sentence."""
    rules = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=rules)(cls)
    check = made.__init__

    @functools.wraps(check)
    def init(self: Any, **fields: Any) -> None:
        refuse_unknown(made, fields)
        try:
            check(self, **fields)
        except ValidationError as error:
            raise ValueError(f"{made.__name__}: {first_problem(error)}") from None

    made.__init__ = init
    return made  # pyright: ignore[reportReturnType]


def refuse_unknown(cls: type, names: Iterable[str]) -> None:
    """Refuse names that are no fields of a configuration."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            hint = "; Exact, Wanda, SparseGPT and Magnitude take patterns" if name == "pattern" else ""
            raise ValueError(f"{cls.__name__} has no field {name!r} (fields: {', '.join(known)}){hint}")


def first_problem(error: ValidationError) -> str:
    """Field, problem and value of the first error."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if not name:  # raised by the class itself
        return first["msg"].removeprefix("Value error, ")
    hint = "; 0.5 is 50 %" if name.startswith("sparsit") else ""
    return f"{name}: {first['msg']}, not {first['input']!r}{hint}"


def method_class(name: str) -> type:
    """A method of yours by "package.module:Class"; the package may lie in the working folder."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {name!r} cannot be imported: {error}") from error
