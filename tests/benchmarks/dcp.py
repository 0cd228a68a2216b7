"""Time the conversion of a distributed checkpoint against `cp -r`, and of a file into one.

    python tests/benchmarks/dcp.py --size 1GiB --rounds 3

A folder of two ranks is made with torch for each way of cutting: by rows, where what a rank holds
lies together, and by columns, where every row is put together from both. Printed are the medians of
the wall time, the ratio to copying the folder, and the largest peak memory.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from run import HERE, nbytes_of

sys.path.append(str(HERE.parents[1] / "fixtures"))
WIDTH = 4096
CUTS = {"rows": ([WIDTH // 2],), "columns": ([], [WIDTH // 2])}


def make(folder: Path, nbytes: int, cut: str) -> None:
    """Save square float32 matrices of so many bytes in all, as two ranks do."""
    import ranks
    import torch

    whole = torch.rand(WIDTH, WIDTH)
    count = max(1, nbytes // whole.nbytes)
    parts = ranks.held(whole, *CUTS[cut])
    ranks.save(folder, [{"model": {str(i): part for i in range(count)}} for part in parts])


def measured(command: list[str], out: Path) -> tuple[float, int]:
    """Run a command after its last output is gone; give its seconds and peak bytes."""
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    subprocess.run(["sync"], check=True)
    watch = [sys.executable, "-I", "-S", str(HERE / "measure.py"), str(out.parent / "stderr")]
    done = subprocess.run([*watch, *command], capture_output=True, text=True, check=True)
    status, wall, _, _, peak = done.stdout.split()
    if status != "0":
        sys.exit(f"{' '.join(command)}: {(out.parent / 'stderr').read_text()}")
    return float(wall), int(peak)


def main() -> None:
    """Print a line for each way of cutting and each direction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=nbytes_of, default="1GiB")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ckptool = [sys.executable, "-m", "ckptool", "convert", "--no-sync"]
    with tempfile.TemporaryDirectory() as made:
        here = Path(made)
        for cut in CUTS:
            folder, whole, back, copy = (here / name for name in (cut, "out.pth", "back", "copy"))
            make(folder, given.size, cut)
            tasks = {
                "cp -r": (["cp", "-r", str(folder), str(copy)], copy),
                f"{cut} -> torch": ([*ckptool, str(folder), str(whole)], whole),
                "torch -> dcp": ([*ckptool, "--to", "dcp", str(whole), str(back)], back),
            }
            rounds = [
                {name: measured(*task) for name, task in tasks.items()} for _ in range(given.rounds)
            ]
            copied = statistics.median(each["cp -r"][0] for each in rounds)
            for name in tasks:
                wall = statistics.median(each[name][0] for each in rounds)
                peak = max(each[name][1] for each in rounds) / 2**20
                print(f"{name:16}  {wall:6.2f} s  {wall / copied:5.2f} x cp  {peak:7.1f} MiB")
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
