"""The report and the site's contents: built from records in a temporary folder."""

import json
import re
import runpy
from fnmatch import fnmatch
from types import SimpleNamespace
from urllib.parse import unquote

import nbformat
import pandas as pd
import pytest
import typer
from matplotlib.figure import Figure

import besa
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
    write_notebook(reproduce / "cost.ipynb", "# Cost, <measured>\n\n**Claim**: little.")
    write_notebook(reproduce / "table1.ipynb", "# Table 1\n\n**Claim**: much.")
    return reproduce, tmp_path / "results"


def write_notebook(path, text):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), path)


def run(folders, model, profile, caption="Perplexity", **perplexities):
    """What a notebook leaves: a record per row, a table, the comparison and a figure."""
    folder = records.open_folder("table1", str(folders[1] / "table1"))
    config = {"item": "table1", "model": model, "profile": profile, "sparsity": 0.5, "dtype": "torch.float16"}
    config |= {"calibration": "c4", "sampler": "crop", "seed": 0, "n_samples": 128, "seq_len": 2048}
    methods = {"wanda": besa.Wanda().config(), "besa-row-wise": besa.Besa().config()}
    outcome = {"sparsity": 0.5, "seconds": 1.0, "peak_bytes": 2**30}
    rows = {row.replace("_", "-"): {"wikitext2": value} for row, value in perplexities.items()}
    written = [
        records.save_record(folder, config | {"row": row, "method": methods.get(row)}, outcome | {"metrics": metrics})
        for row, metrics in rows.items()
    ]
    stem = f"{tables.slug(model)}-{profile}"
    tables.write_table(tables.summary(written), folder, stem, caption)
    if len(compared := tables.compare(written, "table1")):
        tables.write_table(compared, folder, f"{stem}-published", "Ours beside published")
    tables.save_figure(Figure(), folder, stem)
    return written


def report_of(folders):
    return build(*folders, folders[0] / "README.md")


def test_every_run_has_its_table_figure_and_verdict(folders):
    run(folders, "llama-7b", "paper", wanda=7.3, besa_row_wise=8.0)  # published: 7.26, 6.86
    run(folders, "smollm2-135m", "quick", dense=20.0, sparsegpt=40.0, wanda=50.123, besa_row_wise=45.0)
    readme, skipped = report_of(folders)
    assert not skipped
    judged = "llama-7b, paper: published numbers: reproduced 1 of 2, worse 1 of 2"
    assert judged in readme and "smollm2-135m, quick: not judged" in readme
    for stem in ("llama-7b-paper.csv", "llama-7b-paper-published.csv", "smollm2-135m-quick.csv", "llama-7b-paper.png"):
        assert f"](../results/table1/{stem})" in readme


def test_a_run_that_is_not_finished_says_how_many_rows_it_has(folders):
    run(folders, "smollm2-135m", "paper", dense=20.0, wanda=50.123)
    for path in (folders[1] / "table1").glob("smollm2-135m-paper*"):
        path.unlink()
    run(folders, "smollm2-135m", "quick", wanda=60.0)
    readme, skipped = report_of(folders)
    assert not skipped and readme.count("no table yet") == 1
    assert "smollm2-135m, paper: rows so far: 2, no table yet" in readme


def test_all_links_lead_to_files(folders):
    run(folders, "org/my model #1", "quick", wanda=7.3)
    for name in ("my run", "table1"):
        write_notebook(folders[1] / "table1" / f"{name}.ipynb", "# Table 1")
    text, _ = report_of(folders)
    linked = re.findall(r"\]\(([^)#][^)]*)\)", text)
    assert "(#how-claims-are-judged)" in text and "\n## How claims are judged\n" in text
    assert len(linked) == 4 and all((folders[0] / unquote(link)).is_file() for link in linked)
    assert linked[0] == "../results/table1/table1.ipynb"


def test_what_is_held_against_the_released_code_comes_first(folders):
    write_notebook(folders[0] / "fidelity.ipynb", "# Fidelity")
    folder = records.open_folder("fidelity", str(folders[1] / "fidelity"))
    config = {"item": "fidelity", "model": "smollm2-135m", "profile": "quick", "row": "layer"}
    records.save_record(folder, config, {"metrics": {"loss": 0.0}})
    verdicts = pd.DataFrame({"verdict": ["reproduced", "not reproduced", "reproduced"]})
    tables.write_table(verdicts, folder, "smollm2-135m-quick-released", "Ours beside the released code's")
    text, _ = report_of(folders)
    assert "quick: comparisons with the released code: reproduced 2 of 3, not reproduced 1 of 3" in text
    assert text.index("| Fidelity |") < text.index("| Table 1 |") < text.index("| Cost, ")


@pytest.fixture(scope="module")
def conf():
    pytest.importorskip("docutils", reason="the extra docs is not installed")
    return runpy.run_path(str(ROOT / "reproduce" / "book" / "conf.py"))


def test_the_site_leads_to_every_page(conf):
    """Its contents are the toctrees that conf.py puts behind the front page and the report."""
    contents = conf["contents"]
    names = ["README", "reproduce/README"]
    trees = [contents(name, (ROOT / f"{name}.md").read_text()) for name in names]
    entries = [re.sub(r".* <(.*)>", r"\1", line).lstrip("/") for tree in trees for line in tree.splitlines()]
    pages = [*ROOT.glob("*.md"), *ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("results/reference/*/*.ipynb")]
    pages = [str(page.relative_to(ROOT).with_suffix("")) for page in pages if page.name != "README.md"]
    assert len(pages) >= 20
    assert not [page for page in pages if not any(fnmatch(page, entry) for entry in entries if entry)]


def test_the_site_draws_every_formula_without_a_script(conf):
    paths = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("results/reference/*/*.ipynb")]
    cells = [cell.source for path in paths for cell in nbformat.read(path, as_version=4).cells]
    formulas = {formula for cell in cells for formula in re.findall(r"(?s)\$\$(.*?)\$\$", cell)}
    assert len(formulas) >= 8
    for formula in formulas:
        writer = SimpleNamespace(body=[])
        with pytest.raises(conf["SkipNode"]):
            conf["draw"](writer, conf["math_block"]("", formula))
        assert writer.body[0].startswith("<math") and "tag" not in writer.body[0] and "\\" not in writer.body[0]


def test_the_site_takes_docstrings_literally(conf):
    lines = ["One: by |W_ij| * `a * b`, or W_.", "", "    c * d"]
    conf["hide_colons"](None, "data", "", None, None, lines)
    assert ":" not in lines[0]
    conf["take_literally"](None, "data", "", None, None, lines)
    assert lines == [r"One: by \|W_ij\| \* `a * b`, or W\_.", "", "::", "", "    c * d"]


def test_titles_and_order_come_from_the_notebooks(folders):
    readme, _ = report_of(folders)
    rows = [line for line in readme.splitlines() if "make " in line and line.startswith("|")]
    assert len(rows) == 2 and rows[0].startswith("| Table 1 |") and rows[1].startswith("| Cost, &lt;measured&gt; |")
    assert all(row.count("not run yet") == 2 for row in rows)


def test_text_from_records_is_escaped(folders):
    run(folders, "<script>x|y", "quick", wanda=7.3)
    readme, _ = report_of(folders)
    assert "<script" not in readme and r"&lt;script&gt;x\|y" in readme


def test_broken_records_and_tables_are_skipped_by_name(folders):
    run(folders, "llama-7b", "quick", wanda=7.3, besa_row_wise=6.8)
    folder = folders[1] / "table1" / "records"
    (folder / "broken.json").write_text("{")
    (folder / "empty.json").write_text('{"config": {}}')
    (folders[1] / "table1" / "notes.csv").write_text("")
    readme, skipped = report_of(folders)
    names = ["notes.csv", "broken.json", "empty.json"]
    assert [line.split(" ")[0] for line in skipped] == [f"table1/{name}" for name in names]
    assert all(f"skipped: {name} (" in readme for name in names)
    assert re.search(r"not judged: other profile[^|;]* 2 of 2", readme)


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
    before, _ = report_of(folders)
    for key, value in change.items():
        part, _, name = key.rpartition(".")
        (record[part] if part else record)[name] = value
    odd = folders[1] / "table1" / "records" / "odd.json"
    odd.write_text(json.dumps(record))
    after, skipped = report_of(folders)
    assert len(skipped) == 1 and skipped[0].startswith("table1/odd.json (") and words in skipped[0]
    assert re.sub(r"<br>skipped: .*?(?= \|\n)", "", after) == before
    shown = report["shown"]("table1", folders[1] / "table1")
    assert "skipped odd.json" in shown and "7.30" in shown


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"null", b"\xff", b"[" * 100000])
def test_what_is_no_record_at_all_is_named(folders, content):
    run(folders, "llama-7b", "quick", wanda=7.3)
    (folders[1] / "table1" / "records" / "odd.json").write_bytes(content)
    (line,) = report_of(folders)[1]
    assert line.startswith("table1/odd.json (")
    with pytest.warns(UserWarning, match=r"odd.json is skipped"):
        tables.beside_reference([], folders[1] / "table1")


def test_verdicts_that_do_not_say_of_which_rows_are_counted(folders):
    run(folders, "llama-7b", "quick", wanda=7.3)
    judged = {"row": ["wanda"], "against": ["dense"], "text": ["c4"], "verdict": ["holds"]}
    judged |= {"difference ± standard error": ["-3.0% ± 1.0%"], "rests on": ["1 draw"]}
    path = folders[1] / "table1" / "llama-7b-quick-verdicts.csv"
    for name in judged:
        pd.DataFrame(judged).rename(columns={name: "other"}).to_csv(path)
        assert ("claims: holds 1 of 1" in report_of(folders)[0]) == (name != "verdict")
    pd.DataFrame(judged).to_csv(path)
    line = "| wanda | dense | perplexity | c4 -3.0% ± 1.0% | 1 draw | Table 1, llama-7b, quick |"
    assert line in report_of(folders)[0]
    answered = {name: 2 * values for name, values in judged.items() if name != "text"} | {"task": ["piqa", "average"]}
    answered |= {"difference ± standard error": ["+1.00 ± 0.40", "+2.00 ± 0.30"]}
    pd.DataFrame(answered).to_csv(path.with_name("llama-7b-quick-zero-shot-verdicts.csv"))
    text = report_of(folders)[0]
    assert "claims: holds 3 of 3" in text and line in text
    assert "| wanda | dense | accuracy, points | average +2.00 ± 0.30 | 1 draw | Table 1, llama-7b, quick |" in text


def test_claims_stand_by_verdict_once_for_all_texts_and_at_equal_zeros(folders):
    run(folders, "llama-7b", "quick", wanda=7.3)
    lines = ["a,wanda,c4,-9% ± 1%,undecided", "a,wanda-matched,c4,-7% ± 1%,holds", "a,wanda-matched,ptb,-6% ± 1%,holds"]
    lines += ["a,wanda,ptb,-5% ± 1%,holds", "a,magnitude,c4,+5% ± 1%,does not hold"]
    lines += ["e,wanda,c4,+4% ± 1%,does not hold", "e,wanda-matched,c4,+6% ± 1%,undecided"]
    lines = [f"{line},1 draw,0.4 and 0.5,0.01" for line in lines]
    lines += [f"b,{row},c4,-5% ± 1%,undecided,1 draw,0.4 and 0.5,{p}" for row, p in (("c", 0.01), ("d", 0.2))]
    columns = "row,against,text,difference ± standard error,verdict,rests on,zeros,p"
    (folders[1] / "table1" / "llama-7b-quick-verdicts.csv").write_text("\n".join([columns, *lines]))
    text, _ = report_of(folders)
    unknown, _, found = text[: text.index("## Every notebook")].partition("## How claims are judged")
    unknown = unknown.partition("**Unknown**")[2]
    assert re.findall(r"\*\*(.*)\*\*\n\n.*\n.*\n\| (a .*) \| 1 draw \|", found) == [
        ("Holds", "a | wanda-matched | perplexity | c4 -7% ± 1%, ptb -6% ± 1%"),
        ("Does not hold", "a | magnitude | perplexity | c4 +5% ± 1%"),
    ]
    assert "| b | c | perplexity | c4 -5% ± 1% (zeros 0.4 and 0.5) |" in found  # why it is undecided
    assert "| b | d | perplexity | c4 -5% ± 1% |" in found
    assert re.findall(r"\| (.*) \| wanda \| .* \| (.*) \| 1 draw", found) == [("e", "c4 +4% ± 1%")]  # alone decided
    assert "llama-13b" in unknown and " llama-7b" not in unknown


def test_the_papers_recipes_stand_first_where_an_error_is_known_and_a_sweeps_targets_together(folders):
    run(folders, "llama-7b", "quick", wanda=7.3)
    (folders[1] / "table1" / "llama-7b-quick-verdicts.csv").write_text(
        "row,against,text,difference ± standard error,verdict,rests on\n"
        'besa-row-wise,wanda-matched,c4,-7% ± 1%,holds,"32 segments, 3 draws"\n'
        'besa-row-wise,wanda-matched,ptb,+9% ± 1%,does not hold,"32 segments, 3 draws"\n'
        "besa-row-wise,wanda,c4,-8% ± 1%,holds,1 draw\n"
        "besa-layer-wise,wanda-matched,c4,-1% ± 1%,undecided,1 draw\n"
        "besa-layer-wise,sparsegpt-matched,c4,-1% ± ?,undecided,1 draw\n"
        "besa-row-wise-0.3,wanda-0.3-matched,c4,+3% ± 1%,does not hold,1 draw\n"
        "besa-row-wise-0.4,wanda-0.4-matched,c4,-4% ± 1%,holds,1 draw\n"
        "besa-row-wise-0.5,sparsegpt-0.5-matched,c4,-5% ± 1%,holds,1 draw\n"
        "besa-row-wise-0.6,sparsegpt-0.6-matched,c4,-6% ± 1%,holds,1 draw\n"
    )
    short = re.search(r"\*\*In short\*\*.*\n.*\n\n.*\n.*\n((?:\|.*\n)+)", report_of(folders)[0])[1]
    short = short.replace("\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}", " ± ")
    assert [line.removeprefix("| Table 1, llama-7b, quick: perplexity | ") for line in short.splitlines()] == [
        "besa-row-wise | wanda-matched | 3 | c4 -7% ± 1%<br>at 0.4 c4 -4% ± 1% | "
        "ptb +9% ± 1%<br>at 0.3 c4 +3% ± 1% |  |",
        "besa-layer-wise | wanda-matched | 1 |  |  | c4 -1% ± 1% |",
        "besa-row-wise | sparsegpt-matched | 1 | at 0.5 c4 -5% ± 1%<br>at 0.6 c4 -6% ± 1% |  |  |",
    ]


def test_the_published_size_stands_for_the_quick_profile_where_it_has_as_many_draws(folders):
    header = "row,against,text,difference ± standard error,verdict,rests on\n"
    draws = {"quick": {"besa-row-wise": 3, "besa-layer-wise": 3}, "paper": {"besa-row-wise": 3, "besa-layer-wise": 1}}
    for profile, rows in draws.items():
        run(folders, "llama-7b", profile, wanda=7.3)
        lines = [f"{row},wanda-matched,c4,-7% ± 1%,holds,{n} draws\n" for row, n in rows.items()]
        (folders[1] / "table1" / f"llama-7b-{profile}-verdicts.csv").write_text(header + "".join(lines))
    text, _ = report_of(folders)
    found = re.findall(r"Table 1, llama-7b, (\w+): perplexity \| (\S+) \| wanda-matched \| (\d)", text)
    assert sorted(found) == [
        ("paper", "besa-layer-wise", "1"),
        ("paper", "besa-row-wise", "3"),
        ("quick", "besa-layer-wise", "3"),
    ]


def test_what_is_decided_alone_and_not_among_all_is_marked(folders):
    run(folders, "llama-7b", "quick", wanda=7.3)
    p = [0.001, 0.02, 0.04, *[0.5] * 7]  # among ten, 0.001 is below its share of 5 %, 0.02 and 0.04 are not
    verdicts = ["holds", "holds", "does not hold", *["undecided"] * 7]
    lines = [f"a,r{i},c4,-5% ± 1%,{verdict},1 draw,{p[i]}" for i, verdict in enumerate(verdicts)]
    columns = "row,against,text,difference ± standard error,verdict,rests on,p"
    (folders[1] / "table1" / "llama-7b-quick-verdicts.csv").write_text("\n".join([columns, *lines]))
    text, _ = report_of(folders)
    assert re.findall(r"\| a \| (r\d) \| perplexity \| c4 -5% ± 1%( †)? \|", text)[:3] == [
        ("r0", ""),
        ("r1", " †"),
        ("r2", " †"),
    ]
    assert text.count("% †") == 2


def test_claims_that_are_not_shown_count_among_all(folders):
    """Beside a row with a partner only what is decided is shown; what is not counts among all claims, too."""
    run(folders, "llama-7b", "quick", wanda=7.3)
    lines = [
        "a,b-matched,c4,-5% ± 1%,holds,1 draw,0.02",
        *(f"r{i},b-matched,c4,-5% ± 1%,undecided,1 draw,0.5" for i in "12"),
    ]
    lines += [f"{row},b,c4,-5% ± 1%,undecided,1 draw,0.6" for row in ("a", "r1", "r2")]
    path, columns = (
        folders[1] / "table1" / "llama-7b-quick-verdicts.csv",
        "row,against,text,difference ± standard error",
    )
    path.write_text("\n".join([f"{columns},verdict,rests on,p", *lines[:1]]))
    assert "% †" not in report_of(folders)[0]
    path.write_text("\n".join([f"{columns},verdict,rests on,p", *lines]))
    text, _ = report_of(folders)
    assert "| a | b-matched | perplexity | c4 -5% ± 1% † |" in text and "| a | b |" not in text


def test_a_row_without_a_partner_of_its_own_is_shown(folders):
    run(folders, "llama-7b", "quick", wanda=7.3)
    columns = "row,against,text,difference ± standard error,verdict,rests on,p"
    lines = ["a,b-matched,c4,-5% ± 1%,undecided,1 draw,0.5", "c,b,c4,-4% ± 3%,undecided,1 draw,0.4"]
    (folders[1] / "table1" / "llama-7b-quick-verdicts.csv").write_text("\n".join([columns, *lines]))
    assert "| c | b | perplexity | c4 -4% ± 3% |" in report_of(folders)[0]


def test_what_a_failed_run_left_hidden_is_no_notebook_of_the_report(folders):
    run(folders, "llama-7b", "quick", wanda=7.3)
    (folders[1] / "table1" / ".table1.ipynb").write_text((folders[0] / "table1.ipynb").read_text())
    assert ".table1.ipynb" not in report_of(folders)[0]


def test_a_notebook_that_ran_other_code_is_said_to(folders):
    cells = [nbformat.v4.new_markdown_cell("# Table 1"), nbformat.v4.new_code_cell("a = 1")]
    given = nbformat.v4.new_code_cell("a = 2", metadata={"tags": ["injected-parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folders[0] / "table1.ipynb")
    run(folders, "llama-7b", "quick", wanda=7.3)
    for executed, other in (([*cells, given], False), ([*cells, nbformat.v4.new_code_cell("a = 3")], True)):
        nbformat.write(nbformat.v4.new_notebook(cells=executed), folders[1] / "table1" / "table1.ipynb")
        assert ("(an older version)" in report_of(folders)[0]) == other


def test_showing_what_was_never_run_says_how_to_run_it(tmp_path):
    with pytest.raises(typer.BadParameter, match=r"holds no table of 'table1'; .* make table1"):
        report["shown"]("table1", tmp_path)


def test_what_was_run_and_not_judged_is_named(folders):
    run(folders, "smollm2-135m", "quick", wanda=50.0)
    text = report_of(folders)[0]
    assert "**Not judged**: Table 1." in text
    lines = ["row,against,text,difference ± standard error,verdict,rests on", "a,wanda,c4,-9% ± 1%,holds,1 draw"]
    (folders[1] / "table1" / "smollm2-135m-quick-verdicts.csv").write_text("\n".join(lines))
    assert "**Not judged**" not in report_of(folders)[0]


def test_a_broken_notebook_is_named(folders):
    (folders[0] / "table9.ipynb").write_text("{")
    with pytest.raises(ValueError, match=r"table9.ipynb is not a notebook"):
        report_of(folders)


def test_smoke_runs_are_left_out(folders):
    before = report_of(folders)
    run(folders, "smollm2-135m", "smoke", wanda=7.3)
    assert report_of(folders) == before


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


def test_the_report_of_ones_own_runs_leaves_the_committed_one_alone(folders):
    committed = (ROOT / "reproduce" / "README.md").read_bytes()
    run(folders, "llama-7b", "paper", wanda=7.3)
    report["main"](folders[1], "")
    own = (folders[1] / "README.md").read_text()
    assert "](./table1/llama-7b-paper.csv)" in own and (ROOT / "reproduce" / "README.md").read_bytes() == committed
    of_what_is_committed = "Two small models were run", "at 70 % of the quick sweep", "differences vary by 0.3 to 1.8 %"
    text, own = (" ".join(each.split()) for each in (committed.decode(), own))
    assert all(said in text and said not in own for said in (*of_what_is_committed, "So many are committed"))


def test_the_committed_report_is_up_to_date():
    path = ROOT / "reproduce" / "README.md"
    assert path.read_text() == build(ROOT / "reproduce", tables.REFERENCE, path)[0], "out of date: run `make report`"
