"""Public models beside published numbers, and the works that are named."""

import json
import re
import tomllib

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import besa
from reproduce import tables
from reproduce.methods import KNOWN, methods_of
from reproduce.runs import Recipe
from reproduce.tables import ROOT

PARAMS = sorted((ROOT / "reproduce" / "params").glob("*.yaml"))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True}
SCALING = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
FAMILIES = {
    "opt-125m": ("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "llama-3.2-1b": ("llama", GATED | {"rope_parameters": SCALING | {"original_max_position_embeddings": 32}}),
    "qwen2.5-0.5b": ("qwen2", GATED),
}


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    given = yaml.safe_load(path.read_text())
    assert isinstance(Recipe(**given["recipe"]), Recipe) and set(given.get("methods", [])) <= KNOWN.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_of_a_public_model_run_on_its_architecture(name):
    given = yaml.safe_load((ROOT / "reproduce" / "params" / f"{name}.yaml").read_text())
    family, options = FAMILIES[name]
    windows = torch.randint(5, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    for row, method in methods_of(given["methods"], given["sparsity"], Recipe(**given["recipe"])).items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).eval()
        if method:
            report = besa.prune(model, windows, method, progress=False)
            assert report.sparsity == pytest.approx(0.5, abs=0.13 if "besa" in row else 1e-9)


def test_published_numbers_of_other_methods_stand_beside_ours():
    config = {"row": "wanda", "model": "facebook/opt-125m", "profile": "paper", "calibration": "c4"}
    table = tables.compare([{"config": config, "metrics": {"wikitext2": 39.5}}], "table1")
    other = {"sparsegpt": 36.35, "shin-block": 31.18, "shin-cross-block": 30.59}
    assert table["published"].to_dict() == {"wanda": 39.0} | other
    assert table["verdict"]["wanda"] == "reproduced" and table["ours"].isna().sum() == 3


def test_related_work_has_entries_and_its_published_numbers():
    text, bib = ((ROOT / "reproduce" / name).read_text() for name in ("related.md", "references.bib"))
    assert set(re.findall(r"\d{4}\.\d{5}", text)) <= set(re.findall(r"eprint = \{(.*)\}", bib))
    numbers = pd.read_csv(tables.PUBLISHED, dtype=str).query("item == 'related'")["value"]
    assert len(numbers) > 10 and not [value for value in numbers if value not in text]


@pytest.mark.parametrize("name", ["01_quickstart", "06_your_own_method"])
def test_a_tutorial_installs_from_the_public_address(name):
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert f'REPOSITORY = "{urls.get("Repository", "")}"' in first
