"""Checkpoints on disk: find, check and open one without reading its weights; write one shard by shard, index last."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from besa.decoder import find_blocks
from besa.inputs import assets
from besa.inputs.models import CARRIED, INDEX, check_loaded, fetch, load_tokenizer, source_of, whole_shards
from besa.machine.device import resolve_dtype
from besa.machine.files import HALF_WRITTEN, mark_of, replacing, sha256, write_text, writing
from besa.packed_files import METHOD

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def find_checkpoint(source: str | Path) -> Path:
    """The folder of a checkpoint by any name that `load_model` takes; one on the hub is downloaded, without pickles.

    Raises:
        ValueError: neither folder nor hub has it, or the hub has no safetensors of it.
    """
    name = source_of(str(source))
    folder = fetch(str(source), "*.safetensors")
    if not Path(name).is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(_no_safetensors(name, " on the hub"))
    return folder


def _no_safetensors(name: str, found: str) -> str:
    return (
        f"{name} has neither model.safetensors nor {INDEX}{found}. Where you trust it, convert it: "
        f"AutoModelForCausalLM.from_pretrained({name!r}, dtype='auto').save_pretrained('NEW_FOLDER'), and the same for "
        "its AutoTokenizer."
    )


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint, each there and as long as its header says.

    Raises:
        ValueError: there are none (says how to convert pickled ones), or one is missing or cut short.
    """
    paths = whole_shards(folder)
    if not paths:
        pickled = next(
            (f", only {path.name}, a pickle, which cannot be read block by block" for path in folder.glob("*.bin")), ""
        )
        raise ValueError(_no_safetensors(str(folder), pickled))
    return paths


def _dtypes(path: Path) -> dict[str, str]:
    """Precision -> a tensor of it, from a shard's header.

    Masks and rotary frequencies, which older checkpoints hold and transformers leaves out, do not count.
    """
    with safetensors.safe_open(path, "pt") as file:
        names = [name for name in file.keys() if not name.endswith("inv_freq")]  # noqa: SIM118 (no mapping)
        found = {file.get_slice(name).get_dtype(): name for name in names}
    return {dtype: name for dtype, name in found.items() if dtype not in ("BOOL", "U8", "I8", "I32", "I64")}


def precision_of(folder: Path) -> torch.dtype:
    """What all tensors of a checkpoint are stored in.

    Raises:
        ValueError: they differ, or it is none of bfloat16, float16 and float32.
    """
    dtypes: dict[str, str] = {}
    for path in shard_paths(folder):
        try:
            dtypes |= _dtypes(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); fetch that file again") from error
    if len(dtypes) != 1 or not dtypes.keys() <= _DTYPES.keys():
        kinds = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        raise ValueError(
            f"{folder} holds tensors of {kinds}; besa takes one of {', '.join(_DTYPES)} for all. Load it in one of "
            "them and save it: AutoModelForCausalLM.from_pretrained(..., dtype='bfloat16').save_pretrained('FOLDER')"
        )
    return _DTYPES[next(iter(dtypes))]


def _check_dense(folder: Path) -> None:
    """Refuse what `besa.pack` wrote."""
    config = {}
    with contextlib.suppress(OSError, ValueError):  # transformers says what is wrong with it
        config = json.loads((folder / "config.json").read_bytes())
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        raise ValueError(
            f"{folder} is packed; make it dense: besa.load_model({str(folder)!r}, packed=False)[0].save_pretrained("
            "'FOLDER')"
        )


def open_checkpoint(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """A checkpoint's model on the CPU, its weights left in their files (memory-mapped).

    Args:
        trust_remote_code: run the Python code that comes with the checkpoint, where it has any.

    Raises:
        ValueError: it is packed, its tensors are not all of one precision of bfloat16, float16 and float32, it lacks
            some or has some too many, or transformers cannot load it.
    """
    _check_dense(folder)
    dtype = precision_of(folder)
    try:
        with torch.device("cpu"):  # whatever is set as the default
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # `check_loaded` names them
                output_loading_info=True,
            )
    except Exception as error:  # odd configurations make it raise many kinds
        raise ValueError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    check_loaded(folder, model, found)
    return model.eval().requires_grad_(False)


def open_source(
    source: str | Path, output: Path, trust_remote_code: bool
) -> tuple[Path, PreTrainedModel, dict[Path, list[str | int]]]:
    """The folder of what is to be made into an output, its model, and its files' marks from before they were mapped.

    Raises:
        ValueError: as `find_checkpoint`, `check_apart`, `carried` and `open_checkpoint`.
    """
    folder = find_checkpoint(source)
    check_apart(folder, output)
    carried(folder)
    marks = {path: mark_of(path) for path in shard_paths(folder)}
    return folder, open_checkpoint(folder, trust_remote_code), marks


def check_tokenizer(model: PreTrainedModel, folder: Path, trust_remote_code: bool) -> None:
    """Refuse a tokenizer that is not the model's; a checkpoint may come without one.

    Raises:
        ValueError: it has more tokens than the model has embeddings. Those added to it do not count: Gemma 3's for
            images has none in a model of text alone.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return
    n_ids = model.get_input_embeddings().num_embeddings
    n_tokens = load_tokenizer(str(folder), trust_remote_code).vocab_size
    if n_tokens > n_ids:
        raise ValueError(
            f"the tokenizer in {folder} has {n_tokens} tokens, but the model has {n_ids} embeddings: it is not the "
            "model's; put the right tokenizer there"
        )


def check_apart(source: Path, output: Path) -> None:
    """Refuse an output that would touch its source.

    Raises:
        ValueError: they are the same folder, or one lies in the other, or a name is not valid UTF-8.
    """
    _check_name(source)
    _check_name(output)
    a, b = source.resolve(), output.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ValueError(f"output {str(output)!r} is, or lies in or around, the source {str(source)!r}; name another")


def _check_name(folder: Path) -> None:
    """Refuse a name that safetensors would refuse once there is something to write."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the name of {str(folder)!r} is not valid UTF-8, which safetensors asks for; rename it"
        ) from error


def write_shard(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors under their names in the checkpoint, whole or not at all.

    Raises:
        OSError: the disk refuses it.
    """
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})


def stored_names(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, str]:
    """What each tensor of a model is called in its checkpoint; some families rename a few when they are loaded."""
    names = {name: next(iter(revert_weight_conversion(model, {name: tensor}))) for name, tensor in state.items()}
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"{type(model).__name__} joins several tensors when it is saved; besa cannot write it in shards"
        )
    return names


def prefixes_of(model: PreTrainedModel) -> list[str]:
    """The name of each block in its model."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] for block in find_blocks(model)]


def rest_of(model: PreTrainedModel, prefixes: list[str]) -> dict[str, Tensor]:
    """What is in no block, by its name in a checkpoint: embeddings, final norm, head; a tied weight once."""
    state = model.state_dict()
    tied = {name for name, kept in model.all_tied_weights_keys.items() if kept in state}
    inside = tuple(f"{prefix}." for prefix in prefixes)
    rest = {name: value for name, value in state.items() if name not in tied and not name.startswith(inside)}
    return {stored: rest[name] for name, stored in stored_names(model, rest).items()}


def write_index(shards: list[Path], folder: Path) -> None:
    """Name every tensor's shard: from now on the folder is a checkpoint."""
    weight_map, total = {}, 0
    for path in shards:
        with safetensors.safe_open(path, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no mapping)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(content, indent=2) + "\n")


def carried(source: Path) -> list[Path]:
    """What belongs to a checkpoint beside its weights: configuration, tokenizer, its own code, licence.

    Raises:
        ValueError: a link that leads out of the folder (but for the hub's own cache): nobody knows what a copy would
            make public.
    """
    found = (path for pattern in CARRIED for path in sorted(source.glob(pattern)) if path.is_file())
    paths = list(dict.fromkeys(found))  # a LICENSE.txt is of two patterns
    folder = source.resolve()
    inside = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    for path in paths:
        if not any(path.resolve().is_relative_to(root) for root in inside):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, out of its folder, and would be copied into the output; put "
                "the file itself there, or remove the link"
            )
    return [path for path in paths if not path.name.endswith(".index.json") and path.name != assets.SUMS]


def carry_over(source: Path, output: Path, written: dict[str, str] | None = None) -> tuple[dict[str, str], list[str]]:
    """Copy what belongs to a checkpoint beside its weights; a file that somebody else wrote or changed stays.

    Args:
        written: name -> sha256 of what an earlier call wrote there.

    Returns:
        The same of all calls, and the names of the files that stay.

    Raises:
        ValueError: as `carried`.
    """
    sums, kept = dict(written or {}), []
    for path in carried(source):
        target, total = output / path.name, sha256(path)
        there = sha256(target) if target.is_file() else None
        if there not in (None, total, sums.get(path.name)):
            kept.append(path.name)
            continue
        if there != total:
            with replacing(target) as temporary:
                shutil.copyfile(path, temporary)
        sums[path.name] = total
    return sums, kept


def check_new(folder: Path) -> None:
    """Refuse what cannot become a folder of ours, before anything is fetched for it.

    Raises:
        ValueError: there is something in `folder`, something is mounted there, or its name is not valid UTF-8.
    """
    _check_name(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is not an empty folder; name another one")
    if os.path.ismount(folder.resolve()):
        raise ValueError(f"{str(folder)!r} is a mount point, which nothing can be renamed to; name a folder in it")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` once everything is in it.

    Raises:
        ValueError: as `check_new`.
        OSError: the disk refuses it; nothing is left of it.
    """
    check_new(folder)
    folder = folder.resolve()  # where a link leads
    about = {"prefix": HALF_WRITTEN, "dir": folder.parent, "ignore_cleanup_errors": True}
    with writing(folder, "nothing is left of it"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(**about) as around:
            temporary = Path(around) / folder.name
            temporary.mkdir()
            yield temporary
            if folder.is_dir():
                folder.rmdir()  # an empty one, which Windows does not replace
            os.replace(temporary, folder)


def export(name: str, folder: Path, dtype: str | None = None, trust_remote_code: bool = False) -> None:
    """Write a model by any name that `load_model` takes as an ordinary checkpoint; with a `dtype` all of it in memory.

    Args:
        dtype: None keeps the source's precision.
        trust_remote_code: run the Python code that comes with the model.

    Raises:
        ValueError: the name or dtype is unknown, the model has no tokenizer, or there is something in the folder.
    """
    precision = resolve_dtype(dtype, torch.device("cpu")) if dtype else None
    check_new(folder)
    tokenizer = load_tokenizer(name, trust_remote_code)
    model = open_checkpoint(find_checkpoint(name), trust_remote_code)
    model = model.to(precision) if precision else model
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
