"""Prune a checkpoint into another one with one block in memory; a killed run continues with the same bytes.

output/model-block-00017.safetensors    a pruned block
output/besa/run.json                    method, windows and source; a run that differs is refused
output/besa/block-00017.json            rows and training steps of a finished block, for the report
output/besa/masks-00017.safetensors     its keep-masks
output/model.safetensors.index.json     written last: the folder is then an ordinary checkpoint
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import safetensors.torch
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

import besa
from besa import system
from besa.config import checked
from besa.data import files
from besa.data.models import CARRIED, checkpoint_dtype, find_checkpoint, open_checkpoint
from besa.decoder import find_blocks
from besa.loop import Method, Reconstruction, check, prune_block
from besa.report import Report
from besa.system import from_rank_0, rank
from besa.walk import frozen, walk

INDEX = "model.safetensors.index.json"


@checked
def prune_checkpoint(
    source: str | Path,
    output: str | Path,
    windows: Int64[Tensor, "n_samples seq_len"],
    method: Method,
    *,
    device: str = "auto",
    progress: bool = True,
    reconstruct: Reconstruction | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> Report:
    """Prune a checkpoint into a new folder, with one block in memory at a time.

    The same call continues an interrupted run. Under torchrun the ranks share the windows and rank 0 writes; all ranks
    must see both folders.

    Args:
        source: folder with safetensors, or another name that `load_model` takes.
        output: new folder, or one in which the same run was interrupted.
        device: device that computes.
        reconstruct: give the kept weights new values, as in `prune`.
        trust_remote_code: run Python code that comes with the source.
        dtype: precision to compute in; None takes the source's.
    """
    compute_device = system.resolve_device(device)
    folder = find_checkpoint(source)
    model = open_checkpoint(source, device, trust_remote_code, dtype)
    stored_dtype = checkpoint_dtype(model)
    check(model, windows, method, reconstruct)
    shards = Shards(folder, Path(output), model, method)
    identity = {
        "besa": besa.__version__,
        "method": method.config(),
        "reconstruct": reconstruct.config() if reconstruct else None,
        "windows": {"shape": list(windows.shape), "sha256": files.tensor_sha256(windows)},
        "source": {path.name: files.sha256(path) for path in sorted(folder.glob("*.safetensors")) if rank() == 0},
        "config.json": files.sha256(folder / "config.json"),
        "dtype": f"{model.dtype} stored as {stored_dtype}",
        "device": compute_device.type,
        "ranks": system.n_ranks(),
    }
    options = {
        "match": method.match,
        "dense": reconstruct is not None,
        "hessian": method.needs_hessian,
        "ignore": method.ignore,
        "stored": shards.read,
        "progress": progress,
    }
    with shards.opened(identity), system.measure(compute_device) as cost:
        if not shards.complete:
            with frozen(model, compute_device):
                for block in walk(
                    model, windows, place=lambda block: copy.deepcopy(block).to(compute_device), **options
                ):
                    shards.write(block.index, block.module, prune_block(block, method, reconstruct, stored_dtype))
                    del block  # before the next one is loaded
        shards.close()
    report = shards.report(len(windows), windows.shape[1])
    report.peak_bytes = cost.peak_bytes
    return report


def carried_files(folder: Path) -> list[Path]:
    """Files beside the weights that go into the output."""
    paths = [path for pattern in CARRIED for path in sorted(folder.glob(pattern))]
    return [path for path in paths if not path.name.endswith(".index.json")]


class Shards:
    """Output folder of a run: the shards, notes and keep-masks of the finished blocks."""

    def __init__(self, source: Path, output: Path, model: PreTrainedModel, method: Method) -> None:
        self.source = source
        self.output = output
        self.model = model
        self.method = method
        self.state = output / "besa"
        names = {id(module): name for name, module in model.named_modules()}
        self.prefixes = [names[id(block)] for block in find_blocks(model)]
        self.notes: dict[int, dict[str, Any]] = {}  # of the finished blocks

    @contextlib.contextmanager
    def opened(self, identity: dict[str, Any]) -> Iterator[None]:
        """Lock the folder, check that it belongs to this run, and read the notes of the finished blocks."""
        lock = filelock.FileLock(self.state / "lock", timeout=0)
        if rank() == 0:
            self._make_folder()
            try:
                lock.acquire()
            except filelock.Timeout:
                raise ValueError(f"another process writes to {str(self.output)!r}") from None
        try:
            if rank() == 0:
                self._read_notes(identity)
            self.notes = from_rank_0(self.notes)
            yield
        finally:
            lock.release()

    def _make_folder(self) -> None:
        if self.output.resolve() == self.source.resolve():
            raise ValueError(f"output {str(self.output)!r} is the source; name another folder")
        others = [path.name for path in self.output.glob("*") if path != self.state]
        if others and not (self.state / "run.json").exists():
            raise ValueError(f"output {str(self.output)!r} holds other files, such as {others[0]!r}; name a new folder")
        self.state.mkdir(parents=True, exist_ok=True)

    def _read_notes(self, identity: dict[str, Any]) -> None:
        for path in [
            *self.output.rglob(f"{files.PART}*"),
            *self.output.rglob(".tmp*"),
        ]:  # half-written, the second by safetensors
            path.unlink()
        run = self.state / "run.json"
        for index in range(len(self.prefixes)):
            if self._beside("block", index).exists():
                self.notes[index] = json.loads(self._beside("block", index).read_text())
        if self.notes:
            there = json.loads(run.read_text())
            if name := next((name for name in identity if there.get(name) != identity[name]), None):
                raise ValueError(
                    f"output {str(self.output)!r} holds a run with another {name}: {there.get(name)} there, "
                    f"{identity[name]} now; name another output, or delete that one"
                )
            tqdm.write(f"continuing: {len(self.notes)} of {len(self.prefixes)} blocks are finished")
        files.write_json(run, identity)
        if not self.complete:
            (self.output / INDEX).unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        return len(self.notes) == len(self.prefixes)

    def read(self, index: int, module: nn.Module) -> dict[str, Tensor] | None:
        """Tensors of a finished block, by their names in the module; None if it is not finished."""
        if index not in self.notes:
            return None
        tensors = safetensors.torch.load_file(self._shard(index))
        names = self._stored_names(index, module)
        state = module.state_dict()
        return {name: tensors[stored].to(state[name]) for name, stored in names.items()}

    def write(self, index: int, module: nn.Module, report: Report) -> None:
        """Write the shard and masks of a pruned block, and its note last."""
        self.notes[index] = {"rows": report.rows, "steps": report.steps, "seconds": report.rows[0]["block_seconds"]}
        if rank() == 0:
            state = module.state_dict()
            names = self._stored_names(index, module)
            dtype = checkpoint_dtype(self.model)
            save({stored: state[name].to("cpu", dtype) for name, stored in names.items()}, self._shard(index))
            files.save_masks(report.keep_masks, self._beside("masks", index))
            files.write_json(self._beside("block", index), self.notes[index])

    def close(self) -> None:
        """Write the tensors outside the blocks, copy the small files, and write the index last."""
        if rank() == 0 and not (self.output / INDEX).exists():
            dtype = checkpoint_dtype(self.model)
            save(
                {name: value.to(dtype) for name, value in self._rest().items()}, self.output / "model-rest.safetensors"
            )
            config = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
            if config.get("dtype") == "float32" and dtype != torch.float32:  # an embedded model
                files.write_json(self.output / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
            for path in carried_files(self.source):
                if not (self.output / path.name).exists():
                    with files.atomic_write(self.output / path.name) as temporary:
                        shutil.copyfile(path, temporary)
            write_index(self.output)
        from_rank_0(None)

    def report(self, n_samples: int, seq_len: int) -> Report:
        """Report of all blocks, whether they were finished now or earlier."""
        report = Report(self.method.name, n_samples=n_samples, seq_len=seq_len)
        for index in sorted(self.notes):
            report.rows += self.notes[index]["rows"]
            report.steps += self.notes[index]["steps"]
            report.seconds += self.notes[index]["seconds"]
            report.keep_masks.update(files.load_masks(self._beside("masks", index)))
        return report

    def _shard(self, index: int) -> Path:
        return self.output / f"model-block-{index:05d}.safetensors"

    def _beside(self, kind: str, index: int) -> Path:
        return self.state / f"{kind}-{index:05d}.{'json' if kind == 'block' else 'safetensors'}"

    def _stored_names(self, index: int, block: nn.Module) -> dict[str, str]:
        """Name in the block -> name in the checkpoint."""
        path = self.prefixes[index]
        state = block.state_dict()
        names = {name: stored_name(self.model, f"{path}.{name}", tensor) for name, tensor in state.items()}
        if len(set(names.values())) < len(names):
            raise ValueError(f"{type(self.model).__name__} joins tensors when it is saved: it has no shards by block")
        return names

    def _rest(self) -> dict[str, Tensor]:
        """Tensors outside the blocks by their name in the checkpoint: embeddings, norm, head; a tied weight once."""
        state = self.model.state_dict()
        tied = {name for name, kept in self.model.all_tied_weights_keys.items() if kept in state}
        inside = tuple(f"{prefix}." for prefix in self.prefixes)
        rest = {name: value for name, value in state.items() if name not in tied and not name.startswith(inside)}
        return {stored_name(self.model, name, value): value for name, value in rest.items()}


def stored_name(model: PreTrainedModel, name: str, tensor: Tensor) -> str:
    """Name of a tensor in the checkpoint; some families rename a few when they are loaded."""
    return next(iter(revert_weight_conversion(model, {name: tensor})))


def save(tensors: dict[str, Tensor], path: Path) -> None:
    with files.atomic_write(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})


def write_index(folder: Path) -> None:
    """Write the file that names the shard of each tensor."""
    weight_map = {}
    total = 0
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors = safetensors.torch.load_file(shard)
        weight_map |= dict.fromkeys(tensors, shard.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
