"""Programs to run with torchrun, on one host or many; each is short enough to be copied and changed."""

import sys

from recsys_edu.interrupts import end_at_once

if sys.argv[0] == "-m":  # so it is while `python -m recsys_edu.examples.train_dlrm` looks for the program
    end_at_once()
