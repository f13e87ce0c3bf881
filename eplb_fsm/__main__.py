"""`python -m eplb_fsm`: the command line, also for `torchrun -m eplb_fsm`."""

import sys

from eplb_fsm.cli import main

if __name__ == "__main__":
    sys.exit(main())
