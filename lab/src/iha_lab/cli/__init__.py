"""The command line, `iha`. Each error is one sentence and exit code 2."""

import os
import sys


def main() -> None:
    """Entry point. It imports the commands itself, so that Ctrl-C may come then too."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars would be drawn over ours
    try:
        from iha_lab.cli.app import app

        app()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("IHA_TRACEBACK"):
            raise
        message = " ".join(str(error).split())
        print(f"error: {message} (IHA_TRACEBACK=1 shows where.)", file=sys.stderr)
        sys.exit(2)
