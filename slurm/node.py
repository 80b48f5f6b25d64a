"""torchrun for one node of a Slurm job; its status says whether it was asked to stop.

    srun python slurm/node.py TORCHRUN'S ARGUMENTS        0 done, 75 stopped by SIGTERM, else torchrun's own

torchrun hands SIGTERM on to its ranks, waits for them (--shutdown-timeout) and then ends with 1, as it does when they
fail. A preempted job goes back into the queue and a failed one must not: hence a status of its own (EX_TEMPFAIL). It
is torchrun in this process, so that it is the process that Slurm signals, once, whatever tracks the job's processes.
"""

import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException

if __name__ == "__main__":
    try:
        run.main()
    except SignalException:
        sys.exit(os.EX_TEMPFAIL)
