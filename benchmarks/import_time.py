"""What importing this package adds to importing torch and FBGEMM, beside TorchRec.

    python benchmarks/import_time.py [--rounds 7]

Fresh processes, by turns. `import recsys_edu` loads parts on first use, so the second row imports every public name
and the distributed package too.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, THEIRS, Gate, parse_arguments, report
from benchmarks.embedding_lookup import torchrec_or_none
from recsys_edu.kernels.backend import use_fbgemm

EVERYTHING = (
    "from recsys_edu import *; import recsys_edu.models.dlrm; import recsys_edu.distributed.model_parallel; "
    "import recsys_edu.optim"
)
IMPORTS = {"recsys_edu": "import recsys_edu", "recsys_edu, all public names": EVERYTHING}
PROGRAM = """
import time
start = time.perf_counter()
{base}
middle = time.perf_counter()
{added}
print(middle - start, time.perf_counter() - middle)
"""


def seconds(base: str, added: str) -> tuple[float, float]:
    """How long `base`, and then `added`, take in a fresh process."""
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(base=base, added=added)]
    done = subprocess.run(program, cwd=ROOT, check=True, capture_output=True, text=True)
    first, second = done.stdout.split()[-2:]
    return float(first), float(second)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__, argv, rounds=7)
    base = "import torch, fbgemm_gpu" if use_fbgemm() else "import torch"
    added = dict(IMPORTS)
    if torchrec_or_none() is not None:
        added[THEIRS] = "import torchrec"
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in added}
    for _ in range(1 if arguments.tiny else arguments.rounds):
        for name, statement in added.items():
            samples[name].append(seconds(base, statement))
    base_s = statistics.median(first for each in samples.values() for first, _ in each)
    rows = [
        {
            "import": base.removeprefix("import "),
            "seconds": base_s,
            "fastest": min(first for each in samples.values() for first, _ in each),
        }
    ]
    for name, each in samples.items():
        extra = [second for _, second in each]
        rows.append({"import": f"+ {name}", "seconds": statistics.median(extra), "fastest": min(extra)})
    gates = [
        Gate(f"seconds that {name} adds", statistics.median(second for _, second in samples[name]), at_most=0.3)
        for name in IMPORTS
    ]
    report("import_time", rows, gates, arguments.out)


if __name__ == "__main__":
    main()
