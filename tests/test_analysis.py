import numpy as np
import pandas as pd
import torch

from besa.decoder import find_blocks, projections
from besa.paper import analysis


def test_spearman_is_one_for_any_rising_function_and_shares_ranks_of_equals():
    x = np.array([3.0, 1.0, 2.0, 5.0, 4.0])
    frame = pd.DataFrame({"rising": x**3, "falling": -np.exp(x), "ties": [2.0, 1, 1, 3, 3], "constant": np.ones(5)})
    rho = analysis.spearman(frame, x)
    assert np.isclose(rho["rising"], 1) and np.isclose(rho["falling"], -1)
    assert np.isclose(rho["ties"], np.corrcoef([3, 1.5, 1.5, 4.5, 4.5], x)[0, 1])
    assert rho["constant"] is None
    assert analysis.spearman(frame, np.ones(5)) == dict.fromkeys(frame.columns)


def test_row_features_are_those_of_a_loop_over_rows(tiny_llama, windows):
    features = analysis.row_features(tiny_llama, windows)
    name, block = "mlp.down_proj", find_blocks(tiny_llama)[1]
    weight = projections(block)[name].weight.detach()
    inputs = []
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        tiny_llama(windows)
    handle.remove()
    norms = (inputs[0].flatten(0, 1).square().sum(0) / len(windows)).sqrt()
    for i in (0, 17):
        scores = [float(w.abs() * n) for w, n in zip(weight[i], norms, strict=True)]
        mean, variance = np.mean(scores), np.var(scores)
        expected = {
            "row norm": float(weight[i].norm()),
            "importance": sum(scores),
            "kurtosis": np.mean([(s - mean) ** 4 for s in scores]) / variance**2 - 3,
            "lost at half": sum(sorted(scores)[: len(scores) // 2]) / sum(scores),
        }
        found = features[1, name].iloc[i].to_dict()
        assert found.keys() == expected.keys() and np.allclose([*found.values()], [*expected.values()], rtol=1e-4)
    assert len(features) == 3 * 7


def test_rows_are_summed_up_by_projection_and_correlated_by_block():
    sparsities = {(0, "q"): np.array([0.2, 0.4, 0.6]), (1, "q"): np.array([0.1, 0.9, 0.5])}
    features = {key: pd.DataFrame({"x": [1.0, 2.0, 3.0]}) for key in sparsities}
    result = analysis.row_analysis(sparsities, features)
    assert np.allclose(result["row_quantiles"]["q"][::3], [0.1, 0.45, 0.9])  # lowest, median, highest
    assert [entry["x"] for entry in result["row_correlations"]] == [1.0, 0.5]
    by_block = pd.DataFrame({"depth": [0.7]}, index=pd.Index(["q"], name="projection"))
    table = analysis.correlation_table(pd.DataFrame(result["row_correlations"]), by_block)
    assert table.loc[("rows", "x"), "q"] == 0.75 and table.loc[("blocks", "depth"), "mean"] == 0.7


def test_blocks_are_spread_from_the_first_to_the_last():
    assert analysis.spread(4, 30) == [0, 10, 19, 29]
    assert analysis.spread(4, 2) == [0, 1] and analysis.spread(1, 5) == [0]
