"""Retrieval in the manner of RULER, trained on short passages and asked on longer ones.

Two ways to start: a small Llama from nothing, whose words are those of the task, or a pretrained
model from the exact start (`init="upcycle"`), where all attentions begin as the same function.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from iha_lab import baselines, models, paper
from iha_lab.baselines import AnyAttention
from iha_lab.data.examples import collator
from iha_lab.data.retrieval import Kind, RetrievalTask, evaluate, lessons, sized
from iha_lab.experiments.config import Progress, Run, Sweep
from iha_lab.experiments.records import Part, Result, thinned
from iha_lab.machine import default_device
from iha_lab.stats import Accuracy
from iha_lab.train.finetuning import optimizer
from iha_lab.train.trainer import fit

FEWEST = 4  # facts of a passage
WORDS = (
    "Key Var Vars They key keys var vars is are what which all values of Question Answer . , : ?"
)


class Decoder(Part):
    """A small Llama with random weights."""

    num_layers: int = pydantic.Field(default=2, ge=1)
    hidden_size: int = pydantic.Field(default=128, ge=1)
    num_heads: int = pydantic.Field(default=8, ge=1)


@dataclasses.dataclass(frozen=True)
class RetrievalRun(Run["Retrieval"]):
    kind: Kind

    def model(self) -> tuple[Any, Any]:
        """Load or build (a model whose attention is not chosen yet, its tokenizer)."""
        sweep, start = self.sweep, self.sweep.start
        if isinstance(start, str):
            torch.manual_seed(self.seed)
            return models.load(start)
        words = word_tokenizer(sweep.digits)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=start.hidden_size,
            intermediate_size=4 * start.hidden_size,
            num_hidden_layers=start.num_layers,
            num_attention_heads=start.num_heads,
            max_position_embeddings=max(sweep.test_lengths),
            initializer_range=start.hidden_size**-0.5,  # 0.02 is for widths of thousands
            attention_bias=True,  # heads that look a fixed distance back form sooner
            pad_token_id=words.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=True,
        )
        config = self.matched(LlamaForCausalLM, config, sweep.train_length)
        torch.manual_seed(self.seed)
        return LlamaForCausalLM(config), words

    def in_the_paper(self) -> str:
        if self.kind != "multi-key":
            return "only in a figure"
        gains = ", ".join(f"{gain:+} % at {n} tokens" for n, gain in paper.MULTI_KEY.items())
        return f"IHA over global attention, relative, 2.4B parameters: {gains}"

    def run(self, folder: Path, progress: Progress) -> Result:
        sweep = self.sweep
        model, tokenizer = self.model()
        baselines.equip(model, self.attention, sweep.train_length).to(default_device())
        cost = baselines.cost(model, sweep.train_length)
        steps = sweep.steps if sweep.flops_of is None else self.steps(cost.total_flops)
        pretrained = isinstance(sweep.start, str)
        task = RetrievalTask(
            digits=sweep.digits, seed=self.seed, kind=self.kind, new_keys=pretrained
        )
        learned = self.lessons(task, tokenizer, steps * sweep.batch_size)
        done = fit(
            model,
            learned,
            folder / "checkpoints",
            lambda step, loss: progress(step, steps, f"loss {loss:.3f}"),
            steps=steps,
            batch_size=sweep.batch_size,
            save_every=max(1, steps // 5),
            seed=self.seed,
            arguments={"warmup_steps": max(1, steps // 10), "weight_decay": 0.0},
            data_collator=collator(tokenizer),
            processing_class=tokenizer,
            optimizers=(optimizer(model, sweep.learning_rate, sweep.mixing_learning_rate), None),
        )
        if not done.finished:
            raise KeyboardInterrupt
        tested: dict[int, Accuracy] = {}
        for length in sweep.test_lengths:
            asked = sized(task, tokenizer, length).questions("held-out", sweep.questions)
            tested[length] = evaluate(model, tokenizer, asked)
            progress(steps, steps, f"{tested[length].value:.0%} at {length} tokens")
        return Result(
            cost=cost.as_dict(),
            measures={f"accuracy at {n} tokens": found.value for n, found in tested.items()},
            curves={
                "accuracy over tokens": [(float(n), found.value) for n, found in tested.items()],
                "training loss over steps": thinned(done.losses),
            },
            notes={"steps": steps, "questions": sweep.questions},
        )

    def steps(self, flops: int) -> int:
        """Count the steps that take the FLOPs of `steps` steps with `flops_of`."""
        sweep = self.sweep
        assert sweep.flops_of is not None
        other, _ = self.model()
        baselines.equip(other, sweep.flops_of, sweep.train_length)
        return round(sweep.steps * baselines.cost(other, sweep.train_length).total_flops / flops)

    def lessons(self, task: RetrievalTask, tokenizer: Any, count: int) -> list[dict[str, Any]]:
        """Write `count` passages with questions, of all sizes that fit, in random order."""
        sweep = self.sweep
        most = sized(task, tokenizer, sweep.train_length, sweep.questions_per_passage).num_facts
        sizes = range(min(FEWEST, most), most + 1)
        found: list[Any] = []
        for i, size in enumerate(sizes):
            share = len(range(i, count, len(sizes)))
            some = dataclasses.replace(task, num_facts=size).passages(
                "train", share, sweep.questions_per_passage
            )
            found += lessons(some, tokenizer)
        random.Random(self.seed).shuffle(found)
        return found


class Retrieval(Sweep):
    """`iha lab retrieval`.

    A step has `batch_size` passages with `questions_per_passage` questions each: of four facts (a
    model from nothing learns short ones first) up to as many as fit into `train_length` tokens with
    their questions.
    With `flops_of`, an attention that costs less gets more steps (and so more data): as many as
    take the FLOPs of `steps` steps with that attention. Without, all get the same steps and data.
    """

    AXES: ClassVar[tuple[str, ...]] = ("kinds", "attentions", "seeds")
    RUN: ClassVar[type[Run[Any]]] = RetrievalRun

    experiment: Literal["retrieval"] = "retrieval"
    kinds: tuple[Kind, ...] = pydantic.Field(("multi-key",), min_length=1)
    start: Decoder | str = Decoder()
    digits: int = pydantic.Field(3, ge=1)
    train_length: int = pydantic.Field(128, ge=1)
    test_lengths: tuple[int, ...] = pydantic.Field((128, 256, 512), min_length=1)
    questions_per_passage: int = pydantic.Field(8, ge=1)
    questions: int = pydantic.Field(256, ge=1)
    steps: int = pydantic.Field(1500, ge=1)
    batch_size: int = pydantic.Field(16, ge=1)
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    mixing_learning_rate: float = pydantic.Field(3e-3, gt=0)
    flops_of: AnyAttention | None = None

    @pydantic.model_validator(mode="after")
    def _matchable(self) -> Retrieval:
        if isinstance(self.start, str) and self.match != "nothing":
            raise ValueError(f"match must be nothing for the pretrained {self.start}")
        return self


def word_tokenizer(digits: int) -> Any:
    """Make a token for each word of the task and for each number, as a small model needs."""
    numbers = RetrievalTask(num_facts=1, digits=digits).numbers
    words = ["<pad>", "<unk>", *WORDS.split(), *map(str, numbers)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>"
    )
