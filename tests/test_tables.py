"""Records as tables: verdicts, the reference run, rounding, figures that repeat, citations."""

import json
import re
import runpy

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import besa
from besa.machine.provenance import ROOT
from besa.paper import tables
from besa.paper.records import open_folder, resolve_recipe, save_record

page = runpy.run_path(str(ROOT / "reproduce" / "page.py"))

CONFIG = {"item": "table1", "model": "llama-7b", "row": "wanda", "profile": "paper", "sparsity": 0.5}
CONFIG |= {"calibration": "c4", "sampler": "crop", "seed": 0, "n_samples": 128, "seq_len": 2048}
CONFIG |= {"dtype": "torch.float16", "method": besa.Wanda().config()}
BESA = {"row": "besa-row-wise", "method": besa.Besa().config()}
OUTCOME = {"metrics": {"wikitext2": 7.3, "c4": 9.0, "ptb": 80.14}, "sparsity": 0.5, "seconds": 3.0, "peak_bytes": 2**30}


@pytest.fixture
def record(tmp_path):
    """A function that writes a record."""
    folder = open_folder("table1", str(tmp_path))
    return lambda outcome=None, **config: save_record(folder, CONFIG | config, OUTCOME | (outcome or {}))


def compared(record, item, *options, over="text", **more):
    return tables.compare([record], item, *options, over=over, **more).set_index(over)


def test_one_draw_has_no_spread_but_what_is_not_a_number_is_shown(tmp_path):
    table = pd.DataFrame({"wiki": [21.456, float("nan")], "± wiki": [float("nan"), 0.423]}, index=["dense", "broken"])
    lines = tables.write_table(table, tmp_path, "t", "Two rows").splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in lines[4:6]}
    assert cells == {"dense": ["21.46", ""], "broken": ["nan", "0.42"]}


def test_comparison_finds_the_published_value_and_judges_within_two_percent(record):
    frame = compared(record(), "table1")
    assert frame.loc["wikitext2", "published"] == 7.26 and frame.loc["wikitext2", "verdict"] == "reproduced"
    assert frame.loc["c4", "verdict"] == "better"
    assert frame.loc["wikitext2", "difference"] == "+0.6%"
    assert frame["source"].str.startswith("Xu et al. 2024").all()


def test_comparison_judges_accuracies_by_the_higher_one_and_only_on_all_questions(record):
    config = BESA | {"item": "table2", "limit": None}
    metrics = {"piqa": 79.0, "boolq": 70.0, "average": 63.0}  # published: 76.66, 72.17, 63.13
    others = dict.fromkeys(("hellaswag", "winogrande", "arc_easy", "arc_challenge"), 1.0)
    frame = compared(record({"metrics": metrics | others}, **config), "table2", "accuracy_percent", over="task")
    judged = dict(frame["verdict"])
    assert {task: judged[task] for task in metrics} == {"piqa": "better", "boolq": "worse", "average": "reproduced"}
    two = compared(record({"metrics": metrics}, **config), "table2", "accuracy_percent", over="task")
    assert dict(two["verdict"]) == {"piqa": "better", "boolq": "worse", "average": "not judged: other tasks"}
    part = record({"metrics": metrics | others}, **config | {"limit": 100})
    assert set(compared(part, "table2", "accuracy_percent")["verdict"]) == {"not judged: other limit"}


@pytest.mark.parametrize(
    "others",
    [
        {"profile": "quick"},
        {"calibration": "sotu", "sampler": "pack"},
        {"seed": 1, "n_samples": 64, "seq_len": 512},
        {"dtype": "torch.bfloat16"},
        {"sparsity": 0.6},
        {"method.d_coef": 10.0},
        {"method.penalty": 1.0, "method.epochs": 3},
        {"method.budget": "exact"},
        {"method.pattern": "2:4"},
        {"sampler": None, "seed": None},
    ],
)
def test_runs_that_differ_in_any_published_value_or_do_not_name_it_are_not_judged(record, others):
    """The published d_coef of LLaMA-30B is 10, of LLaMA-13B 5."""
    own = {"row": "besa-row-wise", "method": besa.Besa(d_coef=5.0).config()}
    same = record(**own, model="llama-13b")
    assert set(compared(same, "table1")["verdict"]) <= {"reproduced", "better", "worse"}
    for name, value in others.items():
        part = own["method"] if name.startswith("method.") else own
        part[name.removeprefix("method.")] = value
    names = [name.removeprefix("method.") for name in others]
    other = record(**own, model="llama-13b")
    assert set(compared(other, "table1")["verdict"]) == {f"not judged: other {', '.join(names)}"}


def test_other_models_have_other_published_steps_and_some_no_published_numbers(record):
    own = {"row": "besa-row-wise", "method": besa.Besa(d_coef=10.0).config()}
    assert not compared(record(**own, model="llama-30b"), "table1")["verdict"].str.contains("not judged").any()
    assert tables.compare([record(model="smollm2-135m")], "table1").empty


def test_comparison_takes_the_values_of_the_named_metric_and_judges_no_impossible_ones(record):
    own = record({"metrics": {"q_proj": 2232.31, "down_proj": 7200.0}}, item="table4", **BESA)
    frame = compared(own, "table4", "cycles")  # beside sparsity and speed-up of q_proj
    assert frame["published"].to_dict() == {"q_proj": 2232.31, "down_proj": 6850.03}
    assert frame["verdict"].to_dict() == {"q_proj": "reproduced", "down_proj": "worse"}
    frame = compared(own, "table4", "cycles", impossible=[("down_proj", "besa")])
    assert frame.loc["down_proj", "verdict"] == "not judged: the printed number is not possible"


def test_the_reference_is_the_newest_record_that_was_asked_the_same(record, tmp_path):
    method = {"method": "wanda", "sparsity": 0.5}
    reference = record({"metrics": {"wiki": 50.0}}, method=method, dtype="torch.bfloat16", seed=0)
    record({"metrics": {"wiki": 60.0}}, method=method, seed=1)
    own = reference | {"metrics": {"wiki": 51.0, "sotu": 30.0}}
    own["config"] = reference["config"] | {"dtype": "torch.float32", "method": {**method, "quantize": None}}
    frame = tables.beside_reference([own], tmp_path)
    assert frame.loc["wanda"].to_dict() == {"of": "wiki", "ours": 51.0, "reference": 50.0, "difference": "+2.0%"}
    for other in ({"row": "dense"}, {"profile": "quick"}, {"method": {**method, "sparsity": 0.4}}, {"method": None}):
        assert tables.beside_reference([own | {"config": own["config"] | other}], tmp_path).empty


def test_tables_round_as_the_paper_does_and_keep_the_digits_in_the_csv(record, tmp_path):
    markdown = tables.write_table(tables.summary([record({"sparsity": 0.49663})]), tmp_path, "t", "Caption 50 %")
    assert "| wanda" in markdown and "0.4966" in markdown and "7.30" in markdown
    assert "0.49663" in (tmp_path / "t.csv").read_text()
    assert r"Caption 50 \%" in (tmp_path / "t.tex").read_text()


@pytest.mark.parametrize(
    ("cell", "markdown", "latex"),
    [
        (r"\input{/etc/passwd}", r"\\input{/etc/passwd}", r"\textbackslash input\{/etc/passwd\}"),
        ("a|b", r"a\|b", "a|b"),
        (r"a\|b", r"a\\\|b", r"a\textbackslash |b"),
        ("a\n\n| b", r"a \| b", None),
        ("a\\", "a\\\\", None),
        ("50 % & $x$ #1_2", "50 % & $x$ #1_2", r"50 \% \& \$x\$ \#1\_2"),
    ],
)
def test_cells_are_text_in_every_format_and_are_read_back_as_they_were(tmp_path, cell, markdown, latex):
    frame = pd.DataFrame({"row": [cell], cell: [1.5], "more": [cell]}).set_index("row")
    tables.write_table(frame, tmp_path, "t", cell)
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert len(lines) == 5 and lines[2].count(f" {markdown} ") == 1 and lines[4].count(f" {markdown} ") == 2
    text = (tmp_path / "t.tex").read_text()
    assert not re.search(r"\\input", text) and text.count("passwd") == 4 * cell.count("passwd")
    assert latex is None or text.count(latex) >= 3
    read = pd.read_csv(tmp_path / "t.csv")
    assert list(read) == ["row", cell, "more"] and read.iloc[0].tolist() == [cell, 1.5, cell]


def test_braces_and_backslashes_do_not_unbalance_a_citation(record):
    text = tables.citation([record(row=r"a}, note={\input{x}", model="org/{m^~", item="t}1")])
    entry = text.partition("@misc")[2]
    assert entry.count("{") == entry.count("}") and r"\input" not in entry
    assert r"\textbackslash{}input\textbraceleft{}x" in entry and r"\textasciicircum{}\textasciitilde{}" in entry
    depth = [entry[:end].count("{") - entry[:end].count("}") for end in range(1, len(entry))]
    assert min(depth[1:]) >= 0 and "note={" not in entry


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        figure, ax = plt.subplots()
        ax.plot([1, 2], [3, 4], "o-")
        tables.save_figure(figure, tmp_path, name)
        plt.close(figure)
    for suffix in ("svg", "png"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()
    assert "<dc:date>" not in (tmp_path / "one.svg").read_text()


def test_citation_names_every_row_commit_hardware_and_profile(record):
    rows = [record(row="wanda"), record(row="besa_row", model="org/My model #1")]
    text = tables.citation(rows)
    source = rows[0]["provenance"]
    for part in ("xu2024besa", "forum?id=gC6JTEU3jl", source["commit"][:12], source["hardware"], "profile paper"):
        assert part in text
    assert all(row["config_hash"] in text for row in rows) and r"besa\_row" in text
    assert (
        "author = {{besa contributors}}" in text and r"title  = {{besa, table1 on llama-7b, org/My model \#1}}" in text
    )
    key = text.partition("@misc{")[2].partition(",")[0]
    assert key == f"besa-table1-my-model-1-{rows[1]['config_hash']}"


def test_sources_tell_draws_apart_and_the_citation_has_the_last_day(record):
    rows = [record(row="wanda", seed=seed) for seed in (0, 1)]
    rows[0]["provenance"] = rows[0]["provenance"] | {"date": "2099-12-31T00:00:00+00:00"}
    assert list(tables.sources(iter(rows))["seed"]) == [0, 1]
    assert set(tables.sources(rows)["torch"]) == {rows[0]["provenance"]["versions"]["torch"]}
    assert "2099-12-31; rows:" in tables.citation(rows) and "year   = {2099}" in tables.citation(rows)
    del rows[1]["config"]["seed"]
    assert "seed" not in tables.sources(rows)


def test_seconds_are_shown_where_one_machine_took_them(record):
    rows = [record(row=row, method={"method": row}) for row in ("wanda", "sparsegpt")]
    assert list(tables.summary(rows)["seconds"]) == [row["seconds"] for row in rows]
    rows[1]["provenance"] = rows[1]["provenance"] | {"hardware": "another, 2 cores"}
    table = tables.summary(rows)
    assert "seconds" not in table and tables.over_draws(table).equals(table)
    rows[1]["config"]["method"] = None  # dense: nothing was timed there
    assert "seconds" in tables.summary(rows)


def test_old_records_are_read_as_new_ones():
    paths = sorted(tables.REFERENCE.glob("*/records/*.json"))
    found = [json.loads(path.read_text()) for path in paths]
    assert len(found) > 100 and all(record["config"]["profile"] != "smoke" for record in found)
    scored = [record for record in found if record["config"]["item"] not in ("cost", "scale")]
    assert len(tables.summary(scored)) == len(scored) and len(tables.sources(found)) == len(found)


def test_the_recipes_take_the_published_steps():
    published = pd.read_csv(ROOT / "besa" / "paper" / "published.csv").query("metric == 'd_coef'")
    assert len(published) == 14
    for _, row in published.iterrows():
        recipe = resolve_recipe(row["model"])
        assert row["value"] == (recipe.d_coef if row["method"] == "besa-row-wise" else recipe.d_coef_layer)
