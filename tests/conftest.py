import json
import os

import pytest
import torch
from small_cache import make_small_cache
from transformers import LlamaConfig, LlamaForCausalLM

os.environ.setdefault("BESA_PROFILE", "smoke")
os.environ.pop("BESA_DATA", None)  # the embedded texts, whatever the user has


@pytest.fixture(autouse=True, scope="session")
def results_elsewhere(tmp_path_factory):
    """Smoke runs never overwrite the committed results."""
    os.environ["BESA_RESULTS"] = str(tmp_path_factory.mktemp("results"))


@pytest.fixture
def tiny_llama():
    """Three blocks of random weights, grouped-query attention, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def windows():
    """Six windows of 24 random token ids."""
    return torch.randint(0, 97, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model in float32; do not change it."""
    import besa

    return besa.load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory):
    """A cache in which smollm2-135m has 4 blocks."""
    return make_small_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def short_texts(tmp_path_factory):
    """A $BESA_DATA with the beginnings of the embedded texts: whole ones take seconds to tokenize."""
    from besa.data.text import load_documents

    folder = tmp_path_factory.mktemp("texts")
    for name, split in (("wiki", "test"), ("sotu", "train"), ("sotu", "test")):
        (folder / name).mkdir(exist_ok=True)
        lines = [json.dumps({"text": text[:2000]}) for text in load_documents(name, split)[:8]]
        (folder / name / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(smollm2, short_texts):
    """The embedded model's tokenizer with a vocabulary of 512."""
    return smollm2[1].train_new_from_iterator((short_texts / "sotu" / "train.jsonl").read_text().splitlines(), 512)


@pytest.fixture(scope="session")
def tiny_folder(tiny_tokenizer, tmp_path_factory):
    """A random two-block model and its tokenizer, as a local folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), **shape)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
