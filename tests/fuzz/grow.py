"""Checkpoints grown from nothing: odd trees of sound opcodes, which get further in than damage.

What comes out is mostly readable: tensors fit their storages, marks and memo entries exist. The
trees are such as nobody saves: sets as keys, shared and cyclic containers, calls of anything,
tensors beside hooks, `_metadata` of any shape.
"""

from __future__ import annotations

import io
import sys
import zipfile
from math import prod
from pathlib import Path
from random import Random

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))

import containers
import opcodes as op
from mutate import NAMES, TEXTS

KINDS = (
    ("FloatStorage", 4, "F32"), ("FloatStorage", 4, "F32"), ("LongStorage", 8, "I64"),
    ("HalfStorage", 2, "F16"), ("BFloat16Storage", 2, "BF16"), ("DoubleStorage", 8, "F64"),
    ("ByteStorage", 1, "U8"), ("BoolStorage", 1, "BOOL"), ("ComplexFloatStorage", 8, "C64"),
    ("QInt8Storage", 1, ""), ("UntypedStorage", 1, ""),
)  # fmt: skip
UTILS = "torch._utils"


class Grower:
    """Grows one checkpoint; keeps its storages and how many values are memoized."""

    def __init__(self, random: Random, legacy: bool) -> None:
        self.random = random
        self.legacy = legacy
        self.storages: list[tuple[str, int, int, str]] = []  # key, elements, width, class
        self.memoized = 0
        self.open = 0  # containers that are memoized and not closed yet

    def maybe(self, chance: float) -> bool:
        return self.random.random() < chance

    def text(self) -> bytes:
        names = ("weight", "bias", "running_mean", "module.a.weight", "module.b", "a.b.c", "x")
        return op.text(self.random.choice(TEXTS if self.maybe(0.15) else names))

    def key(self, index: int) -> bytes:
        if self.maybe(0.1):
            return self.random.choice((self.text(), op.integer(index), op.NONE, op.TRUE))
        prefix = self.random.choice(("", "", "module.", "module.", "_orig_mod.", "features."))
        return op.text(f"{prefix}{self.random.choice('abc')}.{index}.weight")

    def storage(self) -> tuple[bytes, int, int, str]:
        """Push a storage, a new one or a known one; give its elements, width and class too."""
        random = self.random
        if not self.storages or self.maybe(0.5):
            name, width, _ = random.choice(KINDS)
            numel = random.choice((0, 1, 2, 6, 24, 100))
            self.storages.append((str(len(self.storages)), numel, width, name))
        key, numel, width, name = random.choice(self.storages)
        module = "torch.storage" if name == "UntypedStorage" else "torch"
        more = (op.NONE,) if self.legacy else ()
        location = "cuda:0" if key == "1" else "cpu"
        pushed = op.storage(
            op.text(key), numel, *more, kind=op.name(module, name), location=location
        )
        return pushed, numel, width, name

    def tensor(self) -> bytes:
        """Push a tensor, mostly one that fits its storage."""
        random = self.random
        stored, numel, _, name = self.storage()
        shape, stride, offset = self.place(numel)
        where = op.place(stored, shape, offset, stride)
        grad, hooks = random.choice((op.FALSE, op.TRUE)), op.ordered_dict(())
        if name == "UntypedStorage":
            dtype = op.name("torch", random.choice(("uint8", "int8", "bool", "float8_e4m3fn")))
            return op.call(op.name(UTILS, "_rebuild_tensor_v3"), *where, grad, hooks, dtype)
        if name == "QInt8Storage":
            scheme = op.tuple_(op.name("torch", "per_tensor_affine"), b"G?\xf0" + b"\0" * 6, b"K\0")
            return op.call(op.name(UTILS, "_rebuild_qtensor"), *where, scheme, grad, hooks)
        metadata = (op.dict_([(op.text(random.choice(("conj", "neg"))), op.TRUE)]),)
        more = metadata if self.maybe(0.1) else ()
        made = op.call(op.name(UTILS, "_rebuild_tensor_v2"), *where, grad, hooks, *more)
        if self.maybe(0.2):
            return op.call(op.name(UTILS, "_rebuild_parameter"), made, grad, hooks)
        if self.maybe(0.05):
            arguments = op.tuple_(*where, grad, hooks)
            function, kind = op.name(UTILS, "_rebuild_tensor_v2"), op.name("torch", "Tensor")
            parts = (function, kind, arguments, op.dict_([(self.text(), self.value(2))]))
            return op.call(op.name("torch._tensor", "_rebuild_from_type_v2"), *parts)
        if self.maybe(0.05):
            layout = op.call(
                op.name("torch.serialization", "_get_layout"), op.text("torch.sparse_coo")
            )
            parts_ = op.tuple_(self.tensor(), made, op.tuple_(op.integer(3)), op.FALSE)
            return op.call(op.name(UTILS, "_rebuild_sparse_tensor"), layout, parts_)
        return made

    def place(self, numel: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Choose shape, stride and offset within so many elements (now and then beyond)."""
        random = self.random
        shape = tuple(random.choice((1, 2, 3, 0, 5)) for _ in range(random.randrange(4)))
        while prod(shape) > numel and shape:
            shape = shape[1:]
        if prod(shape) > numel:
            shape = (0,)
        stride = op.contiguous(shape)
        if self.maybe(0.3):
            pairs = sorted(zip(shape, stride, strict=True), key=lambda _: random.random())
            shape, stride = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
        if self.maybe(0.1) and shape:
            stride = (0, *stride[1:])
        room = numel - prod(shape)
        offset = random.randrange(room + 1) if self.maybe(0.3) else 0
        return shape, stride, offset + (self.maybe(0.02))

    def value(self, depth: int) -> bytes:
        """Push a value of any kind."""
        random = self.random
        if self.memoized and self.maybe(0.08):
            return b"h" + bytes([random.randrange(min(self.memoized, 250))])
        choice = random.choice(
            ("tensor", "plain", "plain", "list", "tuple", "dict", "state", "call")
        )
        if depth > 4 or choice == "plain":
            return self.plain()
        match choice:
            case "tensor":
                made = self.tensor()
            case "list":
                return self.container(b"]", b"e", depth, pairs=False)
            case "dict":
                return self.container(b"}", b"u", depth, pairs=True)
            case "tuple":
                made = op.tuple_(*self.values(depth))
            case "state":
                return self.state(depth)
            case _:
                made = self.call(depth)
        return made + self.put()

    def values(self, depth: int) -> list[bytes]:
        return [self.value(depth + 1) for _ in range(self.random.randrange(4))]

    def container(self, empty: bytes, close: bytes, depth: int, *, pairs: bool) -> bytes:
        """Push a container that is memoized before it is filled, so that it may hold itself."""
        made = empty + self.put() + b"("
        for index in range(self.random.randrange(5)):
            made += (self.key(index) if pairs else b"") + self.value(depth + 1)
        return made + close

    def put(self) -> bytes:
        if self.memoized > 250 or self.maybe(0.3):
            return b""
        self.memoized += 1
        return b"q" + bytes([self.memoized - 1])

    def plain(self) -> bytes:
        random = self.random
        return random.choice((
            self.text(), self.text(), op.integer(random.randrange(300)), op.integer(1 << 70),
            op.NONE, op.TRUE, b"G?\xf0" + b"\0" * 6, b")", op.name(*random.choice(NAMES)),
            op.call(op.name("collections", "OrderedDict")), b"C\2ab", b"U\1\xff",
            op.call(op.name("torch", "Size"), op.tuple_(b"K\2")), op.name("torch", "float32"),
            op.call(op.name("_codecs", "encode"), op.text("x"), op.text("latin1")), b"\x8f(K\1\x90",
        ))  # fmt: skip

    def call(self, depth: int) -> bytes:
        """Push a call of something, with a state or items perhaps."""
        names = (
            NAMES
            if self.maybe(0.5)
            else (("argparse", "Namespace"), ("collections", "OrderedDict"))
        )
        callee, arguments = op.name(*self.random.choice(names)), op.tuple_(*self.values(depth + 1))
        made = callee + arguments + self.random.choice((b"R", b"R", b"\x81"))
        if self.maybe(0.3):
            made += op.dict_([(self.text(), self.value(depth + 1))]) + b"b"
        return made

    def state(self, depth: int) -> bytes:
        """Push a state_dict: an OrderedDict of tensors, mostly, with `_metadata` perhaps."""
        count = self.random.choice((0, 1, 2, 5, 12))
        pairs = [
            (self.key(index), self.value(depth + 2) if self.maybe(0.1) else self.tensor())
            for index in range(count)
        ]
        if self.maybe(0.3):
            return op.dict_(pairs)
        made = op.ordered_dict(pairs)
        if self.maybe(0.5):
            paths = ("", "module", "module.a", "a", "features")
            entries = [
                (op.text(path), self.value(4) if self.maybe(0.1) else op.dict_(
                    [(op.text("version"), op.integer(1))])) for path in paths
            ]  # fmt: skip
            made = op.build(made, op.dict_([(op.text("_metadata"), op.ordered_dict(entries))]))
        return made

    def root(self) -> bytes:
        if self.maybe(0.4):
            return self.state(0)
        names = ("state_dict", "model", "model_ema", "optimizer", "epoch", "args", "net", "x")
        chosen = self.random.sample(names, self.random.randrange(1, 5))
        deep = ("epoch", "args", "x")
        return op.dict_(
            (op.text(name), self.value(1) if name in deep or self.maybe(0.2) else self.state(1))
            for name in chosen
        )


def grown(random: Random) -> bytes:
    """Give the bytes of a checkpoint."""
    if random.random() < 0.15:
        return _safetensors(random)
    legacy = random.random() < 0.3
    grower = Grower(random, legacy)
    body = op.pickled(grower.root())
    stored = [(key, n, random.randbytes(n * width)) for key, n, width, _ in grower.storages]
    used = [each for each in stored if op.text(each[0]) in body]
    if legacy:
        return containers.legacy(body, used)
    records = {key: data for key, _, data in used}
    order = random.choice((b"little", b"little", b"little", b"big"))
    if random.random() < 0.8:
        return containers.torch_zip(body, records, byteorder=order)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in containers.torch_members(body, records, byteorder=order):
            archive.writestr(zipfile.ZipInfo(member.name), member.data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _safetensors(random: Random) -> bytes:
    header: dict[str, object] = {}
    position = 0
    for index in range(random.randrange(6)):
        _, width, dtype = random.choice(KINDS[:-2])
        shape = [random.choice((0, 1, 2, 3)) for _ in range(random.randrange(4))]
        key = random.choice(TEXTS) if random.random() < 0.2 else f"module.{index}.weight"
        if key in header or key == "__metadata__":
            continue
        end = position + prod(shape) * width
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    if random.random() < 0.5:
        header["__metadata__"] = {random.choice(TEXTS): random.choice(TEXTS)}
    return containers.safetensors(header, random.randbytes(position))
