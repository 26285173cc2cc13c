import ast
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_environment_yml_and_pyproject_name_the_same_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python{project['requires-python']}" in listed
    assert sorted(listed[-1]["pip"]) == sorted([*wanted, "--editable ."])


def imports(path):
    """What a file of the package imports from it, as (room or file, ...) below `besa`."""
    tree = ast.parse(path.read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("besa.")}


def test_the_root_imports_machine_and_itself_only():
    files = [path for path in (ROOT / "besa").glob("*.py") if path.stem not in ("__init__", "__main__")]  # the doors
    for path in files:
        assert imports(path) <= {"machine", *(other.stem for other in files)}, path.name


def test_only_notebooks_and_reproduce_import_paper():
    for path in (ROOT / "besa").rglob("*.py"):
        assert path.parent.name == "paper" or "paper" not in imports(path), path
