"""Scores to keep-masks, N:M patterns, and keep-masks as bits."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from besa.data.files import load_masks, save_masks
from besa.masks import (
    KeepMasks,
    bisect_rows,
    keep_largest,
    pack_bits,
    parse_pattern,
    places,
    ranks_of_rows,
    sorted_rows,
    unpack_bits,
)

SCORES = {
    "one row of bfloat16": torch.randn(1, 40000, generator=torch.Generator().manual_seed(0)).bfloat16().float().abs(),
    "few values": torch.randn(50, 800, generator=torch.Generator().manual_seed(1)).mul(2).round().abs(),
    "all equal": torch.zeros(3, 5),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("name", SCORES)
def test_equal_scores_are_pruned_in_the_order_of_a_stable_sort(name, sparsity):
    scores = SCORES[name]
    n_pruned = int(sparsity * scores.shape[1])
    expected = torch.ones_like(scores, dtype=torch.bool)
    expected.scatter_(1, scores.sort(dim=1, stable=True).indices[:, :n_pruned], False)
    assert torch.equal(keep_largest(scores, sparsity), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_rows_are_ranked_and_sorted_as_torch_does_stably(dtype, n_threads):
    scores = torch.randn(400, 333, generator=torch.Generator().manual_seed(0)).mul(20).round().div(20).to(dtype)
    scores[0, :9] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, -0.0, 0.0, -0.05])
    before, own = torch.get_num_threads(), scores.clone()
    torch.set_num_threads(n_threads)
    try:
        ranks, ordered = ranks_of_rows(scores, torch.int16), sorted_rows(scores)
    finally:
        torch.set_num_threads(before)
    order = scores.sort(dim=1, stable=True).indices
    assert torch.equal(ranks.long(), order.argsort(dim=1)) and torch.equal(scores, own)
    assert torch.equal(ordered, scores.gather(1, order))


@settings(max_examples=60, deadline=None)
@given(m=st.integers(2, 9), groups=st.integers(1, 4), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_places_equal_a_stable_sort_of_each_group(m, groups, rows, seed):
    scores = torch.randint(0, 4, (rows, groups * m), generator=torch.Generator().manual_seed(seed)).float()
    ours = places(scores, m)
    for row in range(rows):
        for start in range(0, groups * m, m):
            group = scores[row, start : start + m].tolist()
            expected = [sum((group[k], k) < (group[j], j) for k in range(m)) for j in range(m)]
            assert ours[row, start : start + m].tolist() == expected


@pytest.mark.parametrize("pattern", ["4:2", "2/4", "0:4", "4:4", "N:8", "2:200", ""])
def test_what_is_no_pattern_raises(pattern):
    assert parse_pattern("2:4") == (2, 4)
    with pytest.raises(ValueError, match=f"pattern '{pattern}' is not 'N:M'"):
        parse_pattern(pattern)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 8), (5, 64), (0, 4)])
def test_packed_bits_come_back(shape):
    keep_mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack_bits(keep_mask)
    assert len(bits) == (keep_mask.numel() + 7) // 8
    assert torch.equal(unpack_bits(bits, *shape), keep_mask)
    assert pack_bits(torch.tensor([[True, False, False], [False, True, False]])).tolist() == [0b010001]


def test_keep_masks_of_several_blocks_are_saved_and_loaded(tmp_path):
    masks, loaded = KeepMasks(), KeepMasks()
    for block in range(2):
        part = KeepMasks()
        part[block, "mlp.up_proj"] = torch.rand(3, 7, generator=torch.Generator().manual_seed(block)) < 0.5
        save_masks(part, tmp_path / f"{block}.safetensors")
        masks.update(part)
        loaded.update(load_masks(tmp_path / f"{block}.safetensors"))
    assert list(loaded) == list(masks) == [(0, "mlp.up_proj"), (1, "mlp.up_proj")] and len(loaded) == 2
    assert all(torch.equal(loaded[key], masks[key]) for key in masks)


@pytest.mark.parametrize("scores", [scores.float() for scores in SCORES.values()], ids=SCORES)
@pytest.mark.parametrize("sign", [1, -1])
def test_bisection_finds_the_score_of_any_rank(scores, sign):
    signed = sign * scores - 0.5
    ranks = torch.tensor([[int(share * (scores.shape[1] - 1)) for share in (0.0, 0.3, 1.0)]] * len(scores))
    assert torch.equal(bisect_rows(signed, ranks), sorted_rows(signed).gather(1, ranks))
