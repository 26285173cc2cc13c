"""besa as people import, start and install it."""

import ast
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import besa
from besa import packed_kernels as kernels
from besa.machine.provenance import provenance, results_root

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd=ROOT, path=ROOT, **more):
    """Python with `arguments` in a fresh process that finds besa in the folder `path`; what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "BESA_RESULTS"}
    environment |= {"PYTHONPATH": str(path), **more}
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_dir_is_the_public_api_and_every_name_of_it_is_there():
    assert dir(besa) == sorted(besa.__all__)
    assert all(callable(getattr(besa, name)) for name in besa.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        besa.prun  # noqa: B018


def test_editors_see_each_name_where_it_is_loaded_from():
    tree = ast.parse((ROOT / "besa" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.asname: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    assert seen == {name: f"besa.{home}" for name, home in besa._HOMES.items()}


@pytest.mark.parametrize(
    "arguments", [["-c", "import besa"], ["-m", "besa", "--help"], ["-m", "besa", "prune", "--help"]]
)
def test_import_and_help_load_nothing_heavy(arguments):
    look = (
        "import atexit, sys; atexit.register(lambda: print('LOADED', 'torch' in sys.modules, 'numpy' in sys.modules))"
    )
    run_module = f"import runpy; sys.argv = {['besa', *arguments[2:]]!r}; runpy.run_module('besa', run_name='__main__')"
    rest = arguments[1] if arguments[0] == "-c" else run_module
    assert run("-c", f"{look}; {rest}").endswith("LOADED False False")


def test_transformers_is_taught_however_often_its_file_is_looked_for(monkeypatch):
    """An import may be interrupted, `importlib.util.find_spec` only asks, and the file may be another finder's."""
    name, path = "transformers.modeling_utils", list(transformers.__path__)
    asked = []

    class Other:
        def find_spec(self, *wanted):
            asked.append(wanted)
            return importlib.machinery.PathFinder.find_spec(*wanted)

    monkeypatch.setattr(sys, "meta_path", [besa._TeachTransformers(), Other()])
    for number in range(3):
        spec = next(filter(None, (finder.find_spec(name, path) for finder in sys.meta_path)))
        assert "exec_module" in vars(spec.loader) and spec.origin.endswith("modeling_utils.py")
        assert asked == (number + 1) * [(name, path, None)]


def test_prune_is_the_function_whatever_is_imported_first():
    """The function and the file it stands in have one name."""
    script = """
import sys
for first in ("import besa.prune", "from besa.prune import Method", "from besa import Wanda",
              "from besa import prune", "from besa import *", "import besa; besa.quantize.save_quantized"):
    exec(first, {})
    import besa.prune
    assert besa.prune is sys.modules["besa.prune"].prune, first
    for name in [name for name in sys.modules if name.partition(".")[0] == "besa"]:
        del sys.modules[name]
print("all")
"""
    assert run("-W", "error::ImportWarning", "-c", script) == "all"


def test_importing_besa_asks_for_repeatable_sums():
    script = (
        "import os, besa; print(*map(os.environ.get, ('CUBLAS_WORKSPACE_CONFIG', 'FLASH_ATTENTION_DETERMINISTIC')))"
    )
    assert run("-c", script, CUBLAS_WORKSPACE_CONFIG=":16:8") == ":16:8 1"
    os_without = "import os; os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None); " + script
    assert run("-c", os_without) == ":4096:8 1"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with besa as a wheel installs it, and nothing else; no network is used."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "besa", source / "besa", ignore=shutil.ignore_patterns("__pycache__"))
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source), str(source))
    (wheel,) = source.glob("besa-*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel))
    return site


@pytest.fixture
def foreign(tmp_path):
    """Somebody's git repository, with a commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    unset = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}  # signatures, hooks
    subprocess.run([*git, "init", "--quiet"], check=True, env=unset)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True, env=unset)
    return tmp_path


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_the_wheel_holds_every_file_of_the_package(site):
    wanted = files_in(ROOT / "besa")
    assert files_in(site / "besa") == wanted and {"py.typed", "paper/published.csv"} <= set(wanted)


def test_an_installed_besa_keeps_out_of_its_own_folder_and_names_its_version(site, foreign):
    """In a foreign repository: results under the working directory, and no commit, since that one is not besa's."""
    before = files_in(site)
    script = """
import json, besa
from besa.machine.provenance import provenance
from besa.paper.records import open_folder
from besa.paper.tables import compare
config = {"item": "table1", "model": "llama-7b", "row": "wanda", "profile": "paper", "sparsity": 0.5}
record = {"config": config, "config_hash": "", "metrics": {"wikitext2": 7.3}, "provenance": provenance()}
print(json.dumps([besa.__file__, str(open_folder("table1")), record["provenance"], len(compare([record], "table1"))]))
"""
    file, folder, who, compared = json.loads(run("-c", script, cwd=foreign, path=site))
    assert file == str(site / "besa" / "__init__.py")
    assert folder == str(foreign / "results" / "table1") and (foreign / "results" / "table1" / "records").is_dir()
    assert (who["commit"], who["modified"]) == (f"besa {besa.__version__}", False)
    assert compared == 1  # published.csv came along
    assert files_in(site) == before


def test_an_installed_besa_is_a_command(site, foreign):
    command = [str(site / "bin" / "besa"), "--version"]
    script = subprocess.run(command, cwd=foreign, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True)
    assert script.stdout.decode().strip() == run("-m", "besa", "--version", cwd=foreign, path=site)
    assert f"besa {besa.__version__}" == script.stdout.decode().strip()


def test_an_installed_besa_answers_from_a_packed_folder_without_a_compiler(site, foreign):
    script = """
import besa, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **shape)).to(torch.bfloat16)
for parameter in model.model.layers.parameters():
    parameter.data[torch.rand(parameter.shape) < 0.5] = 0
besa.pack(model)
besa.save_packed(model, "packed")
"""
    run("-c", script, cwd=foreign, path=site)
    script = """
import shutil
assert not any(map(shutil.which, ("cc", "gcc", "clang", "c++", "ld", "as", "nvcc")))
import besa, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("packed", dtype="auto")
text = model.generate(torch.ones(3, 4, dtype=int), max_new_tokens=5, min_new_tokens=5)
print(type(model.model.layers[0].mlp.up_proj).__name__, text.shape)
"""
    nothing = {"PATH": str(foreign), "NUMBA_CACHE_DIR": str(foreign / "compiled"), "BESA_CACHE": str(foreign / "cache")}
    assert run("-c", script, cwd=foreign, path=site, **nothing) == "PackedLinear torch.Size([3, 9])"
    # compiled here, by numba
    assert kernels.instructions() == "none" or list((foreign / "compiled").rglob("*.nbc"))


def test_besas_own_checkout_keeps_its_commit_and_its_results(monkeypatch):
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("not a git repository")
    assert provenance()["commit"] == head
    monkeypatch.delenv("BESA_RESULTS")
    assert results_root() == ROOT / "results"
