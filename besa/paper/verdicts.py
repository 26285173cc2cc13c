"""Claims, judged by code: differences of two rows, paired by segment or question and by draw of calibration windows."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float

from besa.paper.tables import Record

Samples = Callable[[Record], Mapping[str, np.ndarray]]
"""What a row's metrics are means of (`besa.paper.records.Run.samples`); older records have none."""


SURE = 2 * float(scipy.stats.norm.sf(2))
"""p below which a difference is not 0: of the normal distribution beyond two standard errors, 4.6 %."""
SAME_ZEROS = 1e-5
"""Fractions of zeros that are taken for equal: SparseGPT, at another row's count, misses it by 7e-6."""
MATCHED = "-matched"
"""What ends the name of a row that was pruned to another's zeros."""


def judge(
    records: Iterable[Record],
    claims: Iterable[tuple[str, str]],
    samples: Samples,
    metric: str = "perplexity",
    over: str = "text",
) -> pd.DataFrame:
    """A verdict on each claim, for each text. A claim is a pair of rows, of which the first is said to be better.

    It "holds", or "does not hold", where the mean difference is not 0 at 95 %: p below `SURE` (`paired`). It is
    "undecided" elsewhere, also where the better row has fewer zeros (of cycles: more), which is no fair win, and where
    neither samples nor three draws tell an error.

    Args:
        records: of all draws, which `seed` tells apart.
        metric: accuracy_percent (more is better; differences are in points), or perplexity, cycles or error (less is
            better; differences are factors).
        over: text, task, projection or hidden states: the column's name.
    """
    by_factor = metric != "accuracy_percent"
    draws: dict[str, dict[int, Record]] = {}
    for record in records:
        draws.setdefault(record["config"]["row"], {})[record["config"]["seed"]] = record
    lines = []
    for ours, other in claims:
        both = draws.get(ours, {}).keys() & draws.get(other, {}).keys()
        pairs = [(draws[ours][seed], draws[other][seed]) for seed in sorted(both)]
        for name in pairs[0][0]["metrics"] if pairs else ():
            differences = _differences(pairs, name, samples, by_factor)
            about = {"row": ours, "against": other, over: name}
            fewer = SAME_ZEROS
            if (pairs[0][1]["config"].get("method") or {}).get("method") == "wanda":  # prunes whole numbers in each row
                fewer = 1 / min(row["columns"] for _, record in pairs for row in record["projections"])
            lines.append(about | _verdict(pairs, differences, by_factor, fewer, zeros_help=metric == "cycles"))
    return pd.DataFrame(lines).set_index("row") if lines else pd.DataFrame()


def paired(differences: list[Float[np.ndarray, "draws _"]]) -> tuple[float, float, float]:
    """Mean difference, its standard error and two-sided p; NaN where nothing tells the error.

    With d_sgi of draw s of S, group g of k (one text, or the tasks of an average) and its sample i of n_g:

        error^2 = 1/k^2 sum_g Var_i(mean_s d_sgi) / m_g + Var_s(mean_gi d_sgi) / S,   m_g = n_g (1 - r_g) / (1 + r_g)

    The first part is of the text or the questions. Where neighbours are alike, with a correlation of r between one and
    the next (0 where that is negative), n samples tell as much as m would that are not (Zwiers and von Storch, 1995).
    The second part is of the calibration, where there are several draws; what is of both is counted twice, which is on
    the safe side. Without samples (n_g = 1) three draws are the least. p is Student's t's, with the degrees of freedom
    of Welch and Satterthwaite, error^4 / sum of the squared parts over theirs: it is `SURE` at 4.5 errors of three
    draws, at 2.1 of 32 segments that are not alike. Where there are several draws it is no less than by their part
    alone: the text's many degrees would make up for the draws' few, and equal rows be told apart too often (simulated
    with two draws in 13 of 100 cases, with three in 7, where 4.6 are meant; so in 5 at most).
    """
    by_draw = np.mean([group.mean(axis=1) for group in differences], axis=0)
    means = [group.mean(axis=0) for group in differences if group.shape[1] > 1]
    counts = map(_independent, means)
    parts = [(each.var(ddof=1) / m / len(differences) ** 2, max(1.0, m - 1)) for each, m in zip(means, counts)]
    alone = [(by_draw.var(ddof=1) / len(by_draw), len(by_draw) - 1)] if len(by_draw) > (1 if parts else 2) else []
    parts += alone
    variance, spread = sum(part for part, _ in parts), sum(part**2 / freedom for part, freedom in parts)
    mean, errors = by_draw.mean(), np.sqrt([variance if parts else np.nan, *(part for part, _ in alone)])
    with np.errstate(divide="ignore", invalid="ignore"):  # an error of 0
        freedoms = [variance**2 / spread if spread else np.inf, *(freedom for _, freedom in alone)]
        p = np.fmax.reduce(2 * scipy.stats.t.sf(abs(mean) / errors, freedoms))
    return float(mean), float(errors[0]), float(p)


def _independent(samples: Float[np.ndarray, " n"]) -> float:
    """m of `paired`: how many samples without likeness between neighbours would tell the mean as well as these."""
    apart = samples - samples.mean()
    alike = max(0.0, float(apart[1:] @ apart[:-1])) / (float(apart @ apart) or 1.0)
    return len(samples) * (1 - alike) / (1 + alike)


def _differences(
    pairs: list[tuple[Record, Record]], name: str, samples: Samples, by_factor: bool
) -> list[Float[np.ndarray, "draws _"]]:
    """Ours less the other's by group, in nats per token or in points; without samples, of the metric itself."""
    names = [each for each in pairs[0][0]["metrics"] if each != "average"] if name == "average" else [name]
    found = [[samples(record) for record in pair] for pair in pairs]
    if all(set(names) <= set(each) for pair in found for each in pair):
        scale = 1.0 if by_factor else 100.0
        return [np.stack([scale * ours[g] - scale * other[g] for ours, other in found]) for g in names]
    value = lambda record: np.log(record["metrics"][name]) if by_factor else record["metrics"][name]
    return [np.array([[value(ours) - value(other)] for ours, other in pairs])]


def _verdict(
    pairs: list[tuple[Record, Record]],
    differences: list[Float[np.ndarray, "draws _"]],
    by_factor: bool,
    fewer: float,
    zeros_help: bool,
) -> dict[str, str]:
    """The difference, what it rests on, and what it says of the claim.

    Args:
        fewer: by so much may the other row's fraction of zeros be below ours, and count as equal.
        zeros_help: more of them make a row better, and not worse.
    """
    mean, error, p = paired(differences)
    zeros = [sum(record["sparsity"] for record in row) / len(pairs) for row in zip(*pairs)]
    is_better = (mean < 0) == by_factor
    more = zeros[0] - zeros[1]
    is_fair = more >= -SAME_ZEROS if is_better != zeros_help else more <= fewer
    n, n_draws = sum(group.shape[1] for group in differences), len(pairs)
    shown = _factor(mean, error) if by_factor else f"{mean:+.2f} ± {error:.2f}"
    rests_on = [f"{n} {'segments' if by_factor else 'questions'}"] * (n > 1)
    return {
        "difference ± standard error": shown.replace("nan%", "?").replace("nan", "?"),
        "zeros": " and ".join(f"{zero:.4f}" for zero in zeros),
        "rests on": ", ".join([*rests_on, f"{n_draws} draw" + "s" * (n_draws > 1)]),
        "p": f"{p:.2g}",
        "verdict": ("holds" if is_better else "does not hold") if p < SURE and is_fair else "undecided",
    }


def _factor(mean: float, error: float) -> str:
    """exp of a mean, with its error: in percent, to more digits where it is small, as factors where it is large."""
    if error > 0.2:
        return f"x {np.exp(mean):.3g} (x/÷ {np.exp(error):.2g})"
    digits = 2 if 0 < error < 5e-4 else 1
    return f"{np.expm1(mean):+.{digits}%} ± {np.exp(mean) * error:.{digits}%}"
