"""TRL: packed SFT, DPO or GRPO of an upcycled model.

    python examples/post_training.py sft | dpo | grpo [MODEL]

The model is saved and loaded before it is trained: DPO, and GRPO with `beta > 0`, load their
reference model from where the policy came from, and that must be the IHA model.
"""

import sys
import tempfile

import tiny
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import iha.hf

method = sys.argv.pop(1) if len(sys.argv) > 1 else "sft"
model = iha.upcycle(tiny.model(), pseudo_heads=2)
if len(sys.argv) > 1:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
else:  # the tiny model's words are letters
    letters = Tokenizer(models.WordLevel({chr(i): i for i in range(256)}, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="\0", eos_token="\3", unk_token=" "
    )

questions = [f"{a}+{b}=" for a in range(9) for b in range(9)]
answers = [f"{a + b}." for a in range(9) for b in range(9)]
wrong = [f"{a + b + 1}." for a in range(9) for b in range(9)]
options = {"max_steps": 10, "per_device_train_batch_size": 8, "logging_steps": 5}
options |= {"report_to": "none", "save_strategy": "no", "bf16": False, "learning_rate": 1e-3}


def reward(completions, **_):
    """More digits are better."""
    return [sum(letter.isdigit() for letter in text) / len(text or " ") for text in completions]


with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    options["output_dir"] = f"{folder}/run"
    match method:
        case "sft":
            settings = trl.SFTConfig(packing=True, max_length=64, **options)
            rows = {"text": [q + a for q, a in zip(questions, answers, strict=True)]}
            kind, more = trl.SFTTrainer, {}
        case "dpo":
            settings = trl.DPOConfig(**options)
            rows = {"prompt": questions, "chosen": answers, "rejected": wrong}
            kind, more = trl.DPOTrainer, {}
        case "grpo":
            settings = trl.GRPOConfig(num_generations=4, max_completion_length=4, **options)
            rows, kind, more = {"prompt": questions}, trl.GRPOTrainer, {"reward_funcs": reward}
        case _:
            sys.exit(f"the method must be sft, dpo or grpo, got {method}")
    rows = Dataset.from_dict(rows)
    kind(model, args=settings, train_dataset=rows, processing_class=tokenizer, **more).train()
