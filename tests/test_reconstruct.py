"""What BESA reconstructs together: projections, attention and MLP, a block, several blocks."""

import copy

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import besa
from besa.decoder import embed, find_blocks, projections, record_calls, record_part, run_block
from besa.walk import reconstruction_error


def last_hidden(model, window):
    """What leaves the last block, before the final norm."""
    calls = record_calls(model, window)
    hidden = embed(model, window)
    for block, call in zip(find_blocks(model), calls, strict=True):
        hidden = run_block(block, hidden, call)
    return hidden


def test_all_blocks_together_must_reproduce_the_dense_models_output(tiny_llama, windows):
    dense = copy.deepcopy(tiny_llama)
    report = besa.prune(tiny_llama, windows, besa.Besa(reconstruct=3), progress=False)
    with torch.no_grad():
        errors = [reconstruction_error(last_hidden(tiny_llama, w), last_hidden(dense, w)) for w in windows.split(1)]
    (error,) = {row["block_error"] for row in report.rows}
    assert error == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    assert len(report.steps) == len(windows)


def test_a_span_reports_its_projections_under_their_own_blocks(tiny_llama, windows):
    report = besa.prune(tiny_llama, windows, besa.Besa(reconstruct=2), progress=False)  # blocks 0 and 1, then 2
    for row in report.rows:
        weight = tiny_llama.model.layers[row["block"]].get_submodule(row["projection"]).weight
        assert row["zeros"] == (weight == 0).sum()
    assert [row["block"] for row in report.rows] == [0] * 7 + [1] * 7 + [2] * 7
    errors = report.to_frame().groupby("block")["block_error"].first()
    assert errors[0] == errors[1] != errors[2]


def test_a_span_on_several_devices_is_refused_before_any_work(tiny_llama):
    tiny_llama.model.layers[1].to("meta")  # as another GPU
    besa.Besa().check(tiny_llama)
    with pytest.raises(
        ValueError, match="2 blocks from block 0 on lie on cpu and meta, and cannot be pruned as one; take"
    ):
        besa.Besa(reconstruct=2).check(tiny_llama)


@pytest.mark.parametrize("reconstruct, n_parts", [("projection", 7), ("sublayer", 2), (1, 1)])
def test_each_part_keeps_to_the_sparsity_by_itself(tiny_llama, windows, reconstruct, n_parts):
    tiny_llama.model.layers, tiny_llama.config.num_hidden_layers = tiny_llama.model.layers[:1], 1
    method = besa.Besa(sparsity=0.45, reconstruct=reconstruct, epochs=30, d_coef=1.0)
    report = besa.prune(tiny_llama, windows, method, progress=False)
    assert len(report.steps) == n_parts * 30 * len(windows)
    frame = report.to_frame()
    part = {"projection": frame["projection"], "sublayer": frame["projection"].str.split(".").str[0], 1: frame["block"]}
    sizes = (frame["rows"] * frame["columns"]).groupby(part[reconstruct]).sum()
    zeros = frame["zeros"].groupby(part[reconstruct]).sum()
    assert len(sizes) == n_parts
    assert (zeros / sizes).tolist() == pytest.approx([0.45] * n_parts, abs=0.04)  # whole weights of 32 columns


def test_a_part_sees_what_the_pruned_rest_of_the_block_makes_of_the_inputs(tiny_llama, windows):
    """The second projection of the MLP must reproduce its own output on inputs that the pruned attention made."""
    call = record_calls(tiny_llama, windows[:1])[0]
    block = find_blocks(tiny_llama)[0]
    hidden = torch.cat([embed(tiny_llama, window) for window in windows.split(1)]).detach()
    pruned = {"self_attn.o_proj": torch.zeros_like(block.self_attn.o_proj.weight)}
    inputs, _, outputs = record_part(block, "mlp.up_proj", hidden, call, pruned)
    # Without attention's output, the MLP sees the normalized block input.
    expected = block.post_attention_layernorm(hidden)
    torch.testing.assert_close(inputs, expected)
    torch.testing.assert_close(outputs, block.mlp.up_proj(expected))


def test_attention_is_replayed_as_the_block_calls_it(tiny_llama, windows):
    call = record_calls(tiny_llama, windows[:1])[0]
    block = find_blocks(tiny_llama)[0]
    hidden = embed(tiny_llama, windows[:1])
    inputs, attention, outputs = record_part(block, "self_attn", hidden, call, {})
    torch.testing.assert_close(run_block(block.self_attn, inputs, attention), outputs)
    assert attention.in_tuple


def test_parts_of_blocks_without_an_mlp_module_are_their_children(windows):
    config = OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2)
    model = OPTForCausalLM(config).eval()
    report = besa.prune(model, windows, besa.Besa(reconstruct="sublayer"), progress=False)
    assert len(report.steps) == 2 * 3 * len(windows)  # attention, fc1, fc2
    assert all(0.4 < (p.weight == 0).float().mean() < 0.6 for b in find_blocks(model) for p in projections(b).values())


def test_parts_of_blocks_have_no_dense_targets():
    with pytest.raises(ValueError, match="only whole blocks have the dense model's outputs"):
        besa.Besa(reconstruct="projection", targets="dense")
