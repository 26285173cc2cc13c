"""The rows that the sweeping notebooks compare, from their comma-separated parameters."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from besa.besa import Besa
from besa.inputs.models import SHAPES

PUBLISHED_ROWS = {("row", "pruned"): "besa-row-wise", ("layer", "dense"): "besa-layer-wise"}
"""(row_group, targets) of the two released recipes -> the row's name in every table."""


def granularities(
    row_groups: dict[str, str], d_coef: float = 5.0, d_coef_layer: float = 0.5, **config: Any
) -> dict[str, Besa]:
    """Row name -> BESA, one for each row group and kind of targets.

    Args:
        row_groups: targets ("pruned", "dense") -> row groups, comma-separated: "row", "layer" or numbers of rows.
        d_coef: Prodigy's d_coef of rows and groups of them; d_coef_layer is layer-wise's.
        config: further fields of `Besa`.

    Raises:
        ValueError: an unknown or repeated row group, or none at all.
    """
    rows = {}
    for targets, text in row_groups.items():
        for group in parse(text, f"row groups with {targets} targets"):
            step = d_coef_layer if group == "layer" else d_coef
            name = PUBLISHED_ROWS.get((group, targets), f"besa-{group}-{targets}")
            rows[name] = Besa(row_group=group, targets=targets, d_coef=step, **config)
    if not rows:
        raise ValueError("no row groups are given: nothing to compare")
    return rows


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of an ablation: the baseline, or all as in the baseline but for one value."""

    ablation: str
    """The field of `Besa` that is varied, or `n_samples`."""
    value: int | str
    row: str
    """`baseline`, or ablation and value: fit for file names."""
    method: Besa
    n_samples: int


def ablations(baseline: Besa, n_samples: int, grids: dict[str, str], limit: int | None = None) -> list[Setting]:
    """The settings of every ablation in order, the baseline among them whether or not its value is listed.

    Args:
        n_samples: the baseline's calibration windows.
        grids: ablation -> values, comma-separated; an empty string leaves the ablation out.
        limit: settings kept beside the baseline in each ablation; None keeps all.

    Raises:
        ValueError: a value that is repeated, of the wrong kind, or that `Besa` refuses; nothing beside the baseline.
    """
    settings = []
    for ablation, text in grids.items():
        own = n_samples if ablation == "n_samples" else getattr(baseline, ablation)
        values = parse(text, ablation)
        found = [_setting(baseline, n_samples, ablation, value) for value in values]  # refuses before anything is cut
        others = [setting for setting in found if setting.value != own][:limit]
        if others:
            kept = {setting.value for setting in others} | {own}
            order = values if own in values else [own, *values]
            order = order if any(isinstance(value, str) for value in order) else sorted(order)
            settings += [_setting(baseline, n_samples, ablation, value) for value in order if value in kept]
    if not settings:
        raise ValueError("no value differs from the baseline: nothing to compare")
    return settings


def _setting(baseline: Besa, n_samples: int, ablation: str, value: int | str) -> Setting:
    whole = {field.name for field in fields(baseline) if field.type in (int, "int")} | {"n_samples"}
    if ablation in whole and (isinstance(value, str) or value < 1):
        raise ValueError(f"{ablation} {value!r} is not a whole number of at least 1")
    row = f"{ablation}-{value}"
    if ablation == "n_samples":
        row = "baseline" if value == n_samples else row
        return Setting(ablation=ablation, value=value, row=row, method=baseline, n_samples=value)
    row = "baseline" if value == getattr(baseline, ablation) else row
    method = replace(baseline, **{ablation: value})
    return Setting(ablation=ablation, value=value, row=row, method=method, n_samples=n_samples)


def parse(text: str, name: str) -> list[int | str]:
    """Comma-separated values, those of digits as numbers.

    Raises:
        ValueError: a value is repeated; the message says of what (`name`).
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    values = [int(word) if word.lstrip("-").isdecimal() else word for word in words]
    repeated = {value for value in values if values.count(value) > 1}
    if repeated:
        raise ValueError(f"{name}: {repeated.pop()!r} is repeated in {text!r}")
    return values


def scale_runs(text: str) -> list[tuple[str, int, int]]:
    """(shape, blocks, windows) of each run in "llama-7b:4x32,llama2-70b:2x8".

    Raises:
        ValueError: not of that form, or an unknown shape.
    """
    runs = []
    for run in text.split(","):
        found = re.fullmatch(r"(.+):(\d+)x(\d+)", run.strip())
        if not found or found[1] not in SHAPES or int(found[2]) < 1 or int(found[3]) < 1:
            raise ValueError(f"runs {run!r} is not SHAPE:BLOCKSxWINDOWS with a shape of {', '.join(SHAPES)}")
        runs.append((found[1], int(found[2]), int(found[3])))
    return runs


def fractions(name: str, values: str) -> list[float]:
    """The numbers of a comma-separated parameter, ascending.

    Raises:
        ValueError: not numbers in [0, 1), or one of them twice; the message names the parameter and the value.
    """
    numbers = []
    for value in values.split(","):
        try:
            numbers.append(float(value))
        except ValueError as error:
            raise ValueError(f"{name} {values!r}: {value!r} is not a number") from error
        if not 0 <= numbers[-1] < 1:
            raise ValueError(f"{name} {values!r}: {value} is outside [0, 1)")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} {values!r}: a value is repeated")
    return sorted(numbers)
