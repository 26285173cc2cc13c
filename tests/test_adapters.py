"""Training that keeps zeros: masked adapters of peft, and the callback of transformers' Trainer."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

import besa
from besa.beyond.adapters import KeepZeros, MaskedLora, masked_lora
from besa.decoder import find_blocks, projections


@pytest.fixture
def text():
    """Sixteen windows of 24 tokens, each of which follows from the one before it."""
    windows = torch.randint(0, 97, (16, 24), generator=torch.Generator().manual_seed(1))
    for column in range(1, 24):
        windows[:, column] = (3 * windows[:, column - 1] + 1) % 97
    return windows


@pytest.fixture
def pruned(tiny_llama, text):
    return tiny_llama, besa.prune(tiny_llama, text, besa.Wanda(), progress=False)


def train(model, text, folder, callbacks=()):
    """Loss before and after eight epochs of transformers.Trainer."""
    data = Dataset.from_dict({"input_ids": text.tolist(), "labels": text.tolist()})
    options = {"num_train_epochs": 8, "per_device_train_batch_size": 4, "learning_rate": 0.01, "seed": 0}
    options |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    trainer = Trainer(model, TrainingArguments(folder, **options), train_dataset=data, callbacks=[*callbacks])
    before = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    return before, trainer.evaluate(data)["eval_loss"]


def assert_zeros_stay(model, report):
    blocks = find_blocks(model)
    assert report.keep_masks
    for (index, name), keep_mask in report.keep_masks.items():
        weight = projections(blocks[index])[name].weight
        assert not weight[~keep_mask].any() and weight[keep_mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_with_masked_adapters_lowers_the_loss_and_keeps_every_zero(pruned, text, tmp_path, dtype):
    model, report = pruned
    adapted = masked_lora(model.to(dtype), report, LoraConfig(r=8))
    before, after = train(adapted, text, tmp_path)
    logits = adapted(text[:2]).logits
    merged = adapted.merge_and_unload()
    assert after < before - 0.1
    assert torch.equal(merged(text[:2]).logits, logits)  # adapters compute what they merge into, to the bit
    assert_zeros_stay(merged, report)


def test_trainer_with_keep_zeros_lowers_the_loss_and_keeps_every_zero(pruned, text, tmp_path):
    model, report = pruned
    before, after = train(model, text, tmp_path, [KeepZeros(model, report)])
    assert after < before - 0.1
    assert_zeros_stay(model, report)


def test_adapters_change_kept_weights_by_their_product(pruned, text):
    """W + (B A) * keep_mask * (alpha / r), before and after merging; without a keep-mask, plain LoRA."""
    model, report = pruned
    before = copy.deepcopy(model)
    adapted = masked_lora(model, report, LoraConfig(r=3, lora_alpha=5, target_modules=["up_proj", "lm_head"]))
    layers = [layer for layer in adapted.modules() if isinstance(layer, MaskedLora)]
    assert len(layers) == 4
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    first = model.model.layers[0].mlp.up_proj
    product = first.lora_B["default"].weight @ first.lora_A["default"].weight
    wanted = before.model.layers[0].mlp.up_proj.weight + product * report.keep_masks[0, "mlp.up_proj"] * 5 / 3
    x = torch.randn(7, 32)
    torch.testing.assert_close(first(x), x @ wanted.T)
    with adapted.disable_adapter():
        assert torch.equal(adapted(text[:2]).logits, before(text[:2]).logits)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged.model.layers[0].mlp.up_proj.weight, wanted)
    assert_zeros_stay(merged, report)
    assert not torch.equal(merged.lm_head.weight, before.lm_head.weight)


def test_saved_adapters_are_loaded_again_behind_their_masks(pruned, text, tmp_path):
    (model, report), config = pruned, LoraConfig(r=3, target_modules=["up_proj"])
    again = copy.deepcopy(model)
    adapted = masked_lora(model, report, config)
    for layer in adapted.modules():
        if isinstance(layer, MaskedLora):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
    adapted.save_pretrained(tmp_path)
    loaded = masked_lora(again, report, config)
    loaded.load_adapter(tmp_path, "default")
    assert torch.equal(loaded(text[:2]).logits, adapted(text[:2]).logits)
    assert_zeros_stay(loaded.merge_and_unload(), report)


@pytest.mark.parametrize(
    "option", [{"use_dora": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["mlp"]}]
)
def test_adapters_that_would_lose_zeros_are_refused(pruned, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* is not supported"):
        masked_lora(*pruned, LoraConfig(**option))


def test_the_report_of_another_model_is_refused(pruned):
    model, report = pruned
    masks = {key: ~keep_mask for key, keep_mask in report.keep_masks.items()}
    for function in (lambda: masked_lora(model, masks, LoraConfig()), lambda: KeepZeros(model, masks)):
        with pytest.raises(ValueError, match=r"block 0, .*: weights are not 0"):
            function()
