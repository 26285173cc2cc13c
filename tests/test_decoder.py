"""Finding blocks and projections of any family, recording calls, and models that are refused."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

import besa
from besa.decoder import (
    check_model,
    embed,
    find_blocks,
    pruned_projections,
    record_calls,
    run_block,
    run_head,
)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen3": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "GPTNeoX": {},
    "Gemma3": {"sliding_window": 8, "sliding_window_pattern": 2, "final_logit_softcapping": 5.0},
    "Phi": {},
    "GPTNeo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},  # its blocks return tuples
}


def build(family):
    """A random model of three small blocks."""
    torch.manual_seed(0)
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(**SMALL | FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which would be 0
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_chained_blocks_equal_the_whole_model(family):
    model, window = build(family), torch.randint(1, 97, (1, 24))
    calls = record_calls(model, torch.randint(1, 97, (1, 24)))
    hidden = embed(model, window)
    for block, call in zip(find_blocks(model), calls, strict=True):
        hidden = run_block(block, hidden, call)
    expected = model(window).logits
    assert torch.equal(run_head(model, hidden, calls[0]), expected)
    assert calls[0].in_tuple == (family == "GPTNeo")
    assert not any("forward" in vars(block) for block in find_blocks(model))


NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
NAMES += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize(
    "entry, ignored",
    [
        ("1.mlp.up_proj", ["1.mlp.up_proj"]),
        ("2", [f"2.{name}" for name in NAMES]),
        ("0.mlp", [f"0.{name}" for name in NAMES[4:]]),
        (r".*\.down_proj", [f"{index}.mlp.down_proj" for index in range(3)]),
    ],
)
def test_ignore_takes_names_and_regular_expressions(tiny_llama, entry, ignored):
    pruned = {f"{index}.{name}" for index, name in pruned_projections(tiny_llama, [entry])}
    assert pruned == {f"{index}.{name}" for index in range(3) for name in NAMES} - set(ignored)


@pytest.mark.parametrize(
    "ignore, message",
    [
        (["1.mlp.up"], "ignore '1.mlp.up' matches no projection; names look like"),
        (["down_proj"], "ignore 'down_proj' matches no projection"),
        (["7", "2"], "ignore '7' matches no projection"),
        ([".*"], r"ignore \['.\*'\] leaves nothing to prune"),
    ],
)
def test_ignore_that_matches_nothing_or_everything_raises(tiny_llama, windows, ignore, message):
    with pytest.raises(ValueError, match=message):
        besa.prune(tiny_llama, windows, besa.Wanda(ignore=ignore), progress=False)


def test_conv1d_raises_by_name():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)
    with pytest.raises(ValueError, match=r"block 0, attn.c_attn: a Conv1D is not a torch.nn.Linear"):
        check_model(transformers.GPT2LMHeadModel(config))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_other_precisions_raise_by_name(tiny_llama, dtype):
    projection = tiny_llama.model.layers[1].mlp.down_proj
    projection.weight = nn.Parameter(torch.zeros(32, 80).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"block 1, mlp.down_proj: weights of {dtype}; load the model in"):
        check_model(tiny_llama)


@pytest.mark.parametrize("owner, other", [("0.mlp.gate_proj", "0.mlp.up_proj"), ("0.mlp.up_proj", "2.mlp.up_proj")])
def test_shared_weights_raise_by_both_names(tiny_llama, windows, owner, other):
    linear = tiny_llama.model.layers.get_submodule
    linear(other).weight = linear(owner).weight
    names = [f"block {name.replace('.', ', ', 1)}" for name in (other, owner)]
    with pytest.raises(ValueError, match=rf"{names[0]}: its weight is shared with {names[1]}"):
        besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    linear(other).weight = nn.Parameter(linear(other).weight.clone())
    assert besa.prune(tiny_llama, windows, besa.Wanda(), progress=False).sparsity == 0.5


WRAPPERS = {
    "prune": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "parametrized": parametrizations.orthogonal,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_weights_computed_from_others_raise(tiny_llama, windows, wrap):
    WRAPPERS[wrap](tiny_llama.model.layers[1].mlp.up_proj)
    before = copy.deepcopy(tiny_llama.state_dict())
    with pytest.raises(ValueError, match=r"block 1, mlp.up_proj: its weight is computed from other tensors"):
        besa.prune(tiny_llama, windows, besa.Magnitude(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_adapters_raise_until_they_are_merged(tiny_llama):
    adapted = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules=["down_proj"]))  # in place
    with pytest.raises(ValueError, match=r"block 0, mlp.down_proj: merge the adapters first: .*merge_and_unload"):
        check_model(tiny_llama)
    check_model(adapted.merge_and_unload())


def test_models_without_a_list_of_blocks_raise(tiny_llama):
    tiny_llama.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="no list of 5 blocks"):
        find_blocks(tiny_llama)


def test_token_dependent_arguments_raise(windows):
    """Gemma 4 passes per-layer inputs, made of the tokens, to its blocks."""
    shape = SMALL | {"layer_types": ["full_attention"] * 3, "vocab_size_per_layer_input": 97}
    shape |= {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "global_head_dim": 8}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Gemma4TextConfig(**shape)).eval()
    with pytest.raises(ValueError, match="passes token-dependent arguments to its blocks"):
        besa.prune(model, windows, besa.Wanda(), progress=False)


def test_hidden_states_changed_between_blocks_raise(tiny_llama, windows):
    tiny_llama.model.layers[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    with pytest.raises(ValueError, match="changes the hidden states between blocks 0 and 1: not supported"):
        besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
