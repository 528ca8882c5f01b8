"""`iha lab theory`, each experiment by its name, and `iha lab report`: the paper on trial."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from iha_lab.cli.console import Live, quiet_libraries

app = typer.Typer(help="The paper's claims, each as a command.", no_args_is_help=True)

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of results; default: in runs/.")
]


@app.command()
def theory(output: Output = None) -> None:
    """Every theorem as a construction through the real operator: a table, a verdict, figures."""
    from iha_lab.theory import run

    with Live() as console:
        file = run(output or Path("runs/theory"), console)
        console.say(f"Written: {file}, and figures beside it.")


@app.command("composition", help="R∘R and R∘R∘R of random Boolean matrices, one layer.")
@app.command("retrieval", help="Multi-key retrieval and its kin, trained short and tested long.")
@app.command("lm", help="Train a decoder on text.")
@app.command("shift-bank", help="One attention layer learns to look back by every offset.")
@app.command("recall", help="Which value did this pair of tokens have? Trained short, tested long.")
def experiment(
    context: typer.Context,
    scale: Annotated[
        str, typer.Option(help="A config of the package: small (two CPU cores), paper …")
    ] = "small",
    config: Annotated[
        Path | None, typer.Option(help="A YAML config of your own instead, as results hold them.")
    ] = None,
    output: Output = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs side by side. Default: cores, or one on a GPU.")
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(help="For lm: starts each run, such as 'torchrun --nproc-per-node 2'."),
    ] = None,
) -> None:
    from iha_lab.experiments import configs, load, read
    from iha_lab.experiments.runner import run_all
    from iha_lab.experiments.summary import summarize
    from iha_lab.report import lab_page

    kind = str(context.info_name)
    if launcher is not None and kind != "lm":
        raise ValueError(f"launcher is for lm; {kind} runs in one process.")
    quiet_libraries()
    if config is None:
        known = configs(kind)
        if scale not in known:
            raise ValueError(f"scale must be one of {', '.join(sorted(known))}, got {scale!r}.")
        config = known[scale]
    chosen = read(config)
    if chosen.model_dump()["experiment"] != kind:
        raise ValueError(f"config {str(config)!r} is of another experiment than {kind}.")
    output = output or Path("runs") / config.stem
    options: dict[str, Any] = {"jobs": jobs}
    if launcher is not None:
        options["command"] = [*shlex.split(launcher), "-m", "iha_lab.experiments"]
    with Live() as console:
        failed = run_all(chosen, output, console, **options)
        if len(failed) < len(chosen.runs()):
            for compared in summarize(load(output)):
                table = lab_page.table(compared)
                console.table(table.title or kind, table.columns, table.rows)
            console.say(f"Written: {lab_page.write([output], output)}.")
    if failed:
        print(f"{len(failed)} runs failed; the same command tries them again.", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that the lab has written.")],
    output: Output = None,
) -> None:
    """One self-contained page with tables, intervals over seeds and figures."""
    from iha_lab.report.lab_page import write

    if output is None and len(folders) > 1:
        raise ValueError("output must be given for several folders: the page is about all of them.")
    page = write(folders, output or folders[0])
    print(f"{page} is the page; its figures are beside it.")
