"""The paper's own numbers (arXiv 2602.21371), shown beside ours and never as ours.

They are of its 2.4B models, trained from scratch on 240B tokens. None: not given there.
"""

from __future__ import annotations

import dataclasses

SOURCE = "arXiv 2602.21371v1"
MODELS = ["IHA", "Global Attention", "Global+Local", "Talking Heads", "Diff Transformer"]


@dataclasses.dataclass(frozen=True)
class Column:
    """A score of the paper, and where ours of the same kind is: (name of the job, score)."""

    title: str
    ours: tuple[str, str]
    values: tuple[float | None, ...]  # in percent, in the order of MODELS


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    average_rank: tuple[float, ...]


TABLES = (
    Table(
        "Table 1: after fine-tuning on OpenThoughts, 16 samples at temperature 0.6",
        (
            Column("GSM8K P@1", ("gsm8kx16", "P@1"), (34.3, 29.5, 26.5, 29.3, 31.6)),
            Column("GSM8K Maj@16", ("gsm8kx16", "Maj@16"), (54.2, 48.4, 46.9, 49.4, 53.5)),
            Column("MATH-500 P@1", ("minerva_math500x16", "P@1"), (10.0, 8.8, 7.6, 7.8, 9.0)),
            Column(
                "MATH-500 Maj@16",
                ("minerva_math500x16", "Maj@16"),
                (18.4, 15.6, 15.0, 18.2, 18.0),
            ),
            Column("MBPP P@1", ("mbppx16", "P@1"), (15.5, 14.7, 15.0, 15.9, 15.3)),
            Column("MBPP P@10", ("mbppx16", "P@10"), (41.6, 41.2, 41.9, 43.1, 39.2)),
        ),
        (1.5, 3.8, 4.3, 2.5, 2.8),
    ),
    Table(
        "Table 2: pretrained, 5 examples",
        (
            Column("GSM8K EM", ("gsm8k", "EM"), (8.34, 5.61, 6.82, 5.46, 5.46)),
            Column("GSM8K Maj@5", ("gsm8kx5", "Maj@5"), (8.42, 5.61, 6.90, 5.38, 5.61)),
            Column("MATH-500 EM", ("minerva_math500", "EM"), (3.54, 2.88, 2.26, None, None)),
            Column("MBPP P@1", ("mbpp", "P@1"), (24.5, 23.4, 23.6, 23.8, 25.0)),
            Column("HumanEval P@1", ("humaneval", "P@1"), (17.1, 17.2, 16.0, 16.0, 15.4)),
        ),
        (1.4, 2.9, 2.9, 4.0, 3.5),
    ),
)

# Figure 2, after fine-tuning at 64k tokens: multi-key retrieval by length, IHA over Global
# Attention, relative, in percent. The scores themselves are in the figure alone.
MULTI_KEY = {4096: 27, 8192: 32, 16384: 112}
# Average exact match over RULER, in percent. None: not known to us.
RULER_AVERAGE = {
    "IHA": 44.0,
    "Global+Local": 40.6,
    "Talking Heads": None,
    "Diff Transformer": 37.2,
    "Global Attention": 35.0,
}

# Appendix D.3: the accuracy of relation composition, IHA over the strongest baseline, 2-simplicial
# attention, "up to", in points. The accuracies themselves are in figures alone.
COMPOSITION = {"RoR": 4.7, "RoRoR": 3.3}
