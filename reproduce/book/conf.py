"""Site of `make book`: README, tutorials, report, executed notebooks, and the reference.

The source folder is the repository, so that links between files become links between pages. A file of besa/ is a page
with its docstrings. Formulas become MathML, which browsers draw without network.
"""

import re
from pathlib import Path
from textwrap import indent

from docutils.nodes import SkipNode, math_block
from docutils.utils.math.latex2mathml import tex2mathml

import besa

project, release, copyright = "besa", besa.__version__, "besa contributors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".py": "restructuredtext"}
root_doc = "README"
include_patterns = ["*.md", "notebooks/*.ipynb", "reproduce/README.md", "results/reference/*/*.ipynb", "besa/**.py"]
exclude_patterns = ["**/.*", "build", "besa/__main__.py"]
html_theme, html_title, html_copy_source, html_show_sphinx = "furo", f"besa {release}", False, False
html_static_path = html_css_files = ["site.css"]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
nb_execution_mode, nb_merge_streams, nb_render_markdown_format = "off", True, "myst"
default_role, highlight_language, autosummary_generate = "py:obj", "none", False
suppress_warnings = ["autosummary.import_cycle"]  # besa.besa.Besa is also besa.Besa
autodoc_member_order, autodoc_typehints, python_maximum_signature_line_length = "bysource", "none", 100
autodoc_inherit_docstrings, smartquotes = False, False

TOCTREE = "\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {}\n\n{}\n```\n"
SIDEBAR = {"Tutorials": "notebooks/*", "Results": "reproduce/README"}
SIDEBAR["Reference"] = "besa/__init__\nCONTRIBUTING\nCHANGELOG"
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = re.compile(r"\]\((?:reproduce/)?(\w+)\.ipynb\)")


def read(app, docname: str, source: list[str]) -> None:
    """Write the pages of the reference, and give README and report their entries in the sidebar."""
    if docname.startswith("besa/"):
        source[0] = reference(docname.removesuffix("/__init__").replace("/", "."))
    elif not docname.startswith("notebooks/"):
        source[0] = NOTEBOOK.sub(executed, source[0])
    if docname == "README":
        source[0] += "".join(TOCTREE.format(caption, pages) for caption, pages in SIDEBAR.items())
    elif docname == "reproduce/README":
        source[0] += TOCTREE.format("Notebooks", "/results/reference/*/*")


def executed(link: re.Match) -> str:
    """A link to reproduce/ITEM.ipynb leads to the executed notebook, or to the first of several."""
    folder = ROOT / "results" / "reference" / link[1]
    notebooks = sorted(folder.glob("*.ipynb"), key=lambda path: (path.stem != link[1], path))
    return f"](/{notebooks[0].relative_to(ROOT)})"


def reference(name: str) -> str:
    """The page of a module; that of besa has README's example, the public names, and their modules in order."""
    text = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n"
    if name != "besa":
        return f":orphan:\n\n{text}   :members:\n"
    homes = {public: getattr(besa, public).__module__ for public in besa.__all__}
    public = "".join(f"   ~{module}.{public}\n" for public, module in homes.items())
    pages = "".join(f"   /{module.replace('.', '/')}\n" for module in dict.fromkeys(homes.values()))
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    example = f".. code-block:: python\n\n{indent(snippet, '   ')}"
    return f"{text}\n{example}\n.. autosummary::\n\n{public}\n.. toctree::\n   :titlesonly:\n\n{pages}"


def plain_text(app, what: str, name: str, thing, options, lines: list[str]) -> None:
    """Take stars, bars and underscores literally, and indented paragraphs as formulas or code."""
    paragraphs = "\n".join(lines).split("\n\n")
    special = re.compile(r"(`[^`]*`)|(?<!\\)([*|]|_(?!\w))")
    for number, paragraph in enumerate(paragraphs):
        if paragraph.lstrip("\n").startswith("    "):
            paragraphs[number] = f"::\n\n{paragraph}"
        else:
            paragraphs[number] = special.sub(lambda match: match[1] or "\\" + match[2], paragraph)
    lines[:] = "\n\n".join(paragraphs).splitlines()


def skip_fields(app, what: str, name: str, thing, skip: bool, options) -> bool | None:
    """Leave out the fields of configurations, which the docstring of the class lists."""
    described = callable(thing) or (isinstance(thing, property) and thing.__doc__)
    return True if what == "class" and not described else None


def draw(writer, node) -> None:
    formula = re.sub(r"\\tag\{(\w+)\}", r"\\qquad (\1)", node.astext())
    writer.body.append(tex2mathml(formula, as_block=isinstance(node, math_block)))
    raise SkipNode


def setup(app) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", plain_text, priority=600)  # after napoleon
    app.connect("autodoc-skip-member", skip_fields)
    app.add_html_math_renderer("mathml", inline_renderers=(draw, None), block_renderers=(draw, None))
