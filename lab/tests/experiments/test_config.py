from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iha_lab.experiments import configs, parse, read
from lab.tests.experiments.test_runner import TINY


def test_a_run_has_one_value_on_each_axis(tmp_path: Path) -> None:
    whole = parse(TINY)
    runs = whole.runs()
    assert len(runs) == 1 * 2 * 1 * 2
    assert len({run.name for run in runs}) == len(runs)
    assert [run.seed for run in runs] == [0, 1, 0, 1]
    assert [run.attention.label for run in runs] == ["mha", "mha", "iha-p2-token", "iha-p2-token"]
    for run in runs:
        run.config().write(tmp_path / "run.yaml")
        again = read(tmp_path / "run.yaml").only_run()
        assert (again.name, again.config()) == (run.name, run.config())
    with pytest.raises(ValueError, match="that of one run, and is that of 4"):
        whole.only_run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 3}, r"composition.widht: Extra inputs are not permitted, got 3"),
        ({"seeds": []}, r"composition.seeds: .*at least 1 item"),
        (
            {"attentions": [{"kind": "magic"}]},
            r"attentions.0: Input tag 'magic' found using 'kind' does not match",
        ),
        ({"relations": [{"factors": 1, "sizes": [2, 3], "density": 0.5}]}, r"factors.*got 1"),
        ({"relations": [{"factors": 2, "sizes": [4, 3], "density": 0.5}]}, r"smallest ≤ largest"),
        ({"experiment": "cooking"}, r"Input tag 'cooking' found using 'experiment'"),
    ],
)
def test_a_wrong_config_is_named_by_its_field(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    import yaml

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(TINY | change))
    with pytest.raises(ValueError, match=message) as error:
        read(file)
    assert str(file) in str(error.value)


def test_what_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "none.yaml")
    (tmp_path / "odd.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        read(tmp_path / "odd.yaml")


@pytest.mark.parametrize("kind", ["composition", "retrieval"])
def test_the_packages_own_configs_are_valid(kind: str) -> None:
    found = configs(kind)
    assert {"small", "paper"} <= set(found)
    for file in found.values():
        assert read(file).model_dump()["experiment"] == kind
