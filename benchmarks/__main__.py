"""`python -m benchmarks NAME [options]` runs one benchmark; without a name it lists them."""

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

HELPERS = {"__init__", "__main__", "timing"}


def benches() -> dict[str, str]:
    """Name -> first line of the docstring of every benchmark beside this file (read without importing it)."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in HELPERS:
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            found[path.stem] = docstring.partition("\n")[0]
    return found


def main(argv: Sequence[str]) -> int:
    """List the benchmarks, or run the one that `argv[0]` names with the rest of `argv`.

    Returns:
        The exit status: 0, what the benchmark returned, or 2 for an unknown name.
    """
    known = benches()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [options]\n")
        for name, summary in known.items():
            print(f"  {name:<12} {summary}")
        return 0
    name = argv[0]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: there is no benchmark {name!r}{hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f"benchmarks.{name}").main(list(argv[1:])) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
