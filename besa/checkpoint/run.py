"""From checkpoint to checkpoint, block by block: the model as a whole is never in memory.

The source stays mapped from its files; one block at a time is copied, pruned and written as a shard of its own. Shards
that are there, with the sha256 that their notes under `besa/` name, are what an interrupted run continues from.
"""

import contextlib
import copy
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import filelock
import safetensors.torch
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa.checkpoint.format import (
    INDEX,
    carry_over,
    check_tokenizer,
    open_source,
    prefixes_of,
    rest_of,
    stored_names,
    write_index,
    write_shard,
)
from besa.checkpoint.plan import HiddenStates, Plan, bytes_for, make_plan, n_streams
from besa.checkpoint.resume import (
    check_free,
    finished_blocks,
    identity_of,
    make_folder,
    note_or_nothing,
    open_run,
    remove_half_written,
)
from besa.decoder import Span, check_model, find_blocks, members, projections
from besa.inputs.models import STATE, load_shapes, source_of
from besa.machine.device import check_repeats, resolve_device
from besa.machine.fields import checked
from besa.machine.files import check_same, sha256, write_note, write_text, writing
from besa.machine.memory import Cost, measure
from besa.machine.processes import from_rank_0, n_ranks, rank
from besa.machine.provenance import provenance
from besa.prune import Method, check_fit
from besa.quantize import QuantizedFiles, save_quantized
from besa.reconstruct import Reconstruct
from besa.report import Report
from besa.walk import Block, frozen, walk


@checked
def prune_checkpoint(
    source: str | Path,
    output: str | Path,
    windows: Int64[Tensor, "n_samples seq_len"],
    method: Method,
    *,
    device: str = "auto",
    hidden_states: HiddenStates | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
    reconstruct: Reconstruct | None = None,
) -> Report:
    """Prune a checkpoint into another one, by the same loop as `prune`, with one block in memory at a time.

    Interrupted in whatever way, the same call continues behind the last whole shard and ends with the same bytes.
    Under torchrun the ranks share the windows and rank 0 writes; all must see both folders.

    Args:
        source: a folder with safetensors, or another name that `load_model` takes.
        output: a folder to make, or one in which the same run was interrupted.
        windows: calibration token ids, the same on every rank.
        method: `Besa`, `Magnitude`, `Wanda` or `SparseGPT`.
        device: what computes; "auto" takes the GPU where there is one.
        hidden_states: where they lie: "device", "host" (pinned), or "file" beside the output; "auto" takes the first
            that fits.
        trust_remote_code: run Python code that comes with the source. Pickled weights are never opened.
        progress: show the plan, and bars over blocks and windows.
        reconstruct: give the kept weights new values, as `prune` does.

    Returns:
        What pruning did, now or earlier, and the peak memory of what it did now. `keep_masks` and `quantized` read from
        `output/besa/` what is asked of them.

    Raises:
        ValueError: source, output, windows and method do not go together, or do not fit; before any long work. Or the
            source is changed while it is read.
        OSError: the disk refuses a file; the blocks that are written stay.
    """
    with opened(source, output, windows, method, device, trust_remote_code, progress, reconstruct) as shards:
        cost = Cost()
        if not shards.complete:
            shards.make_room(hidden_states)
            with measure(shards.device) as cost, frozen(shards.model, shards.device), shards.fitting():
                for block in shards.blocks():
                    if shards.has(block):
                        block.skip(shards.state_of(block))
                    else:
                        pruned = method.prune_block(block)
                        if reconstruct:
                            pruned = reconstruct.improve(block, pruned)
                        shards.write(block, method.noted(block, block.finish(pruned)))
                        del pruned  # before the next block is learned
        shards.close()
        report = shards.report()
        report.peak_bytes = cost.peak_bytes
        return report


@checked
def plan_checkpoint(
    source: str | Path,
    output: str | Path,
    windows: Int64[Tensor, "n_samples seq_len"],
    method: Method,
    *,
    device: str = "auto",
    hidden_states: HiddenStates | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
    reconstruct: Reconstruct | None = None,
) -> Plan:
    """Everything that `prune_checkpoint` does before it starts: all checks, and what it needs of memory and disk.

    It leaves the output's folder with some kilobytes about the run. Of a model that the hub would have to send, its
    configuration alone is fetched, and the plan made from that. The arguments are those of `prune_checkpoint`.

    Raises:
        ValueError: as `prune_checkpoint`.
    """
    if shapes := _unseen(source, Path(output), windows, method, trust_remote_code, reconstruct):
        return _plan(shapes, windows, method, resolve_device(device), Path(output), hidden_states, reconstruct)
    with opened(source, output, windows, method, device, trust_remote_code, False, reconstruct) as shards:
        return shards.plan(hidden_states)


def _unseen(
    source: str | Path,
    output: Path,
    windows: Tensor,
    method: Method,
    trust_remote_code: bool,
    reconstruct: Reconstruct | None,
) -> PreTrainedModel | None:
    """The shapes of a model whose weights the hub has still to send, after what can be checked by them; else None."""
    check_measures_blocks(method)
    if Path(source_of(str(source))).is_dir() or (output / STATE).exists():
        return None
    check_free(output)
    shapes = load_shapes(str(source), trust_remote_code)
    check_model(shapes, values=False)
    check_fit(shapes, windows, method, reconstruct)
    return shapes.to(shapes.config.dtype or torch.float32)


def _plan(
    model: PreTrainedModel,
    windows: Tensor,
    method: Method,
    device: torch.device,
    output: Path,
    wanted: HiddenStates | Literal["auto"],
    reconstruct: Reconstruct | None,
    finished: Collection[int] = (),
) -> Plan:
    """Memory and disk of the blocks that are not finished, and of all else in a model."""
    blocks, mine = find_blocks(model), windows[rank() :: n_ranks()]
    left = [block for index, block in enumerate(blocks) if index not in finished]
    rest = sum(tensor.nbytes for tensor in rest_of(model, prefixes_of(model)).values())
    return make_plan(
        block_bytes=bytes_for(Span(blocks[: method.span]), method, device, mine, reconstruct),
        n_streams=n_streams(reconstruct),
        n_windows=len(mine),
        window_bytes=windows.shape[1] * model.config.get_text_config().hidden_size * model.dtype.itemsize,
        shard_bytes=rest + sum(_bytes_of(block, method) for block in left),
        n_blocks=len(left),
        device=device,
        output=next(folder for folder in (output, *output.absolute().parents) if folder.exists()),
        wanted=wanted,
    )


def _bytes_of(block: nn.Module, method: Method) -> int:
    """Of its shard, its keep-masks and its codes."""
    quantize, weights = method.quantize, [projection.weight for projection in projections(block).values()]
    codes = sum(quantize.most_bytes(weight) for weight in weights) if quantize else 0
    masks = sum((weight.numel() + 7) // 8 for weight in weights)
    return codes + masks + sum(tensor.nbytes for tensor in block.state_dict().values())


def check_measures_blocks(method: Method) -> None:
    """Refuse a method that must see a model as a whole.

    Raises:
        ValueError: says where it can be pruned.
    """
    if method.measures_model:
        raise ValueError(
            f"{method.name} with these options measures a model that is in memory; prune it there, or give the "
            "`sparsities` that method.prepared(model, windows, progress=True) finds where there is room for the model"
        )


@contextlib.contextmanager
def opened(
    source: str | Path,
    output: str | Path,
    windows: Tensor,
    method: Method,
    device: str,
    trust_remote_code: bool,
    progress: bool,
    reconstruct: Reconstruct | None,
) -> Iterator["Shards"]:
    """Check that all goes together, and open the output for as long as it is written."""
    place, output = resolve_device(device), Path(output)
    if place.type == "cuda":
        check_repeats(place)
    if shapes := _unseen(source, output, windows, method, trust_remote_code, reconstruct):
        _plan(shapes, windows, method, place, output, "auto", reconstruct)  # refused before the hub sends it
    folder, model, marks = open_source(source, output, trust_remote_code)
    check_model(model, values=False)
    check_tokenizer(model, folder, trust_remote_code)
    check_fit(model, windows, method, reconstruct)
    shards = Shards(folder, output, model, windows, method, place, progress, reconstruct, marks)
    try:
        yield shards
    finally:
        shards.release()


class Shards:
    """The output of a run: what is finished, what the run is, where its hidden states lie."""

    def __init__(
        self,
        source: Path,
        output: Path,
        model: PreTrainedModel,
        windows: Tensor,
        method: Method,
        device: torch.device,
        progress: bool,
        reconstruct: Reconstruct | None,
        marks: dict[Path, list[str | int]],
    ) -> None:
        """
        Args:
            marks: of the source's files, taken before the model was mapped from them.
        """
        self.source, self.output, self.model, self.windows, self.method = source, output, model, windows, method
        self.device, self.progress, self.reconstruct = device, progress and rank() == 0, reconstruct
        self.tell: Callable[[str], None] = tqdm.write if self.progress else lambda _: None
        self.prefixes = prefixes_of(model)
        self.hidden_states: HiddenStates = "device"
        self._streams: list[Path] = []
        self._marks = marks
        self._lock = filelock.FileLock(output / STATE / "lock")
        try:
            self.notes = from_rank_0(self._open() if rank() == 0 else None)
        except BaseException:
            self._lock.release()
            raise

    # What is there

    def _open(self) -> dict[int, dict[str, Any]]:
        """The notes of the blocks that are finished."""
        make_folder(self.output)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"another process writes to {str(self.output)!r}; wait for it, or stop it. Processes that are to share "
                f"the windows are started by torchrun; if none is left, delete {self._lock.lock_file}"
            ) from None
        remove_half_written(self.output)
        notes, damaged = finished_blocks(self.output, self.progress)
        identity = identity_of(self.source, self.output, self.windows, self.method, self.device, self.progress)
        identity["reconstruct"] = self.reconstruct.config() if self.reconstruct else None
        open_run(self.output, identity, len(notes) + len(damaged), {"provenance": provenance(str(self.device))})
        for name in damaged:
            self.tell(f"{name}: its files are missing or not what was written; the block is pruned again")
        if notes:
            self.tell(f"continuing: {len(notes)} of {len(self.prefixes)} blocks are finished")
        return notes

    @property
    def complete(self) -> bool:
        """Whether every block has its shard."""
        return len(self.notes) == len(self.prefixes)

    def report(self) -> Report:
        """Of all blocks that are finished."""
        report = Report(self.method.name, n_samples=len(self.windows), seq_len=self.windows.shape[1])
        for index in sorted(self.notes):
            report.rows += self.notes[index]["rows"]
            report.steps += self.notes[index]["steps"]
            report.keep_masks.load(self._beside("masks", index))
        report.seconds = sum(note["seconds"] for note in self.notes.values())
        if self.method.quantize:
            codes = [self._beside("codes", index) for index in sorted(self.notes)]
            report.quantized = QuantizedFiles(*(path for path in codes if path.is_file()))  # none of an ignored block
        return report

    # What is needed

    def plan(self, wanted: HiddenStates | Literal["auto"]) -> Plan:
        """Memory and disk of what is still to be done."""
        options = (self.windows, self.method, self.device, self.output, wanted, self.reconstruct)
        return _plan(self.model, *options, finished=self.notes)

    def make_room(self, wanted: HiddenStates | Literal["auto"]) -> None:
        """Plan, tell the plan, and keep it beside the output, which is no checkpoint while it lacks a block."""
        plan = self.plan(wanted)
        self.tell(str(plan))
        self.hidden_states = plan.hidden_states
        if rank() == 0:
            (self.output / INDEX).unlink(missing_ok=True)
            write_text(self.output / STATE / "plan.json", json.dumps(asdict(plan), indent=1) + "\n")

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for the hidden states of all windows, where the plan puts them."""
        if self.hidden_states == "device":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self.hidden_states == "host":
            return self._pinned(shape, dtype)
        path = self.output / STATE / f"hidden-{rank()}-{len(self._streams)}.bin"
        size = torch.Size(shape).numel()
        self._streams.append(path)
        with writing(path), path.open("xb") as file:  # never through a link of somebody else's
            if hasattr(os, "posix_fallocate"):  # a full disk shows here, not as a crash later
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def _pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:  # of a kind that is not torch's for too little memory
            raise ValueError(
                f"the hidden states, of {torch.Size(shape).numel() * dtype.itemsize / 2**30:.2f} GiB, cannot be pinned "
                f"in host memory ({str(error).splitlines()[0]}); take hidden_states='file', or fewer windows"
            ) from error

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """Turn too little memory into an error that says what to do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"a block and windows of {self.windows.shape[1]} tokens do not fit on {self.device}: "
                f"{str(error).splitlines()[0]}. Take shorter windows, hidden_states='host' or 'file', a method without "
                "batch_size > 1 or reconstruct > 1, or a larger device; the same call continues"
            ) from error

    def release(self) -> None:
        """Give back what the run held: its lock, and hidden states, which the next one computes again."""
        for path in self._streams:
            path.unlink(missing_ok=True)
        self._lock.release()

    # The loop's side

    def blocks(self) -> Iterator[Block]:
        """The model's blocks, each a copy that computes on the device; on a CPU its weights are still mapped."""
        return walk(
            self.model,
            self.windows,
            self.method.targets,
            self.method.span,
            take_dense=self.reconstruct is not None,
            ignore=self.method.ignore,
            load=self._load,
            room=self.room,
            progress=self.progress,
        )

    def _load(self, block: nn.Module) -> nn.Module:
        """A copy on the device, from a source that is still what was opened."""
        check_same(self._marks)
        return _copy_to(self.device, block)

    def has(self, block: Block) -> bool:
        """Whether an earlier run finished it."""
        return members(block.index, block.module).keys() <= self.notes.keys()

    def state_of(self, block: Block) -> dict[str, Tensor]:
        """The tensors that an earlier run left of it, by their names in its module."""
        state = {}
        for number, member in members(block.index, block.module).items():
            tensors = safetensors.torch.load_file(self.output / self.notes[number]["shard"])
            prefix = f"{number - block.index}." if isinstance(block.module, Span) else ""
            state |= {prefix + name: tensors[stored] for name, stored in self._names(number, member).items()}
        return {name: tensor.to(self.device) for name, tensor in state.items()}

    def write(self, block: Block, report: Report) -> None:
        """Keep a pruned block and what there is to report of it; the first one says how long the others take."""
        if not self.notes:
            seconds, left = report.rows[0]["block_seconds"], max(0, len(self.prefixes) - self.method.span)
            each = seconds / self.method.span
            self.tell(f"the first block took {each:.1f} s: some {each * left / 60:.1f} min for the {left} others")
        for number, member in members(block.index, block.module).items():
            first = number == block.index
            note = {
                "block": number,
                "shard": f"model-block-{number:05d}.safetensors",
                "rows": [row for row in report.rows if row["block"] == number],
                "steps": report.steps if first else [],
                "seconds": report.rows[0]["block_seconds"] if first else 0.0,
            }
            if rank() == 0:
                self._write(note, member, report)
            self.notes[number] = note

    def _write(self, note: dict[str, Any], block: nn.Module, report: Report) -> None:
        """Shard first, note last: a shard without its note was never finished."""
        number, state = note["block"], block.state_dict()
        paths = [self.output / note["shard"], self._beside("masks", number)]
        write_shard({stored: state[name].cpu() for name, stored in self._names(number, block).items()}, paths[0])
        report.keep_masks.of_block(number).save(paths[1])
        codes = {key: value for key, value in report.quantized.items() if key[0] == number}
        if codes:
            paths.append(self._beside("codes", number))
            save_quantized(codes, paths[2])
        else:  # of another run, which was killed before it noted the block
            self._beside("codes", number).unlink(missing_ok=True)
        sums = {path.relative_to(self.output).as_posix(): sha256(path) for path in paths}
        write_note(self.output / STATE / f"block-{number:05d}.json", note | {"files": sums})

    def _beside(self, what: str, number: int) -> Path:
        """Where a block's masks or codes lie packed."""
        return self.output / STATE / f"{what}-{number:05d}.safetensors"

    def _names(self, number: int, block: nn.Module) -> dict[str, str]:
        """Name in the block -> name in its shard."""
        prefix = f"{self.prefixes[number]}."
        stored = stored_names(self.model, {prefix + name: tensor for name, tensor in block.state_dict().items()})
        return {name.removeprefix(prefix): other for name, other in stored.items()}

    def close(self) -> None:
        """Write what is in no block, carry over the small files, and the index last."""
        if rank() == 0:
            check_same(self._marks)
            shards = [self.output / self.notes[index]["shard"] for index in range(len(self.prefixes))]
            shards.append(self.output / "model-rest.safetensors")
            write_shard(rest_of(self.model, self.prefixes), shards[-1])
            self._carry_over()
            write_index(shards, self.output)
        from_rank_0(None)

    def _carry_over(self) -> None:
        """The small files, with a note of what was written: what its user changes in the output stays."""
        path = self.output / STATE / "carried.json"
        written, kept = carry_over(self.source, self.output, note_or_nothing(path))
        write_note(path, written)
        for name in kept:
            self.tell(f"{self.output / name} was changed since it was written, or is of somebody else: left as it is")


def _copy_to(device: torch.device, block: nn.Module) -> nn.Module:
    """A copy of a block whose parameters and buffers are on a device; where they are there already, the same ones."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to(device), requires_grad=False) for p in block.parameters()}
    memo |= {id(buffer): buffer.to(device) for buffer in block.buffers()}
    return copy.deepcopy(block, memo)
