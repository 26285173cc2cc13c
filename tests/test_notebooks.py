"""The reproduce notebooks on a tiny model: one as papermill runs it, the others cell by cell in this process.

nbval runs every notebook in a kernel of its own, in the smoke profile.
"""

import filecmp
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas
import papermill
import pytest
import typer
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "reproduce"


@pytest.fixture(autouse=True)
def where_texts_are(short_texts, monkeypatch):
    monkeypatch.setenv("BESA_DATA", str(short_texts))


@pytest.fixture(autouse=True)
def no_screen():
    """Figures are drawn into files, and gone afterwards."""
    plt.switch_backend("agg")
    yield
    plt.close("all")


def run(notebook, folder, **parameters):
    """Execute a notebook's cells, its parameters changed as papermill would, without waiting for a kernel to start."""
    recipe = {"device": "cpu", **parameters.pop("recipe", {})}
    parameters = {"profile": "smoke", "results": str(folder), "recipe": recipe, **parameters}
    folder.mkdir(exist_ok=True)
    names = {"__name__": "__main__", "display": lambda *_: None}
    for number, cell in enumerate(nbformat.read(NOTEBOOKS / notebook, as_version=4).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{notebook}, cell {number}", "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= parameters


def run_by_papermill(notebook, folder, **parameters):
    """The same in a kernel, as a user would."""
    parameters = {"profile": "smoke", "results": str(folder), "recipe": {"device": "cpu"}, **parameters}
    papermill.execute_notebook(NOTEBOOKS / notebook, folder / "out.ipynb", parameters, progress_bar=False)


def test_table1_continues_where_it_was_interrupted(tiny_folder, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("table1.ipynb", whole, model=str(tiny_folder))
    # Interrupted: the first rows are there, the last ones are not.
    run("table1.ipynb", broken, model=str(tiny_folder), methods=["dense", "magnitude", "wanda"])
    before = {path: path.stat().st_mtime_ns for path in (broken / "records").iterdir()}
    assert len(before) == 3
    run("table1.ipynb", broken, model=str(tiny_folder))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert {path.name for path in (broken / "records").iterdir()} == {p.name for p in (whole / "records").iterdir()}
    columns = slice(0, 4)  # method, sparsity and the two perplexities; seconds and memory differ between runs
    tables = [(folder / "tiny-smoke.csv").read_text().splitlines() for folder in (whole, broken)]
    assert len(tables[0]) == 1 + 6 + 2  # and two with BESA's zeros
    assert [row.split(",")[columns] for row in tables[0]] == [row.split(",")[columns] for row in tables[1]]
    for suffix in ("md", "tex", "png", "svg"):
        assert (broken / f"tiny-smoke.{suffix}").stat().st_size > 0
    assert "SMOKE RUN" in (broken / "tiny-smoke.md").read_text()
    assert (broken / "tiny-smoke-besa-row-wise-allocation.png").is_file()
    judged = pandas.read_csv(broken / "tiny-smoke-verdicts.csv")
    rows = ["wanda", "sparsegpt", "wanda-matched", "sparsegpt-matched"]
    pairs = [(f"besa-{kind}-wise", other) for kind in ("row", "layer") for other in rows]
    pairs.append(("besa-row-wise", "besa-layer-wise"))
    assert list(zip(judged["row"], judged["against"])) == [pair for pair in pairs for _ in ("wiki", "sotu")]
    assert set(judged["verdict"]) <= {"holds", "does not hold", "undecided"}
    assert set(judged["rests on"]) == {"2 segments, 1 draw"}
    matched = judged[judged["against"].str.endswith("matched") & (judged["row"] == "besa-row-wise")]
    zeros = matched["zeros"].str.split(" and ", expand=True).astype(float)
    assert (zeros[0] >= zeros[1]).all()


def test_a_bare_papermill_prints_the_notebook_and_writes_its_results(tiny_folder, tmp_path):
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / "table1.ipynb", "-p", "model", tiny_folder]
    command += ["-p", "methods", "dense,wanda", "-p", "datasets", "wiki", "-y", "recipe: {seq_len: 32}"]
    command += ["-p", "seeds", "3,1"]
    where = os.environ | {"BESA_RESULTS": str(tmp_path), "BESA_PROFILE": "smoke"}
    result = subprocess.run(list(map(str, command)), env=where, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["nbformat"] == 4
    folder = tmp_path / "table1"
    found = [json.loads(path.read_text())["config"] for path in (folder / "records").iterdir()]
    assert sorted((c["row"], c["seed"]) for c in found) == [("dense", 3), ("wanda", 1), ("wanda", 3)]
    assert len({config["calibration_sha256"] for config in found}) == 2 and (folder / "tiny-smoke.png").is_file()
    assert list(pandas.read_csv(folder / "tiny-smoke.csv").columns[2:4]) == ["wiki", "± wiki"]
    assert "2 windows of 32 tokens of sotu" in (folder / "tiny-smoke.md").read_text()


def test_a_notebook_takes_a_published_recipe_from_its_file(tiny_folder, tmp_path, monkeypatch):
    for name in ("c4", "wikitext2", "ptb"):  # stand-ins
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": f"{word} " * 200}) for word in ("one", "two", "three")]
        for split in ("train", "validation", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("BESA_DATA", str(tmp_path))
    params = yaml.safe_load((NOTEBOOKS / "params" / "llama-65b.yaml").read_text())
    run("table1.ipynb", tmp_path / "out", **params | {"model": str(tiny_folder), "profile": "smoke"})
    (path,) = (tmp_path / "out" / "records").glob("*besa-row-wise*")
    config = json.loads(path.read_text())["config"]
    assert (
        config["method"]["d_coef"] == 50
        and config["calibration"] == "c4"
        and set(config["test_sha256"])
        == {
            "wikitext2",
            "c4",
            "ptb",
        }
    )


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_show_the_method(path):
    """In cells of at most 25 lines that define no function and no class, with about eight parameters."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(len(cell.source.splitlines()) <= 25 for cell in code)
    assert not [cell for cell in code if re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE)]
    assert 6 <= len(papermill.inspect_notebook(path)) <= 9
    source = "\n".join(cell.source for cell in code)
    measures = "besa.perplexity(", "besa.zero_shot(", "simulate_model(", "measure("
    assert re.search(r"besa\.prune(_checkpoint)?\(", source) and any(name in source for name in measures)


@pytest.mark.parametrize("path", sorted((ROOT / "results/reference").glob("*/*.ipynb")), ids=lambda path: path.stem)
def test_reference_notebooks_ran_to_their_end(path):
    code = [
        cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source.strip()
    ]
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


def test_the_same_records_make_the_same_notebook_tables_and_figures(tmp_path):
    shutil.copytree(ROOT / "results/reference/scale", tmp_path / "scale")
    command = [sys.executable, NOTEBOOKS / "execute.py", tmp_path / "scale/scale.ipynb"]
    where = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # a GPU has other records
    result = subprocess.run(command, env=where, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    compared = filecmp.dircmp(ROOT / "results/reference/scale", tmp_path / "scale")
    assert compared.same_files and not (compared.left_only + compared.right_only + compared.diff_files)


def test_an_execution_that_fails_leaves_the_last_good_notebook(tmp_path, monkeypatch):
    execute, output = runpy.run_path(str(NOTEBOOKS / "execute.py"))["execute"], tmp_path / "scale/scale.ipynb"
    monkeypatch.setenv("BESA_RESULTS", "")
    with pytest.raises(typer.BadParameter, match=r"scale\.ipynb is not there: give it parameters"):
        execute(output)
    with pytest.raises(typer.BadParameter, match="lies in no folder that is named for a notebook of"):
        execute(tmp_path / "scael" / "scale.ipynb", "profile: quick")
    assert not (tmp_path / "scael").exists()
    shutil.copytree(ROOT / "results/reference/scale", output.parent)
    asked, before = nbformat.read(output, as_version=4).metadata.papermill.parameters, output.read_bytes()

    def fail(notebook, unfinished, parameters, **_):
        assert notebook == NOTEBOOKS / "scale.ipynb" and parameters == asked
        assert os.environ["BESA_RESULTS"] == str(tmp_path)
        Path(unfinished).write_text("half")
        raise papermill.PapermillExecutionError(0, 1, "", "ValueError", "no such shape", ["ValueError: no such shape"])

    monkeypatch.setattr(papermill, "execute_notebook", fail)
    with pytest.raises(SystemExit, match=r"no such shape\s+\S*\.scale\.ipynb is what it left"):
        execute(output)
    assert output.read_bytes() == before


def test_table3_packs_every_row_and_counts_its_bits(tiny_folder, tmp_path):
    folder = tmp_path / "table3"
    run("table3.ipynb", folder, model=str(tiny_folder), methods=["dense", "joint-wanda"], datasets=["wiki"])
    before = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    run("table3.ipynb", folder, model=str(tiny_folder), datasets=["wiki"], seeds=[0, 1])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    table = pandas.read_csv(folder / "tiny-smoke.csv", index_col="method")
    rows = ["dense", "quantized", "joint-wanda", "joint-clipping", "joint-besa"]
    assert list(table.index) == [*rows, "joint-wanda-matched", "joint-clipping-matched"]
    assert len(pandas.read_csv(folder / "tiny-smoke-verdicts.csv")) == 5
    # a bit of mask, 4 bits per weight that is not 0, and 24 bits per row of scale and zero-point
    assert table.loc["dense", "bits/weight"] in (16, 32)
    assert table.loc["quantized", "bits/weight"] > table.loc["joint-wanda", "bits/weight"] > 1 + 4 * 0.49
    for suffix in ("md", "tex", "png", "svg"):
        assert (folder / f"tiny-smoke.{suffix}").stat().st_size > 0


def test_table4_counts_cycles_per_row_and_continues(tiny_folder, tmp_path):
    folder = tmp_path / "table4"
    run("table4.ipynb", folder, model=str(tiny_folder), methods=["dense", "wanda"])
    before = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    run("table4.ipynb", folder, model=str(tiny_folder), seeds=[0, 1, 2])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    table = pandas.read_csv(folder / "tiny-smoke.csv", index_col="method")
    rows = ["dense", "sparsegpt", "wanda", "besa-row-wise", "wanda-matched", "sparsegpt-matched"]
    assert list(table.index) == rows and len(list((folder / "records").iterdir())) == 1 + 3 * 5
    verdicts = pandas.read_csv(folder / "tiny-smoke-verdicts.csv")
    assert set(verdicts["rests on"]) == {"3 draws"} and len(verdicts) == 4 * verdicts["projection"].nunique()
    assert (table.loc["dense", ["q_proj", "gate_proj", "down_proj"]] == [1, 1, 2]).all()  # two patches of 16 x 16
    assert table.loc["wanda", "sparsity"] == 0.5
    for stem, suffix in [("tiny-smoke", s) for s in ("md", "tex", "png", "svg")] + [("tiny-smoke-projections", "csv")]:
        assert (folder / f"{stem}.{suffix}").stat().st_size > 0
    assert "SMOKE RUN" in (folder / "tiny-smoke.md").read_text()


def test_table2_continues_and_keeps_standard_errors_and_versions(tiny_folder, tmp_path):
    folder, options = tmp_path / "out", {"model": str(tiny_folder), "tasks": ["piqa", "arc_challenge"], "limit": 3}
    run("table2.ipynb", folder, **options, methods=["dense"])
    (first,) = (folder / "records").iterdir()
    written = first.stat().st_mtime_ns
    run("table2.ipynb", folder, **options)
    assert len(list((folder / "records").iterdir())) == 6 and first.stat().st_mtime_ns == written
    record = json.loads(first.read_text())
    assert set(record["metrics"]) == set(record["stderr"]) == {"piqa", "arc_challenge", "average"}
    assert record["config"]["limit"] == 3 and record["lm_eval"] and record["tasks"][0]["version"] == 1.0
    table = (folder / "tiny-smoke.md").read_text()
    assert "SMOKE RUN" in table and "3 questions per task" in table
    for suffix in ("csv", "tex", "png", "svg"):
        assert (folder / f"tiny-smoke.{suffix}").stat().st_size > 0
    assert len((folder / "tiny-smoke-stderr.csv").read_text().splitlines()) == 1 + 6
    judged = pandas.read_csv(folder / "tiny-smoke-verdicts.csv")
    assert list(judged["task"]) == 4 * ["piqa", "arc_challenge", "average"]
    assert list(judged["rests on"]) == 4 * ["3 questions, 1 draw", "3 questions, 1 draw", "6 questions, 1 draw"]


def written(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}


def test_granularity_runs_a_missing_row_again_and_tells_targets_from_granularity(tiny_folder, tmp_path):
    folder, options = tmp_path / "out", {"row_groups": ["row", "layer", 8, 4], "dense_row_groups": [4, "layer", "row"]}
    options |= {"model": str(tiny_folder)}
    run("granularity.ipynb", folder, **options)  # smoke takes every third row
    before = written(folder)
    (gone,) = (name for name in before if "besa-4-pruned" in name)
    (folder / "records" / gone).unlink()
    run("granularity.ipynb", folder, **options)
    assert {name for name, time in written(folder).items() if before[name] != time} == {gone}
    table = pandas.read_csv(folder / "tiny-smoke.csv", index_col="method")
    assert list(table.index) == ["wanda", "besa-row-pruned", "besa-4-pruned", "besa-row-dense"]
    assert (table["sparsity"] == 0.5).all()
    judged = pandas.read_csv(folder / "tiny-smoke-verdicts.csv")
    assert list(judged["against"]) == ["besa-4-pruned", "besa-row-pruned", "wanda"]
    crossed = pandas.read_csv(folder / "tiny-smoke-targets.csv", index_col="row_group")
    assert crossed.loc["4", "wiki, pruned targets"] == table.loc["besa-4-pruned", "wiki"]
    assert crossed.loc["row", "wiki, dense targets"] == table.loc["besa-row-dense", "wiki"]
    assert all((folder / f"tiny-smoke.{suffix}").stat().st_size > 0 for suffix in ("md", "tex", "png", "svg"))


def test_ablations_share_one_baseline_and_skip_finished_rows(tiny_folder, tmp_path):
    folder, grid = tmp_path / "out", {"n_samples": [1], "reconstruct": ["projection", 1]}
    run("ablations.ipynb", folder, model=str(tiny_folder), grid=grid)
    before = written(folder)
    run("ablations.ipynb", folder, model=str(tiny_folder), grid=grid | {"epochs": [1, 2], "candidates": [11]})
    after = written(folder)
    assert before.items() <= after.items()
    rows = ("baseline", "n_samples-1", "epochs-2", "candidates-11", "reconstruct-projection")
    assert len(after) == len(rows) and all(any(f"smoke-{row}-" in name for name in after) for row in rows)
    sizes, epochs = (pandas.read_csv(folder / f"tiny-smoke-{name}.csv") for name in ("n_samples", "epochs"))
    assert list(sizes["n_samples"]) == [1, 2] and list(epochs["epochs"]) == [1, 2]
    assert sizes.iloc[1, 1:].to_list() == epochs.iloc[0, 1:].to_list()  # the baseline
    assert all((folder / f"tiny-smoke.{suffix}").stat().st_size > 0 for suffix in ("png", "svg"))


def test_allocation_keeps_steps_and_correlations_in_the_record(tiny_folder, tmp_path):
    folder = tmp_path / "out"
    run("allocation.ipynb", folder, model=str(tiny_folder))
    before = written(folder)
    run("allocation.ipynb", folder, model=str(tiny_folder))
    assert written(folder) == before and len(before) == 2
    (path,) = (folder / "records").glob("*besa-row-wise*")
    record = json.loads(path.read_text())
    assert len(record["steps"]["loss"]) == 2 * 2  # blocks x windows
    assert len(record["row_correlations"]) == 14
    for suffix in ("allocation", "rows", "training", "correlations"):
        assert (folder / f"tiny-smoke-{suffix}.png").stat().st_size > 0
    assert "SMOKE RUN" in (folder / "tiny-smoke-correlations.md").read_text()
    percent = pandas.read_csv(folder / "tiny-smoke-projections.csv", index_col=0)
    of_q = [100 * row["sparsity"] for row in record["projections"] if row["projection"].endswith("q_proj")]
    assert percent.loc["q_proj"].to_list() == pytest.approx([sum(of_q) / len(of_q), min(of_q), max(of_q)], abs=0.01)


def test_figure1_measures_blocks_and_kinds_and_continues(tiny_folder, tmp_path):
    folder = tmp_path / "out"
    run("figure1.ipynb", folder, model=str(tiny_folder), methods=["wanda"], sparsities=[0.5, 0.75])
    before = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    assert len(before) == 1 + 1 + 2 * 2  # no BESA, so none with its zeros
    run("figure1.ipynb", folder, model=str(tiny_folder), sparsities=[0.75, 0.5, 0.6, 0.7], seeds=[0, 1])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    kinds = pandas.read_csv(folder / "tiny-smoke-kinds.csv", index_col="method")
    reduced = [f"{kind}-{value}" for kind in ("q_proj", "down_proj") for value in (0.5, 0.75)]
    assert list(kinds.index) == ["dense", *reduced]
    shares = {"q_proj": 256, "o_proj": 256, "down_proj": 512}  # of the 2560 weights of a block
    assert kinds.loc["down_proj-0.75", "sparsity"] == 0.75 * shares["down_proj"] / 2560
    blocks = pandas.read_csv(folder / "tiny-smoke-blocks.csv")
    plain = ["wanda", "sparsegpt", "besa-row-wise"]
    assert list(blocks["method"].unique()) == [*plain, "wanda-matched", "sparsegpt-matched"]
    judged = pandas.read_csv(folder / "tiny-smoke-verdicts.csv")
    assert list(judged["hidden states"]) == 4 * ["error first block", "error last block"]
    last = blocks.query("method == 'wanda' and block == 1")["error"].item()
    draws = [np.load(path) for path in (folder / "samples").glob("tiny-smoke-wanda-????????????.npz")]
    by_draw = [np.exp(draw["error last block"].item()) for draw in draws]  # by segment, of which smoke has one
    assert len(draws) == 2 and np.mean(by_draw) == pytest.approx(last)
    assert (blocks.groupby("method")["block"].count() == 2).all() and (blocks["error"] > 0).all()
    for stem in ("tiny-smoke", "tiny-smoke-kinds", "tiny-smoke-blocks"):
        assert "SMOKE RUN" in (folder / f"{stem}.md").read_text() and (folder / f"{stem}.tex").stat().st_size > 0
    for suffix in ("png", "svg"):
        assert (folder / f"tiny-smoke.{suffix}").stat().st_size > 0


def test_sparsity_leaves_besas_recipe_where_it_ends_and_continues(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("besa.paper.records.Run.is_smoke", False)  # which takes two sparsities
    folder, options = tmp_path / "out", {"model": str(tiny_folder), "sparsities": [0.2, 0.5, 0.8]}
    run("sparsity.ipynb", folder, **options, methods="wanda")
    before = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    assert len(before) == 1 + 3
    run("sparsity.ipynb", folder, **options)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    records = [json.loads(path.read_text()) for path in (folder / "records").iterdir()]
    assert len(records) == 1 + 4 * 3 + 2 * 3  # and two with BESA's zeros
    smooth = {r["config"]["row"]: r["config"]["method"]["smooth"] for r in records if "besa" in r["config"]["row"]}
    assert smooth == {"besa-row-wise-0.2": False, "besa-row-wise-0.5": True, "besa-row-wise-0.8": False}
    wide = pandas.read_csv(folder / "tiny-smoke-wiki.csv", index_col="target")
    assert list(wide.columns) == ["magnitude", "wanda", "sparsegpt", "besa-row-wise"] and list(wide.index) == [
        0.2,
        0.5,
        0.8,
    ]
    table = pandas.read_csv(folder / "tiny-smoke.csv", index_col="method")
    zeros = [table.loc[row, "sparsity"] for row in ("besa-row-wise-0.2", "sparsegpt-0.2-matched")]
    assert zeros[0] == pytest.approx(zeros[1], abs=2e-3)
    judged = pandas.read_csv(folder / "tiny-smoke-verdicts.csv")
    assert len(judged) == 4 * 3 and set(judged["row"]) == {f"besa-row-wise-{target}" for target in (0.2, 0.5, 0.8)}
    assert table.index[0] == "dense" and wide.loc[0.8, "wanda"] == table.loc["wanda-0.8", "wiki"]
    for suffix in ("md", "tex", "png", "svg"):
        assert (folder / f"tiny-smoke.{suffix}").stat().st_size > 0


def test_beyond_judges_paired_rows_counts_equal_zeros_and_continues(tiny_folder, tmp_path, monkeypatch):
    # Two targets and two seeds even in a smoke run, so that verdicts are drawn.
    monkeypatch.setattr("besa.paper.records.Run.is_smoke", False)
    options = {"model": str(tiny_folder), "targets": ["2:4", 0.6], "parts_at": [0.6], "datasets": ["wiki"]}
    options |= {"tasks": ["piqa"], "seeds": [0, 1]}
    folder = tmp_path / "out"
    run("beyond.ipynb", folder, **options)
    before = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    run("beyond.ipynb", folder, **options)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    table = pandas.read_csv(folder / "tiny-smoke.csv")
    assert set(table["row"]) == {"sparsegpt", "wanda + block", "besa + block"} and set(table["target"]) == {
        "0.6",
        "2:4",
    }
    verdicts = pandas.read_csv(folder / "tiny-smoke-verdicts.csv")
    assert len(verdicts) == 4 and set(verdicts["verdict"]) <= {"holds", "does not hold", "undecided"}
    parts = pandas.read_csv(folder / "tiny-smoke-parts.csv").set_index(["target", "row"])
    besa_rows = [row for row in parts.index if row[1].startswith("besa") and row[0] == "0.6" and "paper" not in row[1]]
    assert len(besa_rows) == 8 and parts.loc[besa_rows, "sparsity"].nunique() == 1  # to the weight, fine-tuned too
    assert (parts.loc["2:4", "sparsity"] == 0.5).all()
    accuracy = pandas.read_csv(folder / "tiny-smoke-zero-shot.csv")
    assert list(accuracy["row"]) == ["dense", "sparsegpt-2of4", "wanda-block-2of4", "besa-block-2of4"]
    answered = pandas.read_csv(folder / "tiny-smoke-zero-shot-verdicts.csv")
    assert list(answered["against"]) == 2 * ["sparsegpt-2of4"] + 2 * ["wanda-block-2of4"]
    assert list(answered["task"]) == 2 * ["piqa", "average"] and set(answered["rests on"]) == {"2 questions, 2 draws"}
    assert (folder / "tiny-smoke.png").is_file()


def test_packed_measures_three_forms_and_continues(tiny_tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), **shape)).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    folder, options = tmp_path / "out", {"model": str(tmp_path / "tiny"), "batches": "1,2", "sparsities": "0.6,0.7"}
    run("packed.ipynb", folder, **options)
    before = written(folder)
    run("packed.ipynb", folder, **options)
    assert written(folder) == before and len(before) == 3  # smoke takes one sparsity
    table = pandas.read_csv(folder / "tiny-smoke.csv")
    assert list(table["form"]) == 2 * ["dense", "packed", "joint 4 bits"]
    assert (table["GiB"].groupby(table["model"]).diff().dropna() < 0).all()
    projections = pandas.read_csv(folder / "tiny-smoke-projections.csv", index_col="product")
    assert {"torch dense", "torch CSR, float32", "packed", "joint 4 bits"} <= set(projections.index)
    for suffix in ("md", "tex", "png", "svg"):
        assert (folder / f"tiny-smoke.{suffix}").stat().st_size > 0
    assert (folder / "tiny-smoke-roofline.png").is_file()


@pytest.mark.parametrize(
    "notebook, parameters, message",
    [
        ("table1.ipynb", {"methods": "dense,wander"}, "unknown method 'wander'"),
        ("table1.ipynb", {"datasets": ["wiki", "wikitext3"]}, "unknown text 'wikitext3'"),
        ("table1.ipynb", {"model": "/nowhere/model"}, "cannot load the model '/nowhere/model'"),
        ("table1.ipynb", {"sparsity": 0.9}, r"sparsity 0.9 is outside \(0.376, 0.624\)"),
        ("table1.ipynb", {"profile": "fast"}, "unknown profile 'fast'"),
        ("table1.ipynb", {"recipe": {"n_samples": 0}}, "n_samples 0 is not an integer >= 1 or None"),
        ("table1.ipynb", {"datasets": None}, "None is not a name or a finite number"),
        ("table1.ipynb", {"methods": None}, "None is not a name or a finite number"),
        ("table2.ipynb", {"tasks": None}, "None is not a name or a finite number"),
        ("table1.ipynb", {"model": "llama7b"}, "unknown model 'llama7b'; did you mean llama-7b"),
        ("table1.ipynb", {"recipe": {"device": "cuda:99"}}, "device 'cuda:99' cannot be used here"),
        ("table1.ipynb", {"recipe": {"dcoef": 1}}, "recipe has an unknown key 'dcoef'; known: calibration, sampler"),
        ("table1.ipynb", {"recipe": {"dtype": "int4"}}, "dtype 'int4' is not 'bfloat16', 'float16', 'float32' or None"),
        ("table3.ipynb", {"quantize": {"bits": 5}}, "bits 5 is not 2, 3, 4 or 8"),
        ("table3.ipynb", {"methods": ["dense", "wander"]}, r"unknown methods \['wander'\]; known: dense, quantized"),
        ("table3.ipynb", {"quantize": {"group_size": 7}, "methods": "joint-besa"}, "16 columns do not divide into"),
        ("table2.ipynb", {"tasks": "piqa,pica"}, "unknown task 'pica'"),
        ("table2.ipynb", {"limit": 0}, "limit must be at least 1"),
        ("table2.ipynb", {"methods": "dense,wander"}, "unknown method 'wander'"),
        ("table4.ipynb", {"methods": "dense,wander"}, "unknown method 'wander'"),
        ("cost.ipynb", {"shapes": ["llama-8b"]}, r"unknown shapes \['llama-8b'\]; known: smollm2-135m, llama-7b"),
        ("granularity.ipynb", {"row_groups": "row,5"}, "16 rows do not divide into groups of 5"),
        ("ablations.ipynb", {"grid": {"candidates": [300]}}, "candidates 300 is not an integer >= 2 and <= 256"),
        ("ablations.ipynb", {"grid": {"epoch": [3]}}, "'Besa' object has no attribute 'epoch'"),
        ("figure1.ipynb", {"sparsities": "0.5,1.2"}, "sparsity 1.2 is not a finite number >= 0 and < 1"),
        ("sparsity.ipynb", {"sparsities": "0.5,1.2"}, "sparsity 1.2 is not a finite number >= 0 and < 1"),
        ("packed.ipynb", {"shape": "llama-8b"}, "unknown shape 'llama-8b'; known: smollm2-135m, llama-7b"),
        ("packed.ipynb", {"sparsities": "0.5,1.2"}, "sparsity 1.2 is not a finite number >= 0 and < 1"),
        ("scale.ipynb", {"profile": "quick", "runs": [["llama-8b", 2, 2]]}, r"unknown shapes \['llama-8b'\]; known"),
    ],
)
def test_bad_parameters_are_refused_by_name_and_leave_nothing_behind(
    no_type_checks, tiny_folder, tmp_path, notebook, parameters, message
):
    folder = tmp_path / "bad"
    model = {} if notebook in ("cost.ipynb", "scale.ipynb") else {"model": str(tiny_folder)}
    with pytest.raises((ValueError, AttributeError), match=message):
        run(notebook, folder, **model | parameters)
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_papermill_shows_what_a_notebook_refuses_a_parameter_that_it_has_not_too(tiny_folder, tmp_path):
    params = yaml.safe_load((NOTEBOOKS / "params" / "llama-7b.yaml").read_text())  # datasets are for others
    told = "unknown parameter 'sparsty'; this notebook has model, methods, tasks, limit, sparsity, seeds, profile"
    with pytest.raises(papermill.PapermillExecutionError, match=told):
        run_by_papermill("table2.ipynb", tmp_path, **params | {"model": str(tiny_folder), "sparsty": 0.6})


@pytest.mark.skipif(not (ROOT / ".venv" / "installed").is_file(), reason="make has not set up .venv here")
def test_a_failing_make_says_so_and_leaves_the_last_good_notebook_alone(tmp_path):
    (tmp_path / "table1").mkdir()
    (tmp_path / "table1" / "table1.ipynb").write_text("the last good one")
    command = ["make", "-o", ".venv/installed", "table1", "PROFILE=fast"]
    where = os.environ | {"BESA_RESULTS": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)
    assert result.returncode != 0 and "unknown profile 'fast'" in result.stderr
    assert (tmp_path / "table1" / "table1.ipynb").read_text() == "the last good one"
