"""Packed models, in memory and on disk.

On disk a packed model is an ordinary transformers folder. A packed projection `model.layers.0.mlp.up_proj` is stored as
`model.layers.0.mlp.up_proj.mask`, `.starts`, `.values` and, if it has them, `.scale`, `.zero_point` and `.bias` (see
`linear.py`), and so is a head of 8 bits, which can hold the embeddings, too. config.json has in `quantization_config`:
`quant_method` "besa_packed", `format_version`, `embeddings_in_head`, and `projections`, by name
{"in_features": columns, "dtype": "bfloat16", "tensors": {"mask": ["uint8", rows, bytes], ...}}.

Importing this file registers the format, so that `from_pretrained` reads such a folder.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from besa.config import checked
from besa.decoder import find_blocks, projections
from besa.packed.linear import PackedLinear, check_plain
from besa.quantize import Quantize, QuantizedWeight
from besa.report import Report

METHOD, VERSION = "besa_packed", 1
Masks = Mapping[tuple[int, str], Tensor]


@checked
def pack(model: PreTrainedModel, report: Report | Masks | None = None, head: bool = False) -> None:
    """Replace pruned projections by packed ones, in place; `save_pretrained` then writes them packed.

    Projections that would not be smaller stay dense.

    Args:
        model: as `prune` left it.
        report: what `prune` returned, or keep-masks by (block, projection); None keeps all weights that are not 0.
        head: round the head, and embeddings that are the same matrix, to 8 bits with a scale for each row.
    """
    if packed_projections(model):
        raise ValueError("this model is packed already; besa.unpack(model) makes it dense")
    keep_masks, quantized = (report.keep_masks, report.quantized) if isinstance(report, Report) else (report, {})
    stored = getattr(model, "checkpoint_dtype", None) or model.dtype
    try:
        for index, block in enumerate(find_blocks(model)):
            for name, linear in projections(block).items():
                codes, keep_mask = quantized.get((index, name)), (keep_masks or {}).get((index, name))
                if keep_masks is None or keep_mask is not None or codes is not None:
                    packed = _packed(linear, f"block {index}, {name}", codes, keep_mask)
                    if packed.nbytes < sum(parameter.numel() for parameter in linear.parameters()) * stored.itemsize:
                        block.set_submodule(name, packed)
        if head:
            _pack_head(model)
        _describe(model)
    except BaseException:  # a model that is packed in part could be saved as if it were whole
        unpack(model)
        raise


def unpack(model: PreTrainedModel) -> None:
    """Replace packed projections by dense ones of the same bits, in place."""
    for name, module in packed_projections(model).items():
        model.set_submodule(name, module.unpack())
    if isinstance(model.get_input_embeddings(), PackedEmbedding):
        weight = model.get_output_embeddings().weight
        model.set_input_embeddings(nn.Embedding(*weight.shape, device="meta"))
        model.get_input_embeddings().weight = weight
        model.config.tie_word_embeddings = True
    if isinstance(getattr(model.config, "quantization_config", None), PackedConfig):
        del model.config.quantization_config


def packed_projections(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed projections of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _packed(linear: nn.Linear, name: str, codes: QuantizedWeight | None, keep_mask: Tensor | None) -> PackedLinear:
    """Pack a projection, and check that nothing else comes out."""
    check_plain(linear, name)
    if codes is None:
        packed = PackedLinear.from_linear(linear, keep_mask)
    else:
        packed = PackedLinear.from_quantized(codes, keep_mask, linear.weight.dtype, linear.bias)
    packed = packed.to(linear.weight.device).train(linear.training)
    if not torch.equal(packed.dense(), linear.weight):
        raise ValueError(f"{name}: the report is of other weights than the model's")
    return packed


def _pack_head(model: PreTrainedModel) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_shared = type(embeddings) is nn.Embedding and embeddings.weight is head.weight
    codes = Quantize(bits=8).codes(head.weight)
    head.weight = nn.Parameter(codes.dequantize(head.weight.dtype))
    packed = _packed(head, "head", codes, torch.ones_like(head.weight, dtype=torch.bool))
    model.set_output_embeddings(packed)
    if is_shared:
        model.set_input_embeddings(PackedEmbedding(packed))
    model.config.tie_word_embeddings = False


class PackedEmbedding(nn.Module):
    """Embeddings that are the rows of a packed head."""

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self.head, self.num_embeddings = [head], head.out_features  # in a list, so that it is saved once

    def forward(self, ids: Tensor) -> Tensor:
        rows, places = ids.unique(return_inverse=True)
        return torch.cat([self.head[0].dense(row, row + 1) for row in rows.tolist()])[places]


def _describe(model: PreTrainedModel) -> None:
    """Describe the packed projections in the configuration of their model; names of dtypes go without "torch."."""
    described = {}
    for name, module in packed_projections(model).items():
        kinds = {part: [str(tensor.dtype)[6:], *tensor.shape] for part, tensor in module.named_buffers()}
        described[name] = {"in_features": module.in_features, "dtype": str(module.dtype)[6:], "tensors": kinds}
    if not described:
        raise ValueError("no projection would be smaller packed than in its checkpoint's precision; prune it first")
    in_head = isinstance(model.get_input_embeddings(), PackedEmbedding)
    model.config.quantization_config = PackedConfig(described, in_head)


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model."""

    def __init__(self, projections: dict, embeddings_in_head: bool = False, format_version: int = VERSION, **_: Any):
        if format_version != VERSION:
            raise ValueError(f"this besa reads packed format {VERSION}, not {format_version}")
        self.quant_method, self.format_version = METHOD, format_version
        self.projections, self.embeddings_in_head = projections, embeddings_in_head


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
        if self.quantization_config.embeddings_in_head:
            model.set_input_embeddings(PackedEmbedding(model.get_output_embeddings()))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, module in packed_projections(model).items():
            module.to(model.dtype).check(name)
        self.remove_quantization_config(model)  # by which transformers would refuse to convert it
        _describe(model)


# The functions of transformers that register a format refuse a second time, when a notebook reloads this file.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], AUTO_QUANTIZER_MAPPING[METHOD] = PackedConfig, PackedQuantizer
