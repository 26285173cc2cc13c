"""reproduce.tables: summaries, comparisons, files."""

import json

import pandas as pd
import pytest

from reproduce import tables

MACHINE = {
    "commit": "a" * 40,
    "modified": False,
    "hardware": "a CPU, 2 cores",
    "threads": 1,
    "versions": {"torch": "2"},
}


def record(row, value, seed=0, model="llama-7b", text="wikitext2", sparsity=0.5, profile="paper"):
    config = {"item": "table1", "model": model, "row": row, "seed": seed, "profile": profile, "calibration": "c4"}
    config |= {"dtype": "torch.float32", "device": "cpu", "method": {"sparsities": None}}
    outcome = {"metrics": {text: value}, "sparsity": sparsity, "seconds": 2.0, "peak_bytes": 2**30}
    provenance = MACHINE | {"date": "2026-01-02T03:04:05+00:00"}
    return {"config": config, "config_hash": f"hash{seed}", **outcome, "provenance": provenance}


def test_a_summary_has_a_line_per_record_and_means_over_seeds():
    records = [record("dense", 5.0), record("wanda", 7.0), record("wanda", 8.0, seed=1)]
    table = tables.summary(records)
    assert list(table["wikitext2"]) == [5.0, 7.0, 8.0] and list(table["peak GiB"]) == [1.0] * 3
    means = tables.over_seeds(table)
    assert list(means.index) == ["dense", "wanda"] and list(means.columns) == ["sparsity", "wikitext2", "± wikitext2"]
    assert means.loc["wanda", "wikitext2"] == 7.5 and means.loc["wanda", "± wikitext2"] == pytest.approx(0.5**0.5)
    assert tables.over_seeds(table.iloc[:2]).equals(table.iloc[:2])


def test_block_sparsities_count_zeros():
    rows = [
        {"block": 0, "rows": 2, "columns": 4, "sparsity": 0.5},
        {"block": 0, "rows": 4, "columns": 4, "sparsity": 0.25},
    ]
    rows.append({"block": 1, "rows": 2, "columns": 4, "sparsity": 0.75})
    assert tables.block_sparsities({"projections": rows}) == (8 / 24, 0.75)


def test_published_numbers_are_those_of_the_paper():
    assert tables.published("table1").loc["besa", "wikitext2"] == 6.86
    assert tables.published("table2", "accuracy_percent", "llama2-70b").shape == (4, 7)
    assert tables.published("table1", model="smollm2-135m").empty


def test_besa_is_compared_in_the_paper_and_here():
    records = [
        record("besa-row-wise", 8.0, model="small", text="wiki"),
        record("wanda", 10.0, model="small", text="wiki"),
    ]
    table = tables.beside_paper(records, "table1")
    assert list(table.index) == ["wanda"]
    assert table.loc["wanda", "small: wiki"] == pytest.approx(0.8)
    assert table.loc["wanda", "paper, llama-7b: wikitext2"] == pytest.approx(6.86 / 7.26)
    assert tables.compare(records, "table1").empty


def test_the_published_protocol_is_judged_at_two_percent():
    records = [record("wanda", 7.30), record("besa-row-wise", 7.30), record("dense", 5.0, profile="quick")]
    table = tables.compare(records, "table1")
    assert list(table["verdict"]) == ["reproduced", "not reproduced", "other settings", "no row here"]
    assert list(table["published"]) == [7.26, 6.86, 5.68, 7.22] and table["difference"].iloc[1] == "+6.4%"


def test_reference_records_are_found_on_another_machine(tmp_path):
    (tmp_path / "records").mkdir()
    theirs = record("wanda", 7.0)
    theirs["config"] |= {"dtype": "torch.bfloat16", "device": "cuda"}
    (tmp_path / "records" / "wanda.json").write_text(json.dumps(theirs))
    table = tables.beside_reference([record("wanda", 7.7), record("wanda", 7.0, seed=1)], tmp_path)
    assert list(table["difference"]) == ["+10.0%"]


def test_tables_are_written_rounded_and_in_full(tmp_path):
    frame = pd.DataFrame({"sparsity": [0.49694, 0.5], "wiki": [1 / 3, float("nan")], "seconds": [12.6, 3.0]})
    frame.index = pd.Index(["a", "c"], name="method")
    text = tables.write_table(frame, tmp_path, "stem", "A caption.")
    assert text == (tmp_path / "stem.md").read_text() and text.startswith("**A caption.**\n\n| method")
    assert "0.4969" in text and "0.33 " in text and "nan" not in text and "| 13 " in text
    assert pd.read_csv(tmp_path / "stem.csv", index_col="method").equals(frame)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stem.csv", "stem.md"]


def test_the_citation_names_paper_commit_and_rows():
    text = tables.citation([record("dense", 5.0), record("wanda", 7.0, seed=1)])
    assert "Peng Xu and Wenqi Shao" in text and "arXiv" not in text.split("@misc")[1]
    assert "commit aaaaaaaaaaaa, profile paper" in text and ", 2 rows " in text and "{https://openreview" in text
    assert text != tables.citation([record("dense", 5.0), record("wanda", 7.0, seed=2)])
    assert tables.sources([record("wanda", 7.0)])["commit"].tolist() == ["aaaaaaaaaaaa"]
