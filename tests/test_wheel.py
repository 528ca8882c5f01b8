"""The two distributions as they are published."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import iha

ROOT = Path(__file__).parents[1]
MOST_LINES = 8_680
# PyTorch and what it imports.
TORCH = (
    *("torch", "torchgen", "functorch", "nvidia", "triton", "typing_extensions.py", "sympy"),
    *("mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock"),
)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the library, the lab)."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in ("library", "lab"):
        source = ROOT if name == "library" else ROOT / "lab"
        command = (
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            str(folder / name),
            str(source),
        )
        subprocess.run((sys.executable, *command), check=True)
    library, lab = (next((folder / name).glob("*.whl")) for name in ("library", "lab"))
    return library, lab


pytestmark = pytest.mark.slow


def test_the_library_holds_no_research_code(wheels: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [n for n in wheel.namelist() if not re.match(r"[^/]+\.dist-info/", n)]
        lines = sum(len(wheel.read(n).splitlines()) for n in names if n.endswith(".py"))
        sources = {n: wheel.read(n).decode() for n in names if n.endswith(".py")}
    assert {name.split("/")[0] for name in names} == {"iha"}
    assert not [
        n for n, text in sources.items() if re.search(r"^\s*(from|import) iha_lab", text, re.M)
    ]
    assert lines <= MOST_LINES


def test_both_have_one_version(wheels: tuple[Path, Path]) -> None:
    assert [wheel.name.split("-")[:2] for wheel in wheels] == [
        ["interleaved_head_attention", iha.__version__],
        ["iha_lab", iha.__version__],
    ]


CALL = """
import sys, torch, iha
assert not {"transformers", "iha_lab"} & set(sys.modules), "import iha brings more than torch"
q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
mixing = iha.HeadMixing(4, num_kv_heads=2, pseudo_heads=2, init="upcycle")
sdpa = torch.nn.functional.scaled_dot_product_attention
expected = sdpa(q, k, v, is_causal=True, enable_gqa=True)
torch.testing.assert_close(mixing(q, k, v), expected, atol=1e-5, rtol=1e-5)
print(iha.__file__)
"""


def test_the_library_works_beside_torch_alone(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment with torch and what it needs, by links to this one's."""
    folder = tmp_path / "venv"
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", str(folder)), check=True)
    python = folder / "bin" / "python"
    here = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps")
    subprocess.run((*here, str(wheels[0])), check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    installed = Path(torch.__file__).parents[1]
    for name in TORCH:
        if (installed / name).exists():
            (packages / name).symlink_to(installed / name)
    done = subprocess.run((python, "-I", "-c", CALL), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(packages)
