import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import besa
from besa.checkpoint.format import open_checkpoint
from besa.inputs import models
from besa.machine.device import resolve_dtype


def test_a_local_folder_loads(tiny_llama, smollm2, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    model, tokenizer = besa.load_model(str(tmp_path), dtype="float32", device="cpu")
    assert torch.equal(model.lm_head.weight, tiny_llama.lm_head.weight) and not model.training
    assert tokenizer("a b")["input_ids"] == smollm2[1]("a b")["input_ids"]


def change_tensors(folder, change):
    """Save a checkpoint's tensors again as `change` leaves them."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder):
    return besa.load_model(str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize("opened", [load, open_checkpoint])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(tiny_llama, tmp_path, opened, name):
    tiny_llama.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"lacks 1 tensor\(s\) of a LlamaForCausalLM, the first {name}; fetch"):
        opened(tmp_path)


@pytest.mark.parametrize("opened", [load, open_checkpoint])
def test_layers_that_the_configuration_leaves_out_are_refused_by_name(tiny_llama, tmp_path, opened):
    tiny_llama.save_pretrained(tmp_path)
    tiny_llama.config.num_hidden_layers = 2
    tiny_llama.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds 9 tensor\(s\) .*first model.layers.2.input_layernorm.weight; mend"):
        opened(tmp_path)


def test_tied_heads_and_old_rotary_frequencies_are_nothing_missing_or_left_over(smollm2, tmp_path):
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tied = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    change_tensors(tmp_path, lambda tensors: tensors.update(frequencies))
    assert "lm_head.weight" not in safetensors.torch.load_file(tmp_path / "model.safetensors")
    smollm2[1].save_pretrained(tmp_path)
    for model in (load(tmp_path)[0], open_checkpoint(tmp_path)):
        assert torch.equal(model.lm_head.weight, tied.model.embed_tokens.weight)


def test_an_unknown_model_names_the_known_ones(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"cannot load the model .*the folder has not.*smollm2-135m.*llama2-70b"):
        besa.load_model(str(tmp_path))


def test_bad_dtype_and_device_are_refused():
    with pytest.raises(ValueError, match="dtype 'int8' is not one of bfloat16, float16, float32"):
        besa.load_model("smollm2-135m", dtype="int8")
    with pytest.raises(ValueError, match="device 'tpu' cannot be used here"):
        besa.load_model("smollm2-135m", device="tpu")


@pytest.mark.parametrize("native, on_cpu, on_gpu", [(True, "bfloat16", "bfloat16"), (False, "float32", "float16")])
def test_dtype_defaults_to_what_the_device_computes_in(monkeypatch, native, on_cpu, on_gpu):
    monkeypatch.setattr("besa.machine.device.computes_bfloat16", lambda device: native)
    assert resolve_dtype(None, torch.device("cpu")) == getattr(torch, on_cpu)
    assert resolve_dtype(None, torch.device("cuda")) == getattr(torch, on_gpu)
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


def test_a_model_larger_than_the_gpu_is_spread_over_all_gpus_and_the_host(tiny_llama, monkeypatch, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    n_bytes = models.weight_bytes(models.load_shapes(str(tmp_path)), torch.float32)
    assert n_bytes == sum(parameter.nbytes for parameter in tiny_llama.parameters())
    first, free = torch.device("cuda", 0), {0: n_bytes, 1: 200}
    monkeypatch.setattr(models, "free_device", lambda device: free[device.index])
    monkeypatch.setattr(models, "free_host", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    memory = {0: int(0.8 * n_bytes), 1: 160, "cpu": 900}
    assert models._spread(str(tmp_path), torch.float32, first) == {"device_map": "auto", "max_memory": memory}
    assert models._spread(str(tmp_path), torch.bfloat16, first) == {}
    free[0] = int(1.12 * n_bytes)  # 0.9 of it hold all
    assert models._spread(str(tmp_path), torch.float32, first) == {}
    free[0] = n_bytes
    assert models._spread(str(tmp_path), torch.float32, torch.device("cpu")) == {}
    monkeypatch.setattr(models, "n_ranks", lambda: 2)  # another rank has the other GPU
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    memory = {0: int(0.8 * n_bytes), "cpu": 450}
    assert models._spread(str(tmp_path), torch.float32, first)["max_memory"] == memory
