"""What a run's identity depends on: the code that decides the bytes, and no other."""

import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import besa
from besa.checkpoint.resume import classes_of, code_hash, open_run
from besa.inputs.models import STATE
from besa.paper.analysis import WandaOneKind

PACKAGE = Path(__file__).parents[1] / "besa"


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "besa", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "besa"


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_figures_label_a_comment_and_a_docstring_change_no_identity(copied):
    before = code_hash(copied)
    assert before == code_hash(PACKAGE)
    edit(copied / "report.py", '"block"', '"decoder block"')
    edit(copied / "allocation.py", "Rank 0 is the least important", "Rank 0 matters least")
    (copied / "besa.py").write_text("# a remark\n" + (copied / "besa.py").read_text())
    for place in ("paper/more.py", "machine/memory.py", "checkpoint/plan.py"):
        (copied / place).write_text("x = 1\n")
    assert code_hash(copied) == before


@pytest.mark.parametrize("place", ["allocation.py", "machine/processes.py", "checkpoint/format.py"])
def test_code_that_decides_the_bytes_changes_it_in_whatever_folder(copied, place):
    before = code_hash(copied)
    (copied / place).write_text((copied / place).read_text() + "\nx = 1\n")
    assert code_hash(copied) != before


def test_a_new_room_counts(copied):
    before = code_hash(copied)
    (copied / "new").mkdir()
    (copied / "new" / "code.py").write_text("x = 1\n")
    assert code_hash(copied) != before


def test_an_option_that_is_none_differs_from_one_that_was_not_there(tmp_path):
    """As of a method that got a field since."""
    (tmp_path / STATE).mkdir()
    open_run(tmp_path, {"method": {"sparsity": 0.5}}, 0, {})
    with pytest.raises(ValueError, match=r"another method \(mine\): 'nothing' there, None now"):
        open_run(tmp_path, {"method": {"sparsity": 0.5, "mine": None}}, 1, {})
    with pytest.raises(ValueError, match=r"another reconstruct: 'nothing' there, None now"):
        open_run(tmp_path, {"method": {"sparsity": 0.5}, "reconstruct": None}, 1, {})


def test_the_fields_of_your_own_method_come_back_from_a_file_as_they_were_put_there():
    @dataclass(frozen=True, kw_only=True)
    class Mine(besa.Wanda):
        steps: tuple[tuple[int, float], ...] = ((1, 0.25), (2, 0.5))

    assert Mine().config() == json.loads(json.dumps(Mine().config()))


MINE = """
from besa.baselines import Wanda

class Mine(Wanda):
    "{}"
    def prune_block(self, block):
        return {}
"""


def test_a_method_of_ones_own_counts_with_its_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for name, words in {"a": ("a word", 1), "b": ("another", 1), "c": ("a word", 2)}.items():
        (tmp_path / f"mine_{name}.py").write_text(MINE.format(*words))
        found.append(classes_of(importlib.import_module(f"mine_{name}").Mine())["Mine"])
    assert None not in found and found[0] == found[1] != found[2]
    assert classes_of(besa.Besa()) == {} and list(classes_of(WandaOneKind(kind="q_proj"))) == ["WandaOneKind"]
    names = {}
    exec(MINE.format("", 1), names)
    assert classes_of(names["Mine"]()) == {"Mine": None}
