"""Cycles against a literal simulation of Table 4's text."""

import math

import pytest
import torch

from besa.decoder import projections
from reproduce.measuring.analysis import simulate_model
from reproduce.measuring.cycles import _run, simulate_cycles


def literal(mask):
    """Table 4's text, weight by weight and column by column: cycles, threshold and what each engine multiplies."""
    rows, columns = mask.shape
    total = sum(bool(mask[i, j]) for i in range(rows) for j in range(columns))
    tenths, moves, best = 5, 0, None
    while True:
        whole, alone = [], []  # dense columns; the other kept weights
        for j in range(columns):
            column = [(i, j) for i in range(rows) if mask[i, j]]
            if column and len(column) / rows > tenths / 10:
                whole.append(column)
            else:
                alone += column
        outcome = engines(len(whole) * rows, len(alone))
        if best is None or outcome < best[0]:
            best = (outcome, tenths / 10, len(whole), sum(len(column) for column in whole), len(alone))
        share = sum(len(column) for column in whole) / total if total else 0.5
        if 0.4 <= share <= 0.6 or moves == 5:
            return best
        tenths, moves = tenths + (1 if share > 0.6 else -1), moves + 1


def engines(dense, sparse):
    """Cycles of both engines, side by side: each PE of an engine takes one multiplication per cycle."""
    wide = math.floor(64 * dense / (dense + sparse)) if dense else 0
    wide = max(wide, 1) if dense else 0
    cycles = 0
    while dense > 0 or sparse > 0:
        dense, sparse, cycles = dense - wide * 64, sparse - (64 - wide) * 64, cycles + 1
    return cycles


def random_mask(seed, rows, columns):
    """Every column keeps its own share of the weights."""
    generator = torch.Generator().manual_seed(seed)
    middle, spread = torch.rand(2, generator=generator).tolist()
    share = middle + 0.6 * spread * torch.randn(columns, generator=generator)
    return torch.rand(rows, columns, generator=generator) < share


SHAPES = [(64, 64), (80, 300), (300, 80), (1, 500), (500, 1), (128, 128), (33, 257), (210, 230)]
MASKS = {f"random {seed}, {SHAPES[seed % 8]}": random_mask(seed, *SHAPES[seed % 8]) for seed in range(16)} | {
    "empty": torch.zeros(70, 130, dtype=torch.bool),
    "full": torch.ones(130, 70, dtype=torch.bool),
    "half of the columns full": (torch.arange(128) % 2 == 0).expand(96, 128),
    "one full column": random_mask(40, 256, 256) & random_mask(41, 256, 256) | (torch.arange(256) == 3),
    "every column between 40 and 50 %": (torch.arange(100)[:, None] < 45).expand(100, 90),
    "fewest cycles after the fifth move": (torch.arange(256)[:, None] < 235).expand(256, 256),
    "exactly 60 % in dense columns": torch.arange(100)[:, None] < torch.tensor([60, 40] * 500),
    "no columns": torch.zeros(8, 0, dtype=torch.bool),
    "no rows": torch.zeros(0, 8, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_cycles_equal_the_literal_simulation(mask):
    ours = simulate_cycles(mask)
    found = (ours.cycles, ours.threshold, ours.dense_columns, ours.dense_kept, ours.sparse_kept)
    assert found == literal(mask)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_every_kept_weight_is_computed_and_no_pe_twice_in_a_cycle(mask):
    ours = simulate_cycles(mask)
    assert ours.dense_kept + ours.sparse_kept == int(mask.sum())
    assert math.ceil(int(mask.sum()) / 4096) <= ours.cycles
    assert ours.dense_cycles == math.ceil(mask.numel() / 4096)


def test_nothing_kept_takes_no_cycles_and_everything_kept_takes_the_dense_ones():
    empty, full = (simulate_cycles(torch.full((192, 576), keep)) for keep in (False, True))
    assert (empty.cycles, empty.dense_columns) == (0, 0)
    assert (full.cycles, full.dense_cycles, full.dense_columns) == (27, 27, 576)


def test_dense_cycles_are_rows_times_columns_over_4096():
    assert simulate_cycles(torch.ones(4096, 4096, dtype=torch.bool)).dense_cycles == 4096
    assert simulate_cycles(torch.ones(11008, 4096, dtype=torch.bool)).dense_cycles == 11008  # printed: 10128


def test_few_dense_columns_still_get_a_pe_column():
    mask = torch.rand(1000, 3000, generator=torch.Generator().manual_seed(0)) < 0.05
    mask[:, 7] = True
    at_half = _run(mask.sum(dim=0), len(mask), 5)
    assert at_half.dense_columns == 1 and 1000 + at_half.sparse_kept > 64 * 1000  # floor(64 q) = 0
    assert at_half.cycles == math.ceil(at_half.sparse_kept / (63 * 64))


def test_a_models_down_proj_is_cut_into_square_patches(tiny_llama):
    keep_masks = {
        (index, name): torch.ones_like(projection.weight, dtype=torch.bool)
        for index, block in enumerate(tiny_llama.model.layers)
        for name, projection in projections(block).items()
    }
    for index in range(3):
        keep_masks[index, "mlp.down_proj"] = torch.rand(32, 80, generator=torch.Generator().manual_seed(index)) >= 0.5
    frame = simulate_model(tiny_llama, keep_masks)
    assert len(frame) == 3 * 7 and frame["block"].tolist() == sorted(frame["block"])
    for _, row in frame.iterrows():
        keep = keep_masks[row["block"], row["projection"]]
        width = 32 if row["kind"] == "down_proj" else keep.shape[1]
        patches = [simulate_cycles(keep[:, start : start + width]) for start in range(0, keep.shape[1], width)]
        assert len(patches) == (3 if row["kind"] == "down_proj" else 1)
        assert row["cycles"] == sum(patch.cycles for patch in patches)
        assert row["dense_cycles"] == sum(patch.dense_cycles for patch in patches)
        assert row["sparsity"] == pytest.approx(1 - int(keep.sum()) / keep.numel())
    assert (frame["sparsity"] > 0).tolist() == (frame["kind"] == "down_proj").tolist()
    dense = simulate_model(tiny_llama)
    assert (dense["cycles"] == dense["dense_cycles"]).all() and not dense["sparsity"].any()
