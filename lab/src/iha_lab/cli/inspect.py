"""`iha inspect`: what training did to the mixing, and where the heads look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iha_lab.cli.console import Live, quiet_libraries

PASSAGE = "Key 417 is 903. Key 471 is 286. Key 714 is 550. What is key 471? Key 471 is 286."


def inspect(
    model: Annotated[str, typer.Argument(help="An upcycled model, as for the other commands.")],
    prompt: Annotated[str, typer.Option(help="What the heads look at.")] = PASSAGE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A page (.html) to click through.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Indices or name patterns, with commas. Default: all.")
    ] = None,
    heads: Annotated[bool, typer.Option("--heads", help="A row for each head.")] = False,
    beside: Annotated[
        str | None,
        typer.Option(
            help="Another model for the page's right side, with the same tokenizer. Default: this"
            " one with its mixing taken back to the start, which is plain attention."
        ),
    ] = None,
) -> None:
    """See what training did to the mixing, and where heads look."""
    import copy

    import iha
    from iha_lab.inspection import inspect as look
    from iha_lab.inspection import mixing_layers, to_exact_start
    from iha_lab.models import load
    from iha_lab.report import inspector

    quiet_libraries()
    found, tokenizer = load(model)
    given = tokenizer(prompt, return_tensors="pt")
    if not given["input_ids"].numel():
        raise ValueError("prompt holds no token; give it some text.")
    chosen, mixings = layer_list(layers), mixing_layers(found)
    with Live() as console:
        tell = console.steps("layers in numbers", len(mixings))
        reports = []
        for i, report in enumerate(look(found, given, chosen)):
            reports.append(report)
            tell(i + 1, report.name)
        table = inspector.numbers(reports, heads)
        console.table(
            f"{model}, on {given['input_ids'].shape[1]} tokens", table.columns, table.rows
        )
        console.say(table.note)
        if output is None:
            return
        other = to_exact_start(copy.deepcopy(found)) if beside is None else load(beside)[0]
        patterns, plain = (iha.attention_patterns(m, given, chosen) for m in (found, other))
        if [p.heads for p in patterns.values()] != [p.heads for p in plain.values()]:
            raise ValueError(f"beside ({beside!r}) has other layers or heads than {model!r}.")
        moved = {r.name: r.distances.sum(1).tolist() for r in reports}
        levels, floor = inspector.write(
            output,
            model=Path(model).name,
            beside="the same, mixing at its start" if beside is None else Path(beside).name,
            tokens=inspector.names(tokenizer, given["input_ids"][0]),
            layers=[
                inspector.Layer(name, one, two, mixings.get(name), moved.get(name, []))
                for (name, one), two in zip(patterns.items(), plain.values(), strict=True)
            ],
            table=inspector.numbers(reports, heads=False),
            tell=console.steps("page", len(patterns)),
        )
        left = f", weights below {floor:.1%} left out" if floor else ""
        megabytes = output.stat().st_size / 1e6
        console.say(f"Written: {output}, {megabytes:.1f} MB, {levels} steps of weight{left}.")


def layer_list(text: str | None) -> list[int | str] | None:
    """Layers as the command line has them: indices or name patterns, with commas."""
    if text is None:
        return None
    return [int(part) if part.strip().isdigit() else part.strip() for part in text.split(",")]
