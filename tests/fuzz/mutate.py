"""Damage done with knowledge of the containers: opcodes, directories, counts, headers.

Every function takes a generator of random numbers and bytes, and gives other bytes; the same
generator gives the same damage. What cannot be taken apart any more is damaged as plain bytes.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))

import containers
import opcodes as op
from containers import Member

Mutation = Callable[[Random, bytes], bytes]

INTEGERS = (
    0, 1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 1001, 1002, 4095, 4096, 0x7FFF, 0x8000,
    0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 32, 1 << 40,
    (1 << 61) + 1, (1 << 62) // 4, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -2, -8, -(1 << 31),
    -(1 << 63), 1 << 70,
)  # fmt: skip
NAMES = (
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"),
    ("__builtin__", "eval"), ("collections", "OrderedDict"), ("collections", "defaultdict"),
    ("torch", "FloatStorage"), ("torch", "LongStorage"), ("torch", "BFloat16Storage"),
    ("torch", "float32"), ("torch", "Size"), ("torch", "QInt8Storage"), ("torch", "FloatTensor"),
    ("torch.cuda", "FloatTensor"), ("torch.storage", "UntypedStorage"), ("torch", "device"),
    ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._utils", "_rebuild_sparse_tensor"), ("torch._utils", "_rebuild_nested_tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"), ("torch.nn.parameter", "Parameter"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"), ("torch.nn.modules.linear", "Linear"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("torch.serialization", "_get_layout"),
    ("_codecs", "encode"), ("argparse", "Namespace"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"), ("numpy", "dtype"), ("copy_reg", "_reconstructor"),
    ("builtins", "set"), ("functools", "partial"), ("mine", "Thing"), ("a.b", "c.d"), ("", ""),
)  # fmt: skip
TEXTS = (
    "", "module", "module.", "a", "a.b", "a..b", ".", "weight", "storage", "cpu", "cuda:0", "meta",
    "state_dict", "model", "optimizer", "_metadata", "__metadata__", "0", "-1", "../x", "/etc/x",
    "x\0y", "x\ny", "x\ty", "\x1b[31mred", "\u202ertl", "\ud800", "\u0130", "\U0001f600", "'", '"',
    "%s{0}", "#", "=", "*", "?", "re:(", "[", "-n", "--force", "@file", "x" * 300,
)  # fmt: skip
SNIPPETS = (
    *(bytes([code]) for code in b"N)]}(t012RbQosuaelp.\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92"),
    *(bytes([code]) for code in b"\x93\x94\x97\x98\x99\xff"),
    b"q\0", b"h\0", b"h\xff", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"g0\n", b"p-1\n",
    b"p99999999999999999999\n", b"2\x86" * 40, b"\x85" * 300, b"(" * 1000, b"]" * 50, b"}a", b"]s",
    b"X\xff\xff\xff\xff", b"X\2\0\0\0\xed\xa0", b"\x8d" + b"\xff" * 8, b"\x8e" + b"\0\0\0\0\1" * 2,
    b"B\0\0\0\x40", b"C\2ab", b"\x96\1" + b"\0" * 7 + b"a", b"T\xff\xff\xff\xff", b"U\2\xff\xfe",
    b"\x95" + b"\xff" * 8, b"\x95\1" + b"\0" * 7, b"\x8a\0", b"\x8a\x11" + b"\xff" * 17,
    b"\x8b\xff\xff\xff\xff", b"\x8b\1\0\0\0\1", b"I01\n", b"I00\n", b"I-5\n", b"Ix\n", b"L5L\n",
    b"L" + b"9" * 5000 + b"L\n", b"F1e999\n", b"Fnan\n", b"Fx\n", b"G" + b"\x7f\xf0" + b"\0" * 6,
    b"V\\ud800\n", b"V\\u12\n", b"S'a'\n", b"S'\\x\n", b"S\"\\xff\"\n", b"P1\n", b"P('storage',)\n",
    b"(ios\nsystem\n", b"\x82\1", b"\x83\1\1", b"\x80\6", b"\x80\4", b"\x80\0", b"c\n\n",
    b"cos\nsystem\n(X\4\0\0\0true\x85R", b"cos\nsystem\nX\4\0\0\0true\x85R0",
    b"}(K\1K\1u", b"]K\1a", b"\x8f(K\1\x90", b"(K\1\x91", b"(K\1K\2d", b"(K\1l", b"(K\1t",
    b"ccollections\nOrderedDict\n)R", b"ctorch\nFloatStorage\n", b"}X\t\0\0\0_metadata}sb",
)  # fmt: skip


# Plain bytes.


def number(random: Random, width: int) -> bytes:
    """Write an interesting integer in so many bytes, mostly little-endian."""
    value = random.choice(INTEGERS) + random.choice((0, 0, 0, 1, -1))
    order = "big" if random.random() < 0.1 else "little"
    return (value % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]


def flip_bit(random: Random, data: bytes) -> bytes:
    return _with(data, at := _place(random, data), bytes([data[at] ^ 1 << random.randrange(8)]))


def set_byte(random: Random, data: bytes) -> bytes:
    return _with(data, _place(random, data), bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x2E))]))


def set_number(random: Random, data: bytes) -> bytes:
    width = random.choice((1, 2, 4, 8))
    return _with(data, _place(random, data), number(random, width))[: max(len(data), width)]


def insert(random: Random, data: bytes) -> bytes:
    at = _place(random, data)
    new = random.choice((number(random, 8), number(random, 4), b"\0" * 64, random.choice(SNIPPETS)))
    return data[:at] + new + data[at:]


def cut(random: Random, data: bytes) -> bytes:
    at = _place(random, data)
    return data[:at] + data[at + random.choice((1, 2, 4, 8, 64, 512)) :]


def truncate(random: Random, data: bytes) -> bytes:
    return data[: _place(random, data)]


def lengthen(random: Random, data: bytes) -> bytes:
    return data + random.choice((b"\0", b"\n", b"\0" * 512, data[:100], data, random.randbytes(30)))


def move_block(random: Random, data: bytes) -> bytes:
    start, to = _place(random, data), _place(random, data)
    block = data[start : start + random.choice((1, 4, 16, 64, 256))]
    return _with(data, to, block) if random.random() < 0.5 else data[:to] + block + data[to:]


def prepend(random: Random, data: bytes) -> bytes:
    return random.choice((b"\0", b"\n", b"PK\3\4", b"\x80\2", random.randbytes(16), data)) + data


def _place(random: Random, data: bytes) -> int:
    """Choose a place, the start and the end (where containers keep their headers) most often."""
    near = min(len(data), random.choice((8, 64, 512, 1 << 20)))
    place = random.randrange(near) if near else 0
    return place if random.random() < 0.6 else max(0, len(data) - 1 - place)


def _with(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def splice(random: Random, data: bytes, other: bytes) -> bytes:
    """Go on with another file somewhere."""
    return data[: _place(random, data)] + other[_place(random, other) :]


PLAIN: tuple[Mutation, ...] = (
    flip_bit, set_byte, set_number, set_number, insert, cut, truncate, lengthen, move_block, prepend
)  # fmt: skip


# Pickles.


def operations(data: bytes, start: int = 0) -> list[bytes]:
    """Split the pickle at `start` into its opcodes with their arguments."""
    starts = [
        position for _, _, position in pickletools.genops(data[start:]) if position is not None
    ]
    ends = [*starts[1:], starts[-1] + 1]
    return [data[start + one : start + end] for one, end in zip(starts, ends, strict=True)]


def change_pickle(random: Random, data: bytes) -> bytes:
    """Change opcodes or arguments of a pickle."""
    try:
        ops = operations(data)
    except Exception:
        return random.choice(PLAIN)(random, data)
    rest = data[sum(map(len, ops)) :]
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        _change_operation(random, ops)
    return b"".join(ops) + rest


def _change_operation(random: Random, ops: list[bytes]) -> None:
    if not ops:
        return
    at = random.randrange(len(ops))
    match random.choice(
        ("argument",) * 6 + ("drop", "double", "swap", "insert", "replace", "move")
    ):
        case "argument":
            candidates = [index for index, each in enumerate(ops) if len(each) > 1] or [at]
            at = random.choice(candidates)
            ops[at] = _other_argument(random, ops[at], ops)
        case "drop":
            del ops[at : at + random.choice((1, 1, 1, 4, 20))]
        case "double":
            ops[at:at] = ops[at : at + random.choice((1, 1, 5, 30))]
        case "swap":
            other = random.randrange(len(ops))
            ops[at], ops[other] = ops[other], ops[at]
        case "insert":
            ops.insert(at, random.choice(SNIPPETS))
        case "replace":
            ops[at] = random.choice(SNIPPETS)
        case "move":
            size = random.choice((1, 4, 16))
            block = ops[at : at + size]
            del ops[at : at + size]
            ops[(to := random.randrange(len(ops) + 1)) : to] = block


def _other_argument(random: Random, one: bytes, ops: list[bytes]) -> bytes:
    """Give an opcode with another argument of its kind."""
    code = one[:1]
    if code in (b"K", b"M", b"J", b"I", b"L", b"\x8a"):
        return op.integer(random.choice(INTEGERS))
    if code in (b"X", b"U", b"T", b"V", b"S", b"\x8c"):
        texts = [each for each in ops if each[:1] in (b"X", b"U", b"\x8c")]
        if texts and random.random() < 0.6:
            return random.choice(texts)
        return op.text(random.choice(TEXTS))
    if code in (b"c", b"i"):
        return code + op.name(*random.choice(NAMES))[1:]
    if code in (b"q", b"h", b"r", b"j"):
        return code.translate(bytes.maketrans(b"rj", b"qh")) + bytes([random.randrange(40)])
    return set_byte(random, one)


# torch zip.


def members_of(data: bytes) -> list[Member]:
    """Take an archive apart."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [Member(info.filename, archive.read(info)) for info in archive.infolist()]


def change_record(random: Random, data: bytes) -> bytes:
    """Change what is in a record, most often the pickle, and pack it again."""
    members = members_of(data)
    pickles = [index for index, each in enumerate(members) if each.name.endswith(".pkl")]
    others = range(len(members))
    at = random.choice(pickles if pickles and random.random() < 0.8 else others)
    change = change_pickle if members[at].name.endswith(".pkl") else random.choice(PLAIN)
    crc = None if random.random() < 0.9 else random.choice((0, 1, zlib.crc32(members[at].data)))
    members[at] = replace(members[at], data=change(random, members[at].data), crc=crc)
    return _packed(random, members)


def _packed(random: Random, members: list[Member]) -> bytes:
    """Pack records as torch does, as re-zipping users do, or without checksums."""
    way = random.random()
    if way < 0.7:
        return containers.zip_bytes(members)
    if way < 0.8:
        return containers.zip_bytes([replace(each, crc=0) for each in members])
    buffer = io.BytesIO()
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
    method = random.choice(methods[: 3 if way < 0.98 else 4])
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that stand twice
        archive.comment = random.choice((b"", b"", b"PK\5\6", b"x" * 100))
        for each in members:
            info = zipfile.ZipInfo(each.name.replace("\0", "_"))
            info.compress_type = archive.compression
            with archive.open(info, "w", force_zip64=random.random() < 0.3) as record:
                record.write(each.data)
    return buffer.getvalue()


def change_members(random: Random, data: bytes) -> bytes:
    """Drop, repeat, rename, reorder, resize or add records."""
    members = members_of(data)
    at = random.randrange(len(members))
    one, other = members[at], random.choice(members)
    root = one.name.partition("/")[0]
    match random.choice(("drop", "double", "rename", "swap", "shuffle", "size", "add", "deflate")):
        case "drop":
            del members[at]
        case "double":
            members.insert(random.randrange(len(members) + 1), one)
        case "rename":
            near = (one.name.upper(), other.name, f"{root}/../x", f"/{one.name}", f"x/{one.name}")
            names = (*near, one.name + "\0", f"{one.name}/", f"{root}/data/{random.choice(TEXTS)}")
            name = random.choice(names).encode("utf-8", "replace").decode()
            members[at] = replace(one, name=name, local_name=random.choice((None, one.name)))
        case "swap":
            members[at] = replace(one, data=other.data)
        case "shuffle":
            random.shuffle(members)
        case "size":
            members[at] = replace(one, data=random.choice((one.data[:-1], one.data + b"\0", b"")))
        case "add":
            name, content = random.choice(EXTRA_RECORDS)
            members.append(Member(f"{root}/{name}", content))
        case "deflate":
            members[at] = _deflated(random, one)
    return _packed(random, members) if random.random() < 0.3 else containers.zip_bytes(members)


EXTRA_RECORDS = (
    ("byteorder", b"big"), ("byteorder", b"little"), ("byteorder", b"little\n"), ("byteorder", b""),
    (".format_version", b"1"), (".storage_alignment", b"64"), ("constants.pkl", b"\x80\2)."),
    ("version", b"3\n"), ("version", b"x"), ("data/", b""), ("data/0", b"1234"), ("code/a.py", b""),
    ("data.pkl", b"\x80\2}."), ("DATA.PKL", b"\x80\2}."), (".data/serialization_id", b"1"),
)  # fmt: skip


def _deflated(random: Random, one: Member) -> Member:
    packer = zlib.compressobj(wbits=-15)
    payload = packer.compress(one.data) + packer.flush()
    lies = random.choice((one.data, one.data, one.data + b"\0", one.data[:-1]))
    broken = random.random() < 0.3
    return replace(
        one, data=lies, crc=zlib.crc32(one.data), method=8,
        payload=flip_bit(random, payload) if broken else payload,
    )  # fmt: skip


def _numbers(layout: struct.Struct) -> list[tuple[int, int]]:
    """List (offset, width) of the numbers in a header, its signature aside."""
    found, position = [], 4
    for count, kind in re.findall(r"(\d*)([HLQ])", layout.format.removeprefix("<4s")):
        for _ in range(int(count or 1)):
            width = {"H": 2, "L": 4, "Q": 8}[kind]
            found.append((position, width))
            position += width
    return found


HEADERS = {
    b"PK\1\2": _numbers(containers.CENTRAL),
    b"PK\3\4": _numbers(containers.LOCAL),
    b"PK\5\6": _numbers(containers.END),
    b"PK\6\6": _numbers(containers.END64),
    b"PK\6\7": _numbers(containers.LOCATOR64),
    b"PK\7\x08": [(4, 4), (8, 4), (12, 4)],
}


def change_header(random: Random, data: bytes) -> bytes:
    """Set a field of a header, a directory entry or an end record."""
    found = [match.start() for match in re.finditer(b"PK(\1\2|\3\4|\5\6|\6\6|\6\7|\7\x08)", data)]
    for _ in range(random.choice((1, 1, 2, 3))):
        if not found:
            break
        at = random.choice(found)
        offset, width = random.choice(HEADERS[data[at : at + 4]])
        old = int.from_bytes(data[at + offset : at + offset + width], "little")
        near = ((old + random.choice((-1, 1, 64))) % (1 << 8 * width)).to_bytes(width, "little")
        data = _with(data, at + offset, near if random.random() < 0.4 else number(random, width))
    return data


def change_directory(random: Random, data: bytes) -> bytes:
    """Change the entries of the directory and write end records that fit, or do not."""
    at = data.rindex(b"PK\5\6")
    *_, count, size, start, _ = containers.END.unpack_from(data, at)
    entries = _entries(data[start : start + size])
    one = random.randrange(len(entries))
    match random.choice(("drop", "double", "swap", "wide", "extra", "comment", "name")):
        case "drop":
            del entries[one]
        case "double":
            entries.insert(random.randrange(len(entries)), entries[one])
        case "swap":
            random.shuffle(entries)
        case "wide":
            entries[one] = _widened(random, entries[one])
        case "extra":
            entries[one] = _lengthened(entries[one], 30, random.randbytes(random.randrange(20)))
        case "comment":
            entries[one] = _lengthened(entries[one], 32, random.choice((b"PK\5\6", b"x" * 40)))
        case "name":
            other = random.choice(entries)
            if len(other) == len(entries[one]):
                entries[one] = entries[one][:46] + other[46:]
    directory = b"".join(entries)
    count = random.choice((len(entries),) * 8 + (count, count + 1))
    return data[:start] + directory + containers.endings(count, start, len(directory))


def _entries(directory: bytes) -> list[bytes]:
    entries, position = [], 0
    while position + 46 <= len(directory):
        name, extra, comment = struct.unpack_from("<3H", directory, position + 28)
        end = position + 46 + name + extra + comment
        entries.append(directory[position:end])
        position = end
    return entries


def _lengthened(entry: bytes, field: int, new: bytes) -> bytes:
    """Put bytes before the extra field (30) or the comment (32) of a directory entry."""
    (size,) = struct.unpack_from("<H", entry, field)
    name, extra, _ = struct.unpack_from("<3H", entry, 28)
    at = 46 + name + (extra if field == 32 else 0)
    return _with(entry[:at] + new + entry[at:], field, struct.pack("<H", size + len(new) & 0xFFFF))


def _widened(random: Random, entry: bytes) -> bytes:
    """Move sizes or the offset of an entry into a zip64 field, rightly or wrongly."""
    values = []
    for at in (24, 20, 42):  # unpacked, packed, offset: the order of the zip64 field
        if random.random() < 0.6:
            values.append(int.from_bytes(entry[at : at + 4], "little"))
            entry = _with(entry, at, b"\xff" * 4)
    if random.random() < 0.4 and values:
        values[random.randrange(len(values))] = random.choice(INTEGERS) % (1 << 64)
    wide = b"".join(struct.pack("<Q", value) for value in values)
    size = len(wide) if random.random() < 0.8 else random.choice((0, 4, 8, 24, 0xFFFF))
    return _lengthened(entry, 30, struct.pack("<HH", 1, size) + wide)


# Legacy.


def change_legacy(random: Random, data: bytes) -> bytes:
    """Change one of the pickles in a row, or a count or the bytes behind them."""
    parts, position = [], 0
    while len(parts) < 5 and position < len(data):
        size = sum(map(len, operations(data, position)))
        parts.append(data[position : position + size])
        position += size
    rest = data[position:]
    match random.choice(
        ("pickle",) * 6 + ("other",) * 3 + ("count", "rest", "drop", "double", "swap")
    ):
        case "pickle":
            at = min(3, len(parts) - 1)
            parts[at] = change_pickle(random, parts[at])
        case "other":
            at = random.randrange(len(parts))
            parts[at] = change_pickle(random, parts[at])
        case "count":
            rest = _with(rest, random.randrange(len(rest) // 8 + 1) * 8, number(random, 8))
        case "rest":
            rest = random.choice(PLAIN)(random, rest)
        case "drop":
            del parts[random.randrange(len(parts))]
        case "double":
            parts.insert(random.randrange(len(parts)), random.choice(parts))
        case "swap":
            random.shuffle(parts)
    return b"".join(parts) + rest


# safetensors.


def change_json(random: Random, data: bytes) -> bytes:
    """Change a value of the header, and write it with a right or a wrong length."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(random.choice((1, 1, 2))):
        header = _other_header(random, header)
    text = json.dumps(header, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    if random.random() < 0.2:
        text = random.choice(PLAIN)(random, text)
    text += b" " * random.choice((0, -len(text) % 8))
    length = len(text) if random.random() < 0.9 else random.choice(INTEGERS) % (1 << 64)
    return (
        struct.pack("<Q", length)
        + text
        + (body if random.random() < 0.9 else lengthen(random, body))
    )


def _other_header(random: Random, header: dict[str, Any]) -> dict[str, Any]:
    keys = list(header)
    key = random.choice(keys) if keys else "a"
    entry = header.get(key)
    match random.choice(
        ("field",) * 5 + ("drop", "double", "rename", "metadata", "order", "value")
    ):
        case "field" if isinstance(entry, dict) and entry:
            field = random.choice(list(entry))
            header[key] = {**entry, field: _other_value(random, entry[field])}
        case "drop":
            header.pop(key, None)
        case "double":
            header[random.choice(TEXTS)] = entry
        case "rename":
            new = random.choice(TEXTS)
            header = {new if each == key else each: value for each, value in header.items()}
        case "metadata":
            note = {"v": 1, "order": [*keys[::-1], "b"], "ties": {"b": key}}
            note |= {"order": keys[::-1], "ties": {}} if random.random() < 0.5 else {}
            header["__metadata__"] = {
                "format": "pt", "ckptool": json.dumps(_other_value(random, note)),
            }  # fmt: skip
        case "order":
            random.shuffle(keys)
            header = {each: header[each] for each in keys}
        case _:
            header[key] = _other_value(random, entry)
    return header


def _other_value(random: Random, value: Any) -> Any:
    if isinstance(value, list) and value and random.random() < 0.7:
        changed = list(value)
        changed[random.randrange(len(value))] = _other_value(random, None)
        return random.choice((changed, [*value, 1], value[:-1], value[::-1]))
    if isinstance(value, dict) and value and random.random() < 0.7:
        key = random.choice(list(value))
        return {**value, key: _other_value(random, value[key])}
    small = (random.randrange(100), random.choice(INTEGERS), random.choice(TEXTS), None, True, 1.5)
    odd = (-0.0, [], {}, [[]], {"a": 1}, random.choice(DTYPES), random.choice(DTYPES), float("nan"))
    return random.choice((*small, *odd))


DTYPES = tuple(
    "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL F8_E4M3 F4 F6_E2M3 C64 U64 f32 F128".split()
)


# Tar.


def change_tar(random: Random, data: bytes) -> bytes:
    """Change a member, or a header with a right or a wrong checksum."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = [(info, file.read() if (file := tar.extractfile(info)) else b"") for info in tar]
    at = random.randrange(len(found))
    info, content = found[at]
    match random.choice(("content",) * 4 + ("drop", "double", "name", "type", "swap", "header")):
        case "content":
            change = random.choice((change_legacy, change_pickle, *PLAIN[:5]))
            found[at] = info, _tried(random, change, content)
        case "drop":
            del found[at]
        case "double":
            found.insert(random.randrange(len(found)), found[at])
        case "name":
            info.name = random.choice(TEXTS).encode("utf-8", "replace").decode()[:99] or "x"
        case "type":
            info.type = random.choice((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE))
            info.linkname = random.choice(("/etc/passwd", "../x", "pickle"))
        case "swap":
            random.shuffle(found)
        case "header":
            return _other_tar_header(random, data)
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as made:
        for info, content in found:
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


TAR_FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8))


def _other_tar_header(random: Random, data: bytes) -> bytes:
    starts = [at - 257 for at in range(257, len(data), 512) if data[at : at + 5] == b"ustar"]
    if not starts:
        return random.choice(PLAIN)(random, data)
    at = random.choice(starts)
    offset, width = random.choice(TAR_FIELDS)
    values = (b"7" * width, b"\x80" + b"\0" * (width - 1), b"\xff" * width, random.randbytes(width))
    head = _with(data[at : at + 512], offset, random.choice(values)[:width])
    if random.random() < 0.8 and offset != 148:
        total = sum(_with(head, 148, b" " * 8))
        head = _with(head, 148, b"%06o\0 " % total)
    return _with(data, at, head)


# All together.


def kind_of(data: bytes) -> str:
    """Tell a container by its first bytes."""
    if data.startswith(b"PK"):
        return "zip"
    if data[257:262] == b"ustar":
        return "tar"
    if data[8:9] == b"{":
        return "safetensors"
    try:
        first = next(arg for _, arg, _ in pickletools.genops(data) if type(arg) is int and arg > 5)
    except (ValueError, StopIteration):
        first = 0
    return "legacy" if first == containers.MAGIC else "pickle"


BY_KIND: dict[str, tuple[Mutation, ...]] = {
    "zip": (change_record,) * 6 + (change_members,) * 3 + (change_header, change_directory) * 2,
    "legacy": (change_legacy,) * 4,
    "safetensors": (change_json,) * 4,
    "tar": (change_tar,) * 4,
    "pickle": (change_pickle,) * 4,
}


def mutated(random: Random, data: bytes, other: bytes) -> bytes:
    """Damage a file once or a few times; `other` is a file to splice it with."""
    kind = kind_of(data)
    for _ in range(random.choice((1, 1, 1, 1, 2))):
        way = random.random()
        if way < 0.03:
            data = splice(random, data, other)
        else:
            change = random.choice(PLAIN if way < 0.12 else BY_KIND[kind])
            data = _tried(random, change, data)
    return data


def _tried(random: Random, change: Mutation, data: bytes) -> bytes:
    """Damage in a way that may not be possible any more; then damage the bytes."""
    if not data:
        return random.choice((b"\0", b"{", b"\x80\2"))
    try:
        return change(random, data)
    except Exception:
        return random.choice(PLAIN)(random, data)
