"""Tables and sentences of README and the report that hold numbers."""

import json

import numpy as np
import pandas as pd

from reproduce import REFERENCE, ROOT
from reproduce.drawing.tables import geometric_mean, over_seeds, published, summary
from reproduce.methods import ROWS
from reproduce.page.load import MODEL, at_equal_sparsity, cpu_minutes, load


def results_table() -> pd.DataFrame:
    """Quality and cost of each method at the published size, calibrated on C4, and the paper's LLaMA-7B."""
    records = at_equal_sparsity(load("table1", model=MODEL, profile="paper", calibration="c4"))
    ours = over_seeds(summary(records))
    minutes: dict[str, list[float]] = {}
    for record in records:
        minutes.setdefault(record["config"]["row"], []).append(cpu_minutes(record))
    paper = published("table1")["wikitext2"].rename({"besa": "besa-row-wise"})
    lines = []
    shown = [row for row in ours.index.unique() if row in ROWS and ROWS[row].code]
    for row in sorted(shown, key=lambda row: (row != "dense", -ours["wikitext2"][row])):
        label = bold(row, ROWS[row].label)
        code = ROWS[row].code if row != "dense" else ""
        line = {"": label, "`besa.`": code, "sparsity": f"{ours['sparsity'][row]:.3f}"}
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


def bold(row: str, text: str) -> str:
    """The text, in bold if the row is the paper's method."""
    return f"**{text}**" if row == "besa-row-wise" else text


def compared() -> pd.DataFrame:
    """Quality and cost of methods on seed 3 of beyond.ipynb: at 50 %, after `finetune`, and at 70 %."""
    seed = {"model": MODEL, "calibration": "c4", "seed": 3}
    dense, at_half, at_70 = (
        {record["config"]["row"]: record for record in load("beyond", target=target, **seed)}
        for target in (0.0, 0.5, 0.7)
    )
    at_half |= dense
    rows = [row for row in at_half if row in ROWS and ROWS[row].code]
    lines = []
    for row in sorted(rows, key=lambda row: -geometric_mean(at_half[row])):
        record = at_half[row]
        after = at_half.get(f"{row} + epoch")
        sparser = at_70.get(row)
        line = {"": bold(row, ROWS[row].code), "→ sparsity": f"{record['sparsity']:.3f}"}
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
    seeds = {"model": MODEL, "calibration": "c4"}
    for target in (0.5, 0.7, 0.8):
        rows = ("exact-update", "exact-update + budgets + epoch")
        means = [list(map(geometric_mean, load("beyond", target=target, row=row, **seeds))) for row in rows]
        before, after = (f"{np.mean(values):.1f}±{np.std(values, ddof=1):.1f}" for values in means)
        parts.append(f"at {target:.0%} from {before} to {after}")
    return f"`Exact(update=True)` with budgets and the epoch, mean over {len(means[0])} seeds: {', '.join(parts)}."


def gain_on_gemma() -> str:
    parts = []
    for row, words in {"": "`Exact(update=True)`", " + budgets": "with budgets", " + epoch": "with the epoch"}.items():
        record = load("beyond", target=0.5, model="gemma3-270m", row=f"exact-update{row}", seed=0)[0]
        parts.append(f"{words} {record['metrics']['wiki']:.1f} / {record['metrics']['sotu']:.1f}")
    return f"Gemma 3 270M, 32 windows of 256 tokens of `sotu`, one seed, `wiki` / `sotu`: {', '.join(parts)}."


def plain_softmax() -> str:
    """Perplexities at 50 % with the plain softmax and as released."""
    plain, released = (
        load("sparsity", target=0.5, model=MODEL, profile="quick", row=row, seed=0)[0]["metrics"]["wikitext2"]
        for row in ("besa-plain", "besa-row-wise")
    )
    return f"perplexity {plain:.0f} on WikiText-2 where the released form has {released:.0f}"


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
        or record["seconds"] * record["provenance"]["threads"]
        for record in records
    }
    first, last = (f"{source['commit'][:8]} ({source['date'][:10]})" for source in (sources[0], sources[-1]))
    n_commits, processors = (len({source[name] for source in sources}) for name in ("commit", "hardware"))
    return (
        f"{len(records)} records of {n_commits} commits from {first} to {last}, on {processors} kinds of processors; "
        f"{sum(seconds.values()) / 3600:.0f} core-hours to prune each model once."
    )
