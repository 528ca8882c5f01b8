"""A tiny random model of each family that IHA is tested with."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import iha

# Sizes that most configs share; 4 query heads over 2 key/value heads.
DECODER = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
ENCODER = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5, "head_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 5},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "sliding_window": 5,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    # Its config has no such name, and continuous batching would believe it.
    "gpt_neox": ("GPTNeoXForCausalLM", {"num_key_value_heads": 4}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 6}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
}  # fmt: skip
# Tested for their logits alone.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("PhiForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {"attention_multiplier": 0.3}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 8}),
    "stablelm": ("StableLmForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {"sliding_window": 4}),
    "exaone4": ("Exaone4ForCausalLM", {"sliding_window": 4}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 2}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {"num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 8},
    ),
    "roberta": ("RobertaForMaskedLM", {}),
    "distilbert": ("DistilBertForMaskedLM", {}),
    "electra": ("ElectraForMaskedLM", {}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", ENCODER),
    "modernbert": ("ModernBertForMaskedLM", {**ENCODER, "local_attention": 6, **SPECIAL}),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
    "bart": ("BartForConditionalGeneration", {**SEQ2SEQ, "max_position_embeddings": 64}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}


def tiny(family: str, attention: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """The family's model with random weights, in evaluation mode; equal for equal seeds.

    SDPA has no soft-cap, so that Gemma 2 is refused with it from transformers 5.23 on.
    """
    attention = attention or ("eager" if family == "gemma2" else "sdpa")
    name, settings = {**DECODERS, **MORE, **OTHERS}[family]
    base = {} if family in OTHERS else DECODER
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    config = cls.config_class(**{**base, **settings, **changes}, attn_implementation=attention)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the library's 0.02 leaves attention all but uniform
                parameter.mul_(6)
    return model


def moved(model: Any, seed: int = 0) -> Any:
    """An upcycled model, its mixing tensors far from their start, as after training."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in iha.mixing_parameters(model):
            parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    return model


def trained(family: str, pseudo_heads: int = 2, *, seed: int = 0, **settings: Any) -> Any:
    """The family's upcycled model, with mixing tensors far from their start, as after training."""
    return moved(iha.upcycle(tiny(family), pseudo_heads, **settings), seed)


def tiny_llava(attention: str = "sdpa") -> Any:
    """A vision-language model: CLIP's tower of 2 layers, a Llama of 3; token 98 is an image's."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=8,
    )  # fmt: skip
    text = transformers.LlamaConfig(**DECODER)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=98, attn_implementation=attention
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def inputs(family: str, batch: int = 2, tokens: int = 11, seed: int = 1) -> dict[str, Any]:
    """Random inputs; the decoders' and text encoders' batches have padded rows."""
    random = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=random)}
    ids = torch.randint(3, 99, (batch, tokens), generator=random)
    mask = torch.ones_like(ids)
    if family == "whisper":
        features = torch.randn(batch, 8, 32, generator=random)
        return {"input_features": features, "decoder_input_ids": ids}
    if family in DECODERS or family in MORE:
        mask[1:2, :4] = 0  # left padding, as for generation
    else:
        mask[1:2, -3:] = 0
    ids[mask == 0] = 0
    if family == "bart":
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :7]}
    return {"input_ids": ids, "attention_mask": mask}
