"""Checkpoints of random weights in published shapes: what a run costs does not depend on the weights' values."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from besa.checkpoint.format import new_folder

SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-7b": {},  # transformers' own default
    "llama2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Without the number of blocks."""


def write_random(shape: str, folder: Path, n_blocks: int, seed: int = 0) -> None:
    """Write a bfloat16 checkpoint of random weights, to measure what pruning takes on a model that is not at hand.

    Args:
        shape: one of `SHAPES`.
        n_blocks: how many of its blocks; they must fit in memory together.

    Raises:
        ValueError: an unknown shape, or there is something in the folder.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=n_blocks, max_position_embeddings=4096)
    with new_folder(folder) as temporary, torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(temporary)
