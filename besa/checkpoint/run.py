"""From checkpoint to checkpoint, block by block: the model as a whole is never in memory.

The source stays mapped from its files; one block at a time is copied, pruned and written as a shard of its own. Shards
that are there, with the sha256 that their notes under `besa/` name, are what an interrupted run continues from.
"""

import contextlib
import copy
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
    check_apart,
    check_tokenizer,
    find_checkpoint,
    open_checkpoint,
    rest_of,
    room_for,
    stored_names,
    write_index,
    write_shard,
)
from besa.checkpoint.plan import HiddenStates, Plan, Trial, make_plan, try_out
from besa.checkpoint.resume import STATE, finished_blocks, identity_of, make_folder, open_run, remove_half_written
from besa.machine.device import resolve_device
from besa.machine.files import sha256, write_text
from besa.machine.processes import from_all, from_rank_0, n_ranks, rank
from besa.machine.provenance import provenance
from besa.prune import InModel, Method, check_request, prune_blocks
from besa.quantize import QuantizedFiles, save_quantized
from besa.report import Report
from besa.walk import BlockCall, Spans, check_model, find_blocks, members, projections, record_calls, spans


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
) -> Report:
    """Prune a checkpoint into another one, by the same loop as `prune`, with one block in memory at a time.

    Killed at any moment, the same call continues behind the last whole shard and ends with the same bytes. SIGINT stops
    behind the block at hand, a second one at once. Under torchrun the ranks share the windows and rank 0 writes; all
    must see both folders.

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

    Returns:
        What pruning did, now or earlier. `quantized` reads from `output/besa/` what is asked of it.

    Raises:
        ValueError: source, output, windows and method do not go together, or do not fit; before any long work.
        OSError: the disk is full; what is written stays.
    """
    with opened(source, output, windows, method, device, trust_remote_code, progress) as shards:
        if not shards.complete:
            shards.make_room(hidden_states)
            with shards.stopping_between_blocks():
                prune_blocks(shards.model, windows, method, shards, progress and rank() == 0)
        shards.close()
        return shards.report()


def plan_checkpoint(
    source: str | Path,
    output: str | Path,
    windows: Int64[Tensor, "n_samples seq_len"],
    method: Method,
    *,
    device: str = "auto",
    hidden_states: HiddenStates | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
) -> Plan:
    """Everything that `prune_checkpoint` does before it starts: all checks, a trial on the first block, the plan.

    Raises:
        ValueError: as `prune_checkpoint`.
    """
    with opened(source, output, windows, method, device, trust_remote_code, progress=False) as shards:
        return shards.plan(hidden_states)


@contextlib.contextmanager
def opened(
    source: str | Path,
    output: str | Path,
    windows: Tensor,
    method: Method,
    device: str,
    trust_remote_code: bool,
    progress: bool,
) -> Iterator["Shards"]:
    """Check that all goes together, and open the output for as long as it is written."""
    folder, output = find_checkpoint(source), Path(output)
    check_apart(folder, output)
    model = open_checkpoint(folder, trust_remote_code)
    check_model(model, values=False)
    check_tokenizer(model, folder, trust_remote_code)
    check_request(model, windows, method)
    shards = Shards(folder, output, model, windows, method, resolve_device(device), progress)
    try:
        yield shards
    finally:
        shards.release()


class Shards(InModel):
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
    ) -> None:
        super().__init__(device)
        self.source, self.output, self.model, self.windows, self.method = source, output, model, windows, method
        self.tell: Callable[[str], None] = tqdm.write if progress and rank() == 0 else lambda _: None
        names = {id(module): name for name, module in model.named_modules()}
        self.prefixes = [names[id(block)] for block in find_blocks(model)]
        self.hidden_states: HiddenStates = "device"
        self.interrupted = False
        self._streams: list[Path] = []
        self._ahead: dict[int, Future] = {}
        self._fetcher = ThreadPoolExecutor(1)
        self._copies: torch.cuda.Stream | None = None
        self._lock = filelock.FileLock(output / STATE / "lock")
        try:
            self.run, self.notes = from_rank_0(self._open() if rank() == 0 else None)
        except BaseException:
            self._lock.release()
            raise

    # What is there

    def _open(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """The run's own file and the notes of the blocks that are finished."""
        make_folder(self.output)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(f"another process writes to {str(self.output)!r}; wait for it, or stop it") from None
        remove_half_written(self.output)
        notes, damaged = finished_blocks(self.output)
        identity = identity_of(self.source, self.output, self.windows, self.method, self.device)
        run = open_run(self.output, identity, notes, {"provenance": provenance()})
        if len(notes) < len(self.prefixes):  # a checkpoint that lacks a block is none
            (self.output / INDEX).unlink(missing_ok=True)
        for name in damaged:
            self.tell(f"{name}: its files are missing or not what was written; the block is pruned again")
        if notes:
            self.tell(f"continuing: {len(notes)} of {len(self.prefixes)} blocks are finished")
        return run, notes

    @property
    def complete(self) -> bool:
        """Whether every block has its shard."""
        return len(self.notes) == len(self.prefixes)

    def report(self) -> Report:
        """Of all blocks that are finished."""
        report = self._empty_report()
        for index in sorted(self.notes):
            report.extend(self._report_of(index))
        report.seconds = sum(note["seconds"] for note in self.notes.values())
        if self.method.quantize:
            report.quantized = QuantizedFiles(*(self._codes(index) for index in sorted(self.notes)))
        return report

    def _empty_report(self) -> Report:
        return Report(self.method.name, n_samples=len(self.windows), seq_len=self.windows.shape[1])

    def _report_of(self, index: int) -> Report:
        report = self._empty_report()
        report.rows, report.steps = self.notes[index]["rows"], self.notes[index]["steps"]
        return report

    # What is needed

    def plan(self, wanted: HiddenStates | Literal["auto"]) -> Plan:
        """Memory, disk and time of what is still to be done."""
        windows = self.windows[rank() :: n_ranks()]
        calls = record_calls(self.model, windows[:1])
        together = spans(find_blocks(self.model), calls, self.method.span)
        if "trial" not in self.run:
            self.tell("trying out the first block ...")
            trial = asdict(try_out(self.model, windows, self.method, together, calls[0].returns_tuple, self))
            self.run["trial"] = from_rank_0(trial)
            self._forget_ahead()
        if rank() == 0:
            write_text(self.output / STATE / "run.json", json.dumps(self.run, indent=1) + "\n")
        config = self.model.config.get_text_config()
        sizes = {index: self._bytes_of(block) for index, block in enumerate(find_blocks(self.model))}
        rest = sum(tensor.nbytes for tensor in rest_of(self.model, self.prefixes).values())
        left = [index for index in sizes if index not in self.notes]
        return make_plan(
            Trial(**self.run["trial"]),
            n_windows=len(windows),
            window_bytes=windows.shape[1] * config.hidden_size * self.model.dtype.itemsize,
            shard_bytes=rest + sum(sizes[index] for index in left),
            n_blocks=len(left),
            device=self.device,
            output=self.output,
            wanted=wanted,
        )

    def _bytes_of(self, block: nn.Module) -> int:
        """Of its shard, and of its codes."""
        quantize, weights = self.method.quantize, [projection.weight for projection in projections(block).values()]
        codes = sum(quantize.most_bytes(weight) for weight in weights) if quantize else 0
        return codes + sum(tensor.nbytes for tensor in block.state_dict().values())

    def make_room(self, wanted: HiddenStates | Literal["auto"]) -> None:
        """Plan, tell the plan, and keep it beside the output."""
        plan = self.plan(wanted)
        self.tell(str(plan))
        self.hidden_states = plan.hidden_states
        if rank() == 0:
            write_text(self.output / STATE / "plan.json", json.dumps(asdict(plan), indent=1) + "\n")

    def new_stream(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.hidden_states == "device":
            return super().new_stream(shape, dtype)
        if self.hidden_states == "host":
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        path = self.output / STATE / f"hidden-{rank()}-{len(self._streams)}.bin"
        size = torch.Size(shape).numel()
        self._streams.append(path)
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk shows here, not as a crash later
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def release(self) -> None:
        """Give back what the run held: its lock, and hidden states, which the next one computes again."""
        for path in self._streams:
            path.unlink(missing_ok=True)
        self._forget_ahead()
        self._fetcher.shutdown()
        self._lock.release()

    def _forget_ahead(self) -> None:
        """Free the block that was fetched ahead."""
        for future in self._ahead.values():
            future.result()
        self._ahead.clear()

    # The loop's side

    def load(self, together: Spans, index: int) -> tuple[nn.Module, BlockCall]:
        """The block as in the source, its weights still mapped; on a GPU a copy, and the next one comes meanwhile."""
        if self.device.type != "cuda":
            block, call = together[index]
            return _with_tensors(block, lambda tensor: tensor), call
        here = self._ahead.pop(index, None) or self._fetcher.submit(self._to_gpu, *together[index])
        fetched = here.result()
        following = next((later for later in together if later > index), None)
        if following is not None:
            self._ahead[following] = self._fetcher.submit(self._to_gpu, *together[following])
        return fetched

    def _to_gpu(self, block: nn.Module, call: BlockCall) -> tuple[nn.Module, BlockCall]:
        """From the mapped file through pinned memory, on a stream of its own beside the one that computes."""
        with torch.cuda.device(self.device):
            self._copies = self._copies or torch.cuda.Stream()
            # what the allocator gives this stream, a block before may still be computing with
            self._copies.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(self._copies):
                copied = _with_tensors(block, lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True))
                call = call.to(self.device)
            self._copies.synchronize()
        return copied, call

    def finished(self, index: int, block: nn.Module) -> Report | None:
        self._stop_here(index)
        own = members(index, block)
        if not own.keys() <= self.notes.keys():
            return None
        report = self._empty_report()
        for number in own:
            report.extend(self._report_of(number))
        return report

    def restore(self, index: int, block: nn.Module) -> None:
        for number, member in members(index, block).items():
            tensors = safetensors.torch.load_file(self.output / self.notes[number]["shard"])
            names = self._names(number, member)
            state = {name: tensors[stored].to(self.device) for name, stored in names.items()}
            member.load_state_dict(state, assign=True)

    def keep(self, index: int, block: nn.Module, report: Report) -> None:
        for number, member in members(index, block).items():
            note = {
                "block": number,
                "shard": f"model-block-{number:05d}.safetensors",
                "rows": [row for row in report.rows if row["block"] == number],
                "steps": report.steps if number == index else [],
                "seconds": report.rows[0]["block_seconds"] if number == index else 0.0,
            }
            if rank() == 0:
                self._write(note, member, report)
            self.notes[number] = note
        report.quantized = {}  # on disk now; a whole model's codes would fill the memory

    def _stop_here(self, index: int) -> None:
        """Before a block, where a rank was asked to; all of them wait here for rank 0, which may still be writing."""
        if any(from_all(self.interrupted)):
            raise KeyboardInterrupt(f"stopped before block {index}; the same command continues")

    def _names(self, number: int, block: nn.Module) -> dict[str, str]:
        """Name in the block -> name in its shard."""
        prefix = f"{self.prefixes[number]}."
        stored = stored_names(self.model, {prefix + name: tensor for name, tensor in block.state_dict().items()})
        return {name.removeprefix(prefix): other for name, other in stored.items()}

    def _codes(self, number: int) -> Path:
        """Where a block's codes lie packed."""
        return self.output / STATE / f"codes-{number:05d}.safetensors"

    def _write(self, note: dict[str, Any], block: nn.Module, report: Report) -> None:
        """Shard first, note last: a shard without its note was never finished."""
        number, paths, state = note["block"], [self.output / note["shard"]], block.state_dict()
        write_shard({stored: state[name].cpu() for name, stored in self._names(number, block).items()}, paths[0])
        codes = {key: value for key, value in report.quantized.items() if key[0] == number}
        if codes:
            paths.append(self._codes(number))
            with room_for(sum(weight.codes.nbytes for weight in codes.values()), paths[1]):
                save_quantized(codes, paths[1])
        sums = {str(path.relative_to(self.output)): sha256(path) for path in paths}
        write_text(self.output / STATE / f"block-{number:05d}.json", json.dumps(note | {"files": sums}) + "\n")

    @contextlib.contextmanager
    def stopping_between_blocks(self) -> Iterator[None]:
        """SIGINT stops before the next block, a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            self.tell("stopping behind this block; once more stops at once, and this block is pruned again next time")

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def close(self) -> None:
        """Write what is in no block, carry over the small files, and the index last."""
        if rank() == 0:
            shards = [self.output / self.notes[index]["shard"] for index in range(len(self.prefixes))]
            shards.append(self.output / "model-rest.safetensors")
            write_shard(rest_of(self.model, self.prefixes), shards[-1])
            carry_over(self.source, self.output)
            write_index(shards, self.output)
        from_rank_0(None)


def _with_tensors(block: nn.Module, move: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a block whose parameters and buffers are the original's, moved."""
    memo: dict[int, Any] = {id(p): nn.Parameter(move(p.detach()), requires_grad=False) for p in block.parameters()}
    memo |= {id(buffer): move(buffer) for buffer in block.buffers()}
    return copy.deepcopy(block, memo)
