"""Verdicts on claims: differences between two rows, paired by seed and by document of a test text, or by question."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from reproduce.records.record import Record, target_of

SAME_SPARSITY = 0.0005  # a row with fewer zeros than that cannot be the better one
WITHOUT_BOOLQ = "average without boolq"  # most of BoolQ's answers are yes: a pruned model that always says it gains
DOCUMENTS = "documents of "  # before the name of a text: the document in which each of its segments begins
Samples = Callable[[Record], Mapping[str, np.ndarray]]


def judge(
    records: Iterable[Record],
    claims: Iterable[tuple[str, str]],
    samples: Samples,
    metric: str = "perplexity",
    over: str = "text",
) -> pd.DataFrame:
    """A verdict on each claim, a pair of rows of which the first is said to be better, at each target of both.

    With three seeds or more it is "yes" or "no" if the 95 % interval of the mean difference, which is printed, leaves
    out 0, else "undecided". With fewer seeds there is a number and no verdict.

    Args:
        samples: segment losses or answers of a record, by metric, and the documents of the segments (`Run.samples`).
        metric: accuracy_percent (more is better, differences in points), or perplexity, cycles, error (less is better,
            differences relative).
        over: name of the column of texts, tasks or projections.
    """
    rows: dict[Any, dict[str, dict[int, Record]]] = {}
    for record in records:
        at_target = rows.setdefault(target_of(record), {})
        at_target.setdefault(record["config"]["row"], {})[record["config"]["seed"]] = record
    lines = []
    for target, (ours, other) in itertools.product(rows, list(claims)):
        mine, theirs = (rows[target].get(row, {}) for row in (ours, other))
        seeds = sorted(mine.keys() & theirs.keys())
        pairs = [(mine[seed], theirs[seed]) for seed in seeds]
        names = list(pairs[0][0]["metrics"]) if pairs else []
        names += [WITHOUT_BOOLQ] * ({"average", "boolq"} <= set(names))
        for name in names:
            points = metric == "accuracy_percent"
            mean, error = paired(differences(pairs, name, samples, points))
            zeros = [float(np.mean([pair[side]["sparsity"] for pair in pairs])) for side in (0, 1)]
            shown = f"{mean:+.2f} ± {error:.2f}" if points else f"{np.expm1(mean):+.1%} ± {np.exp(mean) * error:.1%}"
            if error > 0.1 and not points:
                ends = f"{np.expm1(mean - error):+.1%} to {np.expm1(mean + error):+.1%}"
                shown = f"{np.expm1(mean):+.1%} ({ends})"
            line = {
                "row": ours,
                "against": other,
                "target": str(target),
                over: name,
                "difference": shown.replace("nan%", "?"),
            }
            line |= {"sparsity": f"{zeros[0]:.4f}, {zeros[1]:.4f}", "seeds": len(seeds)}
            lines.append(line | {"verdict": verdict(mean if points else -mean, error, len(seeds), zeros)})
    if not lines:
        return pd.DataFrame()
    table = pd.DataFrame(lines).set_index("row")
    return table.drop(columns="target") if table["target"].nunique() == 1 else table


def verdict(gain: float, error: float, n_seeds: int, zeros: list[float]) -> str:
    """The verdict on a gain with a 95 % interval of gain ± error."""
    if n_seeds < 3:
        return "-"
    if not abs(gain) > error:  # also if nothing tells the error
        return "undecided"
    better, other = zeros if gain > 0 else reversed(zeros)
    if better < other - SAME_SPARSITY:
        return "other sparsity"
    return "yes" if gain > 0 else "no"


class Group(NamedTuple):
    """Differences (seeds, samples) of one text or task, and the cluster of each sample."""

    values: np.ndarray
    clusters: np.ndarray


def differences(pairs: list[tuple[Record, Record]], name: str, samples: Samples, points: bool) -> list[Group]:
    """Ours minus the other's: nats per token, points, or log ratios."""
    names = [name]
    if name in ("average", WITHOUT_BOOLQ):
        names = [task for task in pairs[0][0]["metrics"] if task not in ("average", name.split()[-1])]
    values_of = [(samples(ours), samples(other)) for ours, other in pairs]
    if all(group in ours and group in other for ours, other in values_of for group in names):
        scale = 100.0 if points else 1.0
        groups = []
        for group in names:
            values = np.stack([scale * ours[group] - scale * other[group] for ours, other in values_of])
            clusters = values_of[0][0].get(DOCUMENTS + group, np.arange(values.shape[1]))
            groups.append(Group(values, clusters))
        return groups
    values = np.array([[ours["metrics"][name], other["metrics"][name]] for ours, other in pairs])
    values = values if points else np.log(values)
    return [Group(values[:, :1] - values[:, 1:], np.zeros(1))]


def paired(groups: list[Group]) -> tuple[float, float]:
    """Mean difference and half of its 95 % interval.

    The variance is that of the seeds and, for each group, that of its clusters (as of a ratio estimator); Student's t
    with Satterthwaite's degrees of freedom.
    """
    by_seed = np.mean([values.mean(axis=1) for values, _ in groups], axis=0)
    parts = [(by_seed.var(ddof=1) / len(by_seed), len(by_seed) - 1)] if len(by_seed) > 1 else []
    for values, clusters in groups:
        over_seeds = values.mean(axis=0)
        sums = pd.Series(over_seeds - over_seeds.mean()).groupby(clusters).sum()
        n = len(sums)
        if n == 1 < len(over_seeds):  # one document tells nothing of others
            return float(by_seed.mean()), float("nan")
        if n > 1:
            parts.append(((sums**2).sum() * n / (n - 1) / len(over_seeds) ** 2 / len(groups) ** 2, n - 1))
    variance = sum(part for part, _ in parts)
    if not variance > 0:
        return float(by_seed.mean()), float("nan")
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    return float(by_seed.mean()), float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
