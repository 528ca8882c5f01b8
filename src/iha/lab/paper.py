"""The paper's own numbers (arXiv 2602.21371v1), to stand beside ours, marked as the paper's.

Percent. Its RULER accuracies by length and its composition accuracies are in figures alone, so only
the differences that its text states are here.
"""

from __future__ import annotations

MODELS = ("IHA", "Global Attention", "Global+Local", "Talking Heads", "Diff Transformer")

# Table 1: after fine-tuning on OpenThoughts.
FINE_TUNED: dict[str, tuple[float | None, ...]] = {
    "GSM8K P@1": (34.3, 29.5, 26.5, 29.3, 31.6),
    "GSM8K Maj@16": (54.2, 48.4, 46.9, 49.4, 53.5),
    "MATH-500 P@1": (10.0, 8.8, 7.6, 7.8, 9.0),
    "MATH-500 Maj@16": (18.4, 15.6, 15.0, 18.2, 18.0),
    "MBPP P@1": (15.5, 14.7, 15.0, 15.9, 15.3),
    "MBPP P@10": (41.6, 41.2, 41.9, 43.1, 39.2),
    "average rank": (1.5, 3.8, 4.3, 2.5, 2.8),
}

# Table 2: pretrained, 5-shot.
PRETRAINED: dict[str, tuple[float | None, ...]] = {
    "GSM8K EM": (8.34, 5.61, 6.82, 5.46, 5.46),
    "GSM8K Maj@5": (8.42, 5.61, 6.90, 5.38, 5.61),
    "MATH-500 EM": (3.54, 2.88, 2.26, None, None),
    "MBPP P@1": (24.5, 23.4, 23.6, 23.8, 25.0),
    "HumanEval P@1": (17.1, 17.2, 16.0, 16.0, 15.4),
    "average rank": (1.4, 2.9, 2.9, 4.0, 3.5),
}

# Section 5.2, after fine-tuning at 64k: average exact match over RULER.
RULER_AVERAGE: dict[str, float] = {
    "IHA": 44.0,
    "Global+Local": 40.6,
    "Diff Transformer": 37.2,
    "Global Attention": 35.0,
}

# Section 5.2: multi-key retrieval, IHA over Global Attention, relative. (The abstract says 10-20%.)
RULER_MULTI_KEY: dict[int, float] = {4096: 27.0, 8192: 32.0, 16384: 112.0}

# Appendix D.3: IHA over the strongest baseline, simplicial attention, "up to", in points.
COMPOSITION: dict[str, float] = {"RoR": 4.7, "RoRoR": 3.3}
