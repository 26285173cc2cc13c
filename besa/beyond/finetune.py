"""Train a pruned model on the next token of the calibration windows; pruned weights stay zero."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Int64
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from besa.beyond.adapters import KeepZeros, masked_lora, pruned_linears
from besa.config import checked
from besa.report import Report
from besa.system import n_ranks, set_precision


@checked
def finetune(
    model: PreTrainedModel,
    windows: Int64[Tensor, "n_samples seq_len"],
    report: Report | Mapping[tuple[int, str], Tensor],
    *,
    lr: float | None = None,
    epochs: int = 1,
    batch_size: int = 2,
    max_length: int = 512,
    lora: LoraConfig | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> None:
    """Train all weights but the embeddings, in place; zeros stay zero.

    Adam with a warm-up of a tenth of the steps and a cosine to 0, in float32 with bfloat16 autocast: 16 bytes of memory
    per weight, with `lora` 4 and the adapters. The model then has its own precision again.

    Args:
        windows: token ids, such as the calibration windows.
        report: what `prune` returned, or keep-masks by (block, projection).
        lr: Adam's highest step size; None takes 2e-4 with `lora`, else that of `step_size`: 2e-4 for SmolLM2-135M, 7e-6
            for Gemma 3 270M.
        batch_size: windows, or their parts, per step, over all ranks.
        max_length: windows with more tokens are cut into equal parts.
        lora: train masked adapters instead, which are merged.
        folder: save the state here after each epoch; the same call continues from it.
    """
    dtype = model.dtype
    length = windows.shape[1] // -(-windows.shape[1] // max_length)
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    set_precision(model, torch.float32)
    trained = masked_lora(model, report, lora) if lora else model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    with tempfile.TemporaryDirectory() as temporary, torch.random.fork_rng():  # the Trainer sets the seed
        arguments = TrainingArguments(
            str(folder or temporary),
            num_train_epochs=epochs,
            per_device_train_batch_size=max(1, batch_size // n_ranks()),
            learning_rate=lr or (2e-4 if lora else step_size(model, report)),
            lr_scheduler_type="cosine",
            warmup_steps=0.1,  # below 1: a share of the steps
            adam_beta2=0.95,
            max_grad_norm=0,
            bf16=True,
            seed=0,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=False,
            save_strategy="epoch" if folder else "no",
            report_to="none",
            disable_tqdm=not progress,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # else the Trainer multiplies the batch by the GPUs of the machine
        trainer = Trainer(
            trained,
            arguments,
            train_dataset=[  # pyright: ignore[reportArgumentType]
                {"input_ids": part, "labels": part} for part in windows.unfold(1, length, length).flatten(0, 1)
            ],
            callbacks=[] if lora else [KeepZeros(model, report)],
        )
        trainer.train(resume_from_checkpoint=bool(folder and list(Path(folder).glob("checkpoint-*"))))
    if lora:
        trained.merge_and_unload()  # pyright: ignore[reportCallIssue]
    set_precision(model, dtype)
    for parameter in model.eval().parameters():
        parameter.requires_grad_(parameter in trainable)


def step_size(model: PreTrainedModel, report: Report | Mapping[tuple[int, str], Tensor]) -> float:
    """7e-3 of the mean square of the pruned projections' weights, zeros included, to one digit.

    Fitted on SmolLM2-135M and Gemma 3 270M.
    """
    weights = [linear.weight.detach() for linear, _ in pruned_linears(model, report)]
    return float(f"{7e-3 * sum(float(w.square().sum()) for w in weights) / sum(w.numel() for w in weights):.0e}")
