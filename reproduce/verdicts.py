"""Verdicts on claims: differences between two rows, paired by seed and by test segment or question."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd

from reproduce.tables import Record

SAME_SPARSITY = 0.002  # rows further apart in sparsity are not compared
Samples = Callable[[Record], Mapping[str, np.ndarray]]


def judge(
    records: Iterable[Record],
    claims: Iterable[tuple[str, str]],
    samples: Samples,
    metric: str = "perplexity",
    over: str = "text",
) -> pd.DataFrame:
    """A verdict on each claim, a pair of rows of which the first is said to be better.

    With three seeds or more it is "yes" or "no" if the mean difference exceeds two standard errors, else "undecided".
    With fewer seeds there is a number and no verdict.

    Args:
        samples: segment losses or answers of a record, by metric (`Run.samples`).
        metric: accuracy_percent (more is better, differences in points), or perplexity, cycles, error (less is better,
            differences relative).
        over: name of the column of texts, tasks or projections.
    """
    rows: dict[str, dict[int, Record]] = {}
    for record in records:
        rows.setdefault(record["config"]["row"], {})[record["config"]["seed"]] = record
    lines = []
    for ours, other in claims:
        seeds = sorted(rows.get(ours, {}).keys() & rows.get(other, {}).keys())
        pairs = [(rows[ours][seed], rows[other][seed]) for seed in seeds]
        for name in pairs[0][0]["metrics"] if pairs else []:
            points = metric == "accuracy_percent"
            mean, error = paired(differences(pairs, name, samples, points))
            zeros = [float(np.mean([pair[side]["sparsity"] for pair in pairs])) for side in (0, 1)]
            shown = f"{mean:+.2f} ± {error:.2f}" if points else f"{np.expm1(mean):+.1%} ± {np.exp(mean) * error:.1%}"
            line = {"row": ours, "against": other, over: name, "difference": shown.replace("nan%", "?")}
            line |= {"sparsity": f"{zeros[0]:.4f}, {zeros[1]:.4f}", "seeds": len(seeds)}
            lines.append(line | {"verdict": verdict(mean if points else -mean, error, len(seeds), zeros)})
    return pd.DataFrame(lines).set_index("row") if lines else pd.DataFrame()


def verdict(gain: float, error: float, n_seeds: int, zeros: list[float]) -> str:
    if abs(zeros[0] - zeros[1]) >= SAME_SPARSITY:
        return "other sparsity"
    if n_seeds < 3:
        return "-"
    if not abs(gain) > 2 * error:  # also if nothing tells the error
        return "undecided"
    return "yes" if gain > 0 else "no"


def differences(pairs: list[tuple[Record, Record]], name: str, samples: Samples, points: bool) -> list[np.ndarray]:
    """Ours minus the other's, one array (seeds, samples) per text or task: nats per token, points, or log ratios."""
    names = [name]
    if name == "average":
        names = [task for task in pairs[0][0]["metrics"] if task != "average"]
    values_of = [(samples(ours), samples(other)) for ours, other in pairs]
    if all(group in ours and group in other for ours, other in values_of for group in names):
        scale = 100.0 if points else 1.0
        return [np.stack([scale * ours[group] - scale * other[group] for ours, other in values_of]) for group in names]
    values = np.array([[ours["metrics"][name], other["metrics"][name]] for ours, other in pairs])
    values = values if points else np.log(values)
    return [values[:, :1] - values[:, 1:]]


def paired(groups: list[np.ndarray]) -> tuple[float, float]:
    """Mean difference and standard error, from the spread over seeds and over the samples of each group."""
    by_seed = np.mean([group.mean(axis=1) for group in groups], axis=0)
    variance = by_seed.var(ddof=1) / len(by_seed) if len(by_seed) > 1 else 0.0
    for group in groups:
        over_samples = group.mean(axis=0)
        if len(over_samples) > 1:
            variance += over_samples.var(ddof=1) / len(over_samples) / len(groups) ** 2
    return float(by_seed.mean()), float(np.sqrt(variance)) if variance > 0 else float("nan")
