"""The console command `recsys_edu`, before anything of the package is imported.

Importing `recsys_edu` needs torch, and a damaged FBGEMM can end the process that imports it. `recsys_edu
doctor` has to work exactly then, so it is run from its file; every other command goes to the package.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["doctor"]:
        return run_doctor()
    try:
        from recsys_edu.notebook.cli import main as run_command
    except ImportError as error:
        print(f"recsys_edu cannot be imported ({error}). Run: recsys_edu doctor", file=sys.stderr)
        return 1
    return run_command(arguments)


def run_doctor() -> int:
    """The doctor's own main(), from its file: finding a top-level package does not import it."""
    found = importlib.util.find_spec("recsys_edu")
    folder = Path(next(iter(found.submodule_search_locations)))
    return runpy.run_path(str(folder / "notebook" / "doctor.py"))["main"]()


if __name__ == "__main__":
    sys.exit(main())
