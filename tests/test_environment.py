import ast
import re
import tomllib
from importlib.util import resolve_name
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement

import besa

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = (ROOT / "requirements.lock").read_text()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_holds_one_admitted_version_of_all_that_is_asked_for(python):
    place = {**default_environment(), "python_version": python, "python_full_version": f"{python}.7"}
    lines = [Requirement(line) for line in LOCK.splitlines() if not line.startswith("#")]
    here = [line for line in lines if line.marker is None or line.marker.evaluate(place)]
    locked = {line.name: str(line.specifier).removeprefix("==") for line in here}
    assert len(locked) == len(here)
    for wanted in map(Requirement, [*PROJECT["dependencies"], *(name for extra in EXTRAS.values() for name in extra)]):
        assert wanted.specifier.contains(locked[wanted.name]), wanted


def test_the_lock_names_no_place_and_conda_and_make_take_it():
    assert "://" not in LOCK and "--" not in LOCK  # whatever index and wheels pip is set up for
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    everything = f".[{','.join(EXTRAS)}]"
    assert listed[0].startswith(f"python{PROJECT['requires-python']}")
    assert listed[-1]["pip"] == ["--constraint requirements.lock", f"--editable {everything}"]
    assert f"--constraint requirements.lock --editable '{everything}'" in (ROOT / "Makefile").read_text()


def imports(path):
    """What a file of the package imports from it, as (room or file, ...) below `besa`."""
    return imported(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))


def imported(source, package):
    """The same of a text in one of its folders; a public name counts as the file it stands in."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    found = [name.split(".")[1] for name in names if name.startswith("besa.")]
    return {besa._HOMES.get(name, name).split(".")[0] for name in found}


@pytest.mark.parametrize(
    "line, room",
    [
        ("from besa.paper.records import Run", "paper"),
        ("from besa.paper import records", "paper"),
        ("from besa import paper", "paper"),
        ("from besa import packed_kernels as kernels", "packed_kernels"),
        ("from besa import Wanda", "baselines"),
        ("from besa import perplexity", "evaluate"),
        ("from besa import *", "*"),
        ("from . import resume", "checkpoint"),
        ("from .resume import STATE", "checkpoint"),
        ("from .. import paper", "paper"),
        ("from ..paper import records", "paper"),
        ("import besa.paper.records", "paper"),
        ("import besa\nbesa.perplexity(model)", "evaluate"),
        ("import besa\nbesa.paper.records.Run", "paper"),
    ],
)
def test_every_form_of_import_is_seen(line, room):
    assert imported(line, "besa.checkpoint") == {room}


def test_the_root_imports_machine_and_itself_only():
    files = [path for path in (ROOT / "besa").glob("*.py") if path.stem not in ("__init__", "__main__")]  # the doors
    for path in files:
        assert imports(path) <= {"machine", *(other.stem for other in files)}, path.name


def test_only_notebooks_and_reproduce_import_paper():
    for path in (ROOT / "besa").rglob("*.py"):
        assert path.parent.name == "paper" or "paper" not in imports(path), path


def test_every_path_that_the_readmes_name_is_there():
    for name in ("README.md", "CONTRIBUTING.md", "reproduce/README.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"
    tree = re.search(r"^    besa/ .*?^      machine/", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    listed = set(re.findall(r"^ {6}(\w+)\.py ", tree.group(), re.MULTILINE))
    assert listed == {path.stem for path in (ROOT / "besa").glob("*.py")} - {"__init__", "__main__"}
