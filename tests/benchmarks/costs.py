"""Memory and time of inputs that are meant to cost, at three sizes each, against the bound.

python tests/benchmarks/costs.py                  (check of all of them)
python tests/benchmarks/costs.py --command info dicts keys
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import costly

SIZES = (1, 4, 16)


def main() -> int:
    """Print a line for each; exit code 1 says that one took more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of their names")
    parser.add_argument("--command", default="check")
    given = parser.parse_args()
    over = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in costly.INPUTS:
            if given.names and not any(part in name for part in given.names):
                continue
            for factor in SIZES:
                path = costly.write(name, Path(folder), factor)
                line = [sys.executable, costly.__file__, given.command, str(path)]
                found = json.loads(subprocess.run(line, capture_output=True, check=True).stdout)
                nbytes, bound = path.stat().st_size, costly.bound(path)
                over += found["peak"] > bound
                refused = "refused" if "--max-memory" in found["said"] else f"exit {found['code']}"
                print(
                    f"{name:<38}{nbytes / 1e6:>8.2f} MB"
                    f"{found['peak'] >> 20:>6} of {bound >> 20} MiB"
                    f"{found['seconds']:>7.1f} s  {refused}{'  OVER' * (found['peak'] > bound)}",
                    flush=True,
                )
                path.unlink()
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
