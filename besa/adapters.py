"""Low-rank adapters of peft that keep every zero, in the manner of SPP (Lu et al. 2024) and of PERP's MaskLoRA
(Zimmer et al. 2023): W + (B A) * keep_mask * (alpha / r), which merges into a weight with the zeros of W.

peft takes a layer of one's own for a layer type, which is all that the mask needs; choosing, initialising, saving and
merging stay peft's.
"""

import copy
import warnings
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa.finetune import masked_projections
from besa.report import Masks


class _WhereKept(torch.autograd.Function):
    """torch.where(keep_mask, values, -0.0), which by itself took a fourth of a training step on a CPU."""

    @staticmethod
    def forward(ctx, keep_mask, values):
        ctx.save_for_backward(keep_mask)
        return _where_by_bits(keep_mask, values, -0.0)

    @staticmethod
    def backward(ctx, grad):
        (keep_mask,) = ctx.saved_tensors
        return None, _where_by_bits(keep_mask, grad, 0.0)


def _where_by_bits(keep_mask: Tensor, values: Tensor, pruned: float) -> Tensor:
    """Each number's bits, ANDed with all ones or none; elsewhere those of `pruned`. A GPU is faster as it is."""
    if values.is_cuda:
        return torch.where(keep_mask, values, pruned)
    integer = torch.int32 if values.dtype == torch.float32 else torch.int16
    bits, other = values.view(integer), torch.tensor(pruned, dtype=values.dtype, device=values.device).view(integer)
    kept = keep_mask.to(integer).neg_()  # all bits, or none
    return kept.bitwise_and_(bits ^ other).bitwise_xor_(other).view(values.dtype)


class MaskedLora(lora.Linear):
    """A projection whose adapters change kept weights only; without a keep-mask, all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("keep_mask", None, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """(B A) * keep_mask * (alpha / r), in the weight's own precision; merging adds the same."""
        delta = super().get_delta_weight(adapter).to(self.base_layer.weight.dtype)
        return delta if self.keep_mask is None else _WhereKept.apply(self.keep_mask, delta)  # 0 + -0 is 0, -0 + -0 -0

    def forward(self, x: Tensor) -> Tensor:
        """With the weight as it will be once merged."""
        if self.disable_adapters or self.merged:
            return super().forward(x)
        weight = self.base_layer.weight
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                weight = weight + self.get_delta_weight(adapter)
        return torch.func.functional_call(self.base_layer, {"weight": weight}, (x,))


def masked_lora(model: PreTrainedModel, report: Masks, config: LoraConfig) -> PeftModel:
    """A pruned model with adapters for peft, Trainer or TRL, in training and merging of which every zero stays.

    What peft saves of it has no mask: `PeftModel.from_pretrained` would make plain LoRA of it, which fills the zeros.
    `masked_lora(model, report, config).load_adapter(folder, "default")` takes it up again. A second adapter, by
    `add_adapter`, is masked only on projections that this config targets, and would fill zeros of others: give this
    config all targets.

    The adapters go into `model` itself, as always in peft; `merge_and_unload()` removes them and leaves the merged
    weights.

    Args:
        report: what `besa.prune` returned, or keep-masks by (block, projection).
        config: plain LoRA of any rank, alpha and pattern; `target_modules` None takes every pruned projection.

    Raises:
        ValueError: `masked_projections` finds fault, or the config is of a LoRA that is not W + (B A) * (alpha / r), or
            would train a pruned projection without its mask.
    """
    pruned = masked_projections(model, report)
    paths = {id(module): name for name, module in model.named_modules()}
    names = {paths[id(projection)] for projection, _ in pruned.values()}
    _check_plain(config, names)
    config = copy.deepcopy(config)
    config.target_modules = config.target_modules or names
    config._register_custom_module({nn.Linear: MaskedLora})
    with warnings.catch_warnings():  # peft asks transformers 5 by a name of transformers 4
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(model, config)
    layers = {id(layer.base_layer): layer for layer in adapted.modules() if isinstance(layer, MaskedLora)}
    for projection, keep_mask in pruned.values():
        if id(projection) in layers:
            layers[id(projection)].keep_mask = keep_mask
    return adapted


def _check_plain(config: LoraConfig, pruned: set[str]) -> None:
    """Refuse what has other products, biases or first values: PiSSA and its like write into the zeros."""
    variants = [field.name for field in fields(config) if field.metadata.get("is_lora_variant")]
    others = {*variants, "use_dora", "use_rslora", "lora_dropout", "lora_bias", "fan_in_fan_out"}
    others |= {"layer_replication", "megatron_config", "target_parameters"}
    wrong = [name for name in sorted(others) if getattr(config, name, None)]
    # peft takes an entry for the end of a name, whether a dot is before it or not
    copied = [entry for entry in config.modules_to_save or () for name in pruned if f"{entry}." in f"{name}."]
    wrong += ["modules_to_save"] * bool(copied)
    wrong += ["bias"] * (config.bias != "none")
    wrong += ["init_lora_weights"] * (config.init_lora_weights not in (True, False, "gaussian"))
    if wrong:
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        raise ValueError(f"{values}: not plain LoRA, which alone is known to keep zeros; leave it at its default")
