"""Training that keeps zeros: masked adapters for peft, and a callback for transformers' Trainer.

Masked adapters compute W + (B A) * keep_mask * (alpha / r), in the manner of SPP (Lu et al. 2024) and of PERP's
MaskLoRA (Zimmer et al. 2023); merged into W they leave its zeros.
"""

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from besa.config import checked
from besa.decoder import find_blocks, projections
from besa.report import Report

# Fields of `LoraConfig` under which an adapter stays W + (B A) * (alpha / r).
PLAIN = (
    *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("task_type", "inference_mode", "base_model_name_or_path", "revision", "exclude_modules", "peft_version"),
)


@checked
def masked_lora(
    model: PreTrainedModel, report: Report | Mapping[tuple[int, str], Tensor], config: LoraConfig
) -> PeftModel:
    """Add adapters to a pruned model that keep every zero, for `transformers.Trainer` or TRL.

    `merge_and_unload()` merges them. Saved adapters hold no masks, and `PeftModel.from_pretrained` would fill zeros;
    load them with `masked_lora(model, report, config).load_adapter(folder, "default")`.

    Args:
        report: what `besa.prune` returned, or keep-masks by (block, projection).
        config: plain LoRA; `target_modules=None` takes every pruned projection.
    """
    for name, value in vars(config).items():
        if name not in PLAIN and value != getattr(LoraConfig(), name):
            raise ValueError(f"LoraConfig({name}={value!r}) is not supported: the zeros would not be kept")
    pruned = pruned_linears(model, report)
    names = {id(module): name for name, module in model.named_modules()}
    config = copy.deepcopy(config)
    config.target_modules = config.target_modules or {names[id(linear)] for linear, _ in pruned if id(linear) in names}  # pyright: ignore
    config._register_custom_module({nn.Linear: MaskedLora})
    with warnings.catch_warnings():  # peft calls a deprecated function of transformers
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    layers = {id(layer.base_layer): layer for layer in adapted.modules() if isinstance(layer, MaskedLora)}
    for linear, keep_mask in pruned:
        if id(linear) in layers:
            layers[id(linear)].keep_mask = keep_mask
    return adapted


class MaskedLora(lora.Linear):
    """A projection whose adapters change kept weights only; without a keep-mask, all weights."""

    keep_mask: Tensor | None
    base_layer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("keep_mask", None, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """(B A) * keep_mask * (alpha / r), in the precision of the weight; merging adds the same."""
        delta = super().get_delta_weight(adapter).to(self.base_layer.weight.dtype)
        return delta if self.keep_mask is None else torch.where(self.keep_mask, delta, -0.0)  # -0 + -0 stays -0

    def forward(self, x: Tensor) -> Tensor:
        """Compute with the weight as it will be once merged."""
        if self.disable_adapters or self.merged:
            return super().forward(x)
        weight = self.base_layer.weight
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                weight = weight + self.get_delta_weight(adapter)
        return torch.func.functional_call(self.base_layer, {"weight": weight}, (x,))


class KeepZeros(TrainerCallback):
    """Set the pruned weights of a model to zero after every step: `Trainer(model, ..., callbacks=[KeepZeros(...)])`.

    For training of all weights; masked adapters need no callback.
    """

    def __init__(self, model: PreTrainedModel, report: Report | Mapping[tuple[int, str], Tensor]) -> None:
        self.find = partial(pruned_linears, model, report)
        self.pruned = self.find()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.pruned = self.find()  # the Trainer may have moved the model

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        for linear, keep_mask in self.pruned:
            linear.weight.masked_fill_(~keep_mask, 0)


def pruned_linears(
    model: PreTrainedModel, report: Report | Mapping[tuple[int, str], Tensor]
) -> list[tuple[nn.Linear, Tensor]]:
    """Pruned projections with their keep-masks."""
    pruned = []
    linears = [projections(block) for block in find_blocks(model)]
    for (index, name), keep_mask in (report.keep_masks if isinstance(report, Report) else report).items():
        linear = linears[index][name]
        keep_mask = keep_mask.to(linear.weight.device)
        if linear.weight[~keep_mask].any():
            raise ValueError(f"block {index}, {name}: weights are not 0 where the keep-mask has zeros: another model?")
        pruned.append((linear, keep_mask))
    return pruned
