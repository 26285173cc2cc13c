"""What a run leaves in its output for the next call: what it is, which blocks are finished, what is half-written."""

import ast
import contextlib
import functools
import hashlib
import inspect
import platform
import re
import shutil
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import besa
from besa.checkpoint.format import shard_paths
from besa.inputs.models import STATE
from besa.machine import files
from besa.machine.files import HALF_WRITTEN, mark_of, sha256, tensor_sha256, write_note
from besa.machine.processes import n_ranks
from besa.machine.provenance import installed_version
from besa.prune import Method

_AFTERWARDS = ("finetune.py", "adapters.py", "packed.py", "packed_files.py", "packed_kernels.py", "checkpoint/pack.py")
_MEASURING = ("machine/memory.py", "machine/provenance.py", "checkpoint/plan.py", "checkpoint/large.py", "report.py")
_BESIDE_THE_BYTES = ("paper", "evaluate", "inputs", *_MEASURING, *_AFTERWARDS, "__init__.py", "__main__.py")
"""Parts of the package that cannot change a byte of the output; windows and source are summed by themselves."""
_TEMPORARY = re.compile(re.escape(HALF_WRITTEN) + r"\w{8}")
_HIDDEN_STATES = re.compile(r"hidden-\d+-\d+\.bin")


def check_free(output: Path) -> None:
    """Refuse an output that holds something of no run of besa.

    Raises:
        ValueError: names it.
    """
    others = [path.name for path in output.iterdir() if path.name != STATE] if output.is_dir() else []
    if others and not (output / STATE / "run.json").is_file():
        raise ValueError(f"output {str(output)!r} holds {others[0]!r}, of no run of besa; name an empty or new folder")


def make_folder(output: Path) -> None:
    """Make the output where it is not there yet.

    Raises:
        ValueError: it is not writable, or holds something of no run of besa.
    """
    check_free(output)
    try:
        (output / STATE).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output / STATE):
            pass
    except OSError as error:
        raise ValueError(f"output {str(output)!r} is not writable ({error}); name another folder") from error


def remove_half_written(output: Path) -> None:
    """What a killed run was about to write, and its hidden states, which are of no use to the next one."""
    for path in [*output.iterdir(), *(output / STATE).iterdir()]:
        if path.is_dir() and not path.is_symlink() and _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path)
    for path in (output / STATE).iterdir():
        if not path.is_dir() and _HIDDEN_STATES.fullmatch(path.name):
            path.unlink()


def note_or_nothing(path: Path) -> dict[str, Any]:
    """What lies beside the output as JSON by name; {} where it is not there, or damaged."""
    try:
        note = files.read_note(path) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def open_run(output: Path, identity: dict[str, Any], n_finished: int, about: dict[str, Any]) -> None:
    """Take the output for this run, where it is not its own yet.

    Args:
        n_finished: blocks that a run has finished there, those whose files are damaged since, too.

    Raises:
        ValueError: blocks of another run are finished there; names what differs. Or the file that says of which run
            they are is damaged.
    """
    path = output / STATE / "run.json"
    there = note_or_nothing(path).get("identity")
    if there == identity:
        return
    if n_finished and not isinstance(there, dict):
        raise ValueError(
            f"{path} is damaged: it must say of which run the {n_finished} finished blocks are. Put it back from a "
            f"copy, name another output, or delete {str(output)!r}"
        )
    if n_finished:
        _refuse(there, identity, output)
    write_note(path, {"identity": identity, **about})


def _refuse(there: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """By the first thing that differs."""
    name, old, new = _first_difference(there, now)
    if isinstance(old, dict) and isinstance(new, dict):
        key, old, new = _first_difference(old, new)
        name = f"{name} ({key})"
    raise ValueError(
        f"output {str(output)!r} holds a run with another {name}: {old!r} there, {new!r} now; give the same again, "
        "name another output, or delete that one"
    )


def _first_difference(there: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any]:
    """A name, and what stands under it in both; None is not the same as nothing."""
    absent = "nothing"
    pairs = ((name, there.get(name, absent), now.get(name, absent)) for name in {**there, **now})
    return next((name, old, new) for name, old, new in pairs if old != new)


def identity_of(
    source: Path, output: Path, windows: Tensor, method: Method, device: torch.device, progress: bool
) -> dict[str, Any]:
    """What the output's bytes depend on, beside the kind of processor."""
    return {
        "method": method.config(),
        "windows": {"shape": list(windows.shape), "sha256": tensor_sha256(windows)},
        "source": _source_sums(source, output, progress),
        "device": device.type,
        "ranks": n_ranks(),
        "versions": _versions() | classes_of(method),
    }


def classes_of(method: Method) -> dict[str, str | None]:
    """Class name -> a hash of its code, for a method's classes that `code_hash` leaves out, such as yours; None without
    source."""
    found: dict[str, str | None] = {}
    for kind in type(method).__mro__[:-1]:
        package, _, inside = kind.__module__.partition(".")
        if package != "besa" or inside.partition(".")[0] in _BESIDE_THE_BYTES:
            found[kind.__name__] = None
            with contextlib.suppress(OSError, TypeError):
                source = textwrap.dedent(inspect.getsource(kind))
                found[kind.__name__] = hashlib.sha256(_without_words(source)).hexdigest()[:12]
    return found


def _versions() -> dict[str, str | None]:
    packages = ("torch", "transformers", "prodigyopt", "numba")
    python = ".".join(platform.python_version_tuple()[:2])  # before the code, whose hash another one changes
    own = {"python": python, "besa": f"{besa.__version__}+{_own_code()}"}
    return own | {each: installed_version(each) for each in packages}


@functools.cache  # what this process runs does not change with its files
def _own_code() -> str:
    return code_hash(Path(__file__).parents[1])


def code_hash(package: Path) -> str:
    """Twelve hexadecimal digits that change with any code that decides the output's bytes, in whatever folder it lies.

    What measures, draws or reports does not (`_BESIDE_THE_BYTES`), nor do comments and docstrings.
    """
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if not any(path.relative_to(package).is_relative_to(beside) for beside in _BESIDE_THE_BYTES):
            total.update(_without_words(path.read_text(encoding="utf-8")))
    return total.hexdigest()[:12]


def _without_words(source: str) -> bytes:
    """What Python runs of a source, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # docstrings, also of fields
            node.value = ast.Constant(None)
    return ast.dump(tree).encode()


def _source_sums(source: Path, output: Path, progress: bool) -> dict[str, str]:
    """sha256 by file; a file of the same size and time as when it was last summed is not read again."""
    path = output / STATE / "source.json"
    known = note_or_nothing(path)
    seen = {}
    code = [path for path in sorted(source.glob("*.py")) if path.is_file()]
    paths = [*shard_paths(source), source / "config.json", *code]
    for file in tqdm(paths, desc="sha256", unit="file", leave=False, disable=not progress):
        mark, old = mark_of(file), known.get(file.name)
        same = isinstance(old, dict) and old.get("mark") == mark and isinstance(old.get("sha256"), str)
        seen[file.name] = old if same else {"mark": mark, "sha256": sha256(file)}
        if not same:
            write_note(path, known | seen)  # a run that is ended meanwhile does not begin anew
    write_note(path, seen)
    return {name: entry["sha256"] for name, entry in seen.items()}


def finished_blocks(output: Path, progress: bool = False) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Notes of the blocks whose files are there and whole, and the paths of those whose are not."""
    notes, damaged = {}, []
    paths = sorted((output / STATE).glob("block-*.json"))
    for path in tqdm(paths, desc="sha256", unit="block", leave=False, disable=not progress):
        note = note_or_nothing(path)
        try:
            whole = _fits(note, path.stem) and all(
                sha256(output / name) == total for name, total in note["files"].items()
            )
        except OSError:
            whole = False
        if whole:
            notes[note["block"]] = note
        else:
            damaged.append(str(path))
    return notes, damaged


def _fits(note: dict[str, Any], stem: str) -> bool:
    """Whether a note is one of its block, and its files are those that belong to a block and lie in the output."""
    kinds = {"block": int, "shard": str, "rows": list, "steps": list, "seconds": int | float, "files": dict}
    if not all(isinstance(note.get(name), kind) for name, kind in kinds.items()):
        return False
    number = f"{note['block']:05d}"
    needed = {f"model-block-{number}.safetensors", f"{STATE}/masks-{number}.safetensors"}
    allowed = needed | {f"{STATE}/codes-{number}.safetensors"}
    rows = all(isinstance(row, dict) and row.get("block") == note["block"] for row in note["rows"])
    return rows and stem == f"block-{number}" and note["shard"] in needed and needed <= note["files"].keys() <= allowed
