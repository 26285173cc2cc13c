"""Scorecard: a line for each claim of reproduce/claims.csv."""

import pandas as pd

from reproduce import ROOT
from reproduce.drawing.tables import published
from reproduce.page.load import MODEL, at_equal_sparsity, load, samples
from reproduce.records import verdicts


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
    records = load(claim["notebook"], target=claim["target"] or None, **wanted)
    records = at_equal_sparsity(records, claim["ours"])
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
