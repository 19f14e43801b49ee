"""Run a returned notebook from top to bottom, past cells that fail, and keep what it shows.

    python -m recsys_edu.notebook.teaching.rerun SOURCE EXECUTED PARAMETERS

A wrong answer raises in its cell, and the exercises after it still count; so a failing cell does not end the run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Execute one notebook, writing it after every cell; 3 where the kernel died."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError
    from papermill.parameterize import parameterize_notebook

    from recsys_edu.notebook.runner import KERNEL_NAME

    source, executed, parameters = Path(arguments[0]), Path(arguments[1]), json.loads(arguments[2])
    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None  # what was handed in as output is not looked at
        cell.metadata.setdefault("tags", [])
    notebook.metadata["kernelspec"] = {"name": KERNEL_NAME, "display_name": KERNEL_NAME, "language": "python"}
    notebook.metadata.setdefault("papermill", {})
    notebook = parameterize_notebook(notebook, parameters, kernel_name=KERNEL_NAME, language="python")

    def keep(**_: object) -> None:
        nbformat.write(notebook, executed)

    client = NotebookClient(
        notebook,
        timeout=None,
        startup_timeout=120,
        kernel_name=KERNEL_NAME,
        allow_errors=True,
        on_cell_executed=keep,
        resources={"metadata": {"path": str(Path.cwd())}},
    )
    try:
        client.execute()
    except DeadKernelError:
        print("the kernel died")
        return 3
    finally:
        keep()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
