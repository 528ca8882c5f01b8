"""The figures say what they show."""

from __future__ import annotations

import torch

from iha import HeadMixing
from iha_lab.report.figures import curves, data_uri, intervals, looks, mixing_maps, pattern_maps
from iha_lab.stats import Mean


def test_mixing_maps_name_every_tensor_and_pseudo_head() -> None:
    for per_head in (False, True):
        figure = mixing_maps(
            HeadMixing(
                4, num_kv_heads=2, pseudo_heads=3, per_head_collapse=per_head, init="upcycle"
            )
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


def test_an_attention_has_one_colour_on_every_figure() -> None:
    alone = looks(["iha-p4-token"])["iha-p4-token"]["color"]
    among = looks(
        ["mha", "something new", "talking-heads", "iha-p4-token", "iha-p8", "IHA, trained"]
    )
    assert {among[label]["color"] for label in ("iha-p4-token", "iha-p8", "IHA, trained")} == {
        alone
    }
    assert among["mha"]["color"] == looks(["plain, trained"])["plain, trained"]["color"]
    colours = [look["color"] for look in among.values()]
    assert colours.count(among["something new"]["color"]) == 1
    assert len({(look["color"], look["linestyle"]) for look in among.values()}) == len(among)


def test_one_seed_has_no_interval() -> None:
    for seeds in ([0.4], [0.4, 0.6]):
        figure = intervals({"mha": (Mean.of(seeds), seeds)}, "accuracy")
        drawn = [line for bars in figure.axes[0].containers for line in bars.lines[2]]
        assert len(drawn) == len(seeds) - 1


def test_equal_curves_stay_visible() -> None:
    curve = [(float(x), Mean.of([1 / x])) for x in range(1, 31)]
    first, second = curves({"mha": curve, "iha-p2": curve}, "steps", "loss").axes[0].lines
    assert first.get_linewidth() > second.get_linewidth()
    assert first.get_markersize() > second.get_markersize()
    assert first.get_markevery()[0] != second.get_markevery()[0]
