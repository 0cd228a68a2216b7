"""Small files that say a lot, `n` times: what a stranger may make reading cost.

As a program it measures one command line over a file, in a process of its own: exit code, peak of
resident memory in bytes, seconds of CPU, as JSON: `python tests/costly.py check FILE`.
"""

from __future__ import annotations

import io
import json
import re
import resource
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

Writer = Callable[[Path, int], object]
ADDRESSES = 4 << 30


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + u32(len(data)) + data


def archive(path: Path, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, data in records.items():
            made.writestr(f"archive/{name}", data)


# Pickles: what is in a list, `n` times.
PICKLED: dict[str, Callable[[int], bytes]] = {
    "dicts": lambda n: b"}" * n,
    "lists": lambda n: b"]" * n,
    "sets": lambda n: b"\x8f" * n,
    "tuples": lambda n: b"N\x85" * n,
    "nothing": lambda n: b"N" * n,
    "numbers": lambda n: b"".join(b"J" + u32(1000 + i) for i in range(n)),
    "floats": lambda n: (b"G" + b"\x40" * 8) * n,
    "long numbers": lambda n: (b"\x8a\x09" + b"\x7f" * 9) * n,
    "texts": lambda n: b"U\x02ab" * n,
    "one wide text": lambda n: text("a" * n + "\U0001f600"),
    "keys": lambda n: b"}(" + b"".join(text(f"k{i}") + b"N" for i in range(n)) + b"u",
    "calls": lambda n: b"ccollections\nCounter\nq\x010" + b"h\x01)R" * n,
    "ordered dicts": lambda n: b"ccollections\nOrderedDict\nq\x010" + b"h\x01)R" * n,
    "objects": lambda n: b"cmine\nA\nq\x010" + b"h\x01)\x81}b" * n,
    "names": lambda n: b"".join(b"cmine\nn%d\n" % i for i in range(n)),
    "one name": lambda n: b"cmine\nname\n" * n,
    "memoized": lambda n: b"N" + b"\x94" * n,
    "memoized with gaps": lambda n: b"N" + b"".join(b"r" + u32(3 * i) for i in range(n)),
    "text like gets": lambda n: text(
        "".join(f"j{chr(i & 127)}{chr(i >> 7 & 127)}\0\0" for i in range(n))
    ),
    "duplicates": lambda n: b"]" + b"2" * n,
    "marks": lambda n: b"(" * n + b"0" * n,
    "nested": lambda n: (b"]" * 100 + b"a" * 99) * (n // 100),
    "one list": lambda n: b"]q\x01" + b"h\x01" * n,
}  # fmt: skip


def pickled(name: str, method: int = zipfile.ZIP_STORED) -> Writer:
    body = PICKLED[name]

    def write(path: Path, n: int) -> None:
        data = b"\x80\x02](" + body(n) + b"e."
        archive(path, {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}, method)

    return write


def safetensors(path: Path, header: str) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())


def entries(path: Path, n: int) -> None:
    row = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    safetensors(path, "{" + ",".join(row % i for i in range(n)) + "}")


def short_lists(path: Path, n: int) -> None:
    safetensors(path, '{"a":[' + ",".join(["[]", "{}"] * (n // 2)) + "]}")


def metadata(path: Path, n: int) -> None:
    safetensors(path, json.dumps({"__metadata__": {f"k{i}": "v" for i in range(n)}}))


def note(path: Path, n: int) -> None:
    text = '{"v":1,"order":[' + ",".join(["[]"] * n) + "]}"
    safetensors(path, json.dumps({"__metadata__": {"ckptool": text}}))


def some_json(path: Path, n: int) -> None:
    path.write_text('{"a":[' + ",".join(["[]"] * n) + "]}")


def absent(path: Path, n: int) -> None:
    names = {f"k{i}": f"m{i}.safetensors" for i in range(n)}
    path.write_text(json.dumps({"metadata": {}, "weight_map": names}))


def members(path: Path, n: int) -> None:
    archive(
        path, {"data.pkl": b"\x80\x02}.", "version": b"3\n"} | {f"data/{i}": b"" for i in range(n)}
    )


def tar_members(path: Path, n: int) -> None:
    headers = (tarfile.TarInfo(f"x{i}").tobuf(tarfile.USTAR_FORMAT) for i in range(n))
    with path.open("wb") as file:
        file.writelines(headers)
        file.write(bytes(10240))


def plain(path: Path, n: int) -> None:
    path.write_bytes(b"\x80\x02](" + b"}" * n + b"e.")


def legacy(path: Path, n: int) -> None:
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
    path.write_bytes(magic + b"\x80\x02](" + b"}" * n + b"e.\x80\x02].")


def distributed(path: Path, n: int) -> None:
    """Write the index of a distributed checkpoint whose entries are not there."""
    row = text("k%d") + b"h\x02)\x81}b"
    body = b"".join(
        row.replace(b"k%d", b"k%07d" % i).replace(b"\3\0\0\0", b"\x08\0\0\0") for i in range(n)
    )
    index = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}("
    index += b"ctorch.distributed.checkpoint.metadata\nBytesStorageMetadata\nq\x020"
    index += text("state_dict_metadata") + b"}(" + body + b"u" + text("storage_data") + b"}ub."
    path.write_bytes(index)


def kept_states(path: Path, n: int) -> None:
    """Write an index whose chunks are made small, and all that made them is fetched again."""
    where = b"ctorch.distributed.checkpoint.metadata\n"
    index = b"\x80\x02" + where + b"Metadata\n)\x81}(" + where + b"MetadataIndex\nq\x000"
    index += text("state_dict_metadata") + b"}" + text("storage_data") + b"}("
    states = [b"(" + text("fqn") + text(f"k{i}") + text("more") + b"]]]\x87u" for i in range(n)]
    index += b"".join(b"h\0)\x81}r" + u32(1 + i) + state + b"bN" for i, state in enumerate(states))
    gets = b"".join(b"j" + u32(1 + i) for i in range(n))
    path.write_bytes(index + b"u" + text("planner_data") + b"](" + gets + b"eub.")


def long_names(path: Path, n: int) -> None:
    """Write an index of long keys with one letter in them that makes all take four bytes."""
    where = b"ctorch.distributed.checkpoint.metadata\n"
    index = [b"\x80\x02", where, b"Metadata\n)\x81}(", text("state_dict_metadata"), b"}"]
    index += [text("storage_data"), b"}("]
    for i in range(n):
        key = text(f"{i:07}\U00010348" + "x" * 10_000)
        index += [where, b"MetadataIndex\n)\x81}(", text("fqn"), key, text("offset"), b"Nub"]
        index += [b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n)\x81}("]
        index += [text("relative_path"), text("__0_0.distcp"), text("offset"), b"K\0"]
        index += [text("length"), b"K\x01ub"]
    path.write_bytes(b"".join([*index, b"uub."]))


def script(path: Path, n: int) -> None:
    source = "class A(Module):\n  __parameters__ = []\n" + "".join(
        f"  a{i} : int\n" for i in range(n)
    )
    module = b"\x80\x02c__torch__\nA\n)\x81}b."
    records = {
        "data.pkl": module,
        "constants.pkl": b"\x80\x02).",
        "code/__torch__.py": source.encode(),
    }
    archive(path, records, zipfile.ZIP_DEFLATED)


def model_json(path: Path, n: int) -> None:
    row = {"dims": ["0"], "strides": ["1"], "dataType": "FLOAT", "data": {"key": "tensors/0"}}
    model = {"mainModule": {"name": "m"}, "tensors": [row] * n}
    archive(
        path, {"model.json": json.dumps(model).encode(), "tensors/0": b""}, zipfile.ZIP_DEFLATED
    )


# Each: the suffix, what writes it, and the smallest of three sizes, each four times that before.
INPUTS: dict[str, tuple[str, Writer, int]] = {
    **{name: (".pth", pickled(name), 100_000) for name in PICKLED},
    **{
        f"{name}, deflated": (".pth", pickled(name, zipfile.ZIP_DEFLATED), 100_000)
        for name in ("dicts", "keys", "objects", "nothing", "one wide text")
    },
    "entries of safetensors": (".safetensors", entries, 50_000),
    "lists in JSON": (".safetensors", short_lists, 100_000),
    "metadata of safetensors": (".safetensors", metadata, 100_000),
    "a note in safetensors": (".safetensors", note, 200_000),
    "a JSON text": (".json", some_json, 200_000),
    "an index of absent shards": (".safetensors.index.json", absent, 50_000),
    "records of a zip": (".pth", members, 20_000),
    "members of a tar": (".tar", tar_members, 5_000),
    "a plain pickle": (".pkl", plain, 100_000),
    "a legacy file": (".pth", legacy, 100_000),
    "an index of a distributed checkpoint": (".metadata", distributed, 20_000),
    "an index that keeps its states": (".metadata", kept_states, 20_000),
    "an index of long names": (".metadata", long_names, 5_000),
    "source of a script": (".pt", script, 50_000),
    "model.json": (".pt", model_json, 20_000),
}


def write(name: str, folder: Path, factor: int = 1) -> Path:
    """Write one of the inputs, so many times its smallest size."""
    suffix, writer, smallest = INPUTS[name]
    path = folder / f"{name.replace(' ', '_').replace(',', '')}_{factor}{suffix}"
    writer(path, factor * smallest)
    return path


def bound(path: Path) -> int:
    """Return the memory that reading a file may take, all of which is metadata."""
    return min(256 << 20, (64 << 20) + 64 * path.stat().st_size)


def main(line: list[str]) -> None:
    from ckptool.cli.main import main as run

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        code = run(line)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {"code": code, "peak": 1024 * int(peak[1]) if peak else 0}
    print(json.dumps({**found, "seconds": used.ru_utime + used.ru_stime, "said": said.getvalue()}))


if __name__ == "__main__":
    main(sys.argv[1:])
