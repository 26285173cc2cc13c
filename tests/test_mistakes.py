"""Mistakes that users make are named in one sentence, before long work."""

import json
import re
import shutil
import subprocess
import sys

import datasets
import pytest
import torch

import besa
from besa.data.models import find_checkpoint

MISTAKES = {
    "besa.prune(model, windows, 'wanda')": "method='wanda' violates .*Method",
    "besa.prune(model, windows, besa.Besa)": "method=<class .*Besa'> violates .*Method",
    "besa.prune(model, 'sotu', besa.Besa())": "windows='sotu' violates .*Int64",
    "besa.prune(adapted, windows, besa.Wanda())": "model=.PeftModel.* violates .*PreTrainedModel",
    "besa.prune(model, windows, besa.Wanda(), reconstruct='closed')": "reconstruct='closed' violates .*Reconstruction",
    "besa.prune(model, windows, besa.Wanda(ignore=('*.down_proj',)))": "'[*].down_proj' is no regular expression",
    "besa.perplexity(model, 'wiki')": "tokens='wiki' violates .*Int64",
    "besa.perplexity(model.model, windows.flatten(), 24)": "LlamaModel has no head",
    "besa.calibration_windows(datasets.DatasetDict(train=data), tokenizer)": "source=.DatasetDict.* violates",
    "besa.Besa(epoch=3)": "Besa has no field 'epoch' .fields: sparsity, .*epochs",
    "besa.Besa(pattern='2:4')": "no field 'pattern' .*; Exact, Wanda, SparseGPT and Magnitude take patterns",
    "besa.Besa(sparsity=50.0)": "sparsity: Input should be less than 1, not 50.0; 0.5 is 50 %",
    "besa.Besa(sparsity=0.0)": "the sparsity must be above 0",
}
SCRIPT = """
import json, sys, traceback
import datasets, torch, besa
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
shape = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
model, windows = LlamaForCausalLM(LlamaConfig(vocab_size=97, **shape)), torch.randint(0, 97, (4, 24))
adapted = get_peft_model(LlamaForCausalLM(model.config), LoraConfig(target_modules=["q_proj"]))
data, tokenizer = datasets.Dataset.from_dict({"text": ["a"]}), AutoTokenizer.from_pretrained(sys.argv[1])
found = {}
for mistake in json.loads(sys.argv[2]):
    try:
        exec(mistake)
    except (TypeError, ValueError) as error:
        found[mistake] = str(error), traceback.format_exc()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def raised(tiny_folder):
    """Message and traceback of each mistake, without the type checks that pytest adds."""
    arguments = [sys.executable, "-c", SCRIPT, str(tiny_folder), json.dumps(list(MISTAKES))]
    return json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_names_the_mistake_and_nothing_prints_the_model(raised, mistake):
    message, shown = raised[mistake]
    assert re.search(MISTAKES[mistake], message, re.DOTALL) and len(message) < 400
    assert "LlamaDecoderLayer" not in shown and len(shown.splitlines()) < 25


@pytest.mark.parametrize(
    "text, words",
    [
        ([], "the text is empty"),
        (datasets.Dataset.from_dict({"content": ["a"]}), "no column 'text', but .'content'."),
        ('{"text": "a"}\n{"content": "b"}\n', "mine.jsonl, line 2: no JSON object with a 'text' field"),
        ('{"text": "a"}\n\n{"te', "mine.jsonl, line 3: no JSON object"),
        ("", "the text is empty: .*mine.jsonl"),
    ],
)
def test_bad_texts_are_named(tiny_tokenizer, tmp_path, text, words):
    if isinstance(text, str):
        (tmp_path / "mine.jsonl").write_text(text)
        text = str(tmp_path / "mine.jsonl")
    with pytest.raises((ValueError, TypeError), match=words):
        besa.calibration_windows(text, tiny_tokenizer, 2, 8)


def test_windows_that_overlap_warn_with_the_number_of_different_tokens(tiny_tokenizer):
    text = " ".join(map(str, range(40)))
    n = len(tiny_tokenizer(text)["input_ids"])
    with pytest.warns(UserWarning, match=r"the 32 windows overlap: they hold \d+ different tokens"):
        besa.calibration_windows([text], tiny_tokenizer, 32, n - 5)


def test_pruning_a_pruned_model_warns_and_counts_all_zeros(tiny_llama, windows):
    besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)
    with pytest.warns(UserWarning, match="50.0% of the first block's weights are 0 already"):
        report = besa.prune(tiny_llama, windows, besa.Wanda(sparsity=0.3), progress=False)
    assert report.sparsity == 0.5


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_shards_that_are_not_whole_are_named(tiny_folder, tmp_path, content):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8] if content is None else content)
    with pytest.raises(ValueError, match=r"model.safetensors is cut, empty or a git-lfs pointer"):
        besa.load_model(folder)


def test_an_unfinished_output_is_not_evaluated(tmp_path):
    (tmp_path / "besa").mkdir()
    (tmp_path / "besa" / "run.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="is an unfinished output of `besa prune`: the same command continues it"):
        find_checkpoint(tmp_path)


def test_a_broken_embedding_names_its_token(tiny_llama, windows):
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[int(windows[2, 3])] = float("nan")
    with pytest.raises(ValueError, match=f"the embedding of token {int(windows[2, 3])} is NaN"):
        besa.prune(tiny_llama, windows, besa.Wanda(), progress=False)


def test_missing_extras_are_named_and_the_rest_can_be_imported():
    script = "import sys; sys.modules |= dict.fromkeys(['peft', 'lm_eval', 'gguf']); from besa import *; import besa; "
    script += "print(prune.__name__, besa.{})"
    for name, extra in {"masked_lora": "adapters", "zero_shot(None, None)": "eval"}.items():
        if name.startswith("zero"):
            script_of = script.replace("besa.{}", "besa.system.require('lm_eval', 'eval')")
        else:
            script_of = script.format(name)
        run = subprocess.run([sys.executable, "-c", script_of], capture_output=True, text=True)
        assert f"pip install 'besa-pruning[{extra}]'" in run.stderr.splitlines()[-1]
