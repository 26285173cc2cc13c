"""The two passes over every weight in a training step, fused: masking, and summing the mask's gradient.

numba compiles them for the processor by itself at first use and keeps the result in its cache; where numba is missing,
on other devices and in other precisions, plain torch computes the same.
"""

from typing import no_type_check

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

try:
    import numba
    import numpy as np
except ImportError:  # numba trails new Python releases
    numba = None


def masked_rows(
    weight: Float[Tensor, "rows columns"],
    ranks: Int[Tensor, "rows columns"],
    prune_counts: Int[Tensor, "rows"],
    out: Float[Tensor, "rows columns"],
) -> Float[Tensor, "rows columns"]:
    """`weight` with the `prune_counts` lowest-ranked of each row set to 0, written to `out`."""
    if _compiled(weight):
        _mask(_bits(weight), ranks.numpy(), prune_counts.to(ranks.dtype).numpy(), _bits(out))
        return out
    return torch.mul(weight, ranks >= prune_counts[:, None], out=out)


def bucket_sums(
    grad: Float[Tensor, "rows columns"],
    weight: Float[Tensor, "rows columns"],
    buckets: UInt8[Tensor, "rows columns"],
    n_buckets: int,
) -> Float[Tensor, "rows n_buckets"]:
    """Per row, the sum of grad * weight over the elements of each bucket, in float32."""
    if _compiled(weight) and grad.dtype == weight.dtype:
        sums = torch.zeros(len(weight), n_buckets)
        kernel = _sum_bfloat16 if weight.dtype == torch.bfloat16 else _sum_float32
        kernel(_bits(grad.contiguous()), _bits(weight), buckets.numpy(), sums.numpy())
        return sums
    # Rows in slices: torch wants 64-bit indices, eight times the memory of the buckets.
    step = max(1, 2**24 // weight.shape[1])
    parts = zip(grad.split(step), weight.split(step), buckets.split(step), strict=True)
    zeros = weight.new_zeros
    return torch.cat(
        [zeros(len(g), n_buckets, dtype=torch.float32).scatter_add_(1, b.long(), g.float() * w) for g, w, b in parts]
    )


def _compiled(weight: Tensor) -> bool:
    if numba is None or weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float32):
        return False
    # As torch does, one thread for little work: waking others costs more, much more where cores are shared.
    threads = torch.get_num_threads() if weight.numel() > 2**15 else 1
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    return True


def _bits(tensor: Tensor):
    """A numpy view: float32 as it is, bfloat16 (which numpy lacks) as its 16 bits."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


if numba is not None:

    @numba.njit(parallel=True, cache=True)
    @no_type_check
    def _mask(weight, ranks, prune_counts, out):
        zero = weight.dtype.type(0)
        for i in numba.prange(weight.shape[0]):
            for j in range(weight.shape[1]):
                out[i, j] = weight[i, j] if ranks[i, j] >= prune_counts[i] else zero

    @numba.njit(parallel=True, cache=True)
    @no_type_check
    def _sum_float32(grad, weight, buckets, sums):
        for i in numba.prange(weight.shape[0]):
            product = grad[i] * weight[i]
            for j in range(weight.shape[1]):
                sums[i, buckets[i, j]] += product[j]

    @numba.njit(parallel=True, cache=True)
    @no_type_check
    def _sum_bfloat16(grad, weight, buckets, sums):
        for i in numba.prange(weight.shape[0]):
            # A bfloat16 is the upper half of a float32.
            g = (grad[i].astype(np.uint32) << np.uint32(16)).view(np.float32)
            w = (weight[i].astype(np.uint32) << np.uint32(16)).view(np.float32)
            product = g * w
            for j in range(weight.shape[1]):
                sums[i, buckets[i, j]] += product[j]
