"""Train a pruned model as a whole on the next token, every zero kept.

"low-rank": W + (B A) * keep_mask * (alpha / r) with adapters of peft (`besa/adapters.py`). "full": the weights
themselves, in float32, with gradients for kept ones only. By step t of T the learning rate is

    lr * min(1, (t + 1) / warmup) * (1 + cos(pi t / T)) / 2    with a tenth of the steps for warmup

and the weights that are left in the model are those with the least loss on windows that are not trained on.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pandas as pd
import torch
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from besa.decoder import (
    BlockCall,
    check_model,
    check_tokens,
    embed,
    find_blocks,
    record_calls,
    run_block,
    run_head,
)
from besa.machine.device import way_out
from besa.machine.fields import Count, Positive, Seed, check_fields, checked, documented
from besa.machine.files import tensor_sha256
from besa.machine.memory import measure
from besa.machine.state import StateFile, sum_of, sum_of_weights
from besa.masks import pack_bits
from besa.report import Masks
from besa.walk import frozen

if TYPE_CHECKING:
    import matplotlib.axes

Pruned = dict[tuple[int, str], tuple[nn.Linear, Bool[Tensor, "rows columns"]]]

LR = {"low-rank": 3e-3, "full": 3e-4}
WARMUP = 0.1
"""Of the steps."""
EVALUATIONS = 8
"""How often in a run the held-out loss is taken, beside the one before it."""
LARGEST_NORM = 1.0
"""Of a step's gradient."""
LOGITS_AT_ONCE = 2**24
"""Tokens times vocabulary that the head computes at once: 64 MiB in float32."""


@documented
@dataclass(frozen=True)
class FineTune:
    """How a pruned model is trained as a whole."""

    kind: Literal["low-rank", "full"] = "low-rank"
    """"low-rank": masked adapters, merged at the end; "full": every kept weight; 20 bytes of state for each
    weight of the pruned projections, zeros included."""
    _: KW_ONLY
    rank: Count = 16
    """Of the adapters ("low-rank")."""
    alpha: Positive = 32.0
    """The adapters are scaled by alpha / rank ("low-rank")."""
    lr: Positive | None = None
    """AdamW's largest step size; None takes 3e-3 ("low-rank") or 3e-4 ("full")."""
    epochs: Count = 2
    """Passes over the windows that are trained on."""
    batch_size: Count = 4
    """Windows per step; they run one after the other, and their gradients add up."""
    distill: Annotated[float, Ge(0), Le(1)] = 0.0
    """Weight of KL(dense model || this one), per token, in the loss; the next token's has the rest."""
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.125
    """Fraction of the windows, the last, that is not trained on: its loss says when to stop and what is kept."""
    patience: Count = 3
    """Held-out losses in a row, of eight in a run, that may be no better than the best before training ends."""
    seed: Seed = 0
    """Of the windows' order and the adapters' first values."""

    __post_init__ = check_fields

    def config(self) -> dict[str, Any]:
        """Fields, for records."""
        return asdict(self)

    def n_held_out(self, n_samples: int) -> int:
        """Windows that are not trained on."""
        return max(1, round(self.held_out * n_samples))

    def batches(self, n_trained: int) -> list[list[int]]:
        """The windows of every step: each epoch in an order of its own, cut across their borders."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.cat([torch.randperm(n_trained, generator=generator) for _ in range(self.epochs)])
        return [batch.tolist() for batch in order.split(self.batch_size)]

    def lr_at(self, step: int, n_steps: int) -> float:
        """Linear warmup, then half a cosine; `step` counts from 0."""
        rising = min(1.0, (step + 1) / max(1, round(WARMUP * n_steps)))
        return (self.lr or LR[self.kind]) * rising * (1 + math.cos(math.pi * step / n_steps)) / 2


@documented
@dataclass(repr=False)
class FineTuned:
    """What training did, step by step."""

    config: FineTune
    """How it was trained."""
    _: KW_ONLY
    steps: list[dict[str, float]] = field(default_factory=list)
    """Step (from 1), learning rate, loss that was trained on."""
    held_out: list[dict[str, float]] = field(default_factory=list)
    """Step (0: before) and next-token loss of the windows that are not trained on, in nats per token."""
    seconds: float = 0.0
    """What training took."""
    peak_bytes: int = 0
    """Highest resident memory of the process, or highest allocation on the GPU, while it was trained."""

    @property
    def best_step(self) -> int:
        """The step whose weights the model now has; 0: training did not help, and nothing was changed."""
        return int(min(self.held_out, key=lambda row: row["held_out"])["step"])

    def to_frame(self) -> pd.DataFrame:
        """By step: `lr`, `loss` and, where it was taken, `held_out`, in nats per token."""
        steps = pd.DataFrame(self.steps, columns=["step", "lr", "loss"])
        held_out = pd.DataFrame(self.held_out, columns=["step", "held_out"])
        return held_out.merge(steps, on="step", how="outer").set_index("step")[["lr", "loss", "held_out"]]

    def plot(self, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.axes.Axes":
        """Both losses over the steps; a ring around the one whose weights were kept."""
        import matplotlib.pyplot as plt  # slow to import

        frame = self.to_frame()
        if ax is None:
            _, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
        ax.plot(frame.index, frame["loss"], color="tab:gray", linewidth=1, label="trained on")
        taken = frame["held_out"].dropna()
        ax.plot(taken.index, taken, "o-", color="tab:red", markersize=4, label="held out")
        best = self.best_step
        ax.plot(best, taken[best], "o", markersize=11, fillstyle="none", color="black", label="kept")
        ax.set_xlabel("step")
        ax.set_ylabel("loss (nats per token)")
        ax.grid(alpha=0.3)
        ax.legend()
        return ax

    def __str__(self) -> str:
        losses, last = {row["step"]: row["held_out"] for row in self.held_out}, self.best_step
        change = f"held-out loss {losses[0]:.4f} -> {losses[last]:.4f}"
        skipped = sum("skipped" in step for step in self.steps)
        note = f", {skipped} steps skipped (float16 overflow)" if skipped else ""
        return f"{self.config.kind}: {change} at step {last} of {len(self.steps)}, {self.seconds:.0f} s{note}"

    __repr__ = __str__


@checked
def finetune(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    report: Masks,
    config: FineTune | None = None,
    *,
    dense: PreTrainedModel | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> FineTuned:
    """Train a pruned model in place on the next token of windows; its pruned weights stay 0, each of them.

    Projections with a keep-mask are trained, in float32 whatever the model's precision; those that pruning ignored have
    one, too, which keeps all. Embeddings, norms, biases and the head stay as they are. The same windows, seed and
    machine give the same bits. A run that is interrupted while it trains leaves the model as it was.

    Args:
        model: pruned, of any family that `besa.prune` takes.
        windows: token ids, from `calibration_windows`; the last `config.held_out` of them are not trained on.
        report: what `besa.prune` returned, or keep-masks by (block, projection).
        config: None takes `FineTune()`.
        dense: the model before pruning, where `config.distill` is positive.
        checkpoint: a file for the state of training; after an interruption the same call goes on from there.
        progress: show a bar over the steps.

    Raises:
        ValueError: model, masks, windows and config do not go together, or the checkpoint is of another run; before
            any work. While it trains: the loss is not finite any more.
    """
    config = config or FineTune()
    pruned = masked_projections(model, report)
    _check_windows(model, windows, config)
    _check_dense(model, dense, config)
    check_model(model)
    result = FineTuned(config)
    with measure(model.device) as cost, frozen(model), frozen(dense or model):
        state = StateFile(checkpoint, "finetune", partial(_identity, model, windows, pruned, config, dense))
        with _Masters(pruned) if config.kind == "full" else _Adapters(model, report, config) as trained:
            training = _Training(model, windows, trained, result, dense)
            training.resume(state.read())
            with tqdm(total=training.n_steps, desc="finetune", unit="step", disable=not progress) as bar:
                training.run(bar, state)
            trained.merge(training.best)
        _check_zeros(pruned)
    result.seconds, result.peak_bytes = cost.seconds, cost.peak_bytes
    return result


def masked_projections(model: PreTrainedModel, report: Masks) -> Pruned:
    """The projections that have a keep-mask, each with it, where it is to be used.

    Raises:
        ValueError: there are no masks, a projection is missing, packed, quantized or has adapters, or has weights other
            than 0 where its mask has none.
    """
    if getattr(report, "quantized", None):
        raise ValueError("a quantized weight has no value of its own to train; prune with quantize=None")
    check_model(model, values=False)
    keep_masks, found = getattr(report, "keep_masks", report), {}
    if not keep_masks:
        raise ValueError("there are no keep-masks: the report is of no block; pass what besa.prune returned")
    blocks = find_blocks(model)
    for index, name in keep_masks:
        module = dict(blocks[index].named_modules()).get(name) if 0 <= index < len(blocks) else None
        problem = _problem(module, keep_mask := keep_masks[index, name])
        if problem:
            raise ValueError(f"block {index}, {name}: {problem}")
        found[index, name] = module, keep_mask.to(module.weight.device)
    return found


def _problem(module: nn.Module | None, keep_mask: Tensor) -> str | None:
    if not isinstance(module, nn.Linear) or module.weight.is_meta or module.weight.shape != keep_mask.shape:
        return f"no such projection of shape {tuple(keep_mask.shape)} in this model's memory; are the masks its own?"
    n_alive = _count_alive(module.weight, keep_mask.to(module.weight.device))
    if n_alive:
        return f"{n_alive} weights are not 0 that the mask has pruned; pass the masks of this very model"
    return None


def _count_alive(weight: Tensor, keep_mask: Tensor) -> int:
    """Pruned weights that are not 0."""
    return int(((weight != 0) & ~keep_mask).sum())


def _check_windows(model: PreTrainedModel, windows: Tensor, config: FineTune) -> None:
    check_tokens(model, windows, windows.shape[1])
    if config.n_held_out(len(windows)) >= len(windows):
        raise ValueError(
            f"{len(windows)} window(s) cannot be parted into some to train on and {config.held_out:.1%} held out; "
            "take more windows, or a smaller held_out"
        )


def _check_dense(model: PreTrainedModel, dense: PreTrainedModel | None, config: FineTune) -> None:
    if (dense is not None) != (config.distill > 0):
        given = "a" if dense is not None else "no"
        raise ValueError(f"distill {config.distill} with {given} dense model; give both or neither")
    if dense is model:
        raise ValueError("the dense model is the pruned one itself; load it again: dense, _ = besa.load_model(...)")
    sizes = [network.get_input_embeddings().num_embeddings for network in (model, dense) if network is not None]
    if len(set(sizes)) > 1:
        raise ValueError(f"the dense model has {sizes[1]} token ids, the pruned one {sizes[0]}; take the one it was")


def _identity(
    model: PreTrainedModel, windows: Tensor, pruned: Pruned, config: FineTune, dense: PreTrainedModel | None
) -> dict[str, Any]:
    """What a run is made of."""
    return {
        "config": config.config(),
        "windows": tensor_sha256(windows),
        "masks": sum_of(pack_bits(pruned[key][1]) for key in sorted(pruned)),
        "weights": sum_of_weights(model),
        "dense model": sum_of_weights(dense) if dense is not None else None,
        "device": model.device.type,
    }


def _check_zeros(pruned: Pruned) -> None:
    """Every pruned weight is 0.

    Raises:
        RuntimeError: one is not, which is a fault of besa.
    """
    for (index, name), (projection, keep_mask) in pruned.items():
        if _count_alive(projection.weight, keep_mask):
            raise RuntimeError(f"block {index}, {name}: a pruned weight is not 0 any more; do not use this model")


class _Masters:
    """The weights in float32; gradients of the pruned ones are dropped, and AdamW leaves a 0 without gradient at 0."""

    def __init__(self, pruned: Pruned) -> None:
        self.pruned = pruned
        self.values = {
            key: nn.Parameter(linear.weight.to(torch.float32, copy=True)) for key, (linear, _) in pruned.items()
        }

    def __enter__(self) -> "_Masters":
        return self

    def __exit__(self, *_: Any) -> None:
        """The model was not touched."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.values.values())

    def of_block(self, index: int) -> dict[str, Float[Tensor, "rows columns"]]:
        """Weights to run a block with."""
        dtype = lambda key: self.pruned[key][0].weight.dtype
        return {key[1]: value.to(dtype(key)) for key, value in self.values.items() if key[0] == index}

    def mask_gradients(self) -> None:
        """Before each step."""
        for key, (_, keep_mask) in self.pruned.items():
            self.values[key].grad.mul_(keep_mask)

    def merge(self, values: list[Tensor]) -> None:
        """Leave these values in the model."""
        _assign([linear.weight for linear, _ in self.pruned.values()], values)


class _Adapters:
    """peft's, in the model until it is left."""

    def __init__(self, model: PreTrainedModel, report: Masks, config: FineTune) -> None:
        from peft import LoraConfig  # slow to import

        from besa.adapters import masked_lora

        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, task_type="CAUSAL_LM")
        with torch.random.fork_rng([]):  # peft draws on the CPU
            torch.default_generator.manual_seed(config.seed)
            self.adapted = masked_lora(model, report, lora)

    def __enter__(self) -> "_Adapters":
        return self

    def __exit__(self, *_: Any) -> None:
        self.adapted.unload()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.adapted.parameters() if parameter.requires_grad]

    def of_block(self, index: int) -> dict[str, Tensor]:
        """Nothing: the block holds its adapters."""
        return {}

    def mask_gradients(self) -> None:
        """The product is masked."""

    def merge(self, values: list[Tensor]) -> None:
        """Leave the sum of weights and these values in the model."""
        _assign(self.parameters, values)
        self.adapted.merge_and_unload()


def _assign(parameters: Sequence[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


class _Training:
    """Steps on windows, and the best weights so far."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Int64[Tensor, "n_samples seq_len"],
        trained: _Masters | _Adapters,
        result: FineTuned,
        dense: PreTrainedModel | None,
    ) -> None:
        self.model, self.trained, self.result, self.dense, self.config = model, trained, result, dense, result.config
        cut = len(windows) - self.config.n_held_out(len(windows))
        self.windows, self.held_out = windows[:cut], windows[cut:]
        self.batches = self.config.batches(cut)
        self.n_steps = len(self.batches)
        self.due = {math.ceil(self.n_steps * n / EVALUATIONS) for n in range(EVALUATIONS + 1)}
        self.calls = {id(network): record_calls(network, windows[:1]) for network in (model, dense) if network}
        self.optimizer = torch.optim.AdamW(trained.parameters, weight_decay=0.0)  # a decay would prune on
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
        self.best = [parameter.detach().clone() for parameter in trained.parameters]

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go to where a run had come, if it had."""
        if state:
            _assign(self.trained.parameters, state["parameters"])
            _assign(self.best, state["best"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.result.steps, self.result.held_out = state["steps"], state["held_out"]

    @property
    def state(self) -> dict[str, Any]:
        """What `resume` takes."""
        return {
            "parameters": [parameter.detach() for parameter in self.trained.parameters],
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.result.steps,
            "held_out": self.result.held_out,
        }

    def run(self, bar: tqdm, state: StateFile) -> None:
        """To the last step, or until the held-out loss has not fallen for long."""
        bar.update(len(self.result.steps))
        if not self.result.held_out:
            self._evaluate(0)
        while not self._finished:
            loss = self._step(len(self.result.steps))
            if (step := len(self.result.steps)) in self.due:
                self._evaluate(step)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{self.result.held_out[-1]['held_out']:.3f}")
            state.write(self.state, at_once=self._finished)

    @property
    def _finished(self) -> bool:
        taken = len(self.result.held_out) - 1
        best = min(range(taken + 1), key=lambda n: self.result.held_out[n]["held_out"])
        return len(self.result.steps) == self.n_steps or taken - best >= self.config.patience

    def _step(self, step: int) -> float:
        """One of AdamW, on a batch of windows."""
        batch, lr = self.batches[step], self.config.lr_at(step, self.n_steps)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = sum(self._loss(self.windows[number : number + 1], 1 / len(batch)) for number in batch) / len(batch)
        if not math.isfinite(loss):
            lower = f"lower lr ({self.config.lr or LR[self.config.kind]})"
            cure = lower if step else way_out(self.model.dtype)  # nothing was changed before the first step
            raise ValueError(f"the loss of step {step + 1} is {loss}; {cure}")
        self.scaler.unscale_(self.optimizer)
        self.trained.mask_gradients()
        nn.utils.clip_grad_norm_(self.trained.parameters, LARGEST_NORM)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        overflow = {"skipped": 1.0} if self.scaler.get_scale() < scale else {}
        self.result.steps.append({"step": step + 1, "lr": lr, "loss": loss} | overflow)
        return loss

    def _evaluate(self, step: int) -> None:
        """The held-out loss; the weights are kept where it is the least so far."""
        loss = sum(self._loss(window) for window in self.held_out.split(1)) / len(self.held_out)
        loss = loss if math.isfinite(loss) else math.inf  # never the best
        if not self.result.held_out or loss < min(row["held_out"] for row in self.result.held_out):
            _assign(self.best, self.trained.parameters)
        self.result.held_out.append({"step": step, "held_out": loss})

    def _loss(self, window: Int64[Tensor, "1 seq_len"], share: float = 0.0) -> float:
        """In nats per token; with a share of the batch, what is trained on, and its gradient is added up.

        The head runs on a few tokens at a time, and each part's gradient goes back to the hidden states at once: the
        logits of a window never exist together.
        """
        hidden, call = self._hidden(self.model, window)
        wanted = self._hidden(self.dense, window) if self.dense is not None and share else None
        states, total = hidden.detach().requires_grad_(share > 0), 0.0
        n, n_ids = window.shape[1] - 1, self.model.get_input_embeddings().num_embeddings
        size = max(1, LOGITS_AT_ONCE // n_ids)
        for start in range(0, n, size):
            part = slice(start, min(n, start + size))
            loss = self._part_loss(
                states[:, part], call, window[0, 1:][part], wanted and (wanted[0][:, part], wanted[1])
            )
            if share:
                self.scaler.scale(loss * (share / n)).backward()
            total += float(loss.detach()) / n
        if share:
            hidden.backward(states.grad)
        return total

    def _hidden(self, network: PreTrainedModel, window: Tensor) -> tuple[Float[Tensor, "1 seq_len hidden"], BlockCall]:
        """What leaves the last block; with gradients through the weights that are trained."""
        hidden, calls = embed(network, window), self.calls[id(network)]
        training = network is self.model
        with torch.set_grad_enabled(training and torch.is_grad_enabled()):
            for index, (block, call) in enumerate(zip(find_blocks(network), calls, strict=True)):
                hidden = run_block(block, hidden, call, self.trained.of_block(index) if training else None)
        return hidden, calls[0]

    def _part_loss(
        self,
        states: Float[Tensor, "1 n hidden"],
        call: BlockCall,
        labels: Int64[Tensor, "n"],
        wanted: tuple[Float[Tensor, "1 n dense_hidden"], BlockCall] | None,
    ) -> Float[Tensor, ""]:
        """Of a few tokens, summed."""
        logits = run_head(self.model, states, call)[0].float()  # (n, vocab)
        loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
        if wanted is None:
            return loss
        with torch.no_grad():
            dense = run_head(self.dense, *wanted)[0].float().log_softmax(-1).to(logits.device)
        divergence = F.kl_div(logits.log_softmax(-1), dense, log_target=True, reduction="sum")
        return (1 - self.config.distill) * loss + self.config.distill * divergence
