"""Mixtures of experts: split and joined to the bit, pruned by every method, from folder to folder."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import besa
from besa.checkpoint import INDEX, Shards
from besa.data.files import sha256
from besa.decoder import check_model, find_blocks, projections
from besa.experts import join, split

SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 128, "num_experts_per_tok": 2}
SHAPE |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "head_dim": 8}
    | {"first_k_dense_replace": 1, "num_key_value_heads": 4}
    | LATENT,
    "glm4_moe": {"n_routed_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "first_k_dense_replace": 1},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "layer_types": ["full_attention"] * 2},
}
# The sparsity of each expert is exact, not only of the block.
EXACT = {"magnitude": besa.Magnitude(), "wanda": besa.Wanda(), "sparsegpt": besa.SparseGPT()}
EXACT |= {"closed": besa.Closed(), "exact 2:4": besa.Exact(pattern="2:4")}
METHODS = EXACT | {"besa": besa.Besa(epochs=2), "besa, 4 bits": besa.Besa(quantize=besa.Quantize(bits=4))}
METHODS |= {"exact": besa.Exact(), "exact, update": besa.Exact(update=True)}
WINDOWS = torch.randint(3, 97, (8, 64), generator=torch.Generator().manual_seed(1))


def tiny(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | FAMILIES[family])).eval()
    for parameter in model.parameters():  # some families leave fused weights empty
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    return model


def prune(model, method, **options):
    return besa.prune(model, WINDOWS, method, progress=False, **options)


def fused(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.ndim == 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_equal_to_the_bit_split_and_joined(family):
    model = tiny(family)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        dense = model(WINDOWS).logits
        split(model)
        assert not fused(model) and torch.equal(model(WINDOWS).logits, dense)
        join(model)
        assert torch.equal(model(WINDOWS).logits, dense)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    for block in find_blocks(model):
        names = list(projections(block))
        assert names == list(projections(split(block)))
        assert not any(name.endswith(("gate", "router", "router.layer")) for name in names)
        join(block)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_pruned_saved_and_loaded(family, tmp_path):
    model = tiny(family)
    routers = {n: p.clone() for n, p in model.named_parameters() if n.endswith(("mlp.gate.weight", "router.weight"))}
    prune(model, besa.Wanda())
    assert fused(model)
    for _, parameter in fused(model):
        assert ((parameter == 0).flatten(1).float().mean(1) == 0.5).all()
    assert all(torch.equal(model.get_parameter(name), router) for name, router in routers.items())
    model.save_pretrained(tmp_path / "saved")
    tiny(family).save_pretrained(tmp_path / "source")
    besa.prune_checkpoint(tmp_path / "source", tmp_path / "out", WINDOWS, besa.Wanda(), progress=False)
    names = [set().union(*map(load_file, (tmp_path / folder).glob("*.safetensors"))) for folder in ("source", "out")]
    assert names[0] == names[1]
    for folder in ("saved", "out"):
        state = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto").state_dict()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_prunes_every_expert(name):
    model = tiny("qwen2_moe")
    report = prune(model, METHODS[name], reconstruct=besa.Reconstruct() if name == "wanda" else None)
    frame = report.to_frame()
    assert len(fused(model)) == 4 and 0.45 < report.sparsity < 0.55
    if name in EXACT:
        assert frame["sparsity"].between(0.499, 0.5).all()
    if name.startswith("exact"):
        assert report.sparsity == pytest.approx(0.5, abs=1e-5)
    zeros = sum(int((parameter == 0).sum()) for _, parameter in fused(model))
    n_zeros = frame[frame["projection"].str.contains("experts.[0-9]")]["zeros"].sum()
    assert zeros == n_zeros if "bits" not in name else zeros >= n_zeros
    assert len(report.summary()) < len(frame) / 2 and report.plot_allocation()


def test_an_expert_without_tokens_goes_by_magnitude():
    models = []
    for method in (besa.Wanda(), besa.SparseGPT(), besa.Closed()):
        model = tiny("qwen3_moe")
        router = model.model.layers[0].mlp.gate.weight.data
        router[2:4] = -router[:2]  # of these four, two have positive logits
        router[4:] = 0
        with pytest.warns(UserWarning, match="saw fewer than 64 calibration tokens"):
            report = prune(model, method)
        models.append(model)
        frame = report.to_frame().set_index(["block", "projection"])["tokens"]
        assert frame[0, "mlp.experts.7.up"] == 0 and frame[0, "self_attn.q_proj"] == WINDOWS.numel()
    dense = tiny("qwen3_moe").model.layers[0].mlp.experts.gate_up_proj[7]
    by_magnitude = besa.masks.keep_largest(dense.abs(), 0.5)
    assert torch.equal(models[0].model.layers[0].mlp.experts.gate_up_proj[7], dense * by_magnitude)
    assert torch.equal(models[2].model.layers[0].mlp.experts.gate_up_proj[7] != 0, by_magnitude)


@pytest.mark.parametrize("method", [besa.Wanda(), besa.Exact()])
def test_a_killed_run_continues_with_the_same_bytes(method, tmp_path, monkeypatch):
    tiny("mixtral").save_pretrained(tmp_path / "source")
    whole = besa.prune_checkpoint(tmp_path / "source", tmp_path / "whole", WINDOWS, method, progress=False)
    write = Shards.write
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(Shards, "write", lambda self, index, *rest: write(self, index, *rest) if index < 1 else 1 / 0)
        besa.prune_checkpoint(tmp_path / "source", tmp_path / "out", WINDOWS, method, progress=False)
    assert not (tmp_path / "out" / INDEX).exists()
    report = besa.prune_checkpoint(tmp_path / "source", tmp_path / "out", WINDOWS, method, progress=False)
    assert report.sparsity == whole.sparsity
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert sha256(path) == sha256(tmp_path / "out" / path.name)


def test_budgets_and_finetuning_keep_the_zeros_of_experts():
    model = tiny("olmoe")
    report = prune(model, besa.Wanda(sparsities=besa.block_budgets(model, WINDOWS, 0.5)))
    kept = {name: parameter.clone() for name, parameter in fused(model)}
    besa.finetune(model, WINDOWS, report, progress=False)
    for name, parameter in fused(model):
        assert torch.equal(parameter == 0, kept[name] == 0) and not torch.equal(parameter, kept[name])


def test_an_error_joins_the_experts_and_another_form_is_refused(monkeypatch):
    model = tiny("mixtral")
    monkeypatch.setattr(besa.Wanda, "prune_block", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(model, besa.Wanda())
    assert len(fused(model)) == 4 and not any("forward" in vars(module) for module in model.modules())
    model.model.layers[1].mlp = nn.Module()
    model.model.layers[1].mlp.weight = nn.Parameter(torch.ones(4, 8, 8))
    with pytest.raises(ValueError, match=r"block 1, mlp: a Module is not a torch.nn.Linear, nor experts"):
        check_model(model)
