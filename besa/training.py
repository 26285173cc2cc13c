"""The training step that all learned methods share: optimizers, loss scale, ranks, log."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from besa.shapes import Scalar
from besa.system import finite_hint, mean_over_ranks
from besa.walk import Block

FLOAT16_SCALE = 2.0**16  # of the loss at the start of training, as released


@torch.enable_grad()
def train(
    block: Block,
    batches: Sequence[range],
    optimizers: Sequence[torch.optim.Optimizer],
    loss_of: Callable[[int], tuple[Scalar, Scalar, Scalar]],
    schedules: Sequence[torch.optim.lr_scheduler.LRScheduler] = (),
) -> list[dict[str, float]]:
    """Take one step of every optimizer per batch of windows; returns the training log.

    Gradients are averaged over the windows of a batch and over the ranks.

    Args:
        batches: from `Block.batches`.
        loss_of: loss of a window, its reconstruction error, and the block's sparsity.
    """
    scaler = loss_scaler(block)
    entries = []
    for batch in block.progress(batches, "learn"):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for window in batch:
            loss, error, sparsity = loss_of(window)
            scaler.scale(loss / len(batch)).backward()
            entries.append(torch.stack([loss, error, sparsity]).detach())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    mean_over_ranks(parameter.grad)
            scaler.step(optimizer)
        for schedule in schedules:
            schedule.step()
        scaler.update()
    return training_log(block, entries, scaler, len(batches))


def loss_scaler(block: Block) -> torch.amp.GradScaler:
    """Scale losses in float16, whose gradients would underflow; a step whose scaled gradient overflows is skipped.

    The scale halves at each skipped step and never grows, so that it tells how many were skipped.
    """
    return torch.amp.GradScaler(
        block.device.type,
        init_scale=FLOAT16_SCALE,
        growth_interval=2**31 - 1,
        enabled=block.inputs.dtype == torch.float16,
    )


def training_log(
    block: Block, entries: list[Tensor], scaler: torch.amp.GradScaler, n_steps: int
) -> list[dict[str, float]]:
    """Loss, reconstruction error and sparsity of each step, averaged over its windows and the ranks.

    The last step has the number of those that float16 skipped, if any.
    """
    means = mean_over_ranks(torch.stack(entries).view(n_steps, -1, 3).mean(1))
    if not means.isfinite().all():
        raise ValueError(f"block {block.index}: the loss is not finite; {finite_hint(block.inputs.dtype)}")
    names = ["loss", "reconstruction_error", "sparsity"]
    log = [dict(zip(names, entry, strict=True)) for entry in means.tolist()]
    n_skipped = round(math.log2(FLOAT16_SCALE / scaler.get_scale())) if scaler.is_enabled() else 0
    if n_skipped > 0:
        log[-1]["skipped"] = n_skipped
    if n_skipped > n_steps / 2:
        warnings.warn(f"block {block.index}: float16 overflowed in {n_skipped} of {n_steps} steps", stacklevel=2)
    return log


class Parameters:
    """Named views of one flat parameter, so that Prodigy has one step size for all."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], start: float, device: torch.device) -> None:
        self.shapes = shapes
        self.flat = nn.Parameter(torch.full((sum(map(math.prod, shapes.values())),), start, device=device))

    def by_name(self) -> dict[str, Tensor]:
        parts = self.flat.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}
