"""What a listing far away fetches: bytes and requests for a .pth, a safetensors and a sharded set.

usage: python tests/benchmarks/remote.py [GIB]   (files are sparse; 0.33 by default)
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import ckptool

COUNT = 152  # tensors
SHARDS = 4


def _safetensors(path: Path, keys: list[str], width: int) -> None:
    """Write a header, and a hole for the tensors."""
    entries: dict[str, Any] = {}
    for number, key in enumerate(keys):
        offsets = [number * 4 * width, (number + 1) * 4 * width]
        entries[key] = {"dtype": "F32", "shape": [width], "data_offsets": offsets}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + len(keys) * 4 * width)


def _files(folder: Path, gib: float) -> dict[str, str]:
    """Write the three; give what is listed by its name."""
    keys = [f"layers.{number}.block.weight" for number in range(COUNT)]
    width = int(gib * (1 << 30)) // 4 // COUNT
    _safetensors(folder / "x.safetensors", keys, width)
    ckptool.convert(folder / "x.safetensors", folder / "x.pth", sync=False)
    names = {
        key: f"model-{n % SHARDS + 1:05}-of-{SHARDS:05}.safetensors" for n, key in enumerate(keys)
    }
    for name in sorted(set(names.values())):
        _safetensors(folder / name, [key for key in keys if names[key] == name], width)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return {"torch zip": "x.pth", "safetensors": "x.safetensors", "4 shards": index.name}


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, list[int]]]:
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = folder / self.path[1:]
            size = path.stat().st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert wanted
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("ETag", f'"{size}"')
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            sent.append(stop - start)
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(stop - start))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
    finally:
        server.shutdown()
        server.server_close()


def main(gib: float = 0.33) -> None:
    """Print a row for each."""
    os.environ.pop("http_proxy", None)
    with tempfile.TemporaryDirectory() as name, _serving(Path(name)) as (root, sent):
        print(f"{'':12} {'size':>14} {'fetched':>10} {'share':>9} {'requests':>9} {'seconds':>8}")
        for what, file in _files(Path(name), gib).items():
            sent.clear()
            began = time.perf_counter()
            size = ckptool.read(f"{root}/{file}").nbytes
            seconds = time.perf_counter() - began
            share = f"{sum(sent) / size:.4%}"
            print(f"{what:12} {size:14} {sum(sent):10} {share:>9} {len(sent):9} {seconds:8.3f}")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
