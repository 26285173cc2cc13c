import json
import os

import pytest
import safetensors.torch
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import besa
from besa.data import models
from besa.data.models import checkpoint_dtype, find_checkpoint, load_tokenizer, open_checkpoint, save_model
from reproduce.records import checkpoint_identity


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """The tiny model and a tokenizer of two words, saved in bfloat16."""
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"u": 0, "w": 1}, unk_token="u"))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="u").save_pretrained(tmp_path / "model")
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_tensors(folder, change):
    """Save a checkpoint's tensors again as `change` leaves them."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder):
    return besa.load_model(folder, dtype="float32", device="cpu")[0]


def test_a_local_folder_loads(tiny_llama, folder):
    model, tokenizer = besa.load_model(str(folder), dtype="float32", device="cpu")
    assert model.dtype == torch.float32 and not model.training
    assert torch.equal(model.lm_head.weight, tiny_llama.lm_head.weight.float())
    assert tokenizer("w")["input_ids"] == [1]


def test_a_checkpoint_is_opened_in_its_own_precision_and_mapped(tiny_llama, folder):
    model = open_checkpoint(folder)
    assert model.dtype == torch.bfloat16 and not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(model.lm_head.weight, tiny_llama.lm_head.weight)
    with open("/proc/self/maps") as maps:
        assert str(folder / "model.safetensors") in maps.read()


def test_a_model_is_saved_in_the_precision_of_its_checkpoint(folder, tmp_path):
    model, tokenizer = besa.load_model(folder, dtype="float32", device="cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_model(model, tokenizer, tmp_path / "saved")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(load(tmp_path / "saved").lm_head.weight, model.lm_head.weight)


def test_tied_heads_stay_tied_when_saved(folder, tmp_path):
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tied = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    tied.to(torch.float16).save_pretrained(folder)
    model, tokenizer = besa.load_model(folder, dtype="float32", device="cpu")
    save_model(model, tokenizer, tmp_path / "saved")
    assert "lm_head.weight" not in safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    for loaded in (load(tmp_path / "saved"), open_checkpoint(tmp_path / "saved")):
        assert torch.equal(loaded.lm_head.weight, tied.model.embed_tokens.weight.to(loaded.dtype))


def test_the_embedded_model_is_saved_in_bfloat16_as_the_original_is(smollm2):
    assert smollm2[0].dtype == torch.float32 and checkpoint_dtype(smollm2[0]) == torch.bfloat16


@pytest.mark.parametrize("opened", [load, open_checkpoint])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(folder, opened, name):
    change_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"does not fit its config.json: missing \['{name}'\]"):
        opened(folder)


LEFT_OVER = r"missing \[\], left over \['model.layers.2.input_layernorm.weight'"


@pytest.mark.parametrize("opened", [load, open_checkpoint])
@pytest.mark.parametrize(
    ("field", "value", "error"), [("num_hidden_layers", 2, LEFT_OVER), ("intermediate_size", 81, "ignore_mismatched")]
)
def test_tensors_without_a_place_or_of_another_shape_are_refused(tiny_llama, folder, opened, field, value, error):
    setattr(tiny_llama.config, field, value)
    tiny_llama.config.save_pretrained(folder)
    with pytest.raises((ValueError, RuntimeError), match=error):
        opened(folder)


def test_rotary_frequencies_of_old_checkpoints_are_not_left_over(folder):
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    change_tensors(folder, lambda tensors: tensors.update(frequencies))
    load(folder)


def test_pickled_weights_are_loaded_if_there_are_no_others(tiny_llama, folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load(folder).lm_head.weight, tiny_llama.lm_head.weight.float())


def test_llamas_tokenizer_splits_as_its_own_file_says(folder):
    """As LLaMA's: a space before every part of a text, also behind a special token."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "\u2581": 1, "a": 2}, [], unk_token="<unk>"))
    steps = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    backend.add_special_tokens(["<unk>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
    expected = backend.encode("a<unk>a").ids
    for legacy in (True, False):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": legacy}))
        found = load_tokenizer(folder)("a<unk>a", add_special_tokens=False)["input_ids"]
        assert (found == expected) is legacy


def test_an_unknown_name_lists_the_known_ones(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(models, "snapshot_download", refuse)
    for ask in (besa.load_model, load_tokenizer, find_checkpoint):
        with pytest.raises(ValueError, match=r"'smolm2' is no folder here or one of smollm2.*llama2-70b; .*no conn"):
            ask("smolm2")


def test_the_hub_is_asked_for_the_papers_models_by_their_ids(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(models, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    for name in ("llama-7b", "llama2-70b", "me/model"):
        find_checkpoint(name)
    assert asked == ["huggyllama/llama-7b", "meta-llama/Llama-2-70b-hf", "me/model"]


def test_a_folder_named_as_a_known_model_is_not_taken_for_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-7b").mkdir()
    with pytest.raises(ValueError, match=r"'llama-7b' is a known model and a folder here; .* write './llama-7b'"):
        besa.load_model("llama-7b")
    assert os.fspath(find_checkpoint("./llama-7b")) == "llama-7b"


def test_identity_of_a_folder_changes_with_its_files(folder):
    before = checkpoint_identity(str(folder))
    assert before == checkpoint_identity(str(folder))
    change_tensors(folder, lambda tensors: None)
    assert checkpoint_identity(str(folder)) != before
    assert checkpoint_identity("smollm2-135m") is None and checkpoint_identity("me/unknown") is None


def test_bad_dtype_and_device_are_refused():
    with pytest.raises(ValueError, match="dtype 'int8' is not one of bfloat16, float16, float32"):
        besa.load_model("smollm2-135m", dtype="int8")
    with pytest.raises(ValueError, match="device 'meta' cannot be used"):
        besa.load_model("smollm2-135m", device="meta")
