"""The page of all results, built from records in a temporary folder."""

import json
import re
import runpy
import shutil
from html import unescape
from urllib.parse import unquote

import nbformat
import pandas as pd
import pytest
import typer
from matplotlib.figure import Figure

from besa.machine.provenance import ROOT
from besa.paper import records, tables

report = runpy.run_path(str(ROOT / "reproduce" / "page.py"))
build = report["build"]


@pytest.fixture
def folders(tmp_path):
    """reproduce/ with two notebooks, and an empty results/."""
    reproduce = tmp_path / "reproduce"
    reproduce.mkdir()
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "besa" / "paper" / "published.csv", reproduce)
    write_notebook(reproduce / "cost.ipynb", "# Cost, <measured>\n\n**Claim**: little.\n\n**Here**: all.")
    write_notebook(reproduce / "table1.ipynb", "# Table 1\n\n**Claim**: `-f`\n\n`-f reproduce/params/llama-7b.yaml`")
    return reproduce, tmp_path / "results"


def write_notebook(path, text):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), path)


def run(folders, model, profile, caption="Perplexity", **perplexities):
    """What a notebook leaves: a record per row, a table, the comparison and a figure."""
    folder = records.open_folder("table1", str(folders[1] / "table1"))
    config = {"item": "table1", "model": model, "profile": profile, "sparsity": 0.5}
    outcome = {"sparsity": 0.5, "seconds": 1.0, "peak_bytes": 2**30}
    rows = {row.replace("_", "-"): {"wikitext2": value} for row, value in perplexities.items()}
    written = [
        records.save_record(folder, config | {"row": row}, outcome | {"metrics": metrics})
        for row, metrics in rows.items()
    ]
    stem = f"{tables.slug(model)}-{profile}"
    tables.write_table(tables.summary(written), folder, stem, caption)
    if len(compared := tables.compare(written, "table1")):
        tables.write_table(compared, folder, f"{stem}-published", "Ours beside published")
    tables.save_figure(Figure(), folder, stem)
    return written


def build_texts(folders):
    texts, skipped = build(*folders)
    readme, page = texts.values()
    return readme, page, skipped


def test_every_run_has_its_table_figure_provenance_and_verdict(folders):
    rows = run(folders, "llama-7b", "paper", wanda=7.3, besa_row_wise=8.0)  # published: 7.26, 6.86
    run(folders, "smollm2-135m", "quick", dense=20.0, sparsegpt=40.0, wanda=50.123, besa_row_wise=45.0)
    readme, page, skipped = build_texts(folders)
    assert not skipped
    judged = "llama-7b, paper: of 2 published numbers 1 reproduced, 1 worse"
    embedded = "smollm2-135m, quick; wikitext2: best sparsegpt 40.00 (besa-row-wise 45.00, wanda 50.12, dense 20.00)"
    for text in (readme, page):
        assert judged in text and f"not comparable: {embedded}" in text
    source = rows[0]["provenance"]
    for shown in (
        source["commit"][:12],
        source["date"][:10],
        source["hardware"],
        f"torch {source['versions']['torch']}",
    ):
        assert shown in unescape(page)
    assert all(f">{record['config_hash']}</a>" in page for record in rows)
    assert page.count("@misc{besa-") == 2 and page.count("@inproceedings{xu2024besa,") == 1
    assert "<mark>published</mark> Ours beside published" in page
    assert '<td class="number">50.12</td>' in page  # rounded as the written table is


def test_all_links_lead_to_files(folders):
    run(folders, "org/my model #1", "quick", wanda=7.3)
    readme, page, _ = build_texts(folders)
    linked = re.findall(r'(?:href|src)="([^"#]+)"', page)
    assert len(linked) > 8 and all((folders[1] / unquote(unescape(link))).is_file() for link in linked)
    assert "://" not in "".join(linked)
    (folders[1] / "index.html").touch()
    linked = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(linked) >= 6 and all((folders[0] / unquote(link)).exists() for link in linked)


def test_titles_order_and_recipe_come_from_the_notebooks(folders):
    readme, page, _ = build_texts(folders)
    rows = [line for line in readme.splitlines() if "make " in line and line.startswith("|")]
    assert len(rows) == 2 and rows[0].startswith("| Table 1 |") and rows[1].startswith("| Cost, &lt;measured&gt; |")
    assert "results/table1/llama-7b.ipynb -f reproduce/params/llama-7b.yaml" in rows[0] and "-f" not in rows[1]
    assert all(row.count("not run yet") == 2 for row in rows)
    assert page.count("Not run yet.") == 2 and "<strong>Claim</strong>: little." in page and "all." not in page


def test_what_is_held_against_the_released_code_comes_first(folders):
    write_notebook(folders[0] / "fidelity.ipynb", "# Fidelity")
    folder = records.open_folder("fidelity", str(folders[1] / "fidelity"))
    config = {"item": "fidelity", "model": "smollm2-135m", "profile": "quick", "row": "layer"}
    records.save_record(folder, config, {"metrics": {"loss": 0.0}})
    verdicts = pd.DataFrame({"verdict": ["reproduced", "not reproduced", "reproduced"]})
    tables.write_table(verdicts, folder, "smollm2-135m-quick-released", "Ours beside the released code's")
    readme, page, _ = build_texts(folders)
    said = "smollm2-135m, quick: of 3 comparisons with the released code 2 reproduced, 1 not reproduced"
    assert said in readme and said in page
    assert readme.index("| Fidelity |") < readme.index("| Table 1 |") < readme.index("| Cost, ")


def test_text_from_records_and_captions_is_escaped(folders):
    run(folders, "<script>x|y", "quick", caption="<img src=x> & more", wanda=7.3)
    readme, page, _ = build_texts(folders)
    assert "<script" not in readme + page and "<img src=x>" not in page
    assert "&lt;img src=x&gt; &amp; more" in page and r"&lt;script&gt;x\|y" in readme


def test_broken_records_and_tables_are_skipped_by_name(folders):
    run(folders, "llama-7b", "quick", wanda=7.3, besa_row_wise=6.8)
    folder = folders[1] / "table1" / "records"
    (folder / "broken.json").write_text("{")
    (folder / "empty.json").write_text('{"config": {}}')
    (folders[1] / "table1" / "notes.md").write_text("nothing")
    readme, page, skipped = build_texts(folders)
    assert [line.split(" ")[0] for line in skipped] == ["table1/notes.md", "table1/broken.json", "table1/empty.json"]
    for name in ("broken.json", "empty.json", "notes.md"):
        assert name in readme and name in page
    assert "2 not judged: other protocol" in readme


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": None}, "its config lacks item"),
        ({"config": []}, "its config lacks item"),
        ({"config.row": 7}, "its config lacks row, or holds one that is no str"),
        ({"config.model": None}, "its config lacks model"),
        ({"config.profile": ["quick"]}, "its config lacks profile"),
        ({"config.sparsity": "half"}, "its sparsity cannot be read"),
        ({"config.method": "wanda"}, "its method cannot be read"),
        ({"provenance": {}}, "its provenance lacks commit"),
        ({"provenance.date": 20260101}, "its provenance lacks date"),
        ({"provenance.versions": ["torch"]}, "its provenance lacks versions"),
        ({"config_hash": None}, "its config_hash cannot be read"),
        ({"metrics": [7.3]}, "its metrics cannot be read"),
        ({"metrics": {"wikitext2": "7.3"}}, "its metrics cannot be read"),
        ({"metrics": {"wikitext2": 10**400}}, "its metrics cannot be read"),
        ({"stderr": [0.1]}, "its stderr cannot be read"),
    ],
)
def test_records_of_another_kind_are_named_and_stop_nothing(folders, change, words):
    (record,) = run(folders, "llama-7b", "quick", wanda=7.3)
    _, page, _ = build_texts(folders)
    for key, value in change.items():
        part, _, name = key.rpartition(".")
        (record[part] if part else record)[name] = value
    odd = folders[1] / "table1" / "records" / "odd.json"
    odd.write_text(json.dumps(record))
    _, page_with, skipped = build_texts(folders)
    assert len(skipped) == 1 and skipped[0].startswith("table1/odd.json (") and words in skipped[0]
    rest = [line for line in page_with.splitlines() if "<mark>skipped</mark>" not in line]
    assert rest == page.splitlines()
    shown = report["shown"]("table1", folders[1] / "table1")
    assert "skipped odd.json" in shown and "7.30" in shown


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"null", b"\xff", b"[" * 100000])
def test_what_is_no_record_at_all_is_named(folders, content):
    run(folders, "llama-7b", "quick", wanda=7.3)
    (folders[1] / "table1" / "records" / "odd.json").write_bytes(content)
    (line,) = build_texts(folders)[2]
    assert line.startswith("table1/odd.json (")
    with pytest.warns(UserWarning, match=r"odd.json is skipped"):
        tables.beside_reference([], folders[1] / "table1")


def test_showing_what_was_never_run_says_how_to_run_it(tmp_path):
    with pytest.raises(typer.BadParameter, match=r"holds no table of 'table1'; .* make table1"):
        report["shown"]("table1", tmp_path)


def test_rows_of_several_runs_are_not_ranked(folders):
    run(folders, "smollm2-135m", "quick", wanda=50.0)
    folder, config = folders[1] / "table1", {"item": "table1", "model": "smollm2-135m", "profile": "quick"}
    config |= {"sparsity": 0.5, "row": "wanda", "seed": 1}
    records.save_record(folder, config, {"metrics": {"wikitext2": 60.0}})
    assert "smollm2-135m, quick; see the tables" in build_texts(folders)[0]


def test_only_whole_models_of_the_same_sparsity_are_ranked_with_their_standard_errors(folders):
    run(folders, "smollm2-135m", "quick", wanda=50.0, joint_besa=45.0)
    folder, config = folders[1] / "table1", {"item": "table1", "model": "smollm2-135m", "profile": "quick"}
    for row, more in {
        "quantized": {"sparsity": 0.0},
        "k_proj": {"sparsity": 0.5, "method": {"kind": "k_proj"}},
    }.items():
        records.save_record(folder, config | {"row": row} | more, {"metrics": {"wikitext2": 30.0}})
    outcome = {"metrics": {"wikitext2": 60.0, "error last block": 0.5}, "stderr": {"average": 1.354}}
    records.save_record(folder, config | {"row": "sparsegpt", "sparsity": 0.5}, outcome)
    text = build_texts(folders)[0]
    assert "wikitext2: best joint-besa 45.00 (wanda 50.00, sparsegpt 60.00 ± 1.35)" in text and "error last" not in text
    outcome["metrics"]["wikitext2"] = 20.0
    records.save_record(folder, config | {"row": "sparsegpt", "sparsity": 0.5}, outcome)
    assert "wikitext2: best sparsegpt 20.00 ± 1.35 (joint-besa 45.00, wanda 50.00)" in build_texts(folders)[0]


def test_a_broken_notebook_is_named(folders):
    (folders[0] / "table9.ipynb").write_text("{")
    with pytest.raises(ValueError, match=r"table9.ipynb is not a notebook"):
        build(*folders)


def test_smoke_runs_are_left_out(folders):
    before = build_texts(folders)
    run(folders, "smollm2-135m", "smoke", wanda=7.3)
    assert build_texts(folders) == before


def test_what_a_run_left_is_shown_with_the_reference_last(folders):
    run(folders, "smollm2-135m", "quick", caption="Other", wanda=7.0)
    rows = run(folders, "tiny", "quick", caption="Mine", wanda=50.123)
    folder = folders[1] / "table1"
    tables.write_table(tables.summary(rows), folder, "tiny-quick-reference", "Ours beside reference")
    text = report["shown"]("table1", folder)
    assert (
        text.index("**Mine**") < text.index("50.12") < text.index("**Ours beside reference**") < text.index(str(folder))
    )
    assert "Other" not in text and text.endswith(str(folder / "records"))


def test_the_page_of_ones_own_runs_leaves_the_index_alone(folders):
    index = (ROOT / "reproduce" / "README.md").read_bytes()
    report["main"](folders[1], "")
    assert (folders[1] / "index.html").is_file() and (ROOT / "reproduce" / "README.md").read_bytes() == index


def test_the_committed_report_is_up_to_date():
    for path, text in build(ROOT / "reproduce", tables.REFERENCE)[0].items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date: run `make report`"
