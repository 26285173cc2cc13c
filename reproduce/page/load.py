"""Records in results/reference."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reproduce import REFERENCE
from reproduce.records import Record, target_of

MODEL = "smollm2-135m"


def load(notebook: str, results: Path = REFERENCE, target: float | str | None = None, **config: Any) -> list[Record]:
    """Records of a notebook whose configuration holds these values.

    Args:
        target: sparsity or pattern; None takes all.
    """
    paths = sorted((results / notebook / "records").glob("*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) | {"path": path} for path in paths]
    records = [record for record in records if config.items() <= record["config"].items()]
    return [record for record in records if target is None or str(target_of(record)) == str(target)]


def at_equal_sparsity(records: list[Record], ours: str = "besa-row-wise") -> list[Record]:
    """Records of rows pruned to the sparsity of a row and, where there are none, as they are."""
    matched = {each["config"]["row"] for each in records if each["config"].get("matched_to") == ours}
    wanted = {row: ours for row in matched}
    return [each for each in records if each["config"].get("matched_to") == wanted.get(each["config"]["row"])]


def samples(record: Record) -> Mapping[str, np.ndarray]:
    path = record["path"].parents[1] / "samples" / f"{record['path'].stem}.npz"
    return dict(np.load(path)) if path.is_file() else {}


def cpu_minutes(record: Record) -> float:
    return sum(record.get("cpu_seconds", {}).values()) / 60
