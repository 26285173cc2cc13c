import ast
import re
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement

from besa.allocation import reachable_sparsity
from besa.paper.tables import load_record

ROOT = Path(__file__).parents[1]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = (ROOT / "requirements.lock").read_text()
README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())  # wherever its lines break
SIZES = "quick", "paper"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_holds_one_admitted_version_of_all_that_is_asked_for(python):
    place = {**default_environment(), "python_version": python, "python_full_version": f"{python}.7"}
    lines = [Requirement(line) for line in LOCK.splitlines() if not line.startswith("#")]
    here = [line for line in lines if line.marker is None or line.marker.evaluate(place)]
    locked = {line.name: str(line.specifier).removeprefix("==") for line in here}
    assert len(locked) == len(here)
    for wanted in map(Requirement, [*PROJECT["dependencies"], *(name for extra in EXTRAS.values() for name in extra)]):
        assert wanted.specifier.contains(locked[wanted.name]), wanted


def test_the_lock_names_no_place_and_conda_and_make_take_it():
    assert "://" not in LOCK and "--" not in LOCK  # whatever index and wheels pip is set up for
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    everything = f".[{','.join(EXTRAS)}]"
    assert listed[0].startswith(f"python{PROJECT['requires-python']}")
    assert listed[-1]["pip"] == ["--constraint requirements.lock", f"--editable {everything}"]
    assert f"--constraint requirements.lock --editable '{everything}'" in (ROOT / "Makefile").read_text()


def imports(path):
    """What a file of the package imports from it, as (room or file, ...) below `besa`."""
    tree = ast.parse(path.read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("besa.")}


def test_the_root_imports_machine_and_itself_only():
    files = [path for path in (ROOT / "besa").glob("*.py") if path.stem not in ("__init__", "__main__")]  # the doors
    for path in files:
        assert imports(path) <= {"machine", *(other.stem for other in files)}, path.name


def test_only_notebooks_and_reproduce_import_paper():
    for path in (ROOT / "besa").rglob("*.py"):
        assert path.parent.name == "paper" or "paper" not in imports(path), path


def test_the_readmes_table_is_the_reference_runs():
    """Numbers in prose come from records."""
    folder, texts = ROOT / "results" / "reference" / "table1", ("wiki", "sotu")
    quick, paper = (pd.read_csv(folder / f"smollm2-135m-{profile}.csv").set_index("method") for profile in SIZES)
    assert list(quick.index) == list(paper.index)
    for name in quick.index:
        shown = [name]
        for row in (quick.loc[name], paper.loc[name]):
            spread = {text: "" if pd.isna(row[f"± {text}"]) else f" ± {row[f'± {text}']:.2f}" for text in texts}
            shown += [f"{row['sparsity']:.4f}", *(f"{row[text]:.2f}{spread[text]}" for text in texts)]
        assert f"| {' | '.join(shown)} |\n" in README
    assert README.count("| besa-") + README.count("| wanda |") + README.count("| dense |") == 4  # and no other


def test_the_readmes_zero_shot_answers_to_all_questions_are_the_reference_run():
    folder = ROOT / "results" / "reference" / "table2"
    table = pd.read_csv(folder / "smollm2-135m-paper.csv").set_index("method")
    others = "sparsegpt-matched", "wanda-matched"
    rows = table.loc[["dense", "besa-row-wise", *others]]
    said = (
        "dense {} %, row-wise BESA {} %, with BESA's zeros SparseGPT {} % and Wanda {} %, neither of which can be told"
    )
    assert said.format(*rows["average"].map("{:.2f}".format)) in PROSE
    rest = rows[["piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"]].mean(axis=1)
    said = "the other five average {} % dense, and {}, {} and {} % in the same order, again not to be told apart"
    assert said.format(*rest.map("{:.2f}".format)) in PROSE
    assert f"from {rows.loc['dense', 'boolq']:.2f} %, which is below guessing, to 54 % and more" in PROSE
    assert 54 < rows["boolq"].iloc[1:].min() < 55
    judged = pd.read_csv(folder / "smollm2-135m-paper-verdicts.csv").set_index(["task", "against"])
    judged = judged.loc[[("average", row) for row in others]]
    assert set(judged["rests on"]) == {"19965 questions, 1 draw"} and set(judged["verdict"]) == {"undecided"}
    quick = pd.read_csv(folder / "smollm2-135m-quick-verdicts.csv").set_index(["against", "task"])
    found = quick.loc[("wanda-matched", "average")]
    assert found["verdict"] == "holds" and found["difference ± standard error"].startswith("+2.42 ")
    report = (ROOT / "reproduce" / "README.md").read_text()
    assert f"average {found['difference ± standard error']} †" in report  # not among all
    assert "BESA was 2.42 points ahead of Wanda, which does not survive correction" in PROSE
    left_out = [pd.read_csv(folder / f"smollm2-135m-{profile}-left-out.csv") for profile in ("paper", "quick")]
    assert {verdict for each in left_out for verdict in each[each["task"] == "without boolq"]["verdict"]} == {
        "undecided"
    }


def test_the_readme_says_what_table_1_judged():
    verdicts, by = {}, {}
    for size in SIZES:
        judged = pd.read_csv(ROOT / "results" / "reference" / "table1" / f"smollm2-135m-{size}-verdicts.csv")
        n_segments = {"quick": {"32"}, "paper": {"218", "205"}}[size]
        assert set(judged["rests on"]) == {f"{n} segments, 3 draws" for n in n_segments}
        judged = judged.set_index(["row", "against", "text"]).sort_index()
        difference = judged["difference ± standard error"].str.extract(r"^(\S+)%")[0].astype(float)
        for row, against, _ in judged.index:
            verdicts[size, row, against] = [judged.loc[(row, against, text), "verdict"] for text in ("wiki", "sotu")]
            by[size, row, against] = [difference[row, against, text] for text in ("wiki", "sotu")]
    ours, ahead = ("besa-row-wise", "besa-layer-wise"), lambda *pair: [-difference for difference in by[pair]]
    for size in SIZES:
        assert verdicts[size, ours[0], "wanda-matched"] == ["holds", "holds"]
        assert verdicts[size, ours[0], "sparsegpt-matched"] == ["holds", "does not hold"]
    wanda, sparsegpt = (ahead("paper", ours[0], f"{row}-matched") for row in ("wanda", "sparsegpt"))
    said = "at both sizes: the paper's row-wise BESA is ahead of Wanda on both texts (at the published size by {} % on"
    assert said.format(wanda[0]) in PROSE
    assert f"on `wiki` and {wanda[1]} % on `sotu`), and of SparseGPT on `wiki` ({sparsegpt[0]} %)." in PROSE
    said = (
        "at both sizes: on `sotu`, text of the calibration's kind, it is behind SparseGPT ({} %, at `make table1`'s "
        "size {} %)"
    )
    assert said.format(-sparsegpt[1], by["quick", ours[0], "sparsegpt-matched"][1]) in PROSE
    assert verdicts["quick", *ours] == ["holds", "holds"] and verdicts["paper", *ours] == ["undecided", "undecided"]
    assert verdicts["quick", ours[1], "wanda-matched"] == ["undecided", "holds"]
    assert verdicts["quick", ours[1], "sparsegpt-matched"] == ["undecided", "does not hold"]
    said = (
        "at `make table1`'s size the row-wise is ahead of it on both texts (by {} and {} %), it cannot be told from "
        "Wanda or SparseGPT on `wiki`, and on `sotu` is ahead of Wanda and behind SparseGPT. At the published size it "
        "is behind SparseGPT on both texts. It is {} and {} % behind the matched Wanda there, and the row-wise {} and "
        "{} % ahead of it, but both have fewer zeros"
    )
    behind = by["paper", ours[1], "wanda-matched"]
    assert said.format(*ahead("quick", *ours), *behind, *ahead("paper", *ours)) in PROSE
    assert verdicts["paper", ours[1], "sparsegpt-matched"] == ["does not hold", "does not hold"]
    assert verdicts["paper", ours[1], "wanda-matched"] == ["undecided", "undecided"]


def test_the_readme_says_what_table_3_judged():
    folder, ours, texts = ROOT / "results" / "reference" / "table3", "joint-besa", ["wiki", "sotu"]
    verdicts, ahead = {}, {}
    for size, draws in zip(SIZES, ("3 draws", "1 draw"), strict=True):
        judged = pd.read_csv(folder / f"smollm2-135m-{size}-verdicts.csv").set_index(["row", "against", "text"])
        assert judged["rests on"].str.endswith(f", {draws}").all()
        for other in ("joint-wanda-matched", "joint-clipping-matched"):
            found = judged.loc[[(ours, other, text) for text in texts]]
            verdicts[size, other] = list(found["verdict"])
            ahead[size, other] = list(found["difference ± standard error"].str.extract(r"^-(\d+\.\d+)%")[0])
    assert verdicts.pop(("quick", "joint-clipping-matched")) == ["holds", "undecided"]
    assert list(verdicts.values()) == 3 * [["holds", "holds"]]
    said = (
        "are ahead of Wanda on both texts (by {} and {} %), and of learned clipping alone ({} and {} %; on `sotu` three"
    )
    assert said.format(*ahead["paper", "joint-wanda-matched"], *ahead["paper", "joint-clipping-matched"]) in PROSE
    table = pd.read_csv(folder / "smollm2-135m-paper.csv").set_index("method").loc[[ours, "quantized"], texts]
    said = "{:.2f} and {:.2f} where the quantized model has {:.2f} and {:.2f}"
    assert said.format(*table.to_numpy().ravel()) in PROSE


@pytest.mark.parametrize(
    "profile, n_pairs, said",
    [
        ("quick", 10, "differences vary by {:.1f} to {:.1f} % (standard deviation)"),
        ("paper", 10, "(standard deviation), at the published size by {:.1f} to {:.1f} %."),
    ],
)
def test_the_report_says_by_how_much_draws_differ(profile, n_pairs, said):
    perplexities = {}
    for path in (ROOT / "results" / "reference" / "table1" / "records").glob(f"*-{profile}-*.json"):
        record = load_record(path)
        perplexities.setdefault(record["config"]["row"], {})[record["config"]["seed"]] = record["metrics"]
    logs = {
        row: np.log([list(draw.values()) for _, draw in sorted(draws.items())])
        for row, draws in perplexities.items()
        if len(draws) == 3
    }
    pairs = [(ours, other) for ours in logs for other in logs if ours.startswith("besa") and ours != other]
    spread = [(logs[ours] - logs[other]).std(axis=0, ddof=1) for ours, other in pairs]
    text = " ".join((ROOT / "reproduce" / "README.md").read_text().split())
    low, high = 100 * np.min(spread), 100 * np.max(spread)
    assert len(pairs) == n_pairs and said.format(low, high) in text


def test_the_readme_says_what_new_values_cost_in_accuracy():
    table = pd.read_csv(ROOT / "results" / "reference" / "beyond" / "smollm2-135m-quick-zero-shot.csv").set_index("row")
    averages = [f"{table.loc[f'{row}-0.5', 'average']:.1f} %" for row in ("besa-block", "sparsegpt", "wanda-block")]
    said = "the third row cannot be told from either: {} on average, SparseGPT {}, Wanda with the same {}."
    assert said.format(*averages) in PROSE
    judged = pd.read_csv(ROOT / "results/reference/beyond/smollm2-135m-quick-zero-shot-verdicts.csv")
    averages = judged[judged["task"] == "average"]
    assert set(averages["verdict"]) == {"undecided"}
    assert set(averages["rests on"]) == {"1200 questions, 3 draws"} and len(averages) == 2


def test_the_readme_says_what_new_values_gain():
    folder, found = ROOT / "results" / "reference" / "beyond", {}
    for model in ("smollm2-135m", "gemma3-270m"):
        judged = pd.read_csv(folder / f"{model}-quick-verdicts.csv")
        other = judged["against"].str.rpartition("-")[0]
        found |= {(model, name): set(verdicts) for name, verdicts in judged["verdict"].groupby(other)}
    undecided = ("gemma3-270m", "wanda-block")
    assert found.pop(undecided) == {"undecided"} and len(found) == 3 and set.union(*found.values()) == {"holds"}
    assert "is ahead of SparseGPT, and on SmolLM2 of `besa.Wanda()` with the same" in PROSE
    assert "which on Gemma 3 270M cannot be told apart" in PROSE


def test_the_readme_says_where_the_recipe_ends():
    folder = ROOT / "results" / "reference" / "sparsity"
    judged = pd.read_csv(folder / "smollm2-135m-quick-verdicts.csv")
    assert set(judged["rests on"]) == {"32 segments, 3 draws"}
    verdicts = judged.set_index(["row", "against"])["verdict"]
    at = lambda target: [
        verdicts[f"besa-row-wise-{target}", f"{row}-{target}-matched"] for row in ("wanda", "sparsegpt")
    ]
    assert {target: set(at(target)) for target in (0.4, 0.5, 0.6)} == {
        0.4: {"undecided"},
        0.5: {"holds"},
        0.6: {"holds"},
    }
    said = "`besa.Besa()` is ahead of Wanda and SparseGPT at 50 and 60 % (SmolLM2, `wiki`); at 40 % they cannot be told"
    assert said in PROSE
    assert at(0.3)[0] == "does not hold" and "with which it is behind Wanda at 30 %" in PROSE
    assert "Outside {:.3f} to {:.3f} it needs `smooth=False`".format(*reachable_sparsity(101, True)) in PROSE
    factors = []
    for target in (0.7, 0.8):
        draws = [load_record(path) for path in (folder / "records").glob(f"*-besa-row-wise-{target}-*.json")]
        perplexities = [draw["metrics"]["wiki"] for draw in draws]
        factors.append(f"{float(f'{max(perplexities) / min(perplexities):.1g}'):.0f}")
    said = "at 70 and 80 % its perplexity differs between draws by factors of {} and {}"
    assert len(draws) == 3 and said.format(*factors) in PROSE


def test_the_readmes_packed_models_are_the_reference_run():
    folder = ROOT / "results" / "reference" / "packed"
    products = (
        pd.read_csv(folder / "smollm2-135m-quick-projections.csv")
        .set_index(["size", "sparsity", "product"])
        .sort_index()
    )
    models = pd.read_csv(folder / "smollm2-135m-quick.csv").set_index(["model", "sparsity", "form"]).sort_index()
    rows = {"50 %, bfloat16": (0.5, "packed"), "70 %, bfloat16": (0.7, "packed")}
    for label, (sparsity, form) in (rows | {"50 %, joint 4 bits": (0.5, "joint 4 bits")}).items():
        product, here = products.loc["11008 x 4096", sparsity, form], models.loc["llama-7b 8 blocks", sparsity]
        ratios = (here.loc[form] / here.loc["dense"])[["tokens/s, 1", "tokens/s, 4", "tokens/s, 16"]].tolist()
        ratios.append(here.loc["dense", "prompt of 512, s"] / here.loc[form, "prompt of 512, s"])
        shown = [f"{product['bytes/weight'] / 2:.2f}", f"{product['x torch dense']:.1f}"]
        (line,) = (line for line in README.splitlines() if line.startswith(f"| {label} |"))
        assert re.findall(r"\d+\.\d+", line) == shown + [f"{ratio:.2f}" for ratio in ratios]
    beside = pd.read_csv(folder / "smollm2-135m-quick-llama-cpp.csv").set_index("form")
    speed, size = beside["tokens/s, 1"], beside["GiB"]
    dense = [f"{speed[form]:.1f}" for form in ("llama.cpp, BF16", "dense", "packed")]
    four = [f"{speed[form]:.1f}" for form in ("llama.cpp, Q4_0", "joint 4 bits")]
    assert "at {} tokens/s dense in bfloat16, where torch has {} and packed bfloat16 {}: nearly".format(*dense) in PROSE
    assert speed["llama.cpp, BF16"] / speed["packed"] > 0.95
    assert "In `Q4_0` it has {} tokens/s, where joint 4 bits have {},".format(*four) in PROSE
    judged = pd.read_csv(folder / "smollm2-135m-quick-verdicts.csv").query("model == 'smollm2-135m'").set_index("row")
    assert list(judged.index[judged["verdict"] != "holds"]) == ["joint 4 bits at 0.7"]
    holds = (ROOT / "reproduce" / "README.md").read_text().partition("**Does not hold**")[0]
    marks = re.findall(r"\| seconds \| smollm2-135m [^,]*?%( †)?,", holds)
    said = "(joint 4 bits at 70 %, the 1.1, cannot be told from dense, and three of the other five do not survive"
    assert said in PROSE and len(marks) == 5 and marks.count(" †") == 3
    assert f"from {size['llama.cpp, Q4_0'] / size['joint 4 bits']:.2f} x the bytes" in PROSE
    prompts = beside["prompt of 512, s"]
    longer = [prompts["llama.cpp, BF16"] / prompts["dense"], prompts["llama.cpp, Q4_0"] / prompts["joint 4 bits"]]
    assert sorted(map(round, longer)) == [2, 4] and "For the prompt it takes two to four times as long" in PROSE
    small, forms = models.loc["smollm2-135m"].unstack("form"), ("packed", "joint 4 bits")
    of_dense = lambda column: pd.concat([small[column, form] / small[column, "dense"] for form in forms])
    speed, seconds = of_dense("tokens/s, 1"), pd.concat([1 / of_dense("tokens/s, 16"), of_dense("prompt of 512, s")])
    assert f"{speed.min():.1f} to {speed.max():.1f} x on one sequence" in PROSE
    assert f"prompts take {seconds.min():.1f} to {seconds.max():.1f} times the dense model's seconds" in PROSE
    packed, joint = (8 * products.loc[("11008 x 4096", 0.5, form), "bytes/weight"] for form in forms)
    lost = models["perplexity"].loc["smollm2-135m", 0.5]
    assert f"perplexity {lost['joint 4 bits']:.2f} where bfloat16 has {lost['packed']:.2f})" in PROSE
    shown = f"takes {packed:.0f} bits, a jointly quantized one (`besa.Quantize(bits=4)`) about {joint:.0f};"
    assert shown in PROSE


def test_the_readmes_equality_with_the_released_code_is_the_reference_run():
    found = pd.read_csv(ROOT / "results" / "reference" / "fidelity" / "smollm2-135m-quick-released.csv").set_index(
        "what"
    )
    apart = found["largest difference"]
    assert "within 0.5 %, perplexities of the pruned model on the same tokens within 1 %" in PROSE
    assert (found["verdict"] == "reproduced").all()
    records = [load_record(path) for path in (ROOT / "results" / "reference" / "fidelity" / "records").glob("*.json")]
    rows = {record["config"]["row"]: record for record in records if "c4" in record.get("metrics", {})}
    ours, other = (
        f"{rows[row]['metrics']['c4']:.2f} at {rows[row]['sparsity']:.4f}" for row in ("besa-row-wise", "sparsegpt")
    )
    assert f"BESA has {ours} zeros and SparseGPT {other} ([fidelity]" in PROSE
    perplexities = [name for name in apart.index if name.startswith("perplexity of ")]
    assert len(perplexities) == 10 and apart[perplexities].max() < 0.01
    assert apart[[name for name in apart.index if name.endswith(" of each step")]].max() < 0.005


def test_the_readmes_granularities_are_the_reference_run():
    judged = pd.read_csv(ROOT / "results" / "reference" / "granularity" / "smollm2-135m-quick-verdicts.csv")
    judged = judged.set_index(["row", "against"])
    verdicts, by = judged["verdict"], judged["difference ± standard error"].str.extract(r"(\d+\.\d+)%")[0]
    pairs = [("besa-row-dense", "besa-layer-dense"), ("besa-row-pruned", "besa-8-pruned")]
    assert f"each row is {by[pairs[0]]} % ahead of one for each projection where blocks reproduce the dense" in PROSE
    assert f"the two cannot be told apart, and single rows are behind groups of 8 by {by[pairs[1]]} %" in PROSE
    assert [verdicts[pair] for pair in pairs] == ["holds", "does not hold"]
    assert verdicts["besa-row-pruned", "besa-layer-pruned"] == "undecided"


def test_the_readmes_zero_shot_answers_are_the_reference_run():
    table = pd.read_csv(ROOT / "results" / "reference" / "fidelity" / "smollm2-135m-quick-zero-shot.csv")
    table = table.set_index("precision")
    n, other = table["questions"], table["other answers"]
    said = f"{n['float32'] - other['float32']:.0f} of {n['float32']:.0f} in float32 and"
    assert f"lm-eval's own model, {said} {n['bfloat16'] - other['bfloat16']:.0f} in bfloat16 (the precision of" in PROSE
    assert table["seconds of besa / windows"].between(0.9, 1.1).all()


def test_every_path_that_the_readmes_name_is_there():
    for name in ("README.md", "CONTRIBUTING.md", "reproduce/README.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"
    tree = re.search(r"^    besa/ .*?^      machine/", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    listed = set(re.findall(r"^ {6}(\w+)\.py ", tree.group(), re.MULTILINE))
    assert listed == {path.stem for path in (ROOT / "besa").glob("*.py")} - {"__init__", "__main__"}
