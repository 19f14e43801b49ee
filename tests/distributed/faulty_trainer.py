"""recsys_edu.examples.train_dlrm, but in its first life one rank kills itself in the middle of a step.

    faulty_trainer.py KILL_RANK KILL_STEP CLOCK_FILE <arguments of train_dlrm>

In the middle: ids are under way to their tables, their vectors have not come back. CLOCK_FILE gets the time of it.
"""

import os
import signal
import sys
import time
from pathlib import Path

from recsys_edu.distributed.exchange import GroupExchange
from recsys_edu.examples import train_dlrm


def main() -> None:
    kill_rank, kill_step, clock_file, *arguments = sys.argv[1:]
    mortal = os.environ["RANK"] == kill_rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    steps_begun = 0
    start = GroupExchange.start

    def start_or_die(self, send, send_W, receive_W, label, *more):
        nonlocal steps_begun
        steps_begun += label == FIRST_EXCHANGE
        transfer = start(self, send, send_W, receive_W, label, *more)
        if mortal and steps_begun == int(kill_step) and label != FIRST_EXCHANGE:
            Path(clock_file).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return transfer

    GroupExchange.start = start_or_die
    train_dlrm.main(arguments)


FIRST_EXCHANGE = "sizes"

if __name__ == "__main__":
    main()
