"""Keep-masks as bits, in memory and in a file."""

import pytest
import torch

from besa.masks import KeepMasks, pack_bits, unpack_bits


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 8), (5, 64), (0, 4)])
def test_bits_come_back_as_they_were(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack_bits(mask)
    assert len(bits) == (mask.numel() + 7) // 8
    assert torch.equal(unpack_bits(bits, *shape), mask)


def test_the_first_weight_is_the_lowest_bit():
    assert pack_bits(torch.tensor([[True, False, False], [False, True, False]])).tolist() == [0b010001]


def test_masks_of_several_blocks_go_to_files_and_back(tmp_path):
    masks, back = KeepMasks(), KeepMasks()
    for block in range(2):
        masks[block, "mlp.up_proj"] = torch.rand(3, 7, generator=torch.Generator().manual_seed(block)) < 0.5
        masks.of_block(block).save(tmp_path / f"{block}.safetensors")
        back.load(tmp_path / f"{block}.safetensors")
    assert back.keys() == masks.keys() and all(torch.equal(back[key], mask) for key, mask in masks.items())
    assert masks.nbytes == 2 * 3
    del back[0, "mlp.up_proj"]
    back.take(masks)
    assert len(back) == 2
