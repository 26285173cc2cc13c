import json
import struct
import warnings

import pytest
import safetensors.torch
import tokenizers
import torch
from test_decoder import build
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import besa
from besa.checkpoint import format as checkpoint_format
from besa.checkpoint.format import find_checkpoint, open_checkpoint
from besa.inputs import models
from besa.machine import device as device_module
from besa.machine import processes
from besa.machine.device import computes_bfloat16, resolve_device, resolve_dtype


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


@pytest.fixture
def word_tokenizer():
    """Of one word."""
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"u": 0, "w": 1}, unk_token="u"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="u")


@pytest.mark.parametrize("opened", [load, open_checkpoint])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(tiny_llama, word_tokenizer, tmp_path, opened, name):
    word_tokenizer.save_pretrained(tmp_path)
    tiny_llama.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"lacks 1 tensor\(s\) of a LlamaForCausalLM, the first {name}; fetch"):
        opened(tmp_path)


@pytest.mark.parametrize("opened", [load, open_checkpoint])
def test_layers_that_the_configuration_leaves_out_are_refused_by_name(tiny_llama, word_tokenizer, tmp_path, opened):
    word_tokenizer.save_pretrained(tmp_path)
    tiny_llama.save_pretrained(tmp_path)
    tiny_llama.config.num_hidden_layers = 2
    tiny_llama.config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds 9 tensor\(s\) .*first model.layers.2.input_layernorm.weight; correct config.json"
    ):
        opened(tmp_path)


@pytest.fixture
def pickled(tiny_llama, word_tokenizer, tmp_path):
    """A folder whose only weights are in pytorch_model.bin."""
    tiny_llama.config.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    torch.save(tiny_llama.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


def test_pickled_weights_are_loaded_where_there_are_no_others(tiny_llama, pickled):
    loaded = load(pickled)[0].state_dict()
    assert loaded.keys() == tiny_llama.state_dict().keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in tiny_llama.state_dict().items())


def test_pickled_weights_that_lack_a_tensor_are_refused_by_name(tiny_llama, pickled):
    weights = tiny_llama.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\) of a LlamaForCausalLM, the first model.layers.1.mlp.up"):
        load(pickled)


class Code:
    """What runs where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_pickled_weights_does_not_run(tiny_llama, pickled):
    torch.save(tiny_llama.state_dict() | {"more": Code(pickled / "ran")}, pickled / "pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match=r"transformers cannot load the model .*Unpickl.*; check its config\.json, tokenizer files and weights",
    ):
        load(pickled)
    assert not (pickled / "ran").exists()


def header(content):
    """A safetensors file of a header and 8 bytes."""
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(8)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": (b"", "is damaged: it has no safetensors header"),
    "four bytes": (b"1234", "is damaged"),
    "a header of 16 EB": (b"\xff" * 8 + b"{}", "has 10 bytes, its header says 18446744073709551623"),
    "a header beyond the end": (struct.pack("<Q", 10**9) + b"{}", "has 10 bytes, its header says 1000000008"),
    "a header of no JSON": (header(b"{]"), "is damaged"),
    "a header of no UTF-8": (header(b"\xff\xfe{}"), "is damaged"),
    "a header of brackets": (header(b"[" * 100_000), "is damaged"),
    "a header of a list": (header([1]), "is damaged"),
    "a header of null": (header(None), "is damaged"),
    "a tensor of nothing": (header({"a": {}}), "is damaged"),
    "offsets of words": (header({"a": ONE | {"data_offsets": ["0", "8"]}}), "is damaged"),
    "no tensor": (header({}), "has 18 bytes, its header says 10; fetch or write it again"),
    "bytes too few": (header({"a": ONE})[:-1], r"has \d+ bytes, its header says"),
    "bytes too many": (header({"a": ONE}) + b"0", r"has \d+ bytes, its header says"),
    "an unknown precision": (header({"a": ONE | {"dtype": "F3"}}), "(cannot load|is damaged)"),
    "a shape of other bytes": (header({"a": ONE | {"shape": [3]}}), "(cannot load|is damaged)"),
    "a hole before it": (header({"a": ONE | {"shape": [1], "data_offsets": [4, 8]}}), "(cannot load|is damaged)"),
    "another model's tensor": (header({"a": ONE}), r"lacks 30 tensor\(s\) of a LlamaForCausalLM"),
}


@pytest.mark.parametrize("opened", [load, open_checkpoint])
@pytest.mark.parametrize("content, words", DAMAGED.values(), ids=DAMAGED)
def test_weights_that_are_not_whole_are_refused_by_file(tiny_llama, word_tokenizer, tmp_path, opened, content, words):
    word_tokenizer.save_pretrained(tmp_path)
    tiny_llama.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        opened(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("files", [{}, {"tokenizer_config.json": "{}"}], ids=["no file", "a configuration alone"])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "OPT"])
def test_a_model_without_a_tokenizer_is_refused_before_its_weights_are_read(tmp_path, monkeypatch, architecture, files):
    """For some models transformers makes up a tokenizer that knows no word."""
    build(architecture).save_pretrained(tmp_path / "model")
    for name, content in files.items():
        (tmp_path / "model" / name).write_text(content)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("they were read"))
    monkeypatch.setattr(checkpoint_format, "open_checkpoint", lambda *_: pytest.fail("they were opened"))
    export = lambda name: checkpoint_format.export(name, tmp_path / "out")
    for ask in (besa.load_model, models.load_tokenizer, export):
        with pytest.raises(
            ValueError, match=r"has no tokenizer .*give a folder|Couldn't instantiate the backend tokenizer"
        ):
            ask(str(tmp_path / "model"))


def test_a_gpu_that_torch_cannot_use_is_not_passed_over_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device_module, "Path", lambda _: tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    with warnings.catch_warnings(action="error"):
        assert resolve_device("auto").type == "cpu"
        (tmp_path / "nvidia0").touch()
        assert resolve_device("cpu").type == "cpu"
        for hidden in ("", "-1", "NoDevFiles"):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
            assert resolve_device("auto").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    device_module._tell_that_a_gpu_is_idle.cache_clear()
    with pytest.warns(UserWarning, match=r"there is an NVIDIA GPU that torch .* cannot use, so that the CPU") as told:
        assert resolve_device("auto").type == resolve_device("auto").type == "cpu"
    assert len(told) == 1


CANNOT = "(cannot load|transformers cannot load)"


@pytest.mark.parametrize("opened", [load, open_checkpoint])
@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"vocab_size": 96},
            r"lm_head.weight of shape \(97, 32\), where a LlamaFor.* of its config.json has \(96",
        ),
        (
            {"intermediate_size": 81},
            r"mlp.down_proj.weight of shape \(32, 80\), where .* \(32, 81\); correct config.json",
        ),
        ({"num_key_value_heads": 4}, r"self_attn.k_proj.weight of shape \(16, 32\), where .* \(32, 32\)"),
        ({"hidden_size": "wide"}, CANNOT),
        ({"num_attention_heads": 0}, CANNOT),
        ({"model_type": "lama"}, f"{CANNOT}.*lama"),
        ({"model_type": 7}, CANNOT),
    ],
)
def test_a_configuration_of_another_model_is_refused_by_tensor_or_reason(
    tiny_llama, word_tokenizer, tmp_path, opened, change, words
):
    word_tokenizer.save_pretrained(tmp_path)
    tiny_llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        opened(tmp_path)


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.json", b""),
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("config.json", b"\xff"),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b""),
        ("tokenizer_config.json", b"{"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_one_sentence_with_the_folder(
    tiny_llama, word_tokenizer, tmp_path, file, content
):
    tiny_llama.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"transformers cannot load the model '{tmp_path}' \(\w+"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name, near",
    [
        ("llama7b", "llama-7b or llama2-7b"),
        ("llama-7B", "llama-7b"),
        ("Llama-7b", "llama-7b"),
        ("llama-2-7b", "llama2-7b"),
        ("llama2_13b", "llama2-13b"),
        ("llama-70b", "llama2-70b"),
        ("smolm2-135m", "smollm2-135m"),
        ("smollm2", "smollm2-135m"),
    ],
)
def test_a_typo_is_answered_with_the_near_names_and_without_the_hub(monkeypatch, tmp_path, name, near):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("the hub was asked"))
    ways = (besa.load_model, models.load_shapes, models.load_tokenizer, models.checkpoint_identity, find_checkpoint)
    for ask in ways:
        with pytest.raises(ValueError, match=rf"unknown model '{name}'; did you mean .*{near}"):
            ask(name)
    (tmp_path / name).mkdir()
    assert models.source_of(name) == name


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-7b"])
def test_a_folder_named_as_a_known_model_is_not_taken_for_it(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    for ask in (besa.load_model, models.load_tokenizer, find_checkpoint):
        with pytest.raises(ValueError, match=f"'{name}' is a model's name and a folder's here; for the folder give '/"):
            ask(name)
    assert models.source_of(str(tmp_path / name)) == str(tmp_path / name)


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "me/llama7b", "./llama7b", "/models/llama-7b", "mistral-7b"])
def test_other_names_are_the_hubs_or_a_folders(name):
    assert models.source_of(name) == name


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
    with pytest.raises(
        ValueError, match=r"cannot load the model .*check its config\.json.*Known are smollm2-135m.*llama2-70b"
    ):
        besa.load_model(str(tmp_path))


def test_bad_dtype_and_device_are_refused():
    with pytest.raises(ValueError, match="dtype 'int8' is not one of bfloat16, float16, float32"):
        besa.load_model("smollm2-135m", dtype="int8")
    for device in ("tpu", "meta"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
            besa.load_model("smollm2-135m", device=device)


@pytest.mark.parametrize("native, on_cpu, on_gpu", [(True, "bfloat16", "bfloat16"), (False, "float32", "float16")])
def test_dtype_defaults_to_what_the_device_computes_in(monkeypatch, native, on_cpu, on_gpu):
    monkeypatch.setattr("besa.machine.device.computes_bfloat16", lambda device: native)
    assert resolve_dtype(None, torch.device("cpu")) == getattr(torch, on_cpu)
    assert resolve_dtype(None, torch.device("cuda")) == getattr(torch, on_gpu)
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("platform, computes", [("linux", True), ("darwin", False)])
def test_on_apple_silicon_torch_has_no_fast_bfloat16(monkeypatch, platform, computes):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"bf16": True})
    monkeypatch.setattr("sys.platform", platform)
    assert computes_bfloat16(torch.device("cpu")) is computes


def test_a_torch_without_its_distributed_part_is_one_process(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)
    monkeypatch.delattr("torch.distributed.is_initialized")
    assert (processes.n_ranks(), processes.rank()) == (1, 0)


def test_a_model_larger_than_the_gpu_is_spread_over_all_gpus_and_the_host(tiny_llama, monkeypatch, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    n_bytes = models.weight_bytes(models.load_shapes(str(tmp_path)), torch.float32)
    assert n_bytes == sum(parameter.nbytes for parameter in tiny_llama.parameters())
    first, free = torch.device("cuda", 0), {0: n_bytes, 1: 200}
    monkeypatch.setattr(models, "free_device", lambda device: free[device.index])
    monkeypatch.setattr(models, "free_host", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    memory = {0: int(0.8 * n_bytes), 1: 160, "cpu": 900}
    assert models._device_map(str(tmp_path), torch.float32, first) == {"device_map": "auto", "max_memory": memory}
    assert models._device_map(str(tmp_path), torch.bfloat16, first) == {}
    free[0] = int(1.12 * n_bytes)  # 0.9 of it hold all
    assert models._device_map(str(tmp_path), torch.float32, first) == {}
    free[0] = n_bytes
    assert models._device_map(str(tmp_path), torch.float32, torch.device("cpu")) == {}
    monkeypatch.setattr(models, "n_ranks", lambda: 2)  # another rank has the other GPU
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    memory = {0: int(0.8 * n_bytes), "cpu": 450}
    assert models._device_map(str(tmp_path), torch.float32, first)["max_memory"] == memory
