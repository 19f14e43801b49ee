"""The console command `recsys_edu`, and `python -m recsys_edu`; what it can do: recsys_edu/notebook/cli.py."""

from __future__ import annotations

import sys

from recsys_edu.interrupts import end_at_once, ends_when_interrupted

GRACE_S = 20.0  # for ending the kernel of a notebook that is being executed, or a torchrun's ranks


def main() -> int:
    """Run the command line's command; Ctrl-C ends it with one line, from its first import on."""
    end_at_once()
    from recsys_edu.notebook.cli import main as run_command

    with ends_when_interrupted(GRACE_S):
        return run_command()


if __name__ == "__main__":
    sys.exit(main())
