"""Which passes a suite has; the paper's protocols."""

from __future__ import annotations

import pytest

from iha_lab.eval.suites import PROTOCOLS, SUITES, jobs


def labels(suite: str, protocol: str) -> list[tuple[str, str]]:
    return [(j.name, label) for j in jobs(suite, protocol, [4096]) for label in j.labels]


def test_the_columns_of_the_papers_table_2() -> None:
    assert labels("math", "pretrained") + labels("code", "pretrained") == [
        ("gsm8k", "EM"),
        ("gsm8kx5", "Maj@5"),
        ("minerva_math500", "EM"),
        ("mbpp", "P@1"),
        ("humaneval", "P@1"),
    ]


def test_the_columns_of_the_papers_table_1() -> None:
    assert labels("math", "finetuned") + labels("code", "finetuned")[:2] == [
        ("gsm8kx16", "P@1"),
        ("gsm8kx16", "Maj@16"),
        ("minerva_math500x16", "P@1"),
        ("minerva_math500x16", "Maj@16"),
        ("mbppx16", "P@1"),
        ("mbppx16", "P@10"),
    ]
    assert all(j.temperature == 0.6 for j in jobs("math", "finetuned", []))


def test_each_length_is_a_job_of_its_own() -> None:
    found = jobs("ruler", "greedy", [4096, 8192])
    assert len(found) == 2 * 13
    assert [j.name for j in found[:2]] == ["niah_single_1@4096", "niah_single_1@8192"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rulers", "greedy", [1]), "suite must be one of ruler, math, code, paper, got 'rulers'"),
        (("ruler", "best", [1]), "protocol must be one of greedy, pretrained, finetuned"),
        (("ruler", "greedy", [0]), "lengths must be positive"),
        (("ruler", "greedy", [512]), "lengths of ruler_.* must be at least 1024, got 512"),
        (("ruler", "greedy", [1], ["mmlu"]), "task must be one of .*; got 'mmlu'"),
        (("math", "greedy", [1], None, 0), "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_what_is_unknown_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs(*arguments)  # type: ignore[arg-type]


def test_every_suite_has_jobs_under_every_protocol() -> None:
    for suite in SUITES:
        for protocol in PROTOCOLS:
            found = jobs(suite, protocol, [4096])
            assert len({j.name for j in found}) == len(found) > 0
            assert all(j.labels for j in found)
