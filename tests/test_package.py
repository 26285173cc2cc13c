"""besa as people import, start and install it, and the size that it may have."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

import besa

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def run(*arguments, **environment):
    """Run Python with `arguments` in a fresh process; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# Names and imports


def test_every_public_name_is_there():
    assert set(besa.__all__) <= set(dir(besa))
    assert all(callable(getattr(besa, name)) for name in besa.__all__)
    assert besa.quantize.Quantize is besa.Quantize and besa.evaluate.perplexity.perplexity is besa.perplexity
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        besa.prun  # noqa: B018


@pytest.mark.parametrize("command", ["import besa", "import runpy; runpy.run_module('besa', run_name='__main__')"])
def test_import_and_help_load_nothing_heavy(command):
    watch = "import atexit, sys; atexit.register(lambda: print('LOADED', 'torch' in sys.modules))"
    arguments = "sys.argv = ['besa', '--help']"
    assert run("-c", f"{watch}; {arguments}; {command}").endswith("LOADED False")


def test_importing_besa_asks_for_repeatable_sums():
    script = "import os; {}import besa; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    assert run("-c", script.format(""), CUBLAS_WORKSPACE_CONFIG=":16:8") == ":16:8"
    assert run("-c", script.format("os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None); ")) == ":4096:8"


EXTRAS = ("accelerate", "peft", "gguf", "lm_eval", "matplotlib", "IPython", "papermill", "tabulate", "scipy")
WITHOUT_EXTRAS = f"""
import sys
sys.modules |= dict.fromkeys({EXTRAS})
import torch, besa
from transformers import LlamaConfig, LlamaForCausalLM
shape = {{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}}
model, windows = LlamaForCausalLM(LlamaConfig(vocab_size=99, **shape)), torch.randint(0, 99, (4, 16))
for method in (besa.Wanda(), besa.Besa()):
    report = besa.prune(model, windows, method, progress=False)
besa.perplexity(model, windows.flatten(), 16, progress=False)
print(len(report.rows))
"""


def test_pruning_needs_no_extra():
    assert run("-c", WITHOUT_EXTRAS) == "14"


LOW = ["shapes", "system", "threads", "config", "kernels", "importance", "experts", "decoder", "masks", "quantize", "losses"]
ORDER = [*LOW, "report", "walk", "loop", "training", "baselines", "besa", "beyond", "data", "evaluate", "checkpoint"]
ORDER += ["__main__"]
"""A file of besa/ imports only what comes before it here."""


def imported(source):
    """Files and folders of besa/ that a source imports; a public name counts as the file it stands in."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports from besa in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
    inside = {name.split(".")[1] for name in names if name.startswith("besa.") and not name.startswith("besa.__")}
    return {besa._HOMES.get(name, f"besa.{name}").split(".")[1] for name in inside} | {
        "reproduce" for name in names if name.split(".")[0] == "reproduce"
    }


@pytest.mark.parametrize(
    "line, home",
    [
        ("from besa.data.text import TEXTS", "data"),
        ("from besa import masks", "masks"),
        ("from besa import Wanda", "baselines"),
        ("import besa\nbesa.perplexity(model)", "evaluate"),
        ("import besa.beyond.exact", "beyond"),
        ("from reproduce.page import table", "reproduce"),
    ],
)
def test_every_form_of_import_is_seen(line, home):
    assert imported(line) == {home}


@pytest.mark.parametrize("path", sorted((ROOT / "besa").rglob("*.py")), ids=lambda path: path.stem)
def test_arrows_go_down_only(path):
    own = path.relative_to(ROOT / "besa").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    allowed = set(ORDER[: ORDER.index(own)])
    if path.parent.name == "besa" and own not in ("checkpoint", "__main__"):
        allowed -= {"beyond", "data", "evaluate"}
    else:
        allowed.add(own)  # another file of the same folder
    assert imported(path.read_text()) <= allowed


# Size


def lines(*paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def joins(node):
    """`a, b = x, y`: two assignments in one statement."""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def test_code_readme_and_tests_stay_small():
    paths = list((ROOT / "besa").rglob("*.py"))
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    assert sum(isinstance(node, ast.stmt) for node in nodes) <= 2740
    assert sum(map(joins, nodes)) <= 12
    assert not [str(path) for path in paths if lines(path) > 330]
    others = [node for path in (ROOT / "reproduce").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    assert sum(isinstance(node, ast.stmt) for node in others) <= 1690
    assert lines(ROOT / "README.md") <= 120
    assert lines(ROOT / "reproduce" / "README.md") <= 150
    assert lines(*(ROOT / "tests").glob("*.py")) <= 5320


# Distribution


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_holds_one_admitted_version_of_every_requirement(python):
    place = {**default_environment(), "python_version": python, "python_full_version": f"{python}.7"}
    pins = [Requirement(line) for line in LOCK.splitlines() if not line.startswith("#")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(place)]
    locked = {pin.name: str(pin.specifier).removeprefix("==") for pin in here}
    assert len(locked) == len(here) and "://" not in LOCK
    extras = [entry for extra in PROJECT["optional-dependencies"].values() for entry in extra]
    for wanted in map(Requirement, [*PROJECT["dependencies"], *extras]):
        if wanted.name != PROJECT["name"]:
            assert wanted.specifier.contains(locked[wanted.name]), wanted


def test_the_wheel_holds_besa_alone_and_its_command(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("besa", "reproduce"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    run("-m", "pip", "--quiet", "wheel", *options, str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert b"besa = besa.__main__:app" in archive.read(entry_points)
    assert wheel.name.startswith("besa_pruning-")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "besa").rglob("*.py")} | {
        "besa/py.typed",
        "besa/__init__.pyi",
    }
    assert {name for name in names if ".dist-info/" not in name} == sources


def test_every_path_that_the_readmes_link_is_there():
    for name in ("README.md", "CONTRIBUTING.md", "reproduce/README.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"
