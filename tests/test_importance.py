"""Importance and input statistics against naive loops, and factorizations of bad Hessians."""

import math

import pytest
import torch

from besa.decoder import embed, projections, record_calls, run_block
from besa.importance import InputStatistics, collect_statistics, importance, inverse_cholesky


def test_importance_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=generator), torch.randn(3, 6, generator=generator)
    statistics = InputStatistics(x.square().sum(0), 2 * x.T @ x)
    damped = 2 * (x.T @ x).double()
    damped += 0.01 * damped.diag().mean() * torch.eye(6)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped)).T  # inverse of H = U^T U
    for row in range(3):
        for column in range(6):
            w = float(weight[row, column])
            expected = {
                "magnitude": abs(w),
                "wanda": abs(w) * math.sqrt(sum(float(value) ** 2 for value in x[:, column])),
                "sparsegpt": w**2 / float(upper[column, column]),
            }
            for kind, value in expected.items():
                ours = float(importance(kind, weight, statistics)[row, column])
                assert ours == pytest.approx(value, rel=1e-3)


def test_columns_without_input_have_no_importance():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    statistics = InputStatistics(x.square().sum(0), 2 * x.T @ x)
    for kind in ("wanda", "sparsegpt"):
        ours = importance(kind, torch.ones(3, 6), statistics)
        assert (ours[:, 2] == 0).all() and (ours[:, [0, 1, 3, 4, 5]] > 0).all()


def test_projections_with_one_input_share_its_statistics(tiny_llama, windows):
    block, (call, *_) = tiny_llama.model.layers[0], record_calls(tiny_llama, windows[:1])
    hidden = embed(tiny_llama, windows[:1])
    with collect_statistics(projections(block), 1, hessian=False) as statistics, torch.no_grad():
        run_block(block, hidden, call)
    assert set(statistics) == set(projections(block))
    assert statistics["self_attn.q_proj"] is statistics["self_attn.k_proj"] is statistics["self_attn.v_proj"]
    assert statistics["mlp.gate_proj"] is statistics["mlp.up_proj"]
    assert len({id(value) for value in statistics.values()}) == 4
    normed = block.input_layernorm(hidden)[0]
    torch.testing.assert_close(statistics["self_attn.q_proj"].squared_norm, normed.square().sum(0))


@pytest.mark.parametrize("damping", [0.01, 100.0])
def test_factor_of_a_good_hessian(damping):
    hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    upper, note = inverse_cholesky(hessian, damping)
    damped = hessian + damping * 2.5 * torch.eye(2)
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped))
    assert note == f"damping {damping:g}, float32"


def test_bad_hessian_takes_more_precision_or_damping():
    torch.manual_seed(0)
    x = torch.randn(200, 3) @ torch.randn(3, 64)  # rank 3: float32 cannot tell the damping from 0
    upper, note = inverse_cholesky(2 * x.T @ x, damping=1e-12)
    assert note != "damping 1e-12, float32"
    assert torch.isfinite(upper).all()


@pytest.mark.parametrize("damping", [0.01, 0.03, 100.0])
@pytest.mark.parametrize("hessian", [[[math.nan, 0.0], [0.0, 1.0]], [[1.0, 9e9], [9e9, 1.0]]])
def test_hessian_that_no_damping_mends_raises(hessian, damping):
    with pytest.raises(ValueError, match="the Hessian cannot be factorized, even with damping"):
        inverse_cholesky(torch.tensor(hessian), damping)
