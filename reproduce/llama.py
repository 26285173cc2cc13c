"""llama.cpp beside besa: write a model as GGUF, quantize it, and measure it in a process of its own.

It needs `gguf`, and llama-cpp-python built for this processor:
`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python`.
"""

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def write_gguf(network: PreTrainedModel, path: Path) -> None:
    """Write a Llama or Qwen 2 model in bfloat16, with a vocabulary of made-up words."""
    config, kind = network.config, network.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"t{k}" for k in range(config.vocab_size - 3)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3] + [1] * (config.vocab_size - 3))
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config.num_hidden_layers)
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):  # halves of a head take turns in llama.cpp
            n_heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        form = gguf.GGMLQuantizationType.BF16 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        values = gguf.quants.quantize(tensor.float().numpy(), form)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize as `llama-quantize` does, without an importance matrix; `kind` is named as there, such as "Q3_K_S"."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp did not quantize {source} to {kind}")


def measure(path: Path, n_prompt: int = 8, n_new: int = 16, segments: Tensor | None = None) -> dict[str, float]:
    """Seconds of a prompt and of each token after it, or perplexity on segments, measured by a new process."""
    command = [sys.executable, "-m", "reproduce.llama", path, torch.get_num_threads(), n_prompt, n_new]
    given = json.dumps(None if segments is None else segments.tolist())
    told = subprocess.check_output(
        [str(part) for part in command], input=given, text=True, cwd=Path(__file__).parents[1]
    )
    return json.loads(told.splitlines()[-1])


def _measure(path: str, n_threads: int, n_prompt: int, n_new: int, segments: list[list[int]] | None) -> dict[str, Any]:
    from llama_cpp import Llama

    length = len(segments[0]) if segments else n_prompt + n_new + 1
    options = {"n_threads": n_threads, "n_threads_batch": n_threads, "verbose": False}
    model = Llama(path, n_ctx=length, logits_all=segments is not None, **options)
    if segments:
        losses = []
        for segment in segments:
            model.reset()
            model.eval(segment)
            scores = torch.from_numpy(model.scores[: length - 1])
            losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(segment[1:])).item())
        return {"perplexity": float(np.exp(np.mean(losses)))}
    for _ in range(2):  # the first round warms up
        model.reset()
        start = time.perf_counter()
        model.eval([3 + k for k in range(n_prompt)])
        prompt, start = time.perf_counter() - start, time.perf_counter()
        for _ in range(n_new):
            model.eval([model.sample(temp=0)])
        seconds = time.perf_counter() - start
    return {"prompt": prompt, "token": seconds / max(n_new, 1)}


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    print(json.dumps(_measure(path, *map(int, numbers), json.load(sys.stdin))))
