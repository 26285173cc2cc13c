import copy

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

import besa
from besa.decoder import check_model, embed, find_blocks, projections, record_calls, run_block, run_head
from besa.importance import collect_statistics
from besa.machine.device import deterministic

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
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {},
    "Qwen3": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "GPTNeoX": {},
    "Gemma3": {"sliding_window": 8, "sliding_window_pattern": 2, "final_logit_softcapping": 5.0},
    "Phi": {},
    "XGLM": {"ffn_dim": 48},
}


def build(architecture, **options):
    torch.manual_seed(0)
    config_name = "Gemma3TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
    config = getattr(transformers, config_name)(**SMALL | ARCHITECTURES[architecture] | options)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which would be 0
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_blocks_chained_equal_the_whole_model(architecture):
    model, window = build(architecture), torch.randint(1, 97, (1, 24))
    calls = record_calls(model, torch.randint(1, 97, (1, 24)))
    hidden = embed(model, window)
    for block, call in zip(find_blocks(model), calls, strict=True):
        hidden = run_block(block, hidden, call)
    expected = model(window).logits
    torch.testing.assert_close(run_head(model, hidden, calls[0]), expected, rtol=0, atol=0)
    torch.testing.assert_close(model(window).logits, expected, rtol=0, atol=0)  # stubs are gone


def test_around_its_blocks_a_model_may_sum_as_no_deterministic_algorithm_of_a_gpu_does(monkeypatch):
    """OPT counts positions by torch.cumsum of floats, which on a GPU is an error where the run is to repeat."""
    cumsum, summed = torch.cumsum, []

    def on_a_gpu(*args, **options):
        assert not torch.are_deterministic_algorithms_enabled()
        summed.append(args)
        return cumsum(*args, **options)

    monkeypatch.setattr(torch, "cumsum", on_a_gpu)
    model, window = build("OPT"), torch.randint(1, 97, (1, 24))
    with deterministic(True):
        calls, hidden = record_calls(model, window), embed(model, window)
        run_head(model, hidden, calls[0])
        assert torch.are_deterministic_algorithms_enabled()  # again, for the blocks
    assert len(summed) == 5  # three calls, the embedding, the head


def test_calls_are_recorded_without_running_a_block_on_a_window(monkeypatch):
    """A block of a large model, which may lie on a CPU, would take long."""
    model, seen = build("Llama"), []
    run = model.model.layers[0].forward
    look = lambda hidden, *rest, **options: seen.append(tuple(hidden.shape)) or run(hidden, *rest, **options)
    monkeypatch.setattr(model.model.layers[0], "forward", look)
    calls = record_calls(model, torch.randint(1, 97, (3, 24)))
    assert seen == [(1, 1, 32)] and all(call.kwargs["position_ids"].shape[-1] == 24 for call in calls)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_matrix_of_a_block_is_a_projection(architecture):
    for block in find_blocks(build(architecture)):
        matrices = {name.removesuffix(".weight") for name, p in block.named_parameters() if p.ndim == 2}
        assert set(projections(block)) == matrices


def test_linear_subclasses_count_as_projections(tiny_llama):
    class MyLinear(nn.Linear):
        pass

    tiny_llama.model.layers[1].mlp.up_proj = MyLinear(32, 80, bias=False)
    assert "mlp.up_proj" in projections(tiny_llama.model.layers[1])
    check_model(tiny_llama)


def test_projections_with_one_input_share_its_statistics(tiny_llama, windows):
    block, (call, *_) = tiny_llama.model.layers[0], record_calls(tiny_llama, windows[:1])
    hidden = embed(tiny_llama, windows[:1])
    with collect_statistics(projections(block), 1, hessian=False) as statistics, torch.no_grad():
        run_block(block, hidden, call)
    assert set(statistics) == set(projections(block))
    assert statistics["self_attn.q_proj"] is statistics["self_attn.k_proj"] is statistics["self_attn.v_proj"]
    assert statistics["mlp.gate_proj"] is statistics["mlp.up_proj"]
    assert len({id(value) for value in statistics.values()}) == 4
    normed = block.input_layernorm(hidden)[0]
    torch.testing.assert_close(statistics["self_attn.q_proj"].squared_norm, normed.square().sum(0))


def test_refuses_conv1d_by_name():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)
    with pytest.raises(ValueError, match=r"block 0, attn.c_attn.weight: a Conv1D is not a torch.nn.Linear"):
        check_model(transformers.GPT2LMHeadModel(config))


def test_refuses_mixture_of_experts_by_name():
    config = transformers.MixtralConfig(**SMALL, num_local_experts=2)
    with pytest.raises(ValueError, match=r"block 0, mlp\..*mixture-of-experts"):
        check_model(transformers.MixtralForCausalLM(config))


@pytest.mark.parametrize("shared", [0, 2])
def test_refuses_blocks_that_take_more_than_hidden_states_of_the_tokens(shared):
    """Gemma 4: per-layer inputs made of the tokens, keys and values that later blocks share."""
    kinds = ["sliding_attention", "full_attention"] * 2
    shape = SMALL | {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 8, "global_head_dim": 8}
    shape |= {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    more = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": shared}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Gemma4TextConfig(**shape | more)).eval()
    windows = torch.randint(1, 97, (3, 24))
    for work in (
        lambda: besa.perplexity(model, windows.flatten(), 24, progress=False),
        lambda: besa.prune(model, windows, besa.Wanda(), progress=False),
    ):
        with pytest.raises(ValueError, match="hands its blocks more than hidden states of the tokens: not supported"):
            work()
    plain = transformers.AutoModelForCausalLM.from_config(transformers.Gemma4TextConfig(**shape))
    assert len(record_calls(plain.eval(), windows[:1])) == 4


def test_refuses_parts_that_take_more_than_hidden_states_of_each_window(windows):
    """BLOOM's attention and MLP add the residual themselves."""
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.BloomForCausalLM(config).eval()
    with pytest.raises(ValueError, match="takes more than hidden states of each window: take reconstruct=1"):
        besa.prune(model, windows, besa.Besa(reconstruct="sublayer"), progress=False)
    assert besa.prune(model, windows, besa.Besa(), progress=False).sparsity > 0.4


def test_refuses_meta_weights(tiny_llama):
    with pytest.raises(ValueError, match=r"block 0, .*meta"):
        check_model(tiny_llama.to("meta"))
    check_model(tiny_llama, values=False)


@pytest.mark.parametrize(
    "dtype, kind",
    [
        (torch.int8, "quantized weights"),
        (torch.uint8, "quantized weights"),
        (torch.float8_e4m3fn, "quantized weights"),
        (torch.float64, "weights"),
        (torch.complex64, "weights"),
        (torch.int32, "weights"),
    ],
)
def test_refuses_weights_of_other_precisions_by_name(tiny_llama, dtype, kind):
    projection = tiny_llama.model.layers[1].mlp.down_proj
    projection.weight = nn.Parameter(torch.zeros(32, 80).to(dtype), requires_grad=False)
    told = rf"block 1, mlp.down_proj.weight: {kind} \({dtype}\); load the model in bfloat16, float16 or float32"
    with pytest.raises(ValueError, match=told):
        check_model(tiny_llama)


@pytest.mark.parametrize("owner, other", [("0.mlp.gate_proj", "0.mlp.up_proj"), ("0.mlp.up_proj", "2.mlp.up_proj")])
def test_refuses_projections_that_share_a_weight_by_both_names(tiny_llama, windows, owner, other):
    linear = tiny_llama.model.layers.get_submodule
    linear(other).weight = linear(owner).weight
    names = [f"block {name.replace('.', ', ', 1)}" for name in (other, owner)]
    with pytest.raises(ValueError, match=rf"{names[0]}: its weight is that of {names[1]}, .*; untie them: module"):
        besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    linear(other).weight = nn.Parameter(linear(other).weight.clone())
    assert besa.prune(tiny_llama, windows, besa.Wanda(), progress=False).sparsity == 0.5


def test_refuses_what_is_compiled(tiny_llama, windows):
    tiny_llama.model.layers[1].compile()
    with pytest.raises(ValueError, match="a compiled model does not show what enters its projections; load it again"):
        besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)


@pytest.mark.parametrize("work", ["prune", "finetune"])
def test_refuses_inference_mode_and_what_was_made_in_it(tiny_llama, windows, work):
    report = besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    start = {
        "prune": lambda model: besa.prune(model, windows, besa.Besa(), progress=False),
        "finetune": lambda model: besa.finetune(model, windows, report, progress=False),
    }[work]
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"within torch.inference_mode\(\); call it outside, or in no_grad\(\)"):
            start(tiny_llama)
        made = copy.deepcopy(tiny_llama)
    with pytest.raises(ValueError, match=r"block 0, .*: its weights were made within torch.inference_mode\(\); load"):
        start(made)
    with torch.no_grad():
        start(tiny_llama)


def test_refuses_weights_that_are_not_finite(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.layers[2].self_attn.o_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"block 2, self_attn.o_proj.weight: .*NaN"):
        check_model(tiny_llama)


def test_refuses_adapters_of_peft_by_name(tiny_llama):
    config = peft.LoraConfig(target_modules=["down_proj"])
    adapted = peft.get_peft_model(tiny_llama, config)  # in place: the model that it was given has the adapters, too
    with pytest.raises(ValueError, match=r"block 0, mlp.down_proj: a Linear of peft; .*merge_and_unload"):
        check_model(tiny_llama)
    check_model(adapted.merge_and_unload())


def test_refuses_a_model_that_peft_wraps(tiny_llama, no_type_checks):
    adapted = peft.get_peft_model(tiny_llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"a PeftModelForCausalLM of peft hides its projections; merge it: model"):
        check_model(adapted)


WRAPPERS = {
    "prune": (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), "its weight is made of weight_orig"),
    "weight_norm": (torch.nn.utils.weight_norm, "its weight is made of weight_g, weight_v .*remove_weight_norm"),
    "parametrized": (parametrizations.weight_norm, "its weight is parametrized; .*remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "its weight is parametrized"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap, message", WRAPPERS.values(), ids=WRAPPERS)
def test_refuses_weights_that_every_forward_makes_anew(tiny_llama, windows, wrap, message):
    wrap(tiny_llama.model.layers[1].mlp.up_proj)
    before = copy.deepcopy(tiny_llama.state_dict())
    with pytest.raises(ValueError, match=rf"block 1, mlp.up_proj: {message}"):
        besa.prune(tiny_llama, windows, besa.Magnitude(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_refuses_models_without_a_list_of_blocks(tiny_llama):
    tiny_llama.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="no list of 5 blocks"):
        find_blocks(tiny_llama)
