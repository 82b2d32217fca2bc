"""The form that ml_collections users type: `python -m experiments.run --config=FILE:preset --workdir=DIR`."""

import signal
import sys

if __name__ == "__main__":
    # Until something runs there is nothing to save, and SIGTERM is no failure: the import alone takes seconds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    from experiments.cli import main_config_file

    sys.exit(main_config_file())
