"""IHA and its rivals behind one interface: any transformers model, any attention.

choices.py          which attention, as configs say it; KINDS, a line on each
equipping.py        gives a model one
attention.py        the function that transformers calls
rival.py            the interface: one layer's attention
local_global.py, talking_heads.py, differential.py, knocking_heads.py, simplicial.py
layers.py           what rivals need to know of the layer they are in
cost.py             parameters and FLOPs, and models matched by either
"""

from __future__ import annotations

from iha_lab.baselines.choices import KINDS, Choice
from iha_lab.baselines.cost import Cost, cost, matched
from iha_lab.baselines.equipping import equip
from iha_lab.baselines.rival import Rival

__all__ = ["KINDS", "Choice", "Cost", "Rival", "cost", "equip", "matched"]
