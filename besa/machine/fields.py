"""The meaning of a configuration's fields, written below each of them, where `help()` and Jupyter's `?` show it."""

import ast
import dataclasses
import inspect
import textwrap
from typing import TypeVar

Class = TypeVar("Class", bound=type)


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
