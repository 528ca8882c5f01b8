"""Language modelling: a decoder trained on text, with transformers' Trainer.

The model is transformers' Llama with random weights. A run is one process, or several that
torchrun or Accelerate starts; Accelerate's configuration decides on FSDP.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from iha_lab import baselines
from iha_lab.data.corpus import STDLIB, prepare
from iha_lab.experiments.config import Progress, Run, Sweep
from iha_lab.experiments.records import Result, thinned
from iha_lab.machine import processes
from iha_lab.train.trainer import fit


@dataclasses.dataclass(frozen=True)
class LanguageModellingRun(Run["LanguageModelling"]):
    def model(self, *, meta: bool = False) -> Any:
        """Build the decoder with its attention; `meta` builds it without memory."""
        sweep = self.sweep
        config = LlamaConfig(
            vocab_size=sweep.vocabulary(),
            hidden_size=sweep.hidden_size,
            intermediate_size=sweep.intermediate_size,
            num_hidden_layers=sweep.num_layers,
            num_attention_heads=sweep.num_heads,
            num_key_value_heads=sweep.num_kv_heads or sweep.num_heads,
            max_position_embeddings=sweep.seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": sweep.rope_theta},
            tie_word_embeddings=sweep.tie_word_embeddings,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        config = self.matched(LlamaForCausalLM, config, sweep.seq_len)
        torch.manual_seed(self.seed)
        with torch.device("meta" if meta else "cpu"):
            model = LlamaForCausalLM(config)
        return baselines.equip(model, self.attention, sweep.seq_len)

    def in_the_paper(self) -> str:
        return "no loss is stated"

    def run(self, folder: Path, progress: Progress) -> Result:
        sweep = self.sweep
        text = prepare(
            folder.parent / "corpus",  # one for all runs of the experiment
            sweep.corpus,
            sweep.tokenizer,
            held_out_bytes=sweep.held_out_bytes,
            train_tokens=sweep.steps * sweep.batch_size * sweep.seq_len + 1,
            progress=lambda note: progress(0, sweep.steps, note),
        )
        train, held_out = (
            text.sequences(name, sweep.seq_len, sweep.batch_size) for name in ("train", "held_out")
        )
        model = self.model()
        if len(text.tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"vocab_size must be at least {len(text.tokenizer)}, which the tokenizer has, got"
                f" {model.config.vocab_size}."
            )
        cost = baselines.cost(model, sweep.seq_len)
        done = fit(
            model,
            train,
            folder / "checkpoints",
            lambda step, loss: progress(step, sweep.steps, f"loss {loss:.3f}"),
            steps=sweep.steps,
            batch_size=sweep.batch_size,
            micro_batch_size=sweep.micro_batch_size,
            save_every=sweep.save_every,
            seed=self.seed,
            validation=held_out,
            tensorboard=folder / "tensorboard" if sweep.tensorboard else None,
            arguments={
                "learning_rate": sweep.learning_rate,
                "adam_beta2": 0.95,
                "weight_decay": sweep.weight_decay,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.01},
                "warmup_steps": sweep.warmup_steps,
                "bf16": sweep.bf16,
                "gradient_checkpointing": sweep.gradient_checkpointing,
                "ddp_find_unused_parameters": False,
                "remove_unused_columns": False,  # `shift_labels` is one to the Trainer
            },
        )
        if not done.finished:
            raise KeyboardInterrupt
        loss = done.evaluations[-1]["eval_loss"]
        curve = [(row["step"], row["eval_loss"]) for row in done.evaluations]
        tokens = sweep.steps * sweep.batch_size * sweep.seq_len
        return Result(
            cost=cost.as_dict(),
            measures={
                "validation loss": loss,
                "bits per byte": bits_per_byte(loss, text.held_out.tokens, text.held_out.bytes),
            },
            curves={
                "validation loss over steps": curve,
                "training loss over steps": thinned(done.losses),
            },
            notes={
                "text sha256": text.sha256,
                "tokens seen": tokens,
                "epochs": tokens / (len(train) * sweep.seq_len),
                "processes": processes(),
            },
        )


class LanguageModelling(Sweep):
    """`iha lab lm`. The loss is per token; bits per byte do not depend on the tokenizer.

    Training is the paper's: AdamW (β = 0.9, 0.95), gradients clipped at norm 1, a linear warmup and
    a cosine down to a hundredth of `learning_rate`. Norms have no weight decay. Documents stand one
    behind the other in sequences of `seq_len` tokens.

    `tokenizer` is a name or folder, or the size of a byte-level BPE that is learned from the text;
    `vocab_size` is needed for a model that is larger than its tokenizer, or to build one without.
    `batch_size` is in sequences, over all processes, and each takes `micro_batch_size` of them at a
    time.
    """

    RUN: ClassVar[type[Run[Any]]] = LanguageModellingRun

    experiment: Literal["lm"] = "lm"
    corpus: str = STDLIB
    tokenizer: int | str = pydantic.Field(4096)
    held_out_bytes: int = pydantic.Field(500_000, ge=1)
    num_layers: int = pydantic.Field(5, ge=1)
    hidden_size: int = pydantic.Field(128, ge=1)
    num_heads: int = pydantic.Field(4, ge=1)
    num_kv_heads: int | None = pydantic.Field(None, ge=1)
    intermediate_size: int = pydantic.Field(384, ge=1)
    vocab_size: int | None = pydantic.Field(None, ge=1)
    rope_theta: float = pydantic.Field(10_000.0, gt=0)
    tie_word_embeddings: bool = True
    seq_len: int = pydantic.Field(256, ge=1)
    steps: int = pydantic.Field(1000, ge=1)
    batch_size: int = pydantic.Field(16, ge=1)
    micro_batch_size: int | None = pydantic.Field(None, ge=1)
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    warmup_steps: int = pydantic.Field(100, ge=0)
    weight_decay: float = pydantic.Field(0.1, ge=0)
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_every: int = pydantic.Field(250, ge=1)
    tensorboard: bool = False

    @pydantic.field_validator("tokenizer")
    @classmethod
    def _holds_all_bytes(cls, tokenizer: int | str) -> int | str:
        if isinstance(tokenizer, int) and tokenizer < 257:
            raise ValueError("must be at least 257: 256 bytes and the end token")
        return tokenizer

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> LanguageModelling:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {self.hidden_size},"
                f" {self.num_heads}"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads}, {self.num_heads}"
            )
        return self

    def vocabulary(self) -> int:
        """Count the tokens that the model knows: `vocab_size`, or what the tokenizer has."""
        if self.vocab_size is not None:
            return self.vocab_size
        if isinstance(self.tokenizer, int):
            return self.tokenizer
        return len(AutoTokenizer.from_pretrained(self.tokenizer))


def bits_per_byte(loss: float, tokens: int, size: int) -> float:
    """Convert nats per token, of a text that is `tokens` tokens or `size` bytes long."""
    return loss / math.log(2) * tokens / size
