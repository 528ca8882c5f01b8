"""`iha eval`: models on the harness's tasks, compared question by question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from iha_lab.cli.console import Live, quiet_libraries


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Hub names, folders (adapters too), .gguf files, or 'smollm2'. The others are"
            " compared with the first."
        ),
    ],
    suite: Annotated[str, typer.Option(help="ruler, math, code or paper (all three).")] = "ruler",
    tasks: Annotated[
        str | None, typer.Option(help="Some tasks of the harness in place of a suite, with commas.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Lengths of RULER's prompts in tokens, with commas.")
    ] = "4096,8192,16384",
    limit: Annotated[int | None, typer.Option(help="The first N questions of each task.")] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="greedy (as the harness defines each task), pretrained (the paper's: 5 examples,"
            " exact match, Maj@5) or finetuned (the paper's: 16 samples at temperature 0.6, P@1,"
            " Maj@16, P@10)."
        ),
    ] = "greedy",
    data: Annotated[
        Path | None, typer.Option(help="Folder of data sets, under their names on the hub.")
    ] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run programs that models write, in a sandbox.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat format.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Questions a batch.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most. Default: the task's own.")
    ] = None,
    prefill_chunk: Annotated[
        int, typer.Option(help="Tokens of a prompt at a time, which bounds memory; 0: all at once.")
    ] = 256,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path(
        "runs/eval"
    ),
) -> None:
    """Ask models the same questions by EleutherAI's lm-eval, and compare their answers.

    Every answer is kept as it comes: stopped or killed, the same command goes on from there.
    """
    import torch

    from iha_lab.eval import report, run, suites
    from iha_lab.eval.harness import Settings

    quiet_libraries()
    settings = Settings(
        _dtype(torch, dtype), batch_size, prefill_chunk if prefill_chunk > 0 else None, chat
    )
    plan = run.Plan(
        models=tuple(models),
        jobs=tuple(suites.jobs(suite, protocol, _lengths(lengths), _names(tasks), max_new_tokens)),
        output=output,
        limit=limit,
        data=data,
        run_code=run_code,
        settings=settings,
    )
    console = Live()
    try:
        with console:
            result = run.evaluate(plan, console)
    except KeyboardInterrupt:
        console.say(f"Stopped; the answers are in {output}, the same command goes on from there.")
        raise typer.Exit(130) from None
    if result is None:  # not the first process of `accelerate launch`
        return
    scores = report.table(result)
    console.table("", scores.columns, scores.rows)
    console.say(scores.note)
    page = report.write(result, output)
    samples = output / "samples"
    console.say(f"Written: {page}, {output / 'result.json'}, every sample in {samples}.")


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"lengths must be whole numbers with commas, got {text!r}.") from None


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _dtype(torch: Any, name: str) -> Any:
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {name!r}.")
    return getattr(torch, name)
