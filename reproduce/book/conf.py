"""The site that `make book` makes: README, tutorials, report, executed notebooks and the module's reference.

Sphinx's source folder is the repository, so that links between its files are links between pages. Nothing is copied or
generated: a file of besa/ is read as a page of its docstrings, and formulas become MathML, which browsers draw alone.
"""

import re

from docutils.nodes import SkipNode, math_block
from docutils.utils.math.latex2mathml import tex2mathml

import besa

project, copyright, release = "besa", "besa contributors", besa.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".py": "restructuredtext"}
root_doc = "README"
include_patterns = ["*.md", "notebooks/*.ipynb", "reproduce/README.md", "results/reference/*/*.ipynb", "besa/**.py"]
exclude_patterns = [".*", "**/.*", "build", "tests", "reproduce/templates", "besa/__main__.py"]
html_theme, html_title, html_copy_source, html_show_sphinx = "furo", "besa", False, False
html_static_path = html_css_files = ["site.css"]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
nb_execution_mode, nb_merge_streams, nb_render_markdown_format = "off", True, "myst"
default_role, highlight_language, autosummary_generate = "py:obj", "none", False
suppress_warnings = ["autosummary.import_cycle"]  # the front door lists what stands in the rooms
autodoc_member_order, autodoc_preserve_defaults, python_maximum_signature_line_length = "bysource", True, 100


def contents(docname: str, source: str) -> str:
    """What a page gets in the sidebar: the toctrees behind its text."""
    executed = re.findall(r"\[([^\]]+)\]\(\.\.(/results/[^)]+)\.ipynb\)", source)
    trees = {
        "README": {
            "Tutorials": ["notebooks/*"],
            "Results": ["reproduce/README"],
            "Reference": ["besa/__init__", "CONTRIBUTING", "CHANGELOG"],
        },
        "reproduce/README": {"Notebooks": [f"{title} <{page}>" for title, page in executed]},
    }
    tree = "\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {}\n\n{}\n```\n"
    return "".join(tree.format(caption, "\n".join(pages)) for caption, pages in trees.get(docname, {}).items())


def reference(docname: str) -> str:
    """The page of a module; a package's leads to its modules, the root's also to the public names."""
    name = docname.removesuffix("/__init__").replace("/", ".")
    text = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n"
    if not docname.endswith("/__init__"):
        return f"{text}   :members:\n"
    is_root = name == "besa"
    public = "".join(f"   ~besa.{home}.{public}\n" for public, home in besa._HOMES.items())
    text += f"\n.. autosummary::\n\n{public}" * is_root
    return f"{text}\n.. toctree::\n   :glob:\n   :titlesonly:\n\n   *\n" + "   */__init__\n" * is_root


def read(app, docname: str, source: list[str]) -> None:
    source[0] = reference(docname) if docname.startswith("besa/") else source[0] + contents(docname, source[0])


def hide_colons(app, what: str, name: str, thing, options, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in a constant's first line for its type."""
    lines[:1] = [line.replace(":", "\0") for line in lines[:1]]


def take_literally(app, what: str, name: str, thing, options, lines: list[str]) -> None:
    """A docstring is plain text: stars and bars mean themselves, and an indented paragraph stands as it is."""
    escape = lambda text: re.sub(r"(`[^`]*`)|(?<!\\)([*|]|_(?!\w))", lambda found: found[1] or "\\" + found[2], text)
    paragraphs = re.split(r"\n{2,}", "\n".join(lines).replace("\0", ":"))
    lines[:] = "\n\n".join(f"::\n\n{p}" if p.startswith("    ") else escape(p) for p in paragraphs).splitlines()


def skip_fields(app, what: str, name: str, thing, skip: bool, options) -> bool | None:
    """The docstring of a configuration lists its fields already."""
    described = callable(thing) or (isinstance(thing, property) and thing.__doc__)
    return True if what == "class" and not described else None


def draw(writer, node) -> None:
    formula = re.sub(r"\\tag\{(\w+)\}", r"\\qquad (\1)", node.astext())
    writer.body.append(tex2mathml(formula, as_block=isinstance(node, math_block)))
    raise SkipNode


def setup(app) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", hide_colons, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", take_literally, priority=600)  # after it
    app.connect("autodoc-skip-member", skip_fields)
    app.add_html_math_renderer("mathml", inline_renderers=(draw, None), block_renderers=(draw, None))
