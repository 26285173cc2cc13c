"""The report: rows, summary, plot."""

import copy

import torch

import besa
from besa.decoder import find_blocks, projections
from besa.report import Report


def test_zeros_from_before_count_as_pruned(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[:, :20] = 0  # more than half of each row
    report = besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    frame = report.to_frame().set_index(["block", "projection"])["sparsity"]
    assert frame.pop((1, "mlp.up_proj")) == 20 / 32 and (frame == 0.5).all()


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
