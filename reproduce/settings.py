"""Parameters of the notebooks: size of a run (profile), settings of a model (recipe), lists from the command line."""

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import yaml

from besa.config import config
from reproduce import ROOT


class Profile(NamedTuple):
    """The size of a run: calibration windows, tokens of each, test segments per text, questions per task."""

    name: str
    n_samples: int
    seq_len: int
    max_segments: int | None
    max_questions: int | None


PROFILES = {
    "smoke": Profile("smoke", 2, 64, 2, 2),
    "quick": Profile("quick", 32, 512, 32, 200),
    "paper": Profile("paper", 128, 2048, None, None),
}


def resolve_profile(name: str, device: torch.device) -> Profile:
    """A profile by name; "auto" is `$BESA_PROFILE`, else paper on a GPU and quick on a CPU."""
    if name == "auto":
        name = os.environ.get("BESA_PROFILE") or ("paper" if device.type == "cuda" else "quick")
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; known: auto, {', '.join(PROFILES)}")
    return PROFILES[name]


@config
class Recipe:
    """Settings of a model, from reproduce/params/<model>.yaml; these defaults where there is no file.

    Args:
        calibration: text of the calibration windows.
        sampler: "crop" (published: a random crop of a document longer than seq_len) or "pack".
        seed: of the sampler.
        n_samples, seq_len: calibration windows and tokens of each; None takes the profile's.
        dtype: None takes a precision in which the device is fast.
        d_coef, d_coef_layer: Prodigy's step size, row-wise and layer-wise; the published runs set it by model.
        keep: leave pruned models in $BESA_CACHE/pruned, where an interrupted row continues and other notebooks find
            them; None does in profile paper.
    """

    calibration: str = "sotu"
    sampler: Literal["crop", "pack"] = "crop"
    seed: int = 0
    n_samples: int | None = None
    seq_len: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    device: str = "auto"
    d_coef: float = 5.0
    d_coef_layer: float = 0.5
    keep: bool | None = None


def resolve_recipe(model: str, values: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in reproduce/params/<model>.yaml, some of its values changed."""
    path = ROOT / "reproduce" / "params" / f"{model}.yaml"
    known = yaml.safe_load(path.read_text())["recipe"] if "/" not in model and path.is_file() else {}
    return Recipe(**known | dict(values or {}))


def listed(values: Any) -> list[Any]:
    """A list parameter; `papermill -p row_groups row,8` gives a string, `-p row_groups 8` a number."""
    if isinstance(values, str):
        words = [word.strip() for word in values.split(",") if word.strip()]
        return [int(word) if word.isdecimal() else word for word in words]
    return list(values) if isinstance(values, list | tuple) else [values]
