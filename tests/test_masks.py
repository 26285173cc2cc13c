"""Keep-masks as bits, in memory and in a file."""

import json

import pytest
import safetensors.torch
import torch

from besa.masks import KeepMasks, pack_bits, ranks_of_rows, sorted_rows, unpack_bits
from besa.quantize import Quantize, QuantizedFiles, save_quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_rows_are_ordered_as_torch_orders_them_stably(dtype, n_threads):
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
        masks.of_block(block).save(path := str(tmp_path / f"{block}.safetensors"))
        assert back.load(path) is back
    assert back.keys() == masks.keys() and all(torch.equal(back[key], mask) for key, mask in masks.items())
    back.take(masks.of_block(1))
    assert len(back) == 2


def damaged(change):
    """A file whose metadata say something else of the shapes."""

    def write(path):
        tensors, shapes = safetensors.torch.load_file(path), {"0.up": [3, 8]}
        metadata = {"shapes": change if isinstance(change, str) else json.dumps(shapes | change)}
        safetensors.torch.save_file(tensors, path, metadata=metadata)

    return write


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "no metadata": lambda path: safetensors.torch.save_file(safetensors.torch.load_file(path), path),
    "no JSON": damaged("{"),
    "no object": damaged("[]"),
    "no block": damaged({"up": [3, 8]}),
    "a number": damaged({"0.up": 3}),
    "a fraction": damaged({"0.up": [3.5, 8, 4]}),
    "a name": damaged({"0.up": ["3", 8, 4]}),
    "another projection": damaged({"0.down": [3, 8, 4]}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_masks_or_codes_is_named(tmp_path, no_type_checks, damage):
    masks, codes = KeepMasks(), Quantize(bits=4).codes(torch.randn(3, 8))
    masks[0, "up"] = torch.ones(3, 8) > 0
    masks.save(tmp_path / "masks.safetensors")
    save_quantized({(0, "up"): codes}, tmp_path / "codes.safetensors")
    for path in tmp_path.iterdir():
        DAMAGE[damage](path)
        with pytest.raises(ValueError, match=rf"{path} is damaged \(.*; prune the checkpoint again"):
            KeepMasks().load(path) if path.stem == "masks" else dict(QuantizedFiles(path))


@pytest.mark.parametrize("shape", [[3, 9, 4], [1, 8, 4], [3, 8, 8]])
def test_bits_of_another_number_of_weights_are_refused(tmp_path, no_type_checks, shape):
    save_quantized({(0, "up"): Quantize(bits=4).codes(torch.randn(3, 8))}, tmp_path / "codes.safetensors")
    damaged({"0.up": shape})(tmp_path / "codes.safetensors")
    with pytest.raises(ValueError, match=r"codes.safetensors is damaged \(12 bytes of codes, where"):
        dict(QuantizedFiles(tmp_path / "codes.safetensors"))
    with pytest.raises(ValueError, match="are not the bits of a keep-mask"):
        unpack_bits(pack_bits(torch.ones(3, 8) > 0), 3 * shape[0], shape[2])
