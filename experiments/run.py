"""The form that ml_collections users type: `python -m experiments.run --config=FILE:preset --workdir=DIR`."""

import sys

from experiments.cli import main_config_file

if __name__ == "__main__":
    sys.exit(main_config_file())
