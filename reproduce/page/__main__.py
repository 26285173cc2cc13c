"""Write the generated parts of README.md, and the report reproduce/README.md, from results/reference.

`python -m reproduce.page` writes both; `--show table1 --results results` prints what a notebook left there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from besa.data.files import atomic_write
from reproduce import ROOT
from reproduce.drawing.tables import over_seeds, summary
from reproduce.page import sentences
from reproduce.page.load import MODEL, load
from reproduce.page.scorecard import scorecard
from reproduce.records import slug


def parts() -> dict[str, str]:
    """The generated parts of README.md by marker."""
    same = "We ran the authors' code on the same weights and tokens: BESA's perplexities differ from ours by at most "
    same += f"{sentences.fidelity('besa-row-wise')[1]:.1%} ([fidelity](results/reference/fidelity/fidelity.ipynb))."
    return {
        "snippet": sentences.snippet(),
        "results": f"{table(sentences.results_table())}\n\n{same}",
        "compared": f"{table(sentences.compared())}\n\n{sentences.gain()} {sentences.gain_on_gemma()}",
        "cost": sentences.cost(),
    }


def fill(text: str, generated: Mapping[str, str]) -> str:
    """Replace what stands between the markers `<!-- name -->` and `<!-- end -->`."""
    for name, part in generated.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        escaped = part.replace("\\", r"\\")
        text, n = re.subn(pattern, rf"\g<1>{escaped}\n\g<2>", text, flags=re.DOTALL)
        if n != 1:
            raise ValueError(f"{n} markers <!-- {name} --> in README.md")
    return text


def report() -> str:
    """The report: a line per claim, then the summary of the ML Reproducibility Challenge."""
    template = (ROOT / "reproduce" / "report.md").read_text(encoding="utf-8")
    step, perplexity = sentences.fidelity()
    records = load("table1", model=MODEL, profile="paper", calibration="sotu", row="wanda")
    own, matched = (
        over_seeds(summary([record for record in records if ("matched_to" in record["config"]) == is_matched])).iloc[0]
        for is_matched in (False, True)
    )
    lower = 1 - matched["wiki"] / own["wiki"]
    matching = f"Wanda has {lower:.1%} less perplexity at {matched['sparsity']:.3f} than at {own['sparsity']:.3f}"
    filled = {
        "scorecard": table(scorecard()),
        "beyond": table(scorecard(of_the_paper=False)),
        "step": f"{step:.2%}",
        "perplexity": f"{perplexity:.1%}",
        "cost": sentences.cost(),
        "matching": matching,
        "plain": sentences.plain_softmax(),
        "evidence": sentences.evidence(),
    }
    return re.sub(r"\{(\w+)\}", lambda match: filled[match[1]], template)


def shown(item: str, folder: Path) -> str:
    """The tables that the newest run of a notebook left in a folder."""
    written = sorted(folder.glob("*.md"), key=lambda path: path.stat().st_mtime_ns)
    if not written:
        raise typer.BadParameter(f"no table of {item} in {folder}; run `make {item}` first")
    runs = {f"{slug(record['config']['model'])}-{record['config']['profile']}" for record in load(item, folder.parent)}
    run = next((run for run in runs if written[-1].stem.startswith(run)), "")
    texts = [path.read_text(encoding="utf-8") for path in written if path.stem.startswith(run)]
    return "\n".join([*texts, *map(str, sorted(folder.glob(f"{run}*.png"))), str(folder / f"{item}.ipynb")])


def main(
    results: Annotated[Path, typer.Option(help="folder of your own runs")] = ROOT / "results",
    show: Annotated[str, typer.Option(help="print the tables of a notebook there, such as table1")] = "",
) -> None:
    """Write README.md's tables and reproduce/README.md from results/reference."""
    if show:
        print(shown(show, results / show))
        return
    readme = ROOT / "README.md"
    pages = {readme: fill(readme.read_text(encoding="utf-8"), parts()), ROOT / "reproduce" / "README.md": report()}
    for path, text in pages.items():
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(path)


def table(frame: pd.DataFrame) -> str:
    """A Markdown table without an index, columns not padded."""
    rows = [[str(cell) for cell in line] for line in frame.itertuples(index=False)]
    names = [name.removeprefix("→ ") for name in frame.columns]
    lines = [names, ["--:" if "→" in name else ":--" for name in frame.columns], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    typer.run(main)
