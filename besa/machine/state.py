"""What long work has come to, in a file from which the same work goes on."""

import hashlib
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from torch import Tensor, nn

from besa.machine.files import replacing, tensor_sha256

SAVE_AFTER = 60.0
"""Seconds between two states on the disk."""


class StateFile:
    """A run's state in a file, if it is given one, with what the run is made of."""

    def __init__(self, path: Path | str | None, work: str, identity: Callable[[], dict[str, Any]]) -> None:
        """
        Args:
            path: None reads and writes nothing.
            work: whose state it is, for errors.
            identity: gives what tells this run from others, by name; asked for at once, where there is a path.

        Raises:
            ValueError: there can be no file.
        """
        self.path, self._work, self._written = None if path is None else Path(path), work, time.monotonic()
        if self.path is not None and (self.path.is_dir() or not self.path.parent.is_dir()):
            raise ValueError(f"checkpoint {str(path)!r}: name a file in a folder that is there")
        self.identity = identity() if self.path else {}

    def read(self, **identity: Any) -> dict[str, Any] | None:
        """What was written last, if anything was.

        Args:
            identity: what else tells this run from others, and was not known before.

        Raises:
            ValueError: it is no such file, or of another run; names what differs.
        """
        self.identity |= identity
        if self.path is None or not self.path.is_file():
            return None
        name, advice = repr(str(self.path)), "give the same again, name another file, or delete that one"
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            there = state["identity"]
            others = [key for key, now in self.identity.items() if there[key] != now]
        except (RuntimeError, EOFError, LookupError, TypeError, AttributeError, struct.error, PickleError) as error:
            raise ValueError(f"checkpoint {name} is no state of {self._work} ({error}); {advice}") from error
        if others:
            raise ValueError(f"checkpoint {name} is of a run with other {others[0]}; {advice}")
        return state

    def write(self, state: dict[str, Any], at_once: bool = False) -> None:
        """After a while, or at once; whole or not at all."""
        if self.path is None or not (at_once or time.monotonic() - self._written >= SAVE_AFTER):
            return
        with replacing(self.path) as temporary, temporary.open("wb") as file:  # by a path, torch hides the disk's error
            torch.save({"identity": self.identity, **state}, file)
        self._written = time.monotonic()


def sum_of_weights(model: nn.Module) -> str:
    """Of what is in memory: a model that is too large for a GPU has weights elsewhere."""
    return sum_of(value for value in model.state_dict().values() if not value.is_meta)


def sum_of(tensors: Iterable[Tensor]) -> str:
    """sha256 of tensors of any precision, in their order."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor_sha256(tensor.detach().reshape(-1).view(torch.uint8)).encode())
    return total.hexdigest()
