"""Claims are judged by paired differences: against scipy's paired test, naive loops, and what noise does."""

import copy
import itertools
import runpy

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

import besa
from besa.machine.provenance import ROOT
from besa.paper.records import Run
from besa.paper.tables import block_sparsities, over_draws, summary, write_table
from besa.paper.verdicts import SURE, judge, paired


def record(row, metrics, seed=0, sparsity=0.5):
    return {"config": {"row": row, "seed": seed}, "metrics": metrics, "sparsity": sparsity}


def judged(ours, other, samples=None, metric="perplexity"):
    """The verdicts on "a is better than b"; `samples` by row and seed."""
    of = lambda record: (samples or {}).get((record["config"]["row"], record["config"]["seed"]), {})
    return judge([*ours, *other], [("a", "b")], of, metric)


def losses(mean, noise, n=32, seed=0):
    return mean + noise * np.random.default_rng(seed).standard_normal(n)


def unlike(samples):
    """The same in an order in which no neighbours are alike: small and large take turns."""
    low, high = np.array_split(np.sort(samples), 2)
    return np.array([value for pair in zip(low, high[::-1], strict=True) for value in pair])


def test_the_error_of_one_draw_is_that_of_the_paired_t_test():
    difference = unlike(losses(3.0, 0.5) - losses(3.1, 0.5, seed=1))
    mean, error, p = paired([difference[None]])
    expected = scipy.stats.ttest_1samp(difference, 0.0)
    assert mean / error == pytest.approx(expected.statistic) and p == pytest.approx(expected.pvalue)


def test_an_error_is_not_shown_as_nothing():
    easy = losses(3.0, 1.0)
    samples = {("a", 0): {"t": easy - 0.0015 + 0.001 * unlike(np.linspace(-1, 1, 32))}, ("b", 0): {"t": easy}}
    found = judged([record("a", {"t": 20.0})], [record("b", {"t": 20.0})], samples).iloc[0]
    assert found["difference ± standard error"] == "-0.15% ± 0.01%"


@pytest.mark.parametrize("alike", [0.3, 0.6])
def test_segments_that_are_like_their_neighbours_count_for_less(alike):
    """A text of 218 segments whose difficulty drifts: nothing is told apart much more often than in one of 22 cases."""
    sure, errors, means = 0, [], []
    for seed in range(300):
        noise, series = losses(0.0, 1.0, n=218, seed=seed), [0.0]
        for each in noise:
            series.append(alike * series[-1] + each)
        mean, error, p = paired([np.array(series[1:])[None]])
        sure, errors, means = sure + (p < SURE), [*errors, error], [*means, mean]
    assert 0.02 < sure / 300 < 0.09 and np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_fewer_cycles_are_better_and_three_draws_tell_their_noise():
    fewer = [record("a", {"q_proj": 90.0 + seed / 10}, seed) for seed in range(3)]
    more = [record("b", {"q_proj": 100.0}, seed) for seed in range(3)]
    verdict = judged(fewer, more, metric="cycles").loc["a"]
    assert verdict["difference ± standard error"] == "-9.9% ± 0.1%" and verdict["rests on"] == "3 draws"
    assert verdict["verdict"] == "holds"
    turned = judge([*fewer, *more], [("b", "a")], lambda _: {}, "cycles", "projection").loc["b"]
    assert turned["projection"] == "q_proj" and turned["verdict"] == "does not hold"


def test_the_error_of_an_average_and_of_several_draws_adds_theirs_up():
    groups = [np.random.default_rng(n).standard_normal((3, n)) for n in (5, 40)]
    mean, error, p = paired(groups)
    draws = [sum(sum(group[s]) / len(group[s]) for group in groups) / 2 for s in range(3)]
    variance = sum((draw - mean) ** 2 for draw in draws) / 2 / 3
    spread = variance**2 / 2
    for group in groups:
        samples = [sum(group[:, i]) / 3 for i in range(group.shape[1])]
        centre = sum(samples) / len(samples)
        squares = sum((x - centre) ** 2 for x in samples)
        alike = max(0, sum((x - centre) * (y - centre) for x, y in itertools.pairwise(samples)) / squares)
        n = len(samples) * (1 - alike) / (1 + alike)
        part = squares / (len(samples) - 1) / n / 4
        variance, spread = variance + part, spread + part**2 / (n - 1)
    assert mean == pytest.approx(sum(draws) / 3) and error == pytest.approx(variance**0.5)
    of_draws = scipy.stats.ttest_1samp(draws, 0.0).pvalue
    assert p == pytest.approx(max(2 * scipy.stats.t.sf(abs(mean) / error, variance**2 / spread), of_draws))


def test_segments_do_not_make_up_for_few_draws():
    """Draws that vary much: by both parts together equal rows were told apart in 13 (two draws) and 7 of 100 cases."""
    for n_draws in (2, 3):
        sure, rng = 0, np.random.default_rng(0)
        for _ in range(1000):
            draws, text = rng.standard_normal((n_draws, 1)), np.sqrt(0.1 * 218 / n_draws) * rng.standard_normal(218)
            sure += paired([draws + text])[2] < SURE
        assert 0.02 < sure / 1000 < 0.06


def test_more_noise_of_the_text_decides_nothing():
    draws, noise = np.array([[0.012], [0.022], [0.009]]), unlike(losses(0.0, 1.0, n=218))
    of_draws = scipy.stats.ttest_1samp(draws[:, 0], 0.0).pvalue
    found = [paired([draws + scale * (noise - noise.mean())])[2] for scale in (0.01, 0.05, 0.1, 0.2)]
    assert found == sorted(found) and found[0] == pytest.approx(of_draws) and found[-1] > 1.5 * of_draws


def test_equal_rows_are_told_apart_once_in_twenty_times():
    """A text of segments of very different difficulty, and two rows whose differences are noise."""
    words = []
    for seed in range(200):
        easy = losses(3.0, 1.0, seed=seed)
        samples = {("a", 0): {"t": easy + losses(0, 0.1, seed=10**4 + seed)}, ("b", 0): {"t": easy}}
        words += list(judged([record("a", {"t": 20.0})], [record("b", {"t": 20.0})], samples)["verdict"])
    assert 0.02 < 1 - words.count("undecided") / 200 < 0.09 and {"holds", "does not hold"} < set(words)


def test_three_draws_of_equal_rows_are_told_apart_no_more_often():
    words = []
    for seed in range(400):
        draws = np.exp(losses(3.0, 0.01, n=6, seed=seed)).reshape(2, 3)
        ours, other = (
            [record(row, {"t": v}, s) for s, v in enumerate(of)] for row, of in zip("ab", draws, strict=True)
        )
        words += list(judged(ours, other)["verdict"])
    assert 0.02 < 1 - words.count("undecided") / 400 < 0.09


CASES = {  # difference of the losses, its noise, zeros of both -> verdict
    "lower beyond two errors": (-0.1, 0.1, (0.5, 0.5), "holds"),
    "higher beyond two errors": (0.1, 0.1, (0.5, 0.5), "does not hold"),
    "within two errors": (-0.01, 0.5, (0.5, 0.5), "undecided"),
    "equal": (0.0, 0.0, (0.5, 0.5), "undecided"),
    "lower with fewer zeros": (-0.1, 0.1, (0.49, 0.5), "undecided"),
    "lower with as good as equal zeros": (-0.1, 0.1, (0.499995, 0.5), "holds"),
    "lower with more zeros": (-0.1, 0.1, (0.51, 0.5), "holds"),
    "higher with fewer zeros": (0.1, 0.1, (0.49, 0.5), "does not hold"),
    "higher with more zeros": (0.1, 0.1, (0.51, 0.5), "undecided"),
}


@pytest.mark.parametrize("difference, noise, zeros, verdict", CASES.values(), ids=CASES)
def test_a_verdict_needs_two_standard_errors_and_no_fewer_zeros(difference, noise, zeros, verdict):
    easy = losses(3.0, 1.0)
    ours = easy + difference + noise * unlike(np.linspace(-1, 1, 32))
    rows = [[record(row, {"t": 20.0}, sparsity=zero)] for row, zero in zip("ab", zeros, strict=True)]
    found = judged(*rows, {("a", 0): {"t": ours}, ("b", 0): {"t": easy}}).iloc[0]
    assert found["verdict"] == verdict and found["rests on"] == "32 segments, 1 draw"
    assert found["difference ± standard error"].startswith(f"{np.expm1(difference):+.1%} ± ")


def test_of_cycles_more_zeros_make_no_fair_win():
    found = {}
    for zeros in ((0.49, 0.5), (0.5, 0.5), (0.51, 0.5)):
        rows = [
            [record(row, {"t": cycles + s / 10}, s, zero) for s in range(3)]
            for row, cycles, zero in zip("ab", (90.0, 100.0), zeros, strict=True)
        ]
        found[zeros] = judged(*rows, metric="cycles")["verdict"].tolist()
        found[zeros] += judge([*rows[0], *rows[1]], [("b", "a")], lambda _: {}, "cycles")["verdict"].tolist()
    worse = ["holds", "does not hold"]
    assert found == {(0.49, 0.5): worse, (0.5, 0.5): worse, (0.51, 0.5): ["undecided"] * 2}


@pytest.mark.parametrize("other", ["b", "b-matched"])
@pytest.mark.parametrize(
    "method, short, verdict",
    [("wanda", 0.0006, "does not hold"), ("wanda", 0.0011, "undecided"), ("sparsegpt", 0.0006, "undecided")],
)
def test_wanda_may_have_fewer_zeros_by_a_weight_a_row(method, short, verdict, other):
    rows = [record("a", {"t": 20.0}, sparsity=0.7), record(other, {"t": 18.0}, sparsity=0.7 - short)]
    rows[1]["config"]["method"] = {"method": method}
    rows[1]["projections"] = [{"columns": 4000}, {"columns": 1000}]
    samples = {"a": {"t": losses(3.0, 1.0)}, other: {"t": losses(2.9, 1.0)}}
    found = judge(rows, [("a", other)], lambda record: samples[record["config"]["row"]])
    assert list(found["verdict"]) == [verdict]


def test_rows_beside_wanda_may_not_have_fewer_zeros_by_a_weight_a_row():
    rows = [record("a", {"t": 18.0}, sparsity=0.7 - 0.0006), record("b", {"t": 20.0}, sparsity=0.7)]
    rows[1] |= {"projections": [{"columns": 1000}]}
    rows[1]["config"]["method"] = {"method": "wanda"}
    samples = {"a": {"t": losses(2.9, 1.0)}, "b": {"t": losses(3.0, 1.0)}}
    assert list(judge(rows, [("a", "b")], lambda each: samples[each["config"]["row"]])["verdict"]) == ["undecided"]


@pytest.mark.parametrize(
    "perplexities, verdict", [([18.0], "undecided"), ([18.0, 18.1], "undecided"), ([18.0, 18.1, 18.2], "holds")]
)
def test_rows_without_losses_by_segment_take_three_draws(perplexities, verdict):
    """As older records have it; one row with losses does not make up for one without."""
    ours = [record("a", {"t": value}, seed) for seed, value in enumerate(perplexities)]
    other = [record("b", {"t": 20.0}, seed) for seed in range(len(perplexities))]
    found = judged(ours, other, {("a", 0): {"t": losses(2.9, 0.1)}}).iloc[0]
    assert found["verdict"] == verdict and found["rests on"].startswith(f"{len(perplexities)} draw")


def test_accuracies_are_judged_question_by_question_and_on_average_over_the_tasks():
    right = {"a": {"x": np.arange(200) % 4 > 0, "y": np.arange(50) % 2 > 0}}  # 75 and 50 %
    right["b"] = {"x": np.arange(200) % 2 > 0, "y": np.arange(50) % 2 > 0}  # 50 and 50 %
    rows = [[record(row, {"x": 0.0, "y": 0.0, "average": 0.0})] for row in "ab"]
    found = judged(*rows, {(row, 0): right[row] for row in "ab"}, "accuracy_percent").set_index("text")
    assert found["verdict"].to_dict() == {"x": "holds", "y": "undecided", "average": "holds"}
    error = scipy.stats.sem(right["a"]["x"] * 1.0 - right["b"]["x"]) * 100
    assert found.loc["x", "difference ± standard error"] == f"+25.00 ± {error:.2f}"
    assert found.loc["average", "difference ± standard error"] == f"+12.50 ± {error / 2:.2f}"
    assert found.loc["average", "rests on"] == "250 questions, 1 draw"


def test_the_report_says_what_was_judged(tmp_path):
    page = runpy.run_path(str(ROOT / "reproduce" / "page.py"))
    frame = judged([record("a", {"t": 18.0}, s) for s in range(3)], [record("b", {"t": 20.0 + s}, s) for s in range(3)])
    item = page["Item"]("table1", "Table: it", runs={"m-quick": pd.DataFrame([{"model": "m", "profile": "quick"}])})
    write_table(frame, tmp_path, "m-quick-verdicts", "Claims")
    item.tables["m-quick-verdicts"] = pd.read_csv(tmp_path / "m-quick-verdicts.csv")
    line = {
        "verdict": "holds",
        "row": "a",
        "against": "b",
        "difference": "t -14.2% ± 2.4%",
        "rests_on": "3 draws",
        "of": "perplexity",
        "where": "Table, m, quick",
    }
    assert page["claims"]([item]) == [line]
    assert item.verdict("m-quick") == "m, quick: claims: holds 1 of 1"


def test_claims_about_rows_that_were_not_run_are_left_out(tmp_path):
    assert judge([record("a", {"t": 1.0})], [("a", "b"), ("c", "a")], lambda _: {}).empty
    run = Run("table1", model="tiny", profile="smoke", recipe={"device": "cpu"}, results=str(tmp_path))
    assert "nothing to judge" in run.write_verdicts([record("a", {"t": 1.0})], [("a", "b")])


def test_wanda_with_besas_zeros_has_never_more_and_less_than_one_a_row_fewer(tiny_llama, windows):
    twin = copy.deepcopy(tiny_llama)
    own = besa.prune(tiny_llama, windows, besa.Besa(epochs=3), progress=False)
    sparsities = block_sparsities({"projections": own.rows})
    matched = besa.prune(twin, windows, besa.Wanda(sparsities=sparsities), progress=False)
    zeros = [pd.DataFrame(report.rows).groupby("block")[["zeros", "rows"]].sum() for report in (own, matched)]
    fewer = zeros[0]["zeros"] - zeros[1]["zeros"]
    assert ((fewer >= 0) & (fewer < zeros[0]["rows"])).all() and own.sparsity != 0.5


def test_draws_become_a_mean_and_a_standard_deviation_and_one_draw_stays_as_it_is():
    cost = {"seconds": 1.0, "peak_bytes": 2**30}
    rows = [record("dense", {"t": 5.0}) | cost, *(record("a", {"t": v}, s) | cost for s, v in enumerate((6.0, 8.0)))]
    table = over_draws(summary(rows))
    assert list(table.columns) == ["sparsity", "t", "± t"] and list(table.index) == ["dense", "a"]
    assert table.loc["a", ["t", "± t"]].tolist() == pytest.approx([7.0, 2**0.5]) and np.isnan(table.loc["dense", "± t"])
    assert over_draws(summary(rows[:2])).equals(summary(rows[:2]))


def test_what_a_rows_metrics_are_means_of_lies_beside_its_record(tiny_llama, windows, tmp_path):
    run = Run("table1", model="tiny", profile="smoke", recipe={"seq_len": 24, "device": "cpu"}, results=str(tmp_path))
    run = run.on(windows, {"text": windows.flatten()}, torch.float32, seed=7)
    value = besa.perplexity(tiny_llama, windows.flatten(), 24, progress=False)
    saved = run.save("dense", None, None, {"text": value, "piqa": 75.0}, {"piqa": np.array([True, False])})
    assert saved["config"]["seed"] == 7 and run.has("dense", None)
    (read,) = run.records({"dense": None})
    samples = run.samples(read)
    assert np.exp(samples["text"].mean()) == pytest.approx(read["metrics"]["text"]) and len(samples["text"]) == 6
    assert samples["piqa"].tolist() == [True, False]
    (path,) = (tmp_path / "samples").iterdir()
    before = path.read_bytes()
    run.save("dense", None, None, {"text": value}, {"piqa": np.array([True, False])})
    assert path.read_bytes() == before
    for damage in (b"", b"P", b"\x93NUMPY", before[:-30], before.replace(b"text", b"test", 1), bytes(300)):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=rf"{path} is damaged .*; delete its record, too, and run the row again"):
            run.samples(read)
    run.apart(limit=3).save("dense", None, None, {"text": 20.0})
    assert run.samples(run.apart(limit=3).records({"dense": None})[0]) == {}
