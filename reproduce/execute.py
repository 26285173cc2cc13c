"""Execute a notebook of this folder, and keep of it what another execution would leave, too.

`python reproduce/execute.py results/table1/table1.ipynb "profile: quick"`: the folder names the notebook. Without
parameters it takes those that the kept notebook ran with. A run that fails leaves the last good one alone, and its own
beside it under a hidden name.
"""

import logging
import os
from pathlib import Path
from typing import Annotated

import nbformat
import papermill
import typer
import yaml
from nbclient.exceptions import DeadKernelError

HERE = Path(__file__).resolve().parent


def execute(
    output: Annotated[Path, typer.Argument(help="executed notebook: results/ITEM/NAME.ipynb")],
    parameters: Annotated[str | None, typer.Argument(help="YAML; by default those that OUTPUT ran with")] = None,
) -> None:
    """Execute reproduce/ITEM.ipynb into OUTPUT."""
    folder = output.absolute().parent
    notebook = HERE / f"{folder.name}.ipynb"
    if not notebook.is_file():
        raise typer.BadParameter(f"{output} lies in no folder that is named for a notebook of {HERE}")
    if not parameters and not output.is_file():
        raise typer.BadParameter(f"{output} is not there: give it parameters, such as 'profile: quick'")
    given = yaml.safe_load(parameters) if parameters else read(output).metadata.papermill.parameters
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["BESA_RESULTS"] = str(folder.parent)  # where its records are
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}")
    try:
        papermill.execute_notebook(notebook, unfinished, given, log_output=True)
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        raise SystemExit(f"{error}\n{unfinished} is what it left") from None
    nbformat.write(repeatable(read(unfinished)), unfinished)
    unfinished.replace(output)


def repeatable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without when and where it ran: the same records then make the same bytes. Parameters and tags stay."""
    about, language = notebook.metadata, notebook.metadata.language_info
    notebook.metadata = {
        "kernelspec": about.kernelspec,
        "language_info": {name: value for name, value in language.items() if name != "version"},
        "papermill": {"parameters": about.papermill.parameters},
    }
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata.tags}
        if "injected-parameters" in cell.metadata["tags"]:
            cell.id = "parameters"  # papermill's own is drawn
    return nbformat.from_dict(notebook)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


if __name__ == "__main__":
    typer.run(execute)
