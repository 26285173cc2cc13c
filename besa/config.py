"""Decorator for configuration classes: frozen dataclasses whose fields pydantic checks."""

from functools import partial
from typing import Annotated

from annotated_types import Ge, Lt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
config = partial(dataclass, frozen=True, kw_only=True, config=CONFIG)

Sparsity = Annotated[float, Ge(0), Lt(1)]
