"""Language modelling: a decoder trained on text, with transformers' Trainer.

The model is transformers' Llama with random weights. A run is one process, or several that
torchrun or Accelerate starts; Accelerate's configuration decides on FSDP.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from iha_lab import baselines
from iha_lab.data.corpus import STDLIB, prepare
from iha_lab.experiments.base import Experiment, Progress
from iha_lab.experiments.results import Result, thinned
from iha_lab.machine import processes
from iha_lab.train.trainer import fit


class LanguageModel(Experiment):
    """`iha lab lm`. The loss is per token; bits per byte do not depend on the tokenizer.

    Training is the paper's: AdamW (β = 0.9, 0.95), gradients clipped at norm 1, a linear warmup and
    a cosine down to a hundredth of `learning_rate`. Norms have no weight decay. Documents stand one
    behind the other in sequences of `seq_len` tokens.

    `tokenizer` is a name or folder, or the size of a byte-level BPE that is learned from the text;
    `vocab_size` is needed for a model that is larger than its tokenizer, or to build one without.
    `batch_size` is in sequences, over all processes, and each takes `at_once` of them at a time.
    """

    experiment: Literal["lm"] = "lm"
    text: str = STDLIB
    tokenizer: int | str = pydantic.Field(4096)
    held_out_bytes: int = pydantic.Field(500_000, ge=1)
    layers: int = pydantic.Field(5, ge=1)
    width: int = pydantic.Field(128, ge=1)
    heads: int = pydantic.Field(4, ge=1)
    kv_heads: int | None = pydantic.Field(None, ge=1)
    mlp: int = pydantic.Field(384, ge=1)
    vocab_size: int | None = pydantic.Field(None, ge=1)
    rope_theta: float = pydantic.Field(10_000.0, gt=0)
    tied: bool = True
    seq_len: int = pydantic.Field(256, ge=1)
    steps: int = pydantic.Field(1000, ge=1)
    batch_size: int = pydantic.Field(16, ge=1)
    at_once: int | None = pydantic.Field(None, ge=1)
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    warmup: int = pydantic.Field(100, ge=0)
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
    def _divisible(self) -> LanguageModel:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width}, {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads}, {self.heads}")
        return self

    def model(self, *, meta: bool = False) -> Any:
        """Of a run: the decoder with its attention; `meta` builds it without memory."""
        config = LlamaConfig(
            vocab_size=self._vocab_size(),
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=self.seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=self.tied,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        config = self.matched(LlamaForCausalLM, config, self.seq_len)
        torch.manual_seed(self.seed)
        with torch.device("meta" if meta else "cpu"):
            model = LlamaForCausalLM(config)
        return baselines.equip(model, self.attention, self.seq_len)

    def in_the_paper(self) -> str:
        return "no loss is stated"

    def run(self, folder: Path, progress: Progress) -> Result:
        text = prepare(
            folder.parent / "corpus",  # one for all runs of the experiment
            self.text,
            self.tokenizer,
            held_out_bytes=self.held_out_bytes,
            train_tokens=self.steps * self.batch_size * self.seq_len + 1,
            progress=lambda note: progress(0, self.steps, note),
        )
        train, held_out = (
            text.sequences(name, self.seq_len, self.batch_size) for name in ("train", "held_out")
        )
        model = self.model()
        if len(text.tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"vocab_size must be at least {len(text.tokenizer)}, which the tokenizer has, got"
                f" {model.config.vocab_size}."
            )
        cost = baselines.cost(model, self.seq_len)
        cpu = not torch.cuda.is_available()
        done = fit(
            model,
            train,
            folder / "checkpoints",
            lambda step, loss: progress(step, self.steps, f"loss {loss:.3f}"),
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch_size=self.at_once,
            save_every=self.save_every,
            seed=self.seed,
            validation=held_out,
            tensorboard=folder / "tensorboard" if self.tensorboard else None,
            arguments={
                "learning_rate": self.learning_rate,
                "adam_beta2": 0.95,
                "weight_decay": self.weight_decay,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.01},
                "warmup_steps": self.warmup,
                "bf16": self.bf16,
                "gradient_checkpointing": self.gradient_checkpointing,
                "ddp_find_unused_parameters": False,
                "remove_unused_columns": False,  # `shift_labels` is one to the Trainer
                "use_cpu": cpu,
                "dataloader_pin_memory": not cpu,
            },
        )
        if not done.finished:
            raise KeyboardInterrupt
        loss = done.evaluations[-1]["eval_loss"]
        curve = [(row["step"], row["eval_loss"]) for row in done.evaluations]
        tokens = self.steps * self.batch_size * self.seq_len
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
                "epochs": tokens / (len(train) * self.seq_len),
                "processes": processes(),
            },
        )

    def _vocab_size(self) -> int:
        if self.vocab_size is not None:
            return self.vocab_size
        if isinstance(self.tokenizer, int):
            return self.tokenizer
        return len(AutoTokenizer.from_pretrained(self.tokenizer))


def bits_per_byte(loss: float, tokens: int, size: int) -> float:
    """From nats per token, of a text that is `tokens` tokens or `size` bytes long."""
    return loss / math.log(2) * tokens / size
