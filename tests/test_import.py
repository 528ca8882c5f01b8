"""`import iha` costs torch alone, and has every name that it promises."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import iha


def in_a_new_interpreter(code: str) -> None:
    """So that what other tests import does not count."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    "module", ["transformers", "jaxtyping", "triton", "torch._dynamo", "torch._inductor"]
)
def test_importing_brings_torch_alone(module: str) -> None:
    in_a_new_interpreter(
        "import sys, torch; before = set(sys.modules)\n"
        f"import iha; assert {module!r} not in set(sys.modules) - before, sys.modules[{module!r}]"
    )


def test_upcycle_imports_transformers_when_first_used() -> None:
    in_a_new_interpreter(
        "import sys, iha; assert 'iha.hf' not in sys.modules\n"
        "assert iha.upcycle.__module__.startswith('iha.hf') and 'transformers' in sys.modules"
    )


def test_every_public_name_resolves() -> None:
    assert len(set(iha.__all__)) == len(iha.__all__)
    for name in iha.__all__:
        assert getattr(iha, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'iha' has no attribute 'nonexistent'"):
        iha.nonexistent  # noqa: B018  # pyright: ignore
