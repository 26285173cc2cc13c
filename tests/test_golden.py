"""Equality with numbers that the released code produced (tests/golden/README.md)."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import besa
from besa.allocation import Allocation, candidate_counts, candidate_rates, prune_probability, simplex
from besa.importance import collect_statistics, importance

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "row": "wanda",
    "layer": "wanda",
    "row_group4": "wanda",
    "row_nosmooth": "wanda",
    "row_sparsegpt_metric": "sparsegpt",
    "row_weight_metric": "magnitude",
}


def close(ours, golden):
    torch.testing.assert_close(ours, golden.view_as(ours), rtol=1e-5, atol=1e-5 * float(golden.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_projection_equals_the_released_code(case):
    golden = load_file(GOLDEN / f"{case}.safetensors")
    weight, logits = golden["weight"], golden["logits"].reshape(-1, 101).requires_grad_()
    projection = torch.nn.Linear(96, 24, bias=False)
    projection.weight.data = weight
    with collect_statistics({"p": projection}, n_samples=1, hessian=True) as statistics:
        projection(golden["inputs"])
    scores = importance(CASES[case], weight, statistics["p"])
    close(scores, golden["importance"])

    rates = candidate_rates(101)
    allocation = Allocation.create(weight, scores, rates, len(logits), smooth=case != "row_nosmooth")
    masked, alpha = allocation(logits)
    close(alpha.mean(), golden["sparsity"])
    assert torch.equal(allocation.keep_mask(logits), golden["keep_mask"].bool())

    beta = simplex(logits.detach(), allocation.smooth)
    by_rank = prune_probability(beta, candidate_counts(rates, 96), 96).repeat_interleave(24 // len(logits), 0)
    close(by_rank.gather(1, allocation.ranking.ranks.long()), golden["prune_probability"])

    output = torch.nn.functional.linear(golden["inputs"], masked)
    loss = (output - golden["targets"]).square().mean() + 3 * alpha.mean()
    loss.backward()
    close(output.detach(), golden["output"])
    close(loss.detach(), golden["loss"])
    close(logits.grad, golden["logits_grad"])


@pytest.mark.parametrize("case, fields", [("row", {"d_coef": 5.0}), ("layer", {"d_coef": 50.0, "row_group": "layer"})])
def test_block_0_of_smollm2_learns_as_the_released_code(smollm2, case, fields):
    golden = json.loads((GOLDEN / f"smollm2_block0_{case}.json").read_text())
    model = copy.deepcopy(smollm2[0])
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    windows = load_file(GOLDEN / "smollm2_windows.safetensors")["tokens"].long()
    report = besa.prune(model, windows, besa.Besa(**fields), progress=False)

    for key, golden_key in (
        ("loss", "losses"),
        ("reconstruction_error", "reconstruction_errors"),
        ("sparsity", "block_sparsity_per_step"),
    ):
        ours = torch.tensor([step[key] for step in report.steps])
        torch.testing.assert_close(ours, torch.tensor(golden[golden_key]), rtol=5e-3, atol=0)
    for row in report.rows:
        released = golden["projections"][row["projection"]]["kept"] / (row["rows"] * row["columns"])
        assert 1 - row["sparsity"] == pytest.approx(released, abs=1e-3)
