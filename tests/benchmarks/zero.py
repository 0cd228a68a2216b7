"""Time what is read of DeepSpeed ZeRO 3: joining 1 GiB of four ranks, listing 64 ranks.

    python tests/benchmarks/zero.py --size 1GiB --rounds 5

The sets are made with torch. A join is paired with `cat` of the files that hold its slices into
one, in rounds that rotate; printed are the medians, the ratio of the pairs, and the largest peak
memory.
Limits: 1.3 times `cat`, 96 MiB; `keys` of 64 ranks, 1 second.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from dcp import measured
from run import HERE, nbytes_of

sys.path.append(str(HERE.parents[1] / "fixtures"))
LAYERS, RATIO, PEAK, LIST = 32, 1.3, 96.0, 1.0
SHAPES = {
    **{f"self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
    **{f"mlp.{name}_proj.weight": (8, 22) for name in ("gate", "up", "down")},
    **{f"{name}_layernorm.weight": (8,) for name in ("input", "post_attention")},
}


def make(folder: Path, nbytes: int, world: int) -> None:
    """Save a decoder of 32 layers with masters of so many bytes in all, as so many ranks do."""
    import torch
    import zero_ranks

    unit = max(1, int((nbytes / 4 / LAYERS / (4 * 64 + 3 * 8 * 22)) ** 0.5))
    group = {
        f"model.layers.{layer}.{name}": torch.rand([size * unit for size in shape])
        for layer in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    zero_ranks.save(folder, zero_ranks.Model([group], moments=False), 3, world)


def main() -> None:
    """Print a line for each task; exit 1 where a limit is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=nbytes_of, default="1GiB")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ckptool = [sys.executable, "-m", "ckptool"]
    with tempfile.TemporaryDirectory() as made:
        here = Path(made)
        one, out, many = here / "four", here / "out.safetensors", here / "many"
        make(one, given.size, 4)
        make(many, 16 << 20, 64)
        slices = shlex.join(map(str, sorted(one.glob("*optim_states.pt"))))
        joined = here / "joined"
        tasks = {
            "cat": (["sh", "-c", f"cat {slices} > {joined}"], joined),
            "join": ([*ckptool, "convert", "--no-sync", str(one), str(out)], out),
            "keys of 64 ranks": ([*ckptool, "keys", str(many)], here / "none"),
        }
        rounds = []
        for number in range(given.rounds):
            order = list(tasks)[number % 3 :] + list(tasks)[: number % 3]
            rounds.append({name: measured(*tasks[name]) for name in order})
        found = {name: [each[name] for each in rounds] for name in tasks}
        ratio = statistics.median(each["join"][0] / each["cat"][0] for each in rounds)
        walls = {name: statistics.median(wall for wall, _ in each) for name, each in found.items()}
        peaks = {name: max(peak for _, peak in each) / 2**20 for name, each in found.items()}
        for name in tasks:
            print(f"{name:16}  {walls[name]:6.2f} s  {peaks[name]:7.1f} MiB")
        print(f"join: {ratio:.2f} x cat")
    met = ratio <= RATIO and peaks["join"] <= PEAK and walls["keys of 64 ranks"] <= LIST
    sys.exit(not met)


if __name__ == "__main__":
    main()
