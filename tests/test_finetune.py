"""Fine-tuning of the whole model: the loss falls, every zero stays, an interruption changes no bit."""

import copy
import sys

import pytest
import torch
from test_decoder import ARCHITECTURES, build
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import besa
from besa.adapters import _where_by_bits
from besa.decoder import find_blocks, projections
from besa.finetune import FineTune, _Adapters, _Training, masked_projections
from besa.machine import state
from besa.quantize import Quantize

KINDS = ["low-rank", "full"]
FAST = {"lr": 0.01, "epochs": 4, "batch_size": 2, "held_out": 0.25, "patience": 8}


@pytest.fixture
def text():
    """Sixteen windows of 24 tokens, each of which follows from the one before it."""
    windows = torch.randint(0, 97, (16, 24), generator=torch.Generator().manual_seed(1))
    for column in range(1, 24):
        windows[:, column] = (3 * windows[:, column - 1] + 1) % 97
    return windows


@pytest.fixture
def pruned(tiny_llama, text):
    """A model at one half, and its report."""
    return tiny_llama, besa.prune(tiny_llama, text, besa.Wanda(), progress=False)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(model, weights):
    now = weights_of(model)
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in weights)


@torch.no_grad()
def loss_of(model, windows):
    """By the model's own forward pass."""
    logits = model(windows).logits[:, :-1].float()
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_loss_falls_and_every_zero_stays(pruned, text, kind, dtype):
    model, report = pruned
    model.to(dtype)
    before = weights_of(model)
    result = besa.finetune(model, text, report, FineTune(kind, **FAST), progress=False)
    losses = [row["held_out"] for row in result.held_out]
    assert min(losses) < losses[0] - 0.1
    # what is left in the model is what was measured
    assert loss_of(model, text[-4:]) == pytest.approx(min(losses), rel=1e-5 if dtype == torch.float32 else 5e-3)
    trained = {f"model.layers.{index}.{name}.weight" for index, name in report.keep_masks}
    for name, weight in weights_of(model).items():
        assert weight.dtype == dtype
        assert torch.equal(weight, before[name]) != (name in trained)
    for (index, name), keep_mask in report.keep_masks.items():
        weight, old = projections(find_blocks(model)[index])[name].weight, before[f"model.layers.{index}.{name}.weight"]
        assert not weight[~keep_mask].any()
        assert torch.equal(weight[~keep_mask].view(torch.uint8), old[~keep_mask].view(torch.uint8))  # -0 too
    assert not any("lora" in name for name, _ in model.named_modules()) and not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_of_every_architecture_learn_and_keep_their_zeros(architecture, kind, text):
    model, windows = build(architecture, num_hidden_layers=2), text[:8]
    report = besa.prune(model, windows, besa.Wanda(), progress=False)
    before = weights_of(model)
    result = besa.finetune(model, windows, report, FineTune(kind, **FAST | {"epochs": 1}), progress=False)
    losses = [row["held_out"] for row in result.held_out]
    assert loss_of(model, windows[-2:]) == pytest.approx(min(losses), rel=1e-5) and min(losses) < losses[0]
    kept = {id(projection): keep_mask for projection, keep_mask in masked_projections(model, report).values()}
    for name, weight in weights_of(model).items():
        module, _, part = name.rpartition(".")
        keep_mask = kept.get(id(model.get_submodule(module))) if part == "weight" else None
        assert torch.equal(weight, before[name]) == (keep_mask is None), name
        assert keep_mask is None or not weight[~keep_mask].any()


@pytest.mark.parametrize("at_once", [None, 97 * 5])
def test_the_first_steps_loss_and_gradient_are_the_models_own(pruned, text, monkeypatch, at_once):
    """One step of plain gradient descent's direction: AdamW's first step is lr times the gradient's sign."""
    if at_once:  # the head in parts
        monkeypatch.setattr(sys.modules["besa.finetune"], "LOGITS_AT_ONCE", at_once)
    model, report = pruned
    before, other = weights_of(model), copy.deepcopy(model)
    options = {"lr": 1e-3, "epochs": 1, "batch_size": 12, "held_out": 0.25}
    result = besa.finetune(model, text, report, FineTune("full", **options), progress=False)
    logits = other(text[:12]).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), text[:12, 1:].flatten())
    loss.backward()
    assert result.steps[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    name, keep_mask = "model.layers.1.mlp.up_proj.weight", report.keep_masks[1, "mlp.up_proj"]
    gradient, moved = other.get_parameter(name).grad, weights_of(model)[name] - before[name]
    far = keep_mask & (gradient.abs() > 1e-4)
    torch.testing.assert_close(moved[far], -1e-3 * gradient[far].sign(), rtol=0.02, atol=0)


def test_adapters_change_kept_weights_by_their_product(pruned, text):
    """W + (B A) * keep_mask * (alpha / r), before and after merging."""
    from peft import LoraConfig

    from besa.adapters import MaskedLora, masked_lora

    model, report = pruned
    before = weights_of(model)
    adapted = masked_lora(model, report, LoraConfig(r=3, lora_alpha=5, target_modules=["up_proj", "lm_head"]))
    layers = {name: layer for name, layer in adapted.named_modules() if isinstance(layer, MaskedLora)}
    assert len(layers) == 4
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    first = model.model.layers[0].mlp.up_proj
    product = first.lora_B["default"].weight @ first.lora_A["default"].weight
    wanted = before["model.layers.0.mlp.up_proj.weight"] + product * report.keep_masks[0, "mlp.up_proj"] * 5 / 3
    x = torch.randn(7, 32)
    torch.testing.assert_close(first(x), x @ wanted.T)
    logits = adapted(text[:2]).logits
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(text[:2]).logits, logits)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(text[:2]).logits, logits)
    torch.testing.assert_close(merged.model.layers[0].mlp.up_proj.weight, wanted)
    masked_projections(merged, report)  # every zero is there


def test_saved_adapters_are_taken_up_again_behind_their_masks(pruned, text, tmp_path):
    from peft import LoraConfig

    from besa.adapters import MaskedLora, masked_lora

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
    masked_projections(loaded.merge_and_unload(), report)  # every zero is there


def test_adapters_compute_what_they_merge_into_to_the_bit(pruned, text):
    from peft import LoraConfig

    from besa.adapters import masked_lora

    model, report = pruned
    adapted = masked_lora(model.to(torch.bfloat16), report, LoraConfig(r=3, target_modules=["up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    logits = adapted(text[:2]).logits
    assert torch.equal(adapted.merge_and_unload()(text[:2]).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_are_masked_as_torch_where_masks_to_the_bit(dtype):
    from besa.adapters import _WhereKept

    generator = torch.Generator().manual_seed(0)
    keep_mask = torch.rand(64, 48, generator=generator) < 0.5
    delta, gradient = (torch.randn(64, 48, generator=generator).to(dtype) for _ in range(2))
    delta[::7] = torch.tensor([torch.nan, torch.inf, 0.0, -0.0], dtype=dtype).repeat(12)
    ours, wanted = (delta.clone().requires_grad_() for _ in range(2))
    masked, expected = _WhereKept.apply(keep_mask, ours), torch.where(keep_mask, wanted, -0.0)
    masked.backward(gradient)
    expected.backward(gradient)
    assert masked.dtype == dtype and torch.equal(masked.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(ours.grad.view(torch.uint8), wanted.grad.view(torch.uint8))


PLAIN_BUT = [{"use_dora": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}, {"use_rslora": True}]
PLAIN_BUT += [{"target_parameters": ["mlp.up_proj.weight"]}, {"modules_to_save": ["down_proj"]}]
PLAIN_BUT += [{"modules_to_save": ["lm_head", "0.mlp"]}, {"modules_to_save": ["n_proj"]}, {"fan_in_fan_out": True}]


@pytest.mark.parametrize("option", PLAIN_BUT, ids=str)
def test_adapters_that_would_lose_zeros_are_refused(pruned, option):
    from peft import LoraConfig

    from besa.adapters import masked_lora

    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* not plain LoRA"):
        masked_lora(*pruned, LoraConfig(**option))


def test_a_model_that_has_adapters_is_neither_trained_nor_given_others(pruned, text):
    from peft import LoraConfig

    from besa.adapters import masked_lora

    masked_lora(*pruned, LoraConfig())
    for again in (lambda: masked_lora(*pruned, LoraConfig()), lambda: besa.finetune(pruned[0], text, pruned[1])):
        with pytest.raises(ValueError, match=r"of peft; merge it first: model = model\.merge_and_unload\(\)"):
            again()


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_leaves_the_model_and_ends_with_the_same_bits(pruned, text, tmp_path, monkeypatch, kind):
    model, report = pruned
    before, whole, config = weights_of(model), copy.deepcopy(model), FineTune(kind, **FAST)
    expected = besa.finetune(whole, text, report, config, progress=False)
    run_step = _Training._step

    def killed(training, step):
        if step == 11:
            raise Killed
        return run_step(training, step)

    monkeypatch.setattr(state, "SAVE_AFTER", 0.0)
    monkeypatch.setattr(_Training, "_step", killed)
    with pytest.raises(Killed):
        besa.finetune(model, text, report, config, checkpoint=tmp_path / "state.pt", progress=False)
    assert_same(model, before)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    steps = []
    monkeypatch.setattr(_Training, "_step", lambda training, step: steps.append(step) or run_step(training, step))
    found = besa.finetune(model, text, report, config, checkpoint=tmp_path / "state.pt", progress=False)
    assert steps[0] == 11
    assert_same(model, weights_of(whole))
    assert (found.steps, found.held_out) == (expected.steps, expected.held_out)


def test_a_finished_checkpoint_is_read_and_one_of_another_run_refused(pruned, text, tmp_path):
    model, report = pruned
    config, path, first = FineTune(**FAST), tmp_path / "state.pt", copy.deepcopy(model)
    besa.finetune(first, text, report, config, checkpoint=path, progress=False)
    again = copy.deepcopy(model)
    assert besa.finetune(again, text, report, config, checkpoint=path, progress=False).steps
    assert_same(again, weights_of(first))
    others = {
        "config": (model, text, FineTune(**FAST, seed=1)),
        "windows": (model, text.flip(0), config),
        "weights": (first, text, config),
    }
    for name, (network, windows, other) in others.items():
        with pytest.raises(ValueError, match=f"of a run with other {name}; give the same again"):
            besa.finetune(network, windows, report, other, checkpoint=path, progress=False)
    for content in (b"no state", b"task,acc", b"stderr", b"Result", b"", b"\x80\x02}q"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no state of finetune"):
            besa.finetune(model, text, report, config, checkpoint=path, progress=False)
    for nowhere in (tmp_path, tmp_path / "no" / "state.pt", ""):
        with pytest.raises(ValueError, match="name a file in a folder that is there"):
            besa.finetune(model, text, report, config, checkpoint=nowhere, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_every_bit(pruned, text, kind):
    model, report = pruned
    runs = [copy.deepcopy(model) for _ in range(3)]
    for number, (seed, run) in enumerate(zip((0, 0, 1), runs)):
        torch.manual_seed(number)  # which decides nothing
        besa.finetune(run, text, report, FineTune(kind, **FAST | {"epochs": 1}, seed=seed), progress=False)
    assert_same(runs[0], weights_of(runs[1]))
    with pytest.raises(AssertionError):
        assert_same(runs[0], weights_of(runs[2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_kept_by_bits_is_what_where_keeps(dtype):
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, :3] = torch.tensor([-0.0, torch.inf, -torch.inf])
    keep_mask = torch.rand(5, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    for pruned in (0.0, -0.0):
        found, wanted = _where_by_bits(keep_mask, values, pruned), torch.where(keep_mask, values, pruned)
        assert found.dtype == wanted.dtype == dtype and torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_adapters_have_the_rank_and_the_scale_and_the_start_that_they_are_given(pruned):
    model, report = pruned
    left = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(left))  # which decides nothing
        with _Adapters(model, report, FineTune(rank=3, alpha=12.0, seed=seed)) as adapters:
            layer = adapters.adapted.base_model.model.model.layers[0].mlp.up_proj
            assert layer.lora_A["default"].weight.shape == (3, 32) and layer.scaling["default"] == 4.0
            left.append(layer.lora_A["default"].weight.detach().clone())
    assert torch.equal(left[0], left[1]) and not torch.equal(left[0], left[2])


@torch.no_grad()
def divergence(model, dense, windows):
    """KL(dense || model) per token."""
    found, wanted = (network(windows).logits[:, :-1].log_softmax(-1) for network in (model, dense))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_distillation_moves_towards_the_dense_model(tiny_llama, text):
    dense = copy.deepcopy(tiny_llama)
    report = besa.prune(tiny_llama, text, besa.Magnitude(sparsity=0.7), progress=False)
    first, config = divergence(tiny_llama, dense, text[:12]), FineTune("full", **FAST | {"lr": 0.003}, distill=1.0)
    result = besa.finetune(tiny_llama, text, report, config, dense=dense, progress=False)
    assert result.steps[0]["loss"] == pytest.approx(first, rel=0.3)  # of two of the windows
    assert result.steps[-1]["loss"] < 0.6 * first
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_a_loss_may_be_part_cross_entropy_part_divergence(pruned, tiny_llama, text):
    model, report = pruned
    torch.manual_seed(3)
    dense = LlamaForCausalLM(tiny_llama.config).eval()
    parts = loss_of(model, text[:12]), divergence(model, dense, text[:12])
    config = FineTune("full", epochs=1, batch_size=12, held_out=0.25, distill=0.25)
    result = besa.finetune(model, text, report, config, dense=dense, progress=False)
    assert result.steps[0]["loss"] == pytest.approx(0.75 * parts[0] + 0.25 * parts[1], rel=1e-5)
    assert parts[1] > 0.01


def test_a_teacher_larger_than_the_gpu_teaches_what_one_that_fits_does(tiny_llama, spread, text, tmp_path):
    dense, config, rows = copy.deepcopy(tiny_llama), FineTune("full", **FAST | {"epochs": 1}, distill=1.0), []
    report = besa.prune(tiny_llama, text, besa.Wanda(), progress=False)
    for number, teacher in enumerate((dense, spread)):
        options = {"dense": teacher, "checkpoint": tmp_path / f"{number}.pt", "progress": False}
        rows.append(besa.finetune(copy.deepcopy(tiny_llama), text, report, config, **options).held_out)
    assert rows[0][-1]["held_out"] == pytest.approx(rows[1][-1]["held_out"], rel=1e-5)


def test_training_that_does_not_help_leaves_the_model_and_stops_early(pruned, text, windows):
    """What was learned from a text is only lost on random tokens."""
    model, report = pruned
    besa.finetune(model, text, report, FineTune("full", **FAST), progress=False)
    before, mixed = weights_of(model), torch.cat([windows, text[-4:]])
    config = FineTune("full", **FAST | {"epochs": 20, "held_out": 0.4, "patience": 2})
    result = besa.finetune(model, mixed, report, config, progress=False)
    assert result.best_step == 0 and len(result.held_out) == 3 and len(result.steps) < 20 * 3
    assert_same(model, before)


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_model(pruned, text):
    model, report = pruned
    before, config = weights_of(model), FineTune("full", **FAST)
    object.__setattr__(config, "lr", 1e30)  # beyond what it takes, so that a tiny model overflows
    with pytest.raises(ValueError, match=r"the loss of step \d+ is nan; lower lr"):
        besa.finetune(model, text, report, config, progress=False)
    assert_same(model, before)
    with torch.no_grad():
        model.lm_head.weight.mul_(3e38)  # which no smaller step would mend
    with pytest.raises(
        ValueError, match=r"the loss of step 1 is (inf|nan); look for NaN and huge values in its weights"
    ):
        besa.finetune(model, text, report, FineTune(**FAST), progress=False)


def test_the_curve_has_a_row_per_step_and_is_drawn(pruned, text):
    result = besa.finetune(*pruned[:1], text, pruned[1].keep_masks, FineTune(**FAST), progress=False)
    frame = result.to_frame()
    assert list(frame.index) == list(range(25)) and list(frame.columns) == ["lr", "loss", "held_out"]
    assert frame["held_out"].notna().sum() == 9 and frame["loss"].notna().sum() == 24
    assert frame["lr"].idxmax() == 2 and frame["lr"].max() < 0.01 and frame["lr"].iloc[-1] < 1e-4
    assert frame["held_out"].idxmin() == result.best_step
    assert str(result).startswith("low-rank: held-out loss 4.")
    lines = result.plot().get_lines()
    assert [line.get_label() for line in lines] == ["trained on", "held out", "kept"]


def test_tied_weights_stay_tied(text):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, tie_word_embeddings=True, **shape)).eval()
    report = besa.prune(model, text, besa.Wanda(), progress=False)
    for kind in KINDS:
        besa.finetune(model, text, report, FineTune(kind, epochs=1), progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_models_masks_and_windows_that_do_not_go_together_are_refused(pruned, text, no_type_checks):
    model, report = pruned
    dense, masks = copy.deepcopy(model), report.keep_masks
    torch.nn.init.ones_(dense.model.layers[1].mlp.up_proj.weight)
    wrong = dict(masks) | {(0, "self_attn.q_proj"): torch.ones(3, 3, dtype=torch.bool)}
    cases = [
        ((model, text, None), {}, r"report None is not what besa.prune returned or keep-masks \{\(block, projection\)"),
        ((model, text, {}), {}, "there are no keep-masks"),
        ((dense, text, report), {}, "block 1, mlp.up_proj: 1280 weights are not 0 that the mask has pruned"),
        ((model, text, wrong), {}, r"block 0, self_attn.q_proj: no such projection of shape \(3, 3\)"),
        ((model, text, {(7, "mlp.up_proj"): masks[0, "mlp.up_proj"]}), {}, "block 7, mlp.up_proj: no such projection"),
        (
            (model, text, {(-1, "mlp.up_proj"): masks[2, "mlp.up_proj"]}),
            {},
            "block -1, mlp.up_proj: no such projection",
        ),
        ((model, text[:1], report), {}, r"1 window\(s\) cannot be parted"),
        ((model, text[0], report), {}, r"windows of torch.int64 \(24,\) is not int64 token ids \(n_samples, seq_len\)"),
        ((model, text + 1, report), {}, "the vocabulary has 97"),
        ((model, text, report, FineTune(distill=0.5)), {}, "distill 0.5 with no dense model"),
        ((model, text, report), {"dense": dense}, "distill 0.0 with a dense model"),
        ((model, text, report, FineTune(distill=0.5)), {"dense": model}, "the dense model is the pruned one itself"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            besa.finetune(*arguments, **options, progress=False)
    dense.resize_token_embeddings(98)
    with pytest.raises(ValueError, match="the dense model has 98 token ids, the pruned one 97"):
        besa.finetune(model, text, report, FineTune(distill=0.5), dense=dense, progress=False)


def test_packed_and_quantized_models_are_refused_by_name(tiny_llama, text):
    packed = copy.deepcopy(tiny_llama)
    report = besa.prune(packed, text, besa.Wanda(), progress=False)
    besa.pack(packed, report)
    with pytest.raises(ValueError, match=r"a packed model becomes dense by besa\.unpack\(model\)"):
        besa.finetune(packed, text, report, progress=False)
    besa.unpack(packed)
    assert besa.finetune(packed, text, report, FineTune(epochs=1), progress=False).steps
    report = besa.prune(tiny_llama, text, besa.Besa(quantize=Quantize()), progress=False)
    with pytest.raises(ValueError, match="prune with quantize=None"):
        besa.finetune(tiny_llama, text, report, progress=False)
