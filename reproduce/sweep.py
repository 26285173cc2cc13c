"""Run notebooks over models, methods or both, as jobs on this machine or on Slurm, and continue what is unfinished.

`python reproduce/sweep.py --models llama-7b,llama-13b --notebooks table1,table2 --cluster slurm --gpus 1`. A model
takes its recipe from reproduce/params, a cell that is finished with the same parameters is skipped, and a failed one
never takes the others along: its log is named at the end, and the exit status is 1.
"""

import itertools
import json
import os
import re
import time
from pathlib import Path
from typing import Annotated, Any

import papermill
import submitit
import torch
import typer
import yaml
from tqdm.auto import tqdm

from besa.machine.provenance import ROOT
from besa.paper.tables import slug

HERE = Path(__file__).resolve().parent


def cells(models: str, notebooks: str, methods: str, extra: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a cell -> what papermill is given; the name is that of the executed notebook too.

    Raises:
        typer.BadParameter: a notebook that is not there, a method whose name is none of a file, or a parameter that no
            notebook has.
    """
    found, known, unused = {}, sorted(path.stem for path in HERE.glob("*.ipynb")), dict(extra)
    parts = ([part.strip() for part in names.split(",")] for names in (notebooks, models, methods))
    for notebook, model, method in itertools.product(*parts):
        if notebook not in known:  # "../x" may be a file, too
            raise typer.BadParameter(f"unknown notebook {notebook!r}; known: {', '.join(known)}")
        if not re.fullmatch(r"[\w.-]*", method):
            raise typer.BadParameter(f"method {method!r} would name a file; take letters, digits, '.', '_' and '-'")
        recipe = HERE / "params" / f"{model}.yaml"
        own = Path(model).name == model and recipe.is_file()  # not of a folder that happens to lie beside a yaml
        given = inspected(notebook)
        unused = {key: value for key, value in unused.items() if key not in given}
        if method and "methods" not in given:
            raise typer.BadParameter(f"{notebook} has no methods to run apart, but {', '.join(given)}")
        parameters = (yaml.safe_load(recipe.read_text()) if own else {}) | {"model": model} | extra
        parameters |= {"methods": method} if method else {}
        name = "-".join(filter(None, (notebook, slug(model), method)))
        if name in found:
            raise typer.BadParameter(f"two models of {models!r} would both be called {name!r}; sweep them apart")
        found[name] = {key: value for key, value in parameters.items() if key in given}
    for key in unused:
        raise typer.BadParameter(f"no parameter {key!r} in {notebooks}; {notebook} has {', '.join(given)}")
    return found


def inspected(notebook: str) -> list[str]:
    """The parameters that a notebook has: a recipe may hold others, for other notebooks."""
    return list(papermill.inspect_notebook(HERE / f"{notebook}.ipynb"))


def parsed(parameter: str) -> tuple[str, Any]:
    """Name and value of NAME=VALUE.

    Raises:
        typer.BadParameter: it is something else.
    """
    name, equals, value = parameter.partition("=")
    try:
        if equals:
            return name, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise typer.BadParameter(f"parameter {parameter!r} is not NAME=VALUE, with a value in YAML")


def run_cell(notebook: str, output: Path, parameters: dict[str, Any], gpus: str | None) -> None:
    """In the job's process.

    Args:
        gpus: the numbers of those it may use; None leaves that to the cluster.
    """
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}")  # what another run left stays until this one is through
    papermill.execute_notebook(HERE / f"{notebook}.ipynb", unfinished, parameters, progress_bar=False)
    unfinished.replace(output)


def is_finished(output: Path, parameters: dict[str, Any]) -> bool:
    """Whether the executed notebook is there, ran through, and had these parameters."""
    if not output.is_file():
        return False
    try:
        about = json.loads(output.read_text())["metadata"]["papermill"]
    except (ValueError, KeyError):  # cut short while it was written
        return False
    return about["exception"] is None and about["end_time"] is not None and about["parameters"] == parameters


def main(
    models: Annotated[str, typer.Option(help="comma-separated: llama-7b, ..., smollm2-135m, folders, hub ids")],
    notebooks: Annotated[str, typer.Option(help="comma-separated: table1, table2, ...")] = "table1",
    methods: Annotated[str, typer.Option(help="comma-separated; one job each; by default a notebook's own rows")] = "",
    parameter: Annotated[list[str] | None, typer.Option("--parameter", "-p", help="NAME=VALUE for every cell")] = None,
    cluster: Annotated[str, typer.Option(help="local, slurm, or debug (in this process)")] = "local",
    parallel: Annotated[int, typer.Option(help="jobs at a time", min=1)] = 1,
    gpus: Annotated[int, typer.Option(help="per job; without any, a job computes on CPUs")] = 0,
    hours: Annotated[int, typer.Option(help="time limit of a job", min=1)] = 24,
    slurm: Annotated[list[str] | None, typer.Option(help="for sbatch: partition=a100, mem=64G, exclusive, ...")] = None,
    folder: Annotated[Path, typer.Option(help="for executed notebooks and logs")] = ROOT / "results" / "sweep",
) -> None:
    """Run every cell of notebooks x models x methods that is not finished."""
    extra, todo = dict(map(parsed, parameter or [])), {}
    for name, parameters in cells(models, notebooks, methods, extra).items():
        if is_finished(folder / f"{name}.ipynb", parameters):
            typer.echo(f"finished before: {name}")
        else:
            todo[name] = parameters
    if cluster == "local" and parallel * gpus > torch.cuda.device_count():
        raise typer.BadParameter(
            f"{parallel} jobs of {gpus} GPU(s) at a time, but this machine has {torch.cuda.device_count()}"
        )
    executor = submitit.AutoExecutor(folder=folder / "logs", cluster=cluster)
    asked = {name: value if equals else True for name, equals, value in (each.partition("=") for each in slurm or [])}
    executor.update_parameters(timeout_min=60 * hours, gpus_per_node=gpus or None, slurm_additional_parameters=asked)
    failed = run_all(executor, todo, folder, parallel, gpus)
    for name, log in failed.items():
        typer.echo(f"failed: {name}, see {log}", err=True)
    raise typer.Exit(1 if failed else 0)


def run_all(
    executor: submitit.AutoExecutor, todo: dict[str, dict[str, Any]], folder: Path, parallel: int, gpus: int
) -> dict[str, Path]:
    """At most `parallel` jobs at a time, on this machine each on its own GPUs; returns the failed ones' logs.

    Interrupted, it ends those that run: Ctrl-C may have reached this process alone.
    """
    waiting, running, failed = list(todo), {}, {}
    places = list(range(parallel))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(parallel * gpus)))
    own = lambda place: ",".join(visible.split(",")[place * gpus : (place + 1) * gpus])
    bar = tqdm(total=len(todo), unit="cell")
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                name, place = waiting.pop(0), places.pop()
                output, numbers = folder / f"{name}.ipynb", own(place) if executor.cluster == "local" else None
                job = executor.submit(run_cell, name.partition("-")[0], output, todo[name], numbers)
                running[name] = job, place
            time.sleep(0.5)
            for name, (job, place) in [(name, entry) for name, entry in running.items() if entry[0].done()]:
                del running[name]
                places.append(place)
                if job.exception() is not None:
                    failed[name] = job.paths.stderr
                bar.update()
    finally:
        bar.close()
        for job, _ in running.values():
            job.cancel()
    return failed


if __name__ == "__main__":
    typer.run(main)
