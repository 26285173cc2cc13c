"""The report: rows, missed targets, summary, plot."""

import copy

import pytest
import torch

import besa
from besa.decoder import find_blocks, projections
from besa.report import Report


def test_sparsity_is_counted_from_masks_and_not_from_zeros(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[:, :20] = 0  # more than half of each row
    report = besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    assert report.sparsity == 0.5 and (report.to_frame()["sparsity"] == 0.5).all()


def test_report_shows_itself_in_a_few_lines(tiny_llama, windows):
    report = besa.prune(tiny_llama, windows, besa.Besa(), progress=False)
    assert len(repr(report)) < 1000 and "self_attn.q_proj" in repr(report)
    assert "<table" in report._repr_html_() and report.peak_bytes > 0 and report.seconds > 0
    assert repr(Report("besa", n_samples=1, seq_len=1)).startswith("besa: ")
    summary = report.summary()
    assert list(summary.index) == list(projections(find_blocks(tiny_llama)[0]))
    assert (summary["min"] <= summary["sparsity"]).all() and (summary["sparsity"] <= summary["max"]).all()
    assert copy.deepcopy(report) != report  # not compared: tensors in them would raise


def test_allocation_is_drawn_as_blocks_by_projections(tiny_llama, windows):
    ax = besa.prune(tiny_llama, windows, besa.Besa(), progress=False).plot_allocation()
    assert ax.images[0].get_array().shape == (7, 3) and ax.get_xlabel() == "block"


def test_blocks_that_miss_their_target_are_named(tiny_llama, windows):
    report = besa.prune(tiny_llama, windows, besa.Besa(sparsity=0.6, smooth=False, d_coef=1e-9), progress=False)
    assert [missed.partition(" has ")[0] for missed in report.missed] == ["block 0", "block 1", "block 2"]
    assert all(missed.endswith("for 0.6") for missed in report.missed)
    assert "3 of 3 blocks miss their target" in str(report)


ON_TARGET = {
    "wanda": besa.Wanda(),
    "a sparsity for each block": besa.Wanda(sparsities=(0.25, 0.5, 0.75)),
    "ignored": besa.Magnitude(ignore=("0.mlp", "1")),
    "ignored under an exact budget": besa.Exact(sparsity=0.3, ignore=(".*self_attn.*", "1")),
    "2:4": besa.Exact(pattern="2:4", ignore=("2",)),
}


@pytest.mark.parametrize("name", ON_TARGET)
def test_blocks_that_meet_their_target_are_not_named(tiny_llama, windows, name):
    report = besa.prune(tiny_llama, windows, ON_TARGET[name], progress=False)
    assert report.missed == [] and "miss" not in str(report)
