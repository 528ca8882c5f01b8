"""The model card of a saved model: what its README.md says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from iha.hf.attaching import parts
from iha.hf.entry import Entry

_MARK = "<!-- Written anew at each saving; remove this line to keep a text of your own. -->"
_TEXT = """---
{data}
---
{mark}

# {name} with Interleaved Head Attention

Each layer below mixes all heads into P pseudo-heads per head; its key-value cache is an ordinary
one. Please cite Duvvuri et al., "Interleaved Head Attention", 2026, arXiv 2602.21371.

| pseudo-heads P | pseudo-queries | layers |
| --- | --- | --- |
{rows}

causal: {causal}, rope: {rope}, window: {window}

To load it, with `interleaved-head-attention[hf]` installed, from the folder or hub name `path`:

```python
import iha.hf
from transformers import {auto}

model = {auto}.from_pretrained(path)
```
"""
_SERVE = "\nTo serve it, with `interleaved-head-attention[vllm]` installed: `vllm serve path`.\n"


def write_card(model: Any, folder: Path) -> None:
    """Write README.md into the folder of a saved model, unless its user has one there."""
    file = folder / "README.md"
    if file.exists() and _MARK not in file.read_text(encoding="utf-8"):
        return
    entry = next(e for part in parts(model) if (e := Entry.read(part.config)))
    auto = getattr(type(model), "_auto_class", None) or "AutoModel"
    layers: dict[tuple[int, int], list[str]] = {}
    for name, P in entry.pseudo_heads.items():
        layers.setdefault((P, entry.pseudo_queries[name]), []).append(name)
    text = _TEXT.format(
        data=ModelCardData(library_name="transformers", tags=["interleaved-head-attention"]),
        mark=_MARK,
        name=type(model).__name__,
        rows="\n".join(f"| {P} | {Pq} | {_ranges(n)} |" for (P, Pq), n in layers.items()),
        auto=auto,
        **vars(entry),
    )
    ModelCard(text + _SERVE * (auto == "AutoModelForCausalLM")).save(file)


def _ranges(names: list[str]) -> str:
    """`layers.0.attn`, `layers.1.attn`, `layers.3.attn` as `layers.[0-1, 3].attn`."""
    runs: dict[str, list[list[int]]] = {}
    for name in names:
        number = int((re.findall(r"\d+", name) or [0])[0])
        own = runs.setdefault(re.sub(r"\d+", "{}", name, count=1), [])
        if own and own[-1][-1] == number - 1:
            own[-1][1:] = [number]
        else:
            own.append([number])
    shown = {n: ", ".join("-".join(map(str, run)) for run in own) for n, own in runs.items()}
    return ", ".join(f"`{n.format(s if s.isdigit() else f'[{s}]')}`" for n, s in shown.items())
