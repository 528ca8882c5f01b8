"""Documents of several lengths for the trainers' tests, in words of a small vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LENGTHS = (5, 9, 3, 7, 4, 12, 6)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 99)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def documents() -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(3, 99, (n,), generator=random).tolist() for n in LENGTHS]


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def loss_by_document(model: Any, rows: list[list[int]]) -> float:
    """The mean loss a predicted token, with each document in a pass of its own."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            total += model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
            count += len(row) - 1
    return total / count
