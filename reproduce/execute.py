"""Execute a notebook of this folder: `python -m reproduce.execute results/ITEM/NAME.ipynb` runs reproduce/ITEM.ipynb.

Without parameters it takes those that the existing output was made with. The same records give the same bytes.
"""

import logging
import os
from pathlib import Path
from typing import Annotated

import nbformat
import papermill
import typer
import yaml

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(
    output: Annotated[Path, typer.Argument(help="executed notebook: results/ITEM/NAME.ipynb")],
    parameters: Annotated[str | None, typer.Argument(help="YAML; by default those that OUTPUT was made with")] = None,
) -> None:
    """Execute reproduce/ITEM.ipynb into OUTPUT."""
    folder = output.absolute().parent
    if parameters is None and not output.is_file():
        raise typer.BadParameter(f"{output} does not exist: give parameters, such as 'profile: quick'")
    given = yaml.safe_load(parameters) if parameters else nbformat.read(output, 4).metadata.papermill.parameters
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["BESA_RESULTS"] = str(folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}")  # kept if the notebook fails
    papermill.execute_notebook(HERE / f"{folder.name}.ipynb", unfinished, given, cwd=HERE.parent, log_output=True)
    nbformat.write(repeatable(nbformat.read(unfinished, 4)), unfinished)
    unfinished.replace(output)


def repeatable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove times, random ids and progress bars."""
    about, language = notebook.metadata, notebook.metadata.language_info
    notebook.metadata = {
        "kernelspec": about.kernelspec,
        "language_info": {name: value for name, value in language.items() if name != "version"},
        "papermill": {"parameters": about.papermill.parameters},
    }
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata.tags}
        if cell.cell_type == "code":
            shown = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [output for output in shown if WIDGET not in output.get("data", {})]
        if "injected-parameters" in cell.metadata["tags"]:
            cell.id = "parameters"
    return nbformat.from_dict(notebook)


if __name__ == "__main__":
    typer.run(execute)
