"""reproduce.records.verdicts, beside plain loops."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from reproduce.records.verdicts import DOCUMENTS, Group, judge, paired, verdict


def record(row, seed, losses, sparsity=0.5, name="wiki"):
    metrics = {name: math.exp(float(np.mean(losses)))}
    config = {"row": row, "seed": seed, "method": None, "sparsity": 0.5}
    return {"config": config, "metrics": metrics, "sparsity": sparsity, "losses": {name: losses}}


def rows(ours, other, n_seeds, noise=0.0, sparsities=(0.5, 0.5)):
    """Two rows of segments with the mean losses given."""
    random, found = np.random.default_rng(0), []
    for seed in range(n_seeds):
        text = random.normal(size=16)
        for name, mean, sparsity in (("a", ours, sparsities[0]), ("b", other, sparsities[1])):
            found.append(record(name, seed, mean + text + noise * random.normal(size=16), sparsity))
    return found


def decide(records, claim=("a", "b"), **options):
    return judge(records, [claim], lambda record: record["losses"], **options)


def test_the_interval_has_a_part_of_the_seeds_and_one_of_each_text():
    groups = [np.random.default_rng(seed).normal(size=(3, n)) for seed, n in ((0, 5), (1, 7))]
    mean, interval = paired([Group(values, np.arange(values.shape[1])) for values in groups])
    by_seed = [statistics.mean(statistics.mean(group[seed]) for group in groups) for seed in range(3)]
    parts = [(statistics.variance(by_seed) / 3, 2)]
    for group in groups:
        columns = [statistics.mean(column) for column in group.T]
        parts.append((statistics.variance(columns) / len(columns) / 4, len(columns) - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    assert mean == pytest.approx(statistics.mean(by_seed))
    assert interval == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(variance))
    assert math.isnan(paired([Group(np.array([[1.0]]), np.zeros(1))])[1])


def test_segments_of_one_document_count_as_one():
    random = np.random.default_rng(0)
    values = np.repeat(random.normal(size=(1, 6)) + 0.01 * random.normal(size=(3, 6)), 4, axis=1)
    by_document = paired([Group(values, np.repeat(np.arange(6), 4))])
    assert by_document == pytest.approx(paired([Group(values[:, ::4], np.arange(6))]))
    assert by_document[1] > 1.5 * paired([Group(values, np.arange(24))])[1]
    assert math.isnan(paired([Group(values, np.zeros(24))])[1])
    records = [each | {"losses": each["losses"] | {DOCUMENTS + "wiki": np.zeros(16)}} for each in rows(1.0, 2.0, 3)]
    assert decide(records)["verdict"].item() == "undecided"


@pytest.mark.parametrize(
    ("gain", "error", "n_seeds", "zeros", "expected"),
    [
        (1.1, 1.0, 3, (0.5, 0.5), "yes"),
        (-1.1, 1.0, 3, (0.5, 0.5), "no"),
        (0.9, 1.0, 3, (0.5, 0.5), "undecided"),
        (9.0, float("nan"), 3, (0.5, 0.5), "undecided"),
        (9.0, 1.0, 2, (0.5, 0.5), "-"),
        (9.0, 1.0, 3, (0.5, 0.4981), "yes"),
        (9.0, 1.0, 3, (0.4996, 0.5), "yes"),
        (9.0, 1.0, 3, (0.498, 0.5), "other sparsity"),
        (-9.0, 1.0, 3, (0.498, 0.5), "no"),
        (-9.0, 1.0, 3, (0.5, 0.498), "other sparsity"),
    ],
)
def test_verdicts_follow_the_rule(gain, error, n_seeds, zeros, expected):
    assert verdict(gain, error, n_seeds, list(zeros)) == expected


def test_a_lower_loss_is_better_and_differences_are_relative():
    (line,) = decide(rows(1.0, 1.1, 3, noise=0.01)).to_dict("records")
    assert line["verdict"] == "yes" and line["seeds"] == 3 and line["sparsity"] == "0.5000, 0.5000"
    assert float(line["difference"].split("%")[0]) == pytest.approx(100 * (math.exp(-0.1) - 1), abs=0.7)
    assert decide(rows(1.1, 1.0, 3, noise=0.01))["verdict"].item() == "no"
    assert decide(rows(1.0, 1.0, 3, noise=0.1))["verdict"].item() == "undecided"
    assert decide(rows(1.0, 2.0, 2))["verdict"].item() == "-"


def test_sparsities_are_stated_and_compared():
    assert decide(rows(1.0, 2.0, 3, 0.01, (0.4981, 0.5)))["sparsity"].item() == "0.4981, 0.5000"
    assert decide(rows(1.0, 2.0, 3, 0.01, (0.497, 0.5)))["verdict"].item() == "other sparsity"


def test_only_common_seeds_are_compared():
    records = [each for each in rows(1.0, 2.0, 3) if (each["config"]["row"], each["config"]["seed"]) != ("b", 2)]
    assert decide(records)["seeds"].item() == 2
    assert decide(records, ("a", "c")).empty


def test_averages_are_of_all_tasks_and_more_accuracy_is_better():
    records = []
    for seed in range(3):
        for name, right in (("a", [1, 1, 1, 0]), ("b", [1, 0, 0, 0])):
            losses = {"x": np.array(right, bool), "boolq": np.array([1, seed % 2, 0], bool)}
            metrics = {task: 100 * float(values.mean()) for task, values in losses.items()}
            metrics["average"] = sum(metrics.values()) / 2
            records.append(
                {
                    "config": {"row": name, "seed": seed, "method": None, "sparsity": 0.5},
                    "metrics": metrics,
                    "sparsity": 0.5,
                    "losses": losses,
                }
            )
    table = decide(records, metric="accuracy_percent", over="task").set_index("task")
    assert table["difference"]["x"].startswith("+50.00") and table["difference"]["average"].startswith("+25.00")
    assert table["difference"]["boolq"].startswith("+0.00")
    assert table["difference"]["average without boolq"] == table["difference"]["x"]


def test_without_samples_the_seeds_alone_tell_the_error():
    records = [each | {"losses": {}} for each in rows(1.0, 1.5, 3, noise=0.01)]
    (line,) = decide(records).to_dict("records")
    ratios = [math.log(records[i]["metrics"]["wiki"] / records[i + 1]["metrics"]["wiki"]) for i in (0, 2, 4)]
    assert float(line["difference"].split("%")[0]) == pytest.approx(100 * math.expm1(statistics.mean(ratios)), abs=0.06)
    assert line["verdict"] == "yes"
