"""The main job: a real model upcycled, checked, fine-tuned beside its plain self, and pictured."""

from __future__ import annotations

import copy
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import iha
from iha.checks import checked_size
from iha_lab import models
from iha_lab.console import Console
from iha_lab.data import retrieval
from iha_lab.inspection import mixing_layers
from iha_lab.report import figures, pages
from iha_lab.report import quickstart_page as report
from iha_lab.stats import Accuracy, Mean
from iha_lab.train.finetuning import Recipe, train

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Write the first line of a story about a dragon.",
)
NEW_TOKENS = 40
FEW = 8  # questions among which one is shown
PLAN = """\
1. Put IHA into {name}, and check that it still writes the same.
2. Train it beside its plain self, {steps} steps each, to find numbers in a text, and ask both.
3. Save it, and load it in a fresh process.
4. Write a report with figures, {page}.
About four minutes on two free cores. Ctrl-C stops it; nothing is left but {output}."""
NEXT = """\
Look into it:       iha inspect {model} -o {output}/inside.html
Talk to it:         iha generate {model} "Write a haiku about rain."
Use your own text:  iha finetune {name} my-text.txt -p 2 -o runs/mine"""


def quickstart(
    name: str, output: Path, pseudo_heads: int, questions: int, recipe: Recipe, console: Console
) -> Path:
    """Run everything; return the path of report.html. What an earlier run left is replaced."""
    checked_size("questions", questions)
    task = retrieval.RetrievalTask(seed=recipe.seed)
    console.section("Interleaved Head Attention: quickstart")
    page = output / report.PAGE
    console.say(PLAN.format(name=name, steps=recipe.steps, output=output, page=page))
    console.section(f"1. Upcycle {name} with {pseudo_heads} pseudo-heads")
    original, tokenizer = models.load(name)
    torch.manual_seed(recipe.seed)
    mixed = iha.upcycle(copy.deepcopy(original), pseudo_heads)
    difference, size = _compare_logits(original, mixed, tokenizer)
    console.say(f"largest logit difference {difference:.1e}, on logits of size {size:.0f}")
    texts: list[report.Text] = []
    tell = console.steps("write", len(PROMPTS))
    for prompt in PROMPTS:
        pair = (
            models.complete(model, tokenizer, prompt, NEW_TOKENS, chat=True)
            for model in (original, mixed)
        )
        texts.append(report.Text(prompt, *pair))
        tell(len(texts), "")
    console.table(
        "What they write",
        ["prompt", "original", "upcycled"],
        [[text.prompt, text.original, text.upcycled] for text in texts],
    )

    console.section("2. Fine-tune both on multi-key retrieval")
    learned = task.questions("train", recipe.steps * recipe.batch_size)
    asked = task.questions("held-out", questions)
    console.say(_how_long(original, mixed, tokenizer, asked, recipe))
    question, before = _too_hard(original, tokenizer, asked[:FEW])
    accuracies: dict[str, Accuracy] = {}
    losses: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for label, model in (
        ("before training", original), ("plain, trained", original), ("IHA, trained", mixed),
    ):  # fmt: skip
        short = label.split(",")[0]
        if label.endswith("trained"):
            tell, start = console.steps(f"train {short}", recipe.steps), time.perf_counter()
            run = train(
                model,
                tokenizer,
                retrieval.examples(learned, tokenizer),
                recipe,
                None,
                lambda step, loss, tell=tell: tell(step, f"loss {loss:.2f}"),
            )
            if not run.finished:
                raise KeyboardInterrupt
            losses[label], seconds[label] = run.losses, (time.perf_counter() - start) / recipe.steps
        tell = console.steps(f"ask {short}", questions)
        accuracies[label] = retrieval.evaluate(
            model, tokenizer, asked, progress=lambda done, tell=tell: tell(done, "")
        )
    verdict = report.verdict(*list(accuracies.values())[1:])
    console.table(
        f"{len(asked)} questions about held-out keys, {task.num_facts} facts per passage",
        ["model", "right answers (95 % interval)", "seconds per step"],
        [
            [label, str(accuracy), f"{seconds[label]:.2f}" if label in seconds else ""]
            for label, accuracy in accuracies.items()
        ],
    )
    console.say(verdict)
    slower = seconds["IHA, trained"] / seconds["plain, trained"]
    price = report.price(slower, pseudo_heads)
    console.say(price)

    console.section("3. Save, load in a fresh process, ask")
    folder = output / "model"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    models.save(mixed, tokenizer, folder)
    tell = console.steps("load and ask", 1)
    answer = _ask_in_a_fresh_process(folder, question, tokenizer)
    tell(1, "")
    console.say(question.prompt)
    console.say(f"{question.answer} is right. Before training: {before}. IHA, trained: {answer}.")

    console.section("4. Report")
    versions = (
        f"iha {iha.__version__}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, Python {platform.python_version()},"
        f" {torch.get_num_threads()} threads, seed {recipe.seed}."
    )
    mixing = sum(p.numel() for p in iha.mixing_parameters(mixed))
    page = report.write(
        report.Report(
            model=name,
            pseudo_heads=pseudo_heads,
            parameters=sum(p.numel() for p in original.parameters()),
            mixing_parameters=mixing,
            logit_difference=difference,
            logit_size=size,
            texts=texts,
            task=(
                f"Passages of {task.num_facts} facts with {task.digits}-digit values; the questions"
                " are about keys that no training passage had."
            ),
            recipe=(
                f"{recipe.steps} steps of {recipe.batch_size} passages, the same for both models,"
                f" AdamW, learning rate {recipe.learning_rate:g} (mixing tensors"
                f" {recipe.mixing_learning_rate:g})."
            ),
            accuracies=accuracies,
            seconds_per_step=seconds,
            verdict=verdict,
            price=price,
            question=question.prompt,
            before=before,
            answer=answer,
            expected=question.answer,
            figures=_figures(mixed, tokenizer, losses, question),
            versions=versions,
        ),
        output,
    )
    console.say(f"{page} has the figures; the trained model is in {folder}.")
    console.section("Next")
    console.say(NEXT.format(name=name, model=folder, output=output))
    return page


@torch.no_grad()
def _compare_logits(original: Any, mixed: Any, tokenizer: Any) -> tuple[float, float]:
    """(largest difference, largest logit) over the prompts."""
    difference = size = 0.0
    for prompt in PROMPTS:
        given = models.encode(tokenizer, prompt)
        expected = original(**given).logits
        difference = max(difference, float((mixed(**given).logits - expected).abs().max()))
        size = max(size, float(expected.abs().max()))
    return difference, size


def _how_long(
    original: Any,
    mixed: Any,
    tokenizer: Any,
    asked: list[retrieval.Question],
    recipe: Recipe,
) -> str:
    """An estimate from one batch: a training step is about three forward passes of it."""
    took: list[float] = []
    for model in (original, mixed):
        start = time.perf_counter()
        retrieval.evaluate(model, tokenizer, asked[: recipe.batch_size])
        took.append((time.perf_counter() - start) / min(recipe.batch_size, len(asked)))
    plain, iha_model = took
    training = 3 * recipe.steps * recipe.batch_size * (plain + iha_model)
    minutes = (training + len(asked) * (2 * plain + iha_model)) / 60
    return f"This part takes about {max(1, round(minutes))} minutes here, by one batch."


def _too_hard(
    model: Any, tokenizer: Any, asked: list[retrieval.Question]
) -> tuple[retrieval.Question, str]:
    """The first question that the model does not answer yet, if there is one, and its answer."""
    answers = ((question, _continue(model, tokenizer, question)) for question in asked)
    first = next(answers)
    return next((pair for pair in (first, *answers) if pair[1] != pair[0].answer), first)


def _continue(model: Any, tokenizer: Any, question: retrieval.Question) -> str:
    """What the model answers greedily, as many tokens as the right answer has."""
    length = len(tokenizer(question.answer, add_special_tokens=False)["input_ids"])
    return models.complete(model, tokenizer, question.prompt, length).strip()


def _ask_in_a_fresh_process(folder: Path, question: retrieval.Question, tokenizer: Any) -> str:
    length = len(tokenizer(question.answer, add_special_tokens=False)["input_ids"])
    command = [sys.executable, "-m", "iha_lab.cli", "generate", str(folder), question.prompt]
    command += ["--plain", "--max-new-tokens", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the saved model did not load in a fresh process: {done.stderr}")
    return done.stdout.strip()


def _figures(
    model: Any, tokenizer: Any, losses: dict[str, list[float]], question: retrieval.Question
) -> list[pages.Figure]:
    layers = mixing_layers(model)
    name = list(layers)[len(layers) // 2]
    given = tokenizer(question.prompt, return_tensors="pt").to(model.device)
    (pattern,) = iha.attention_patterns(model, given, [name], heads=[0]).values()
    patterns = pattern.pairs[0, 0].permute(1, 3, 0, 2)
    curves = {
        label: [(step, Mean.of([loss])) for step, loss in enumerate(of, 1)]
        for label, of in losses.items()
    }
    return [
        pages.Figure.of(
            figures.curves(curves, "step", "loss on the answers (nats per token)"),
            "Loss curves",
            "Mean loss over the answers' tokens of each training batch.",
        ),
        pages.Figure.of(
            figures.mixing_maps(layers[name]),
            f"The mixing tensors of {name}, after training",
            "Rows of a map are base heads m (for R: output heads), columns the heads they go into."
            " α^K starts as the identity in every pseudo-head, α^V near it, and R as the last"
            " pseudo-head alone.",
        ),
        pages.Figure.of(
            figures.pattern_maps(patterns),
            f"The {patterns.shape[0] ** 2} attention patterns of head 0 in {name}",
            "On the question above: tokens that ask downwards, tokens that are read to the right."
            " Darker is more weight. Each row of maps shares one softmax.",
        ),
    ]
