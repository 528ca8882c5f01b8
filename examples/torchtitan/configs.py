"""Configs for `python -m torchtitan.train --module examples.torchtitan.configs --config NAME`.

`debug` is torchtitan's smallest Llama with IHA in every layer. `paper` is the 2.4B model of
arXiv 2602.21371, section 5.1, as this project reads it: P = 20, and every fifth layer is plain and
global. Its sizes are those of lab/src/iha_lab/experiments/configs/lm-paper.yaml, which says why.
Tokenizer and data are options of torchtitan: `--hf_assets_path`, `--dataloader.dataset`.
"""

from typing import Any

from torchtitan.components.optimizer import default_adamw
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models import llama3
from torchtitan.models.common import ComplexRoPE
from torchtitan.models.llama3.config_registry import llama3_debugmodel_varlen_attn

IHA = "iha.integrations.torchtitan"


def debug() -> Any:
    config = llama3_debugmodel_varlen_attn()
    options = {"pseudo_heads": 4, "init": "scratch"}
    config.override.imports = [(f"{IHA}.interleaved", options), (f"{IHA}.undecayed", {})]
    return config


def paper() -> Any:
    config = debug()
    config.override.imports[0][1].update(pseudo_heads=20, pattern="SSSSL", rope="virtual")
    # Llama 3's 3B config ties embedding and output too; its layers are exchanged for the paper's.
    spec = config.model_spec = llama3.model_registry("3B", attn_backend="varlen")
    width, model = 2560, spec.model
    model.dim = model.tok_embeddings.embedding_dim = model.lm_head.in_features = width
    model.norm.normalized_shape = width
    model.lm_head.param_init = llama3._output_linear_init(width)
    model.layers = llama3._build_llama3_layers(
        n_layers=26,
        dim=width,
        n_heads=20,
        hidden_dim=6912,
        rope=ComplexRoPE.Config(dim=128, max_seq_len=8192, theta=500_000.0),
        attn_backend="varlen",
    )
    spec.flavor = "2.4B of arXiv 2602.21371"
    config.loss.loss_fn.global_vocab_size = model.vocab_size
    config.training.seq_len, config.training.steps = 8192, 240_000
    config.training.local_batch_size, config.training.global_batch_size = 1, 128
    config.optimizer = default_adamw(lr=8e-4)
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_type = 1000, "cosine"
    config.lr_scheduler.decay_ratio, config.lr_scheduler.min_lr_factor = None, 0.01
    config.activation_checkpoint = FullAC.Config()
    config.dataloader.dataset, config.validator.enable = "c4", False
    return config
