"""Packed models: pruned projections take one bit per weight and the kept values, and are multiplied as they are."""

from besa.packed.files import pack as pack
from besa.packed.files import packed_projections as packed_projections
from besa.packed.files import unpack as unpack
from besa.packed.linear import PackedLinear as PackedLinear
