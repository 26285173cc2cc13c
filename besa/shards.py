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

import safetensors.torch
import torch
import transformers
from jaxtyping import Int64
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa.blocks import BlockCall, Spans, check_model, find_blocks, members, record_calls, spans
from besa.checkpoint import (
    carry_over,
    check_apart,
    check_tokenizer,
    find_checkpoint,
    open_checkpoint,
    rest_of,
    shard_paths,
    stored_names,
    write_index,
    write_shard,
)
from besa.files import sha256, tensor_sha256, write_text
from besa.models import resolve_device
from besa.parallel import from_all, from_rank_0, n_ranks, rank
from besa.plan import HiddenStates, Plan, Trial, make_plan, try_out
from besa.provenance import provenance
from besa.prune import InModel, Method, check_request, prune_blocks
from besa.quantize import save_quantized
from besa.report import Report

STATE = "besa"
"""Folder in the output for what is no part of the checkpoint: what the run is, and a note per block."""


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
        What pruning did, now or earlier. `quantized` is empty: its codes lie packed in `output/besa/`.

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
    check_tokenizer(model, folder)
    check_request(model, windows, method)
    shards = Shards(folder, output, model, windows, method, resolve_device(device), progress)
    try:
        yield shards
    finally:
        shards.remove_streams()


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
        self.run, self.notes = from_rank_0(self._open() if rank() == 0 else None)

    # What is there

    def _open(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """The run's own file and the notes of the blocks that are finished."""
        _make_folder(self.output)
        for left in [*self.output.glob(".model-*"), *(self.output / STATE).glob(".*")]:
            left.unlink()  # half-written when a run was killed
        identity, path = self._identity(), self.output / STATE / "run.json"
        if path.is_file():
            run = json.loads(path.read_text())
            _check_same(run["identity"], identity, self.output)
        else:
            run = {"identity": identity, "provenance": provenance()}
            write_text(path, json.dumps(run, indent=1) + "\n")
        return run, self._finished_blocks()

    def _identity(self) -> dict[str, Any]:
        """What the output's bytes depend on, beside the kind of processor."""
        from besa import __version__  # the package imports this file

        return {
            "method": self.method.config(),
            "windows": {"shape": list(self.windows.shape), "sha256": tensor_sha256(self.windows)},
            "source": self._source_sums(),
            "device": self.device.type,
            "ranks": n_ranks(),
            "versions": {"besa": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }

    def _source_sums(self) -> dict[str, str]:
        """sha256 by file; a file of the same size and time as when it was last summed is not read again."""
        path = self.output / STATE / "source.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        seen = {}
        for file in tqdm(shard_paths(self.source), desc="sha256", unit="file", leave=False):
            mark = [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
            old = known.get(file.name, {})
            seen[file.name] = old if old.get("mark") == mark else {"mark": mark, "sha256": sha256(file)}
        write_text(path, json.dumps(seen, indent=1) + "\n")
        return {name: entry["sha256"] for name, entry in seen.items()}

    def _finished_blocks(self) -> dict[int, dict[str, Any]]:
        """The notes of blocks whose shards are there and whole."""
        notes = {}
        for path in sorted((self.output / STATE).glob("block-*.json")):
            with contextlib.suppress(ValueError, KeyError, FileNotFoundError):
                note = json.loads(path.read_text())
                if sha256(self.output / note["shard"]) == note["sha256"]:
                    notes[note["block"]] = note
                    continue
            self.tell(f"{path.stem}: its shard is missing or not what was written; the block is pruned again")
        if notes:
            self.tell(f"continuing: {len(notes)} of {len(self.prefixes)} blocks are finished")
        return notes

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
        if rank() == 0:
            write_text(self.output / STATE / "run.json", json.dumps(self.run, indent=1) + "\n")
        config = self.model.config.get_text_config()
        sizes = {index: _bytes_of(block) for index, block in enumerate(find_blocks(self.model))}
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

    def remove_streams(self) -> None:
        """Hidden states are of no use behind the run: they are computed again."""
        for path in self._streams:
            path.unlink(missing_ok=True)

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
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream()):
            copied = _with_tensors(block, lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True))
            call = call.to(self.device)
            torch.cuda.current_stream().synchronize()
        return copied, call

    def finished(self, index: int, block: nn.Module) -> Report | None:
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
                note["sha256"] = self._write(note, member, report)
            self.notes[number] = note
        report.quantized.clear()  # on disk now; a whole model's codes would fill the memory
        self.interrupted = any(from_all(self.interrupted))  # and every rank waits here for rank 0
        if self.interrupted:
            raise KeyboardInterrupt(f"stopped behind block {max(members(index, block))}")

    def _names(self, number: int, block: nn.Module) -> dict[str, str]:
        """Name in the block -> name in its shard."""
        prefix = f"{self.prefixes[number]}."
        stored = stored_names(self.model, {prefix + name: tensor for name, tensor in block.state_dict().items()})
        return {name.removeprefix(prefix): other for name, other in stored.items()}

    def _write(self, note: dict[str, Any], block: nn.Module, report: Report) -> str:
        """Shard first, note last: a shard without its note was never finished."""
        number, path, state = note["block"], self.output / note["shard"], block.state_dict()
        write_shard({stored: state[name].cpu() for name, stored in self._names(number, block).items()}, path)
        codes = {key: value for key, value in report.quantized.items() if key[0] == number}
        if codes:
            save_quantized(codes, self.output / STATE / f"codes-{number:05d}.safetensors")
        total = sha256(path)
        write_text(self.output / STATE / f"block-{number:05d}.json", json.dumps(note | {"sha256": total}) + "\n")
        return total

    @contextlib.contextmanager
    def stopping_between_blocks(self) -> Iterator[None]:
        """SIGINT stops behind the block at hand, a second one at once."""
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


def _make_folder(output: Path) -> None:
    try:
        (output / STATE).mkdir(parents=True, exist_ok=True)
        write_text(output / STATE / "probe", "")
        (output / STATE / "probe").unlink()
    except OSError as error:
        raise ValueError(f"output {str(output)!r} is not writable ({error}); name another folder") from error
    others = [path.name for path in output.iterdir() if path.name != STATE]
    if others and not (output / STATE / "run.json").is_file():
        raise ValueError(f"output {str(output)!r} holds {others[0]!r}, of no run of besa; name an empty or new folder")


def _check_same(there: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Refuse to mix two runs in one output, by the first thing that differs."""
    for name in now:
        old, new = there.get(name), now[name]
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
            name, old, new = f"{name} ({key})", old.get(key), new.get(key)
        raise ValueError(
            f"output {str(output)!r} holds a run with another {name}: {old!r} there, {new!r} now; give the same again, "
            "name another output, or delete that one"
        )


def _bytes_of(block: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in block.state_dict().values())
