"""`python -m experiments list | run`: the papers and their experiments."""

import signal
import sys

# Until something runs there is nothing to save, and SIGTERM is no failure: imports alone take seconds.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

from experiments.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
