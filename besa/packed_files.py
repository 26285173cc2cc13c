"""Packed models on disk: an ordinary transformers folder, whose packed projections are tensors in packed.py's layout.

A projection `model.layers.0.mlp.up_proj` is stored as `model.layers.0.mlp.up_proj.mask`, `.starts`, `.values` and,
where it has them, `.scale`, `.zero_point` and `.bias`. config.json has in `quantization_config`: `quant_method`
"besa_packed", `format_version`, and `projections`, by name {"in_features": columns, "dtype": "bfloat16", "tensors":
{"mask": ["uint8", rows, bytes], ...}}. Everything else is stored as in any other checkpoint. safetensors: 8 bytes
little-endian n, n bytes of JSON, then the tensors; the JSON has of each its dtype, shape and `data_offsets`, counted
from the end of the JSON: where its bytes begin, and the first byte behind them.

Importing this file is what lets `AutoModelForCausalLM.from_pretrained(folder)` read such a folder. `import besa` sees
to it once transformers is loaded, when files of besa may be half loaded: so packed.py is imported where it is used.
"""

import collections
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from besa.machine.fields import checked
from besa.machine.files import check_whole, writing

METHOD, FORMAT_VERSION = "besa_packed", 1


@checked
def save_packed(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model that `besa.pack` packed; `from_pretrained` gives it back packed, to the bit.

    Its tokenizer is not written: `tokenizer.save_pretrained(folder)`.

    Raises:
        ValueError: nothing in the model is packed, or the folder is a file.
        OSError: the disk refuses it.
    """
    if Path(folder).is_file():  # which transformers leaves as it is, without an error
        raise ValueError(f"{str(folder)!r} is a file; name a folder")
    if not packed_projections(model):
        raise ValueError("nothing in this model is packed: call besa.pack(model, report) first")
    with writing(Path(folder), "what is there of it is of no use"):
        save_pretrained(model, folder)


def save_pretrained(model: PreTrainedModel, *args: Any, **options: Any) -> None:
    """What a packed model's own `save_pretrained` is: transformers', with what is packed told in config.json."""
    packed = packed_projections(model)
    if packed:
        model.config.quantization_config = described(packed)
    try:
        type(model).save_pretrained(model, *args, **options)
    finally:
        if packed:
            del model.config.quantization_config


def keep_packed_when_saved(model: PreTrainedModel) -> None:
    """Let a packed model, and the one without a head in it, write what loads back packed."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.save_pretrained = functools.partial(save_pretrained, module)


def packed_projections(model: nn.Module) -> dict[str, nn.Module]:
    """The packed projections of a model or block by name."""
    from besa.packed import PackedLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def described(packed: dict[str, nn.Module]) -> "PackedConfig":
    """What config.json says of packed projections by name."""
    return PackedConfig({name: _described(module) for name, module in packed.items()})


def _described(module: nn.Module) -> dict[str, Any]:
    from besa.packed import TENSORS

    tensors = {name: module.get_buffer(name) for name in TENSORS if getattr(module, name) is not None}
    kinds = {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()}
    return {"in_features": module.in_features, "dtype": str(module.dtype).removeprefix("torch."), "tensors": kinds}


def _undescribed(described: dict[str, Any]) -> nn.Module:
    """The projection without its tensors, which come from the file."""
    from besa.packed import DTYPES, PackedLinear

    tensors = {
        part: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for part, (dtype, *shape) in described["tensors"].items()
    }
    dtype = getattr(torch, described["dtype"])
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {DTYPES}")
    return PackedLinear(described["in_features"], dtype, **tensors)


class PackedConfig(QuantizationConfigMixin):
    """What config.json says of the packed projections."""

    def __init__(self, projections: dict[str, dict[str, Any]], format_version: int = FORMAT_VERSION, **_: Any) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"packed format {format_version} is not {FORMAT_VERSION}, the one that this besa reads; update besa"
            )
        if not isinstance(projections, dict):
            raise ValueError(f"projections in config.json's quantization_config is {projections!r}, no JSON object")
        self.quant_method, self.format_version, self.projections = METHOD, format_version, projections


def _named_as_in(model: PreTrainedModel, projections: dict[str, Any]) -> dict[str, Any]:
    """By the names that they have in a model with a head, where the file is of one without, or the other way round."""
    names, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    other = lambda name: name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
    return {
        other(name) if other(name) in names and name not in names else name: value
        for name, value in projections.items()
    }


class PackedQuantizer(HfQuantizer):
    """transformers' way to a model with other modules; nothing is left of it once the model is loaded."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        there = [name for path in checkpoint_files or [] for name in check_whole(Path(path))]
        self.quantization_config.projections = _named_as_in(model, self.quantization_config.projections)
        for name, described in self.quantization_config.projections.items():
            try:
                linear, module = model.get_submodule(name), _undescribed(described)
                fits = (linear.in_features, linear.out_features) == (module.in_features, module.out_features)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise ValueError(f"config.json describes no packed projection as {name}: {error}") from error
            if not fits:
                raise ValueError(f"config.json describes {name} as {module}, where the model has {linear}")
            model.set_submodule(name, module)
        self._check_parts(there)

    def _check_parts(self, there: list[str]) -> None:
        """Refuse files with fewer tensors of a kind than are described: transformers makes up what is missing."""
        wanted = collections.Counter(
            part for each in self.quantization_config.projections.values() for part in each["tensors"]
        )
        for part, n in wanted.items():
            found = sum(name.endswith(f".{part}") for name in there)  # some families save other names before the last
            if found < n:
                raise ValueError(
                    f"config.json describes {n} tensors called {part}, the files hold {found}; fetch or write them "
                    "again"
                )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name in self.quantization_config.projections:
            module = model.get_submodule(name)
            try:
                module.to(model.dtype).check()
            except ValueError as error:
                raise ValueError(f"{name}: {error}; fetch or write the file again") from error
        self.remove_quantization_config(model)
        keep_packed_when_saved(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# Not by transformers' register functions: they refuse a second time, which reloading in a notebook is.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], AUTO_QUANTIZER_MAPPING[METHOD] = PackedConfig, PackedQuantizer
