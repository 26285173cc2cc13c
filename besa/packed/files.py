"""Packed models, in memory and on disk.

On disk a packed model is an ordinary transformers folder. A packed projection `model.layers.0.mlp.up_proj` is stored as
`model.layers.0.mlp.up_proj.mask`, `.starts`, `.values` and, if it has them, `.scale`, `.zero_point` and `.bias` (see
`linear.py`). config.json has in `quantization_config`: `quant_method` "besa_packed", `format_version`, and
`projections`, by name {"in_features": columns, "dtype": "bfloat16", "tensors": {"mask": ["uint8", rows, bytes], ...}}.

Importing this file registers the format, so that `from_pretrained` reads such a folder.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from besa.beyond.gptq import quantize_pruned
from besa.data.files import load_masks, load_quantized
from besa.data.models import CARRIED, find_checkpoint, open_checkpoint
from besa.decoder import find_blocks, projections
from besa.masks import KeepMasks
from besa.packed.linear import TENSORS, PackedLinear, check_plain
from besa.quantize import QuantizedWeight
from besa.report import Report

METHOD, FORMAT_VERSION = "besa_packed", 1
Keys = tuple[int, str]
Masks = Mapping[Keys, Tensor]


@jaxtyped(typechecker=beartype)
def pack(model: PreTrainedModel, report: Report | Masks | None = None) -> None:
    """Replace pruned projections by packed ones, in place; `save_pretrained` then writes them packed.

    Projections that would not be smaller stay dense.

    Args:
        model: as `prune` left it.
        report: what `prune` returned, or keep-masks by (block, projection); None keeps all weights that are not 0.
    """
    keep_masks, quantized = (report.keep_masks, report.quantized) if isinstance(report, Report) else (report, {})
    if packed_projections(model):
        raise ValueError("this model is packed already; besa.unpack(model) makes it dense")
    try:
        for index, block in enumerate(find_blocks(model)):
            _pack_block(index, block, keep_masks, quantized, getattr(model, "checkpoint_dtype", None) or model.dtype)
        _describe(model)
    except BaseException:  # a model that is packed in part could be saved as if it were whole
        unpack(model)
        raise


def unpack(model: PreTrainedModel) -> None:
    """Replace packed projections by dense ones of the same bits, in place."""
    for name, module in packed_projections(model).items():
        model.set_submodule(name, module.unpack())
    if isinstance(getattr(model.config, "quantization_config", None), PackedConfig):
        del model.config.quantization_config


def save_packed(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a packed model; `from_pretrained` and `load_model` read it. Its tokenizer is not saved."""
    _describe(model)
    model.save_pretrained(folder)


@jaxtyped(typechecker=beartype)
def pack_folder(
    source: str | Path, output: str | Path, bits: int | None = None, windows: Tensor | None = None
) -> tuple[int, int]:
    """Write a pruned checkpoint packed; returns the bytes of its weights before and after.

    Args:
        source: output of `prune_checkpoint`, whose keep-masks and codes are used, or another checkpoint with zeros.
        output: new folder.
        bits, windows: round the kept weights as `quantize_pruned` does.
    """
    folder, output = find_checkpoint(source), Path(output)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ValueError(f"output {str(output)!r} exists; name a new folder")
    model, keep_masks, quantized = open_checkpoint(folder), KeepMasks(), {}
    if packed_projections(model):
        raise ValueError(f"{str(source)!r} is packed already")
    for path in sorted(folder.glob("besa/masks-*.safetensors")):
        keep_masks.update(load_masks(path))
    if bits:
        quantized = dict(quantize_pruned(model, keep_masks or None, windows, bits).quantized)
    for index, block in enumerate(find_blocks(model)):
        codes = folder / f"besa/codes-{index:05d}.safetensors"  # of a block, or of several from this one on
        quantized |= load_quantized(codes) if codes.exists() else {}
        _pack_block(index, block, keep_masks or None, quantized, model.dtype)
        quantized = {key: weight for key, weight in quantized.items() if key[0] > index}
    _describe(model)
    output.mkdir(parents=True, exist_ok=True)
    for path in [path for pattern in CARRIED for path in folder.glob(pattern)]:
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, output / path.name)
    save_packed(model, output)
    before, after = (sum(path.stat().st_size for path in part.glob("*.safetensors")) for part in (folder, output))
    return before, after


def packed_projections(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed projections of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _pack_block(
    index: int,
    block: nn.Module,
    keep_masks: Masks | None,
    quantized: Mapping[Keys, QuantizedWeight],
    stored: torch.dtype,
) -> None:
    """Pack the projections of a block that get smaller than in the precision `stored`."""
    for name, linear in projections(block).items():
        codes, keep_mask = quantized.get((index, name)), (keep_masks or {}).get((index, name))
        if keep_masks is not None and keep_mask is None and codes is None:
            continue
        check_plain(linear, f"block {index}, {name}")
        if codes is None:
            packed = PackedLinear.from_linear(linear, keep_mask)
        else:
            packed = PackedLinear.from_quantized(codes, keep_mask, linear.weight.dtype, linear.bias)
        packed = packed.to(linear.weight.device).train(linear.training)
        if not torch.equal(packed.dense(), linear.weight):
            raise ValueError(f"block {index}, {name}: the report is of other weights than the model's")
        if packed.nbytes < sum(parameter.numel() for parameter in linear.parameters()) * stored.itemsize:
            block.set_submodule(name, packed)


def _describe(model: PreTrainedModel) -> None:
    """Describe the packed projections in the configuration of their model; names of dtypes go without "torch."."""
    described = {}
    for name, module in packed_projections(model).items():
        tensors = {part: module.get_buffer(part) for part in TENSORS if getattr(module, part) is not None}
        kinds = {part: [str(tensor.dtype)[6:], *tensor.shape] for part, tensor in tensors.items()}
        described[name] = {"in_features": module.in_features, "dtype": str(module.dtype)[6:], "tensors": kinds}
    if not described:
        raise ValueError("no projection would be smaller packed than in its checkpoint's precision; prune it first")
    model.config.quantization_config = PackedConfig(described)


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model."""

    def __init__(self, projections: dict[str, dict[str, Any]], format_version: int = FORMAT_VERSION, **_: Any) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(f"this besa reads packed format {FORMAT_VERSION}, not {format_version}")
        self.quant_method, self.format_version, self.projections = METHOD, format_version, projections


class PackedQuantizer(HfQuantizer):
    """Loads packed models for transformers."""

    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, described in self.quantization_config.projections.items():
            tensors = {
                part: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
                for part, (dtype, *shape) in described["tensors"].items()
            }
            dtype = getattr(torch, described["dtype"])
            model.set_submodule(name, PackedLinear(described["in_features"], dtype, **tensors))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, module in packed_projections(model).items():
            module.to(model.dtype).check(name)
        self.remove_quantization_config(model)  # by which transformers would refuse to convert it
        _describe(model)


# The functions of transformers that register a format refuse a second time, when a notebook reloads this file.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], AUTO_QUANTIZER_MAPPING[METHOD] = PackedConfig, PackedQuantizer
