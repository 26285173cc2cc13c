import re
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


def test_a_file_of_the_module_imports_only_from_those_above_it_in_the_readme():
    tree = re.search(r"^    besa/ .*?^    notebooks/", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    order = re.findall(r"^ {6}(\w+)\.py ", tree.group(), re.MULTILINE)
    files = {path.stem: path.read_text() for path in (ROOT / "besa").glob("*.py") if path.stem != "__init__"}
    assert sorted(order) == sorted(files)
    for name, text in files.items():
        found = re.findall(r"^ *(?:from besa\.(\w+) import|from besa import (.+))", text, re.MULTILINE)
        imported = {part for one, several in found for part in (one or several).split(", ")} & files.keys()
        assert imported <= set(order[: order.index(name)]), name
