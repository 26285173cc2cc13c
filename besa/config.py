"""Checks at the border: of the fields of configurations, and of the arguments of public functions."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from annotated_types import Ge, Lt
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from pydantic import ConfigDict, ValidationError

CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
Sparsity = Annotated[float, Ge(0), Lt(1)]
C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: C) -> C:
    """Make a class a frozen dataclass whose fields pydantic checks; an error is one sentence."""
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=CONFIG)(cls)
    check = made.__init__

    @functools.wraps(check)
    def init(self: Any, **fields: Any) -> None:
        refuse_unknown(made, fields)
        try:
            check(self, **fields)
        except ValidationError as error:
            raise ValueError(f"{made.__name__}: {first_problem(error)}") from None

    made.__init__ = init
    return made


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
    return f"{name}: {first['msg']}, not {described(first['input'])}{hint}"


def checked(function: F) -> F:
    """Check arguments by their annotations; an error names the argument in one sentence."""
    typechecked = jaxtyped(typechecker=beartype)(function)
    pattern = rf"{function.__qualname__}\.\n.*parameter '(\w+)'.*\nExpected type: (.*?)\.\n---"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return typechecked(*args, **kwargs)
        except TypeCheckError as error:
            problem = re.search(pattern, str(error), re.DOTALL)
            if problem is None:
                raise
            value = inspect.signature(function).bind(*args, **kwargs).arguments[problem[1]]
            wanted = re.sub(r"<class '|'>|\b(?:\w+\.)+(?=\w)", "", problem[2])
            raise TypeError(f"{function.__name__}: {problem[1]} must be {wanted}, not {described(value)}") from None

    return call  # pyright: ignore[reportReturnType]


def described(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}: write {value.__name__}()"
    if hasattr(value, "merge_and_unload"):
        return f"a {type(value).__name__}: merge its adapters first, model.merge_and_unload()"
    return repr(value)[:80] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
