"""`python -m experiments list | run`: the papers and their experiments."""

import signal
import sys

if __name__ == "__main__":
    # Until something runs there is nothing to save, and SIGTERM is no failure: the import alone takes seconds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    from experiments.cli import main

    sys.exit(main())
