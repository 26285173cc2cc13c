"""Write the generated parts of README.md, and the report reproduce/README.md, from results/reference.

`python -m reproduce.page` writes both; `--show table1 --results results` prints what a notebook left there.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from besa.data.files import atomic_write
from reproduce import figures, verdicts
from reproduce.tables import REFERENCE, ROOT, Record, over_seeds, published, slug, summary

MODEL = "smollm2-135m"
METHODS = {  # rows of README's table, with the code of each
    "dense": "",
    "wanda": "`Wanda()`",
    "sparsegpt": "`SparseGPT()`",
    "besa-row-wise": "`Besa()`",
}
COMPARED = {  # rows of README's second table, with the code of ours
    "dense": "dense",
    "wanda": "`Wanda()`",
    "sparsegpt": "`SparseGPT()`",
    "besa-row-wise": "**`Besa()`**",
    "ria": "RIA †",
    "dsnot": "DSnoT †",
    "admm": "ADMM †",
    "alps": "ALPS †",
    "ebft-steps": "EBFT †",
    "exact": "`Exact()`",
    "exact-update": "`Exact(update=True)`",
    "exact-update-budgets": "`Exact(update=True, sparsities=block_budgets(model, windows, 0.5))`",
}


def load(notebook: str, results: Path = REFERENCE, **config: Any) -> list[Record]:
    """Records of a notebook whose configuration holds these values."""
    paths = sorted((results / notebook / "records").glob("*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) | {"path": path} for path in paths]
    return [record for record in records if config.items() <= record["config"].items()]


def at_equal_sparsity(records: list[Record], ours: str = "besa-row-wise") -> list[Record]:
    """Records of rows pruned to the sparsity of a row and, where there are none, as they are."""
    matched = {each["config"]["row"] for each in records if each["config"].get("matched_to") == ours}
    wanted = {row: ours for row in matched}
    return [each for each in records if each["config"].get("matched_to") == wanted.get(each["config"]["row"])]


def samples(record: Record) -> Mapping[str, np.ndarray]:
    path = record["path"].parents[1] / "samples" / f"{record['path'].stem}.npz"
    return dict(np.load(path)) if path.is_file() else {}


def percent(value: float) -> str:
    return f"{100 * value:+.1f} %".replace("-", "\N{MINUS SIGN}")


def paper_number(claim: pd.Series, names: list[str]) -> str:
    """BESA relative to the other method in the paper, on LLaMA-7B; of the same texts, if the paper has them."""
    if not claim["paper"]:
        return ""
    numbers = published(claim["notebook"], claim["metric"])
    ours = numbers.loc[next(row for row in ("besa", "joint-besa", "besa-row-wise") if row in numbers.index)]
    other = numbers.loc[claim["paper"]]
    if claim["metric"] == "accuracy_percent":
        return f"{ours['average'] - other['average']:+.1f} points".replace("-", "\N{MINUS SIGN}")
    if claim["metric"] == "cycles":
        return percent(ours.sum() / other.sum() - 1)
    texts = [name for name in names if name in numbers] or ["wikitext2"]
    return ", ".join(f"{text} {percent(ours[text] / other[text] - 1)}" for text in texts)


def judged(claim: pd.Series) -> pd.DataFrame:
    """The verdicts on a claim, a line per text or task; `size` is the number of seeds, and of samples of each line."""
    wanted = {"model": MODEL, "profile": claim["profile"], "calibration": claim["calibration"]}
    records = at_equal_sparsity(load(claim["notebook"], **wanted), claim["ours"])
    if claim["metric"] == "cycles":
        for record in records:
            record["metrics"]["block"] = sum(record["metrics"].values())
    pair = [(claim["ours"], claim["against"])]
    judgements = verdicts.judge(records, pair, samples, claim["metric"], "name").set_index("name")
    judgements = judgements.loc[claim["names"].split(";")] if claim["names"] else judgements
    first = min(record["config"]["seed"] for record in records if record["config"]["row"] == claim["against"])
    values = samples(next(r for r in records if (r["config"]["row"], r["config"]["seed"]) == (claim["ours"], first)))
    sizes = []
    for name in judgements.index:
        left_out = "boolq" if name == verdicts.WITHOUT_BOOLQ else ""
        named = [key for key in values if key == name or ("average" in name and key != left_out)]
        sizes.append(str(sum(len(values[key]) for key in named)))
    size = " / ".join(dict.fromkeys(sizes)) if values else ""
    return judgements.assign(size=f"{judgements['seeds'].max()} × {size}".removesuffix(" × "))


def short(difference: str, metric: str) -> str:
    unit = "points" if "acc" in metric else "%"
    if "(" in difference:
        text = difference.replace("%", "").replace(" (", f" {unit} (")
    else:
        mean, error = (part.strip().rstrip("%") for part in difference.split("±"))
        text = f"{float(mean):+.1f}" + (f" ± {float(error):.1f}" if error not in ("?", "nan") else "") + f" {unit}"
    return text.replace("-", "\N{MINUS SIGN}")


def scorecard(of_the_paper: bool = True) -> pd.DataFrame:
    """A line per claim of reproduce/claims.csv, of the paper or beyond it."""
    lines = []
    for _, claim in pd.read_csv(ROOT / "reproduce" / "claims.csv", keep_default_na=False).iterrows():
        if (claim["item"] in ("Other sparsities", "Beyond the paper")) == of_the_paper:
            continue
        judgements = judged(claim)
        several = len(judgements) > 1
        ours = [
            f"{name} " * several + short(line["difference"], claim["metric"]) for name, line in judgements.iterrows()
        ]
        judgements["verdict"] = judgements["verdict"].replace("-", "too few seeds")
        words = [f"{name} " * several + line["verdict"] for name, line in judgements.iterrows()]
        same = judgements["verdict"].nunique() == 1
        line = {"item": claim["item"], "claim": claim["claim"]}
        if of_the_paper:
            line["paper, LLaMA-7B"] = paper_number(claim, list(judgements.index))
        line |= {
            f"here, {MODEL}": ", ".join(ours),
            "verdict": judgements["verdict"].iloc[0] if same else ", ".join(words),
            "size": judgements["size"].iloc[0],
        }
        lines.append(line | {"notebook": link(claim)})
    return pd.DataFrame(lines)


def link(claim: pd.Series) -> str:
    """Executed notebook, relative to reproduce/."""
    name = claim["notebook"] if claim["profile"] == "quick" else f"{MODEL}-{claim['profile']}"
    name = f"{MODEL}-{claim['profile']}-c4" if claim["calibration"] == "c4" else name
    name += "-unmatched" if claim["ours"] == "besa-layer-wise" else ""
    return f"[{claim['notebook']}](../results/reference/{claim['notebook']}/{name}.ipynb)"


def results_table() -> pd.DataFrame:
    """Quality and cost of each method at the published size, calibrated on C4, and the paper's LLaMA-7B."""
    records = at_equal_sparsity(load("table1", model=MODEL, profile="paper", calibration="c4"))
    ours, minutes = over_seeds(summary(records)), {}
    for record in records:
        minutes.setdefault(record["config"]["row"], []).append(cpu_minutes(record))
    paper = published("table1")["wikitext2"].rename({"besa": "besa-row-wise"})
    lines = []
    for row, code in METHODS.items():
        name = figures.label(row)
        line = {"": "**BESA**" if name == "BESA" else name, "`besa.`": code, "sparsity": f"{ours['sparsity'][row]:.3f}"}
        for text in ("wikitext2", "c4", "ptb"):
            spread = f"±{ours[f'± {text}'][row]:.1f}" if f"± {text}" in ours else ""
            line[f"→ {text}"] = f"{ours[text][row]:.1f}{spread}".removesuffix("±nan")
        line["→ CPU minutes"] = f"{np.mean(minutes[row]):.0f}" if row != "dense" else ""
        line["→ wikitext2 / dense"] = f"{ours['wikitext2'][row] / ours['wikitext2']['dense']:.2f}"
        known = paper.get(row)
        line["→ the paper's, LLaMA-7B"] = f"{known / paper['dense']:.2f}" if known else ""
        lines.append(line)
    return pd.DataFrame(lines)


def snippet() -> str:
    """A sentence on what README's example prints: the row of `make table1` with the same windows and segments."""
    ours = {"model": MODEL, "profile": "quick", "calibration": "sotu", "seed": 0}
    dense, pruned = (load("table1", **ours, row=row)[0] for row in ("dense", "besa-row-wise"))
    return (
        f"Both print a perplexity of {pruned['metrics']['wiki']:.1f} ({dense['metrics']['wiki']:.1f} dense) at "
        f"sparsity {pruned['sparsity']:.4f}, as in column `wiki` of `make table1`; other processors differ by up to "
        "2 %. Five minutes on two cores."
    )


def fidelity(*rows: str) -> tuple[float, float]:
    """Largest relative difference to the released code: of a step in block 0, of a perplexity (of these rows)."""
    steps = [max(record["metrics"].values()) for record in load("fidelity") if "block-0" in record["config"]["row"]]
    known = json.loads((ROOT / "tests" / "golden" / "smollm2_bench.json").read_text())["perplexity"]
    ratios = [
        abs(value / known[record["config"]["row"]][text] - 1)
        for record in load("fidelity", calibration="c4")
        if not rows or record["config"]["row"] in rows
        for text, value in record["metrics"].items()
    ]
    return max(steps), max(ratios)


def cpu_minutes(record: Record) -> float:
    return sum(record.get("cpu_seconds", {}).values()) / 60


def geometric_mean(record: Record) -> float:
    return float(np.exp(np.mean(np.log(list(record["metrics"].values())))))


def compared() -> pd.DataFrame:
    """Quality and cost of methods on seed 3 of beyond.ipynb: at 50 %, after `finetune`, and at 70 %."""
    records = load("beyond", model=MODEL, calibration="c4", seed=3)
    by_row = {each["config"]["row"].removesuffix("-0.5"): each for each in records}
    lines = []
    for row in sorted(by_row.keys() & COMPARED, key=lambda row: -geometric_mean(by_row[row])):
        record, after, sparser = by_row[row], by_row.get(f"{row}-epoch"), by_row.get(f"{row}-0.7")
        line = {"": COMPARED[row], "→ sparsity": f"{record['sparsity']:.3f}"}
        line |= {f"→ {text}": f"{value:.1f}" for text, value in record["metrics"].items()}
        line["→ mean"] = f"{geometric_mean(record):.1f}"
        minutes = cpu_minutes(record)
        line["→ CPU minutes"] = f"{minutes:.1f}" if minutes else ""
        line["→ epoch"] = f"{geometric_mean(after):.1f}" if after else ""
        reached = f" ({sparser['sparsity']:.3f})" if sparser and sparser["sparsity"] < 0.699 else ""
        line["→ mean at 70 %"] = f"{geometric_mean(sparser):.0f}{reached}" if sparser else ""
        lines.append(line)
    return pd.DataFrame(lines)


def gain() -> str:
    """A sentence on budgets and an epoch, over the seeds of beyond.ipynb."""
    parts = []
    for target in ("0.5", "0.7", "0.8"):
        rows = (f"exact-update-{target}", f"exact-update-budgets-epoch-{target}")
        means = [list(map(geometric_mean, load("beyond", model=MODEL, calibration="c4", row=row))) for row in rows]
        before, after = (f"{np.mean(values):.1f}±{np.std(values, ddof=1):.1f}" for values in means)
        parts.append(f"at {float(target):.0%} from {before} to {after}")
    return f"`Exact(update=True)` with budgets and the epoch, mean over {len(means[0])} seeds: {', '.join(parts)}."


def gain_on_gemma() -> str:
    parts = []
    for row, words in {"": "`Exact(update=True)`", "-budgets": "with budgets", "-epoch": "with the epoch"}.items():
        record = load("beyond", model="gemma3-270m", row=f"exact-update{row}-0.5", seed=0)[0]
        parts.append(f"{words} {record['metrics']['wiki']:.1f} / {record['metrics']['sotu']:.1f}")
    return f"Gemma 3 270M, 32 windows of 256 tokens of `sotu`, one seed, `wiki` / `sotu`: {', '.join(parts)}."


def plain_softmax() -> str:
    """Perplexities at 50 % with the plain softmax and as released."""
    plain, released = (
        load("sparsity", model=MODEL, profile="quick", row=row, seed=0)[0]["metrics"]["wikitext2"]
        for row in ("besa-plain-0.5", "besa-row-wise-0.5")
    )
    return f"perplexity {plain:.0f} on WikiText-2 where the released form has {released:.0f}"


def table(frame: pd.DataFrame) -> str:
    """A Markdown table without an index, columns not padded."""
    rows = [[str(cell) for cell in line] for line in frame.itertuples(index=False)]
    names = [name.removeprefix("→ ") for name in frame.columns]
    lines = [names, ["--:" if "→" in name else ":--" for name in frame.columns], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cost() -> str:
    """A sentence on pruning time, from results/reference/cost."""
    hours = pd.read_csv(REFERENCE / "cost" / "hours-quick.csv", index_col="model")["hours"]
    records = load("table1", model=MODEL, profile="paper", row="besa-row-wise")
    minutes = [cpu_minutes(record) or record["seconds"] / 60 for record in records]
    return (
        f"BESA at the published size: {min(minutes):.0f} to {max(minutes):.0f} minutes for SmolLM2-135M on one CPU "
        f"core; extrapolated from one block, {hours['llama-7b']:.0f} hours for LLaMA-7B and "
        f"{hours['llama2-70b']:.0f} for LLaMA-2-70B on two CPU cores."
    )


def evidence() -> str:
    """A sentence on all records: commits, processors, core-hours of pruning."""
    records = [record for folder in sorted(REFERENCE.iterdir()) for record in load(folder.name)]
    sources = sorted((record["provenance"] for record in records), key=lambda source: source["date"])
    seconds = {
        record.get("weights_sha256") or record["path"]: 60 * cpu_minutes(record)
        or np.sum(record["seconds"]) * record["provenance"]["threads"]
        for record in records
    }
    first, last = (f"{source['commit'][:8]} ({source['date'][:10]})" for source in (sources[0], sources[-1]))
    n_commits, processors = (len({source[name] for source in sources}) for name in ("commit", "hardware"))
    return (
        f"{len(records)} records of {n_commits} commits from {first} to {last}, on {processors} kinds of processors; "
        f"{sum(seconds.values()) / 3600:.0f} core-hours to prune each model once."
    )


def parts() -> dict[str, str]:
    """The generated parts of README.md by marker."""
    same = "We ran the authors' code on the same weights and tokens: BESA's perplexities differ from ours by at most "
    same += f"{fidelity('besa-row-wise')[1]:.1%} ([fidelity](results/reference/fidelity/fidelity.ipynb))."
    return {
        "snippet": snippet(),
        "results": f"{table(results_table())}\n\n{same}",
        "compared": f"{table(compared())}\n\n{gain()} {gain_on_gemma()}",
        "cost": cost(),
    }


def fill(text: str, generated: Mapping[str, str]) -> str:
    """Replace what stands between the markers `<!-- name -->` and `<!-- end -->`."""
    for name, part in generated.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        escaped = part.replace("\\", r"\\")
        text, n = re.subn(pattern, rf"\g<1>{escaped}\n\g<2>", text, flags=re.DOTALL)
        if n != 1:
            raise ValueError(f"{n} markers <!-- {name} --> in README.md")
    return text


def report() -> str:
    """The report: a line per claim, then the summary of the ML Reproducibility Challenge."""
    template = (ROOT / "reproduce" / "report.md").read_text(encoding="utf-8")
    step, perplexity = fidelity()
    records = load("table1", model=MODEL, profile="paper", calibration="sotu", row="wanda")
    own, matched = (
        over_seeds(summary([record for record in records if ("matched_to" in record["config"]) == is_matched])).iloc[0]
        for is_matched in (False, True)
    )
    lower = 1 - matched["wiki"] / own["wiki"]
    matching = f"Wanda has {lower:.1%} less perplexity at {matched['sparsity']:.3f} than at {own['sparsity']:.3f}"
    filled = {
        "scorecard": table(scorecard()),
        "beyond": table(scorecard(of_the_paper=False)),
        "step": f"{step:.2%}",
        "perplexity": f"{perplexity:.1%}",
        "cost": cost(),
        "matching": matching,
        "plain": plain_softmax(),
        "evidence": evidence(),
    }
    return re.sub(r"\{(\w+)\}", lambda match: filled[match[1]], template)


def shown(item: str, folder: Path) -> str:
    """The tables that the newest run of a notebook left in a folder."""
    written = sorted(folder.glob("*.md"), key=lambda path: path.stat().st_mtime_ns)
    if not written:
        raise typer.BadParameter(f"no table of {item} in {folder}; run `make {item}` first")
    runs = {f"{slug(record['config']['model'])}-{record['config']['profile']}" for record in load(item, folder.parent)}
    run = next((run for run in runs if written[-1].stem.startswith(run)), "")
    texts = [path.read_text(encoding="utf-8") for path in written if path.stem.startswith(run)]
    return "\n".join([*texts, *map(str, sorted(folder.glob(f"{run}*.png"))), str(folder / f"{item}.ipynb")])


def main(
    results: Annotated[Path, typer.Option(help="folder of your own runs")] = ROOT / "results",
    show: Annotated[str, typer.Option(help="print the tables of a notebook there, such as table1")] = "",
) -> None:
    """Write README.md's tables and reproduce/README.md from results/reference."""
    if show:
        print(shown(show, results / show))
        return
    readme = ROOT / "README.md"
    pages = {readme: fill(readme.read_text(encoding="utf-8"), parts()), ROOT / "reproduce" / "README.md": report()}
    for path, text in pages.items():
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    typer.run(main)
