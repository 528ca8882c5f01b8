"""The theorems of arXiv 2602.21371, executed: each a small construction through the real operator.

inclusion.py   MHA ⊆ IHA, with every mask
strictness.py  MHA ≠ IHA: on repeated tokens one is linear, the other tanh
filters.py     [X, AX, …, A^(k-1) X] with ⌈√k⌉ heads
counting.py    CPM-3 with ⌈√N⌉ heads
ranks.py       P² attention patterns per head
layer.py       weights, mixing, and the operator with or without its softmax
finding.py     a row: a claim, a number, and the verdict that follows from it
plots.py       the curves
execution.py   all of it in order
"""

from __future__ import annotations

from iha_lab.theory.execution import run
from iha_lab.theory.finding import Finding

__all__ = ["Finding", "run"]
