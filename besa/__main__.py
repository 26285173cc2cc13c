"""Command line: `python -m besa prune` and `evaluate`."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import besa

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
CLASSES = {name.lower(): name for name in ("Besa", "Exact", "Closed", "Wanda", "SparseGPT", "Magnitude")}
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu or cuda")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Prune language models and evaluate them."""
    if version:
        typer.echo(f"besa {besa.__version__}")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    from besa.system import joined

    warnings.formatwarning = lambda message, *_, **__: f"besa: {message}\n"
    try:
        with joined():
            yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"besa: {error}", err=True)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def _to_be_continued(output: Path) -> Iterator[None]:
    """Say how to go on after an interruption, or when the disk is full."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        done = f"{len(list(output.glob('besa/block-*.json')))} blocks are finished, and the same command continues"
        raise OSError(f"{str(error) or 'interrupted'}; {done}") from error


@app.command()
@_one_line_errors()
def prune(
    source: Annotated[str, typer.Argument(help="folder with safetensors, hub id, llama-7b ..., or smollm2-135m")],
    output: Annotated[Path, typer.Argument(help="new folder, or one in which this run was interrupted")],
    method: Annotated[str, typer.Option(help=f"{', '.join(CLASSES)}, or package.module:Class")] = "besa",
    sparsity: Annotated[float | None, typer.Option(help="fraction of the weights to set to 0; 0.5 by default")] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of the method, as pattern=2:4, quantize.bits=4; a wrong NAME lists all"),
    ] = None,
    reconstruct: Annotated[bool, typer.Option("--reconstruct", help="give kept weights new values")] = False,
    calibration: Annotated[str | None, typer.Option(help="text: c4, wikitext2, sotu, or a .txt or .jsonl file")] = None,
    n_samples: Annotated[int, typer.Option(help="calibration windows", min=1)] = 128,
    seq_len: Annotated[int, typer.Option(help="tokens per window", min=2)] = 2048,
    seed: Annotated[int, typer.Option(help="seed for drawing the windows")] = 0,
    sampler: Annotated[
        Literal["crop", "pack"], typer.Option(help="crop long documents, or cut all of them, joined")
    ] = "crop",
    finetune: Annotated[bool, typer.Option("--finetune", help="then train the kept weights on the windows")] = False,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Prune the checkpoint SOURCE into OUTPUT with one block in memory; the same command continues after a kill.

    Calibrates on c4 by default, on sotu for the embedded models. torchrun -m besa prune ... shares the windows.
    """
    from besa.data.models import EMBEDDED, load_tokenizer

    chosen = build_method(method, sparsity, fields or [])
    text = calibration or ("sotu" if source in EMBEDDED else "c4")
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    windows = besa.calibration_windows(text, tokenizer, n_samples, seq_len, seed, sampler)
    pruned = output / "besa" / "pruned" if finetune else output
    with _to_be_continued(pruned):
        report = besa.prune_checkpoint(
            source,
            pruned,
            windows,
            chosen,
            device=device,
            reconstruct=besa.Reconstruct() if reconstruct else None,
            trust_remote_code=trust_remote_code,
        )
        if finetune and not (output / "tokenizer_config.json").exists():  # written last
            model, _ = besa.load_model(pruned, device=device, trust_remote_code=trust_remote_code)
            besa.finetune(model, windows, report, folder=output / "besa" / "epochs")
            besa.save_model(model, tokenizer, output)
    _say(f"{report}\nwrote {output}")


def build_method(name: str, sparsity: float | None, settings: list[str]) -> Any:
    """A method by its name, with fields given as "name=value" and checked by pydantic."""
    from pydantic import TypeAdapter, ValidationError

    from besa.config import first_problem, method_class, refuse_unknown

    if ":" not in name and name not in CLASSES:
        raise ValueError(f"unknown method {name!r} (known: {', '.join(CLASSES)}, or package.module:Class)")
    kind: Any = method_class(name) if ":" in name else getattr(besa, CLASSES[name])
    fields: dict[str, Any] = {}
    if sparsity is not None:
        fields["sparsity"] = sparsity
    for setting in settings:
        path, _, value = setting.partition("=")
        outer, _, inner = path.partition(".")
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        fields[outer] = fields.get(outer, {}) | {inner: value} if inner else value
    refuse_unknown(kind, fields)
    try:
        return TypeAdapter(kind).validate_json(json.dumps(fields))
    except ValidationError as error:
        raise ValueError(f"method {name}, {first_problem(error)}") from error


@app.command()
@_one_line_errors()
def evaluate(
    model: Annotated[str, typer.Argument(help="folder, hub id, llama-7b ..., or smollm2-135m")],
    texts: Annotated[str, typer.Option(help="perplexity on wiki, sotu, wikitext2, c4, files, by commas")] = "wiki",
    tasks: Annotated[str, typer.Option(help="zero-shot tasks by commas: piqa, boolq, hellaswag, ...")] = "",
    seq_len: Annotated[int, typer.Option(help="tokens per segment", min=2)] = 2048,
    segments: Annotated[int | None, typer.Option(help="segments per text; all by default", min=1)] = None,
    limit: Annotated[int | None, typer.Option(help="questions per task; all by default", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; fastest by default")] = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Print perplexity and zero-shot accuracy of a model."""
    loaded, tokenizer = besa.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    for text in filter(None, texts.split(",")):
        tokens = besa.test_tokens(text, tokenizer)[: segments and segments * seq_len]
        _say(f"perplexity on {text}: {besa.perplexity(loaded, tokens, seq_len):.4f}")
    if tasks:
        _say(besa.zero_shot(loaded, tokenizer, tasks.split(","), limit).to_frame().to_string())


def _say(text: str) -> None:
    from besa.system import rank

    if rank() == 0:
        typer.echo(text)


if __name__ == "__main__":
    app()
