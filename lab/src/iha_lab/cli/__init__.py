"""The command line, `iha`."""

import sys


def main() -> None:
    """Entry point: `iha_lab.cli.main`, or the sentence that says what it needs."""
    try:
        from iha_lab.cli.main import main as run
    except ModuleNotFoundError as missing:
        sys.exit(
            f"error: the command line needs {missing.name}, which is not installed; install"
            " 'interleaved-head-attention[cli]'."
        )
    run()
