"""The model that an example uses: the one named on the command line, or a tiny random Llama."""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def model() -> PreTrainedModel:
    if len(sys.argv) > 1:
        return AutoModelForCausalLM.from_pretrained(sys.argv[1])
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads)).eval()


def tokens(model: PreTrainedModel, batch: int = 2, length: int = 32) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length))
