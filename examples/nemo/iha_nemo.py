"""NeMo AutoModel 0.7: the `_target_` of a recipe's model. NEMO_ENABLE_USER_MODULES=1 allows it.

    model:
      _target_: examples/nemo/iha_nemo.py:from_pretrained
      pretrained_model_name_or_path: HuggingFaceTB/SmolLM2-135M
      pseudo_heads: 2

`force_hf` is needed: NeMo's own model classes have no place for the mixing. The recipe shards the
model afterwards, and its consolidated checkpoints are IHA folders.
"""

from nemo_automodel import NeMoAutoModelForCausalLM

import iha.hf


def from_pretrained(pretrained_model_name_or_path, pseudo_heads=2, **options):
    options |= {"force_hf": True, "attn_implementation": "sdpa"}
    model = NeMoAutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **options)
    if not hasattr(model.config, "iha"):  # a saved IHA model has its mixing already
        iha.upcycle(model, pseudo_heads)
    return model
