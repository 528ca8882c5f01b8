"""Draw docs/images/visibility.svg from the operator's own rule: `python -m` this module."""

from __future__ import annotations

from typing import Any

import torch

from iha.visibility import visible_pairs
from iha_lab.report.tables import ROOT, generated

N, P, CELL, GAP = 4, 3, 15, 34
PANELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ('causal="flat"', {"causal": "flat", "window": None}),
    ('causal="token"', {"causal": "token", "window": None}),
    ('causal="flat", window=2', {"causal": "flat", "window": 2}),
)
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f")  # of p, as on interleaving.svg
INK, QUIET = "#1f2937", "#e5e7eb"


def picture() -> str:
    """One grid for each panel: rows are virtual queries n·P + p, columns virtual keys s·P + q."""
    side = N * P * CELL
    width, height = 60 + len(PANELS) * (side + GAP), side + 84
    index = torch.arange(N * P)
    n, p = index // P, index % P
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="system-ui, sans-serif" role="img" aria-label="Which virtual keys each'
        f" virtual query sees, for {N} tokens with P = {P}: under flat causality, under token"
        ' causality, and through a flat window of 2 tokens">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]

    def text(x: float, y: float, words: str, size: int = 11, anchor: str = "middle") -> None:
        parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{INK}">'
            f"{words}</text>"
        )

    for i, (name, rule) in enumerate(PANELS):
        left, top = 60 + i * (side + GAP), 36
        text(left + side / 2, 20, name.replace('"', "&quot;"), 13)
        pairs = visible_pairs(n[:, None], p[:, None], n, p, pseudo_heads=P, **rule)
        for row in range(N * P):
            for column in range(N * P):
                fill = COLOURS[row % P] if pairs[row, column] else QUIET
                x, y = left + column * CELL, top + row * CELL
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{fill}"/>'
                )
        for token in range(N):
            middle = (token + 0.5) * P * CELL
            if i == 0:
                text(left - 8, top + middle + 4, f"token {token}", anchor="end")
            text(left + middle, top + side + 16, f"{token}")
            if token:
                at, end = token * P * CELL - 0.5, side
                for line in (
                    f'x1="{left}" y1="{top + at}" x2="{left + end}" y2="{top + at}"',
                    f'x1="{left + at}" y1="{top}" x2="{left + at}" y2="{top + end}"',
                ):
                    parts.append(f'<line {line} stroke="{INK}" stroke-width="1"/>')
        text(left + side / 2, top + side + 34, "token that is read")
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    generated(ROOT / "docs" / "images" / "visibility.svg", picture(), "iha_lab.report.visibility")
