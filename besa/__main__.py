"""`besa`, or `python -m besa`: prune a checkpoint into another one, pack it, evaluate it, write the embedded one.

What is heavy is imported where it is used, so that `--help` answers at once.
"""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import besa

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="BESA: prune large language models block by block (arXiv 2402.16880).",
)

Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu, cuda")]
SeqLen = Annotated[int, typer.Option(help="tokens per window", min=2)]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run Python code that comes with the source")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"besa {besa.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and stop")
    ] = False,
) -> None:
    pass


def _end(*_: Any) -> None:
    """A scheduler's signal counts as Ctrl-C, once: what is half-written is removed in peace."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _plainly(again: str = "starts anew") -> Iterator[None]:
    """What a user can mend is one line, not a traceback."""
    heeds = "RANK" not in os.environ and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a rank ends at once
    if heeds:
        signal.signal(signal.SIGTERM, _end)
    try:
        from besa.machine import processes

        with processes.joined():
            yield
    except KeyboardInterrupt as error:
        typer.echo(f"besa: interrupted; the same command {again}", err=True)
        raise typer.Exit(130) from error
    except (ValueError, OSError) as error:
        typer.echo(f"besa: {error}", err=True)
        raise typer.Exit(1) from error
    except RuntimeError as error:
        from torch.distributed import DistError

        if "gloo" not in str(error) and not isinstance(error, DistError):
            raise
        typer.echo(f"besa: rank {os.environ['RANK']} lost the others ({str(error).splitlines()[0]})", err=True)
        raise typer.Exit(1) from error
    finally:
        if heeds:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@app.command()
@_plainly("continues")
def prune(
    source: Annotated[str, typer.Argument(help="folder with safetensors, llama-7b ... llama2-70b, or a hub id")],
    output: Annotated[Path, typer.Argument(help="folder to make, or one in which this run was interrupted")],
    method: Annotated[str, typer.Option(help="besa, besa-layer-wise, wanda, sparsegpt or magnitude")] = "besa",
    sparsity: Annotated[
        float | None, typer.Option(help="fraction of the weights to set to 0; 0.5, or what the pattern prunes")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M, such as 2:4: N of M weights stay; N:8 with --budget exact: how many")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="projection or block that stays dense: a name, or re:.*down_proj; repeat it"),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="text to draw from: sotu, c4, wikitext2, ptb, or NAME for $BESA_DATA/NAME")
    ] = "sotu",
    n_samples: Annotated[int, typer.Option(help="calibration windows", min=1)] = 128,
    seq_len: SeqLen = 2048,
    sampler: Annotated[Literal["crop", "pack"], typer.Option(help="how windows are cut")] = "crop",
    seed: Annotated[int, typer.Option(help="by which windows are drawn")] = 0,
    budget: Annotated[
        Literal["penalty", "exact"] | None,
        typer.Option(help="exact: any sparsity, met to the weight; which weights stay is learned, too (BESA)"),
    ] = None,
    reconstruct: Annotated[
        Literal["closed", "block"] | None,
        typer.Option(help="new values for the kept weights: by a closed form, or trained on the block's output, too"),
    ] = None,
    d_coef: Annotated[
        float | None,
        typer.Option(
            help="Prodigy's step size factor (BESA): 5, published also 10 (llama-30b) and 50 (llama-65b, llama2-70b); "
            "layer-wise 0.5, published 0.05 to 50"
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the windows (BESA)")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="windows per step (BESA), a multiple of the ranks; as many as ranks by default", min=1),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="quantize too: 2, 3, 4 or 8 bits per weight (BESA, Wanda)")] = None,
    group_size: Annotated[int | None, typer.Option(help="columns that share a scale; a row by default")] = None,
    device: Device = "auto",
    hidden_states: Annotated[
        Literal["auto", "device", "host", "file"], typer.Option(help="where the hidden states lie")
    ] = "auto",
    trust_remote_code: RemoteCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, show memory and disk, stop")] = False,
) -> None:
    """Prune the checkpoint SOURCE into OUTPUT, one block in memory at a time.

    Interrupted (Ctrl-C, a kill, a full disk), the same command continues. `torchrun --nproc-per-node N -m besa prune
    ...` shares the windows out.
    """
    from besa.inputs.models import load_tokenizer
    from besa.machine import processes
    from besa.machine.device import resolve_device

    resolve_device(device)
    batch_size = batch_size or (processes.n_ranks() if method.startswith("besa") else None)
    fields = {"sparsity": sparsity, "pattern": pattern, "ignore": ignore, "budget": budget, "d_coef": d_coef}
    chosen = _method(method, bits, group_size, **fields, epochs=epochs, batch_size=batch_size)
    tokenizer = load_tokenizer(source, trust_remote_code)  # small files; the weights come once all else is known
    windows = besa.calibration_windows(calibration, tokenizer, n_samples, seq_len, seed, sampler)
    more: dict[str, Any] = {"device": device, "hidden_states": hidden_states, "trust_remote_code": trust_remote_code}
    more["reconstruct"] = besa.Reconstruct(reconstruct) if reconstruct else None
    if dry_run:
        plan = besa.plan_checkpoint(source, output, windows, chosen, **more)
        _say(str(plan))
        return
    report = besa.prune_checkpoint(source, output, windows, chosen, **more)
    _say(f"{report}\n{output} is an ordinary checkpoint: AutoModelForCausalLM.from_pretrained({str(output)!r})")


@app.command()
@_plainly()
def pack(
    source: Annotated[str, typer.Argument(help="folder of a pruned checkpoint: of `besa prune`, or any with zeros")],
    output: Annotated[Path, typer.Argument(help="folder to make")],
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a pruned checkpoint packed, one block in memory at a time: a bit per weight and what survived.

    After `import besa`, `from_pretrained` loads it, and it is multiplied as it is.
    """
    from besa.checkpoint.pack import pack_checkpoint
    from besa.checkpoint.plan import gib

    before, after = pack_checkpoint(source, output, trust_remote_code)
    _say(f"wrote {output}: {after / before:.3f} of the {gib(before)} of weights in {source}")


@app.command()
@_plainly("starts anew, or continues from --checkpoint")
def evaluate(
    source: Annotated[str, typer.Argument(help="folder, llama-7b ... llama2-70b, smollm2-135m or a hub id")],
    texts: Annotated[
        str,
        typer.Option(
            help="perplexity on wiki, sotu, wikitext2, c4, ptb, $BESA_DATA/NAME as NAME, by commas; '' for none"
        ),
    ] = "wiki",
    tasks: Annotated[
        str, typer.Option(help="zero-shot: piqa, boolq, hellaswag, winogrande, arc_easy, arc_challenge, by commas")
    ] = "",
    seq_len: SeqLen = 2048,
    max_segments: Annotated[int | None, typer.Option(help="test segments per text; all by default", min=1)] = None,
    limit: Annotated[int | None, typer.Option(help="questions per task; all by default", min=1)] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="file for the tasks' answers so far, from which the same command continues")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; what is fast by default")] = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Perplexity and zero-shot accuracy of a model; `torchrun ... -m besa evaluate` shares the segments out."""
    from besa.evaluate.perplexity import count_segments
    from besa.evaluate.tasks import load_task
    from besa.evaluate.zero_shot import check_request
    from besa.inputs.models import load_tokenizer
    from besa.machine.device import resolve_device, resolve_dtype
    from besa.machine.state import StateFile

    resolve_dtype(dtype, resolve_device(device))  # what can be refused is, before a model is loaded
    StateFile(checkpoint, "zero_shot", dict)
    read, asked = ([*filter(None, names.split(","))] for names in (texts, tasks))
    if not read and not asked:
        raise ValueError("there is nothing to measure; name --texts or --tasks")
    if asked:
        check_request(asked, limit)
    elif limit or checkpoint:
        raise ValueError("--limit and --checkpoint apply to zero-shot questions; name --tasks, too")
    tokenizer = load_tokenizer(source, trust_remote_code)
    most = max_segments and max_segments * seq_len
    streams = {text: besa.test_tokens(text, tokenizer)[:most] for text in read}
    n_segments = {text: count_segments(tokens, seq_len) for text, tokens in streams.items()}
    for name in asked:
        load_task(name)
    model, _ = besa.load_model(source, dtype, device, trust_remote_code=trust_remote_code)
    for text, tokens in streams.items():
        value = besa.perplexity(model, tokens, seq_len)
        _say(f"perplexity on {text}: {value:.4f} over {n_segments[text]} segments of {seq_len} tokens")
    if asked:
        scores = besa.zero_shot(model, tokenizer, asked, limit, checkpoint=checkpoint)
        _say(scores.to_frame()[["acc", "stderr", "n", "of"]].to_string())


@app.command()
@_plainly()
def export(
    name: Annotated[str, typer.Argument(help="smollm2-135m, llama-7b ..., or a hub id")],
    folder: Annotated[Path, typer.Argument(help="folder to make")],
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; the source's by default")] = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a model, such as the embedded one, as an ordinary checkpoint; with --dtype all of it in memory."""
    from besa.checkpoint import format as checkpoint

    checkpoint.export(name, folder, dtype, trust_remote_code)
    _say(f"wrote {folder}")


def _method(name: str, bits: int | None, group_size: int | None, **fields: Any) -> Any:
    """A method by name; what is None keeps its default."""
    from besa.baselines import named_method

    fields = {field: value for field, value in fields.items() if value is not None}
    if group_size is not None and bits is None:
        raise ValueError(f"group size {group_size} without --bits: nothing is quantized")
    if bits is not None:
        fields["quantize"] = besa.Quantize(bits=bits, group_size=group_size)
    name = {"besa": "besa-row-wise"}.get(name, name)
    taken = {field.name for field in dataclasses.fields(named_method(name))}
    idle = ["bits" if field == "quantize" else field.replace("_", "-") for field in fields if field not in taken]
    if idle:
        raise ValueError(f"--{', --'.join(idle)}: not used by method {name!r}; leave it out")
    return named_method(name, **fields)


def _say(text: str) -> None:
    from besa.machine import processes

    if processes.rank() == 0:
        typer.echo(text)


if __name__ == "__main__":
    app()
