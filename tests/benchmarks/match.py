"""Time `ckptool match` on 10 000 keys, in processes of their own: at most 5 s of the CPU each.

    python tests/benchmarks/match.py --rounds 3

Lists of keys alone, so that nothing else is measured: a mixture of experts under two naming
schemes, names without a meaning, and one shape for all.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

KEYS = 10_000
MOST = 5.0  # seconds
LAYERS, EXPERTS, DIM = 40, 82, 512
Shapes = Mapping[str, tuple[int, ...]]
EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "dense"}


def experts(*, theirs: bool) -> Shapes:
    """Return the keys of a mixture of experts, under one of two naming schemes."""
    stack, block, outer = (
        ("h", "moe.expert", "attn") if theirs else ("layers", "mlp.experts", "self_attn")
    )
    made = {}
    for i in range(LAYERS):
        for one, other in ATTENTION.items():
            made[f"model.{stack}.{i}.{outer}.{other if theirs else one}.weight"] = (DIM, DIM)
        for e in range(EXPERTS):
            for one, other in EXPERT.items():
                shape = (DIM, 2 * DIM) if one == "down_proj" else (2 * DIM, DIM)
                made[f"model.{stack}.{i}.{block}.{e}.{other if theirs else one}.weight"] = shape
    return made


def nonsense(seed: int, shapes: int) -> Shapes:
    """Return keys without a meaning, in another order for each seed, of so many sizes each way."""
    draw, order = random.Random(seed), random.Random(0)
    sizes = [(order.randint(2, shapes), order.randint(2, shapes)) for _ in range(KEYS)]
    draw.shuffle(sizes)
    return {
        f"{''.join(draw.choices('bdfgjpwyz', k=5))}.m{at}.weight": size
        for at, size in enumerate(sizes)
    }


CASES = {
    "experts": (experts(theirs=False), experts(theirs=True)),
    "no meaning": (nonsense(1, 30), nonsense(2, 30)),
    "one shape": (nonsense(1, 2), nonsense(2, 2)),
}


def written(path: Path, shapes: Shapes) -> Path:
    rows = [{"key": key, "dtype": "F32", "shape": list(shape)} for key, shape in shapes.items()]
    path.write_text(json.dumps({"schema": "keys/1", "tensors": rows}), encoding="utf-8")
    return path


def seconds(here: Path, there: Path) -> float:
    """Return the time on the CPU of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "ckptool", "match", str(here), "--like", str(there)]
    subprocess.run(command, capture_output=True, timeout=600)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> int:
    """Measure, show, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    slow = False
    with tempfile.TemporaryDirectory() as folder:
        for name, sides in CASES.items():
            here, there = (
                written(Path(folder) / f"{side}.json", shapes)
                for side, shapes in zip(("here", "there"), sides, strict=True)
            )
            took = median(seconds(here, there) for _ in range(options.rounds))
            slow |= took > MOST
            print(f"{name:12} {len(sides[0])} keys: {took:.2f} s")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
