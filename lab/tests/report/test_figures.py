"""The figures say what they show."""

from __future__ import annotations

import torch

from iha import HeadMixing
from iha_lab.report.figures import data_uri, mixing_maps, pattern_maps


def test_mixing_maps_name_every_tensor_and_pseudo_head() -> None:
    for per_head in (False, True):
        figure = mixing_maps(
            HeadMixing(4, num_kv_heads=2, pseudo_heads=3, per_head_collapse=per_head)
        )
        maps = figure.axes[:12]  # a row for each tensor; the rest are colour scales
        assert [axis.get_title() for axis in maps[:3]] == [f"pseudo-head {p}" for p in range(3)]
        rows = [axis.get_ylabel() for axis in maps[::3]]
        assert rows == ["α^Q[m, h, p]", "α^K[m, g, q]", "α^V[m, g, q]", "R[h', h, p]"]
        assert data_uri(figure).startswith("data:image/png;base64,")


def test_pattern_maps_name_queries_and_keys() -> None:
    figure = pattern_maps(torch.rand(2, 2, 5, 5))
    assert [axis.get_title() for axis in figure.axes] == ["pseudo-key 0", "pseudo-key 1", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "pseudo-query 0",
        "",
        "pseudo-query 1",
        "",
    ]
    assert data_uri(figure).startswith("data:image/png;base64,")
