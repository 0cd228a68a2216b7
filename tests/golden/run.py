"""Record what command lines come to, and compare two recordings.

    python tests/golden/run.py record FOLDER --ckptool-path CHECKOUT
    python tests/golden/run.py compare FOLDER_A FOLDER_B

`record` runs the command lines of `lines.txt` over the fixtures and the corpus (`CKPTOOL_CORPUS`),
with the package found in CHECKOUT, and writes a text for each: exit code, stdout, stderr, and each
file that was written. `compare` prints unified diffs of the texts; exit code 1 says that some
differ. What is random by nature (temporary names, free space, durations) is masked.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from comparing import compare
from lines import expanded, parsed
from recording import Sources, record

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def main() -> int:
    """Record or compare."""
    given = _arguments()
    if given.verb == "compare":
        return compare(given.a, given.b)
    _fix_hashes(given.hash_seed)
    sources = Sources(given.fixtures, given.corpus if given.corpus.is_dir() else None)
    if sources.corpus is None:
        print(f"no corpus at {given.corpus}: its lines are left out", file=sys.stderr)
    cases = expanded(parsed(HERE / "lines.txt"), sources.roots)
    cases = [case for case in cases if given.only in case.line]
    count = record(cases, sources, given.folder, given.ckptool_path, given.jobs)
    print(f"{count} command lines of {len(cases)} cases in {given.folder}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    recorder = verbs.add_parser("record")
    recorder.add_argument("folder", type=Path)
    recorder.add_argument("--ckptool-path", type=Path, default=ROOT, help="the program under test")
    recorder.add_argument("--fixtures", type=Path, default=ROOT / "fixtures")
    recorder.add_argument("--corpus", type=Path, default=_corpus())
    recorder.add_argument("--jobs", type=int, default=2)
    recorder.add_argument(
        "--hash-seed", default="0", help="another one shows where the order of a set gets out"
    )
    recorder.add_argument("--only", default="", metavar="TEXT", help="lines that contain TEXT")
    comparer = verbs.add_parser("compare")
    comparer.add_argument("a", type=Path)
    comparer.add_argument("b", type=Path)
    return parser.parse_args()


def _fix_hashes(seed: str) -> None:
    """Start again with this seed for the hashes of texts, which Python draws at its start."""
    if os.environ.get("PYTHONHASHSEED") != seed:
        os.environ["PYTHONHASHSEED"] = seed
        os.execv(sys.executable, [sys.executable, *sys.argv])


def _corpus() -> Path:
    return Path(os.environ.get("CKPTOOL_CORPUS") or ROOT.parent / "shared" / "corpus")


if __name__ == "__main__":
    sys.exit(main())
