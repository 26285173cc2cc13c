"""reproduce.page: README's tables and the report."""

import json
import math
import os

import pandas as pd
import pytest
import typer

from reproduce import REFERENCE, ROOT
from reproduce.page import __main__ as page
from reproduce.page.scorecard import scorecard

README, REPORT = ROOT / "README.md", ROOT / "reproduce" / "README.md"


def test_regenerating_the_pages_changes_nothing():
    assert page.fill(README.read_text(), page.parts()) == README.read_text()
    assert page.report() == REPORT.read_text()


def test_every_claim_has_a_verdict_from_records():
    card = pd.concat([scorecard(), scorecard(of_the_paper=False)])
    assert len(card) == len(pd.read_csv(ROOT / "reproduce" / "claims.csv"))
    verdicts = {entry.split()[-1] for verdict in card["verdict"] for entry in verdict.split(", ")}
    assert verdicts <= {"yes", "no", "undecided", "seeds", "sparsity"}  # too few seeds, other sparsity


def test_the_method_of_a_record_can_give_its_zeros():
    exact = {"wanda": True, "learned-clipping": True, "magnitude": False}  # floor(s n) by row, or by projection
    n_checked = 0
    for path in sorted(REFERENCE.glob("*/records/*.json")):
        record = json.loads(path.read_text())
        method = record["config"].get("method") or {}
        for row in record.get("projections", []) if method.get("method") in exact else []:
            sparsity = method["sparsities"][row["block"]] if "sparsities" in method else record["config"]["sparsity"]
            n = row["columns"] if exact[method["method"]] else row["rows"] * row["columns"]
            wanted = math.floor(sparsity * n) * (row["rows"] if exact[method["method"]] else 1)
            if row["sparsity"] and not method.get("pattern"):  # 0: ignored
                assert row["sparsity"] == pytest.approx(wanted / (row["rows"] * row["columns"]), abs=1e-9), path.name
                n_checked += 1
    assert n_checked > 1000


def test_markers_are_found_once():
    assert page.fill("a\n<!-- x -->\nold\n<!-- end -->\nb", {"x": r"n\1"}) == "a\n<!-- x -->\nn\\1\n<!-- end -->\nb"
    with pytest.raises(ValueError, match="0 markers <!-- y -->"):
        page.fill("text", {"y": "new"})


def test_the_newest_run_is_shown(tmp_path):
    folder = tmp_path / "table1"
    (folder / "records").mkdir(parents=True)
    for number, name in enumerate(("other-smoke.md", "tiny-smoke-verdicts.md", "tiny-smoke.md")):
        (folder / name).write_text(name)
        os.utime(folder / name, (number, number))
    (folder / "records" / "a.json").write_text(json.dumps({"config": {"model": "x/Tiny", "profile": "smoke"}}))
    shown = page.shown("table1", folder)
    assert "tiny-smoke.md" in shown and "tiny-smoke-verdicts.md" in shown and "other-smoke.md" not in shown
    with pytest.raises(typer.BadParameter, match="run `make table2` first"):
        page.shown("table2", tmp_path / "table2")
