import dataclasses
import inspect
import pydoc

import besa
from besa.machine.fields import documented


@dataclasses.dataclass(kw_only=True)
class Base:
    size: int = 3
    """Of the base, in metres."""


@documented
@dataclasses.dataclass(kw_only=True)
class Derived(Base):
    """What it is.

    More of it.
    """

    colour: str
    """What it looks like, in words that
    go over two lines."""
    silent: bool = False
    kind = "no field"
    """Of the class."""


def test_a_docstring_lists_the_fields_its_bases_too_with_the_text_below_each():
    assert Derived.__doc__ == (
        "What it is.\n\nMore of it.\n\nArgs:\n"
        "    size: Of the base, in metres.\n"
        "    colour: What it looks like, in words that go over two lines."
    )


def test_help_shows_every_field_of_a_configuration_with_its_meaning():
    shown = pydoc.plain(pydoc.render_doc(besa.Quantize))
    for field in dataclasses.fields(besa.Quantize):
        assert f" {field.name}: " in shown
    assert "Columns that share a scale and a zero-point; None: a whole row (per channel)." in shown
    assert inspect.getdoc(besa.Quantize) == besa.Quantize.__doc__  # what Jupyter's `?` asks for


def test_without_source_the_docstring_stays(monkeypatch):
    monkeypatch.setattr(inspect, "getsource", lambda cls: (_ for _ in ()).throw(OSError("no source")))

    @documented
    @dataclasses.dataclass
    class Alone:
        """What it is."""

        size: int = 3
        """Lost."""

    assert Alone.__doc__ == "What it is."
