"""`%%ranks`: run a notebook cell on the ranks of a `Cluster`.

%%ranks                         on every rank
%%ranks --only 0,2              on some ranks
%%ranks --timeout 5             seconds until the cell is ended and the rank that hangs is named
%ranks tensor.shape             one line
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys_edu.notebook.cluster import Cluster
    from recsys_edu.notebook.rank_results import CellOutput


def register(cluster: Cluster) -> None:
    """Make `%%ranks` mean the ranks of `cluster`; outside IPython there is nothing to do."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None:
        return
    reference = weakref.ref(cluster)  # the magic must not keep alive a cluster that its notebook has dropped

    def ranks(line: str, cell: str | None = None) -> None:
        found = reference()
        if found is None:
            raise RuntimeError("the cluster of %%ranks is gone: make one, and give it a name (cluster = Cluster())")
        only, timeout, rest = parse_options(line, found.world_size)
        if cell is not None and rest:
            raise ValueError(f"%%ranks: cannot read {rest!r}; expected --only 0,2 or --timeout 60")
        _run_and_show(found, rest if cell is None else cell, only, timeout)

    shell.register_magic_function(ranks, "line_cell", "ranks")


def register_without_cluster() -> None:
    """Make `%%ranks` say that no cluster has been started, until one is; outside IPython there is nothing to do."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or shell.find_line_magic("ranks") is not None:
        return

    def ranks(line: str, cell: str | None = None) -> None:
        raise RuntimeError(
            "no ranks are running in this kernel: run the cell with Cluster(...) first. After a restart of the kernel "
            "everything before this cell is gone: Run > Run All Above Selected Cell"
        )

    shell.register_magic_function(ranks, "line_cell", "ranks")


def parse_options(line: str, world_size: int) -> tuple[list[int] | None, float | None, str]:
    """(ranks, seconds, rest of the line) from `--only 0,2 --timeout 60 rest`; None where an option is not there.

    Raises:
        ValueError: a value that is no rank of the cluster, or no number of seconds.
    """
    only: list[int] | None = None
    timeout: float | None = None
    rest = line.strip()
    while rest.startswith("--"):
        option, _, rest = rest.replace("=", " ", 1).partition(" ")
        value, _, rest = rest.strip().partition(" ")
        rest = rest.strip()
        try:
            if option == "--only":
                only = [int(part) for part in value.split(",")]
                if not all(0 <= rank < world_size for rank in only):
                    raise ValueError
            elif option == "--timeout":
                timeout = float(value)
                if timeout <= 0:
                    raise ValueError
            else:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"%%ranks: cannot read {option} {value!r}; expected --only with ranks from 0 to {world_size - 1}, such "
                "as --only 0,2, or --timeout with seconds, such as --timeout 60"
            ) from None
    return only, timeout, rest


def _run_and_show(cluster: Cluster, code: str, only: list[int] | None, timeout: float | None) -> None:
    from IPython.display import display

    handle: Any = None

    def show(output: CellOutput) -> None:
        nonlocal handle
        if output.is_empty():
            return
        if handle is None:
            handle = display(output, display_id=True)
        else:
            handle.update(output)

    show(cluster.run(code, only, timeout, progress=show))
