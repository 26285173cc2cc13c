"""Array types that several files share; jaxtyping checks them in tests."""

from jaxtyping import Bool, Float, Float32
from torch import Tensor

Matrix = Float[Tensor, "rows columns"]
KeepMask = Bool[Tensor, "rows columns"]  # True = keep
Square = Float[Tensor, "columns columns"]
HiddenStates = Float[Tensor, "batch seq_len hidden"]
Window = Float[Tensor, "1 seq_len hidden"]  # hidden states of one window
Scalar = Float32[Tensor, ""]
