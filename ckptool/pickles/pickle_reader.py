"""Pickle bytes -> an inert tree, protocols 0 to 5; nothing is imported, resolved or called.

The opcodes are those of CPython's `Lib/pickle.py` and `Lib/pickletools.py`.
"""

from __future__ import annotations

import codecs
import re
import struct
import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NoReturn

from ckptool.errors import FormatError, LimitExceeded, Malformed, Unsupported
from ckptool.files import budget
from ckptool.pickles.calls import calls_argument
from ckptool.pickles.tree import (
    ORDERED_DICT,
    ByteArray,
    Dict,
    Global,
    LongInteger,
    Node,
    Object,
    OldString,
    PersistentId,
    Set,
)
from ckptool.records import NamedTuple, dataclass
from ckptool.text import length

MAX_OPCODES = 10_000_000
MAX_STATE_MEMO = 1000
MAX_DIGITS = 4300  # CPython's own bound for int(str)
HIGHEST_PROTOCOL = 5
_BLOCK = 1 << 12  # opcodes whose memory is counted together
_LONG = 1 << 16  # bytes of one thing that is counted before it is made
_WIDEST = 4  # bytes of a letter in memory


@dataclass(slots=True)
class Pickle:
    """One parsed pickle: its tree, where it ended, and all that it named and called.

    `globals` maps each name to the offset where it first stood; `calls` holds every `Object`
    made, those whose result was thrown away too, but of those that the vocabulary understood only
    the ones that call an argument, and of OrderedDicts, two for each tensor of a file, only those
    that get more after their state.
    """

    tree: Node
    end: int
    protocol: int
    globals: dict[Global, int]
    calls: list[Object]


class Memo(list[Node]):
    """The memo of a pickle: what picklers number from zero on, and `others` by their numbers.

    A large pickle fetches few of its entries. What nothing in its bytes can fetch is None here,
    so that it lives no longer than on the stack. `spelled` is for what the vocabulary makes of
    bytes that fetch entries; it holds while no entry has `changed` or `moved`, put out of order.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.others: dict[int, Node] = {}
        self.spelled: dict[tuple[bytes, ...], Any] = {}
        self.changed = self.moved = False
        self.gaps = 0
        # Any `j` counts as a LONG_BINGET, and any `g` with digits as a GET, wherever it is.
        self.fetched = set(range(256))
        for pattern in (_LONG_GETS, _TEXT_GETS):
            keys = map(_key, pattern.finditer(data))
            # Numbers of what is not numbered from zero on are in `others`.
            while block := list(islice(keys, _BLOCK)):
                count = len(self.fetched)
                self.fetched.update(key for key in block if key < len(data))
                budget.current().spend((len(self.fetched) - count) * budget.PAIR)
        self._in_order = sorted(self.fetched)

    @property
    def entries(self) -> int:
        """Return the number of entries."""
        return len(self) - self.gaps + len(self.others)

    def put(self, key: int, node: Node) -> None:
        """Set an entry."""
        gap = key - len(self)
        if 0 <= gap <= _LARGEST_GAP and not self.others:
            self.skip(gap)
            self.append(node if key in self.fetched else None)
            return
        self.changed = self.moved = True
        if gap >= 0:
            self.others[key] = node
        else:
            self.gaps -= self[key] is _NEVER
            self[key] = node

    def skip(self, gap: int) -> None:
        """Leave numbers out, as our own writer does after each tensor."""
        self += [_NEVER] * gap
        self.gaps += gap

    def leave_out(self, count: int) -> None:
        """Make entries that nothing fetches."""
        self += [None] * count

    def next_fetched(self, number: int) -> int:
        """Return the next number, from this one on, that something fetches."""
        at = bisect_left(self._in_order, number)
        return self._in_order[at] if at < len(self._in_order) else sys.maxsize

    def get(self, key: int) -> Node:
        """Return an entry; raises `KeyError` where there is none."""
        node = self[key] if key < len(self) else self.others[key]
        if node is _NEVER:
            raise KeyError(key)
        return node

    def replace(self, old: Node, new: Node, since: int = 0) -> None:
        """Set an entry anew that was memoized before its state was pickled, which is short."""
        for key in range(max(since, len(self) - MAX_STATE_MEMO), len(self)):
            if self[key] is old:
                self[key], self.changed = new, True
        for key in islice(reversed(self.others), MAX_STATE_MEMO):
            if self.others[key] is old:
                self.others[key] = new


_NEVER, _LARGEST_GAP = object(), 1
_LONG_GETS = re.compile(rb"j(?=(.{4}))", re.DOTALL)
_TEXT_GETS = re.compile(rb"g(?=(\d{1,%d})\n)" % MAX_DIGITS)


def _key(found: re.Match[bytes]) -> int:
    is_text = found.re is _TEXT_GETS
    return length(found[1], 10) or 0 if is_text else int.from_bytes(found[1], "little")


class Phrase(NamedTuple):
    """What was read at once: a node, and texts and nodes in turn; its end, and how many opcodes."""

    nodes: list[Node]
    end: int
    opcodes: int


class Vocabulary:
    """What a reader makes of calls and persistent ids; this one leaves them as they are."""

    def persistent(self, value: Node, offset: int) -> Node:
        """Turn the value of a persistent id into a node."""
        return PersistentId(value)

    def called(self, node: Object) -> Node:
        """Turn a fresh call into a node."""
        return node

    def phrase(self, callee: Global, data: bytes, start: int, memo: Memo) -> Phrase | None:
        """Read a whole call at once from the MARK of its arguments, and what follows it alike.

        None reads opcode by opcode.
        """
        return None

    def built(self, node: Node, state: Node) -> Node | None:
        """Apply a BUILD to a node and return what it became; None refuses."""
        if not isinstance(node, Object):
            return None
        node.steps.append(("build", state))
        return node

    def inline(self, node: Node, position: int) -> tuple[Node, int]:
        """Read what is no opcode behind the BUILD of a node; return what it became, and the end."""
        return node, position


class Ended(Malformed):
    """The bytes ended inside the pickle; with more of the file it may be whole."""

    slug = "malformed"


def load(data: bytes, start: int = 0, vocabulary: Vocabulary | None = None) -> Pickle:
    """Parse the pickle that starts at `start`.

    Raises `Ended` when the bytes stop inside it, `Malformed`, `Unsupported` or `LimitExceeded`
    otherwise, each with the offset of the opcode.
    """
    machine = _Machine(data, start, vocabulary or Vocabulary())
    try:
        return _loaded(machine)
    except FormatError as error:
        error.named, error.calls = machine.globals, machine.calls
        raise


@contextmanager
def remembered(read: Iterable[Any]) -> Iterator[None]:
    """Add what was `read` before a fault, by its `globals` and `calls`, to the error that it is.

    More may be read inside: whatever loads the file elsewhere gets as far.
    """
    try:
        yield
    except FormatError as error:
        named: dict[Global, int] = {}
        calls: list[Object] = []
        for each in read:
            named |= each.globals
            calls += each.calls
        error.named, error.calls = named | error.named, calls + error.calls
        raise


def _loaded(machine: _Machine) -> Pickle:
    data = machine.data
    try:
        tree = machine.run()
    except (struct.error, _Short):
        raise Ended("the pickle ends too early", offset=machine.opcode_at) from None
    except IndexError:
        if machine.opcode_at + 1 >= len(data):
            raise Ended("the pickle ends too early", offset=machine.opcode_at) from None
        machine.fail("a pickle opcode takes a value that is missing")
    except KeyError:
        machine.fail("a memo entry that was never made")
    except (ValueError, TypeError, OverflowError, RecursionError):
        machine.fail("a pickle opcode with an impossible value")
    return Pickle(tree, machine.position, machine.protocol, machine.globals, machine.calls)


class _Short(Exception):
    """A length points beyond the bytes."""


_U16 = struct.Struct("<H").unpack_from
_I32 = struct.Struct("<i").unpack_from
_U32 = struct.Struct("<I").unpack_from


class _Level(NamedTuple):
    """The stack below a mark, and what there was when it was made."""

    stack: list[Node]
    made: int
    number: int
    memo: int
    changes: int


class _Machine:
    """The pickle machine over inert values; marks are levels, not values, so none can be forged."""

    def __init__(self, data: bytes, start: int, vocabulary: Vocabulary) -> None:
        self.data = data
        self.position = start
        self.opcode_at = self.start = start
        self.vocabulary = vocabulary
        self.protocol = 0
        self.stack: list[Node] = []
        self.levels: list[_Level] = []
        self.frame_end = sys.maxsize  # outside of frames
        self.memo = Memo(data)
        self.globals: dict[Global, int] = {}
        self.calls: list[Object] = []
        self.budget = budget.current()
        self.made = self.lasting = 0  # bytes of memory, by estimates: of values, of what stays
        self.passed = 0  # opcodes of which nothing is left
        self.counted = 0  # bytes that the budget knows
        self.changes = 0  # of what was there before, and calls that stay
        self.items: tuple[Node, ...] = ()  # the last tuple from a mark, and that
        self.closed = _Level([], 0, 0, 0, 0)
        self.new_object: Node = None  # the last of NEWOBJ, what there was before, a dict since then
        self.new_object_level = self.closed
        self.new_dict: Dict | None = None
        self.odd: set[int] = set()  # ids of those OrderedDicts that are in `calls`

    def run(self) -> Node:
        """Read opcodes up to STOP: the opcode loop, ordered by how often torch writes each."""
        data, memo, levels, size = self.data, self.memo, self.levels, len(self.data)
        persistent, phrase = self.vocabulary.persistent, self.vocabulary.phrase
        stack, position, fetched = self.stack, self.position, self.memo.fetched
        steps = chain.from_iterable(self.blocks())
        for number in steps:
            self.opcode_at = position
            if position >= self.frame_end:
                self.leave_frame(position)
            op = data[position]
            position += 1
            if op == 0x72:  # LONG_BINPUT
                key, node = _U32(data, position)[0], stack[-1]
                if key == len(memo) and not memo.others:
                    memo.append(node if key in fetched else None)
                else:
                    memo.put(key, node)
                position += 4
            elif op == 0x71:  # BINPUT
                memo.put(data[position], stack[-1])
                position += 1
            elif op == 0x4B:  # BININT1
                stack.append(data[position])
                position += 1
            elif op == 0x68:  # BINGET
                stack.append(memo.get(data[position]))
                position += 1
            elif op == 0x58:  # BINUNICODE
                end = position + 4 + _U32(data, position)[0]
                if end > size:
                    raise _Short
                if end - position > _LONG:
                    self.budget.spend(0, brief=_WIDEST * (end - position))
                text = data[position + 4 : end].decode("utf-8", "surrogatepass")
                self.made += text.__sizeof__()
                stack.append(text)
                position = end
            elif op == 0x28:  # MARK
                callee = stack[-1] if stack else None
                whole = None
                if type(callee) is Global and self.frame_end == sys.maxsize:
                    whole = phrase(callee, data, position, memo)  # no writer frames one
                if whole is None:
                    levels.append(_Level(stack, self.made, number, len(memo), self.changes))
                    stack = self.stack = []
                else:
                    stack[-1:], position, count = whole
                    self.read_at_once(whole)
                    deque(islice(steps, count - 1), maxlen=0)
            elif op == 0x4D:  # BININT2
                stack.append(_U16(data, position)[0])
                position += 2
            elif op == 0x74:  # TUPLE
                self.made += budget.NODE
                items = self.items = tuple(stack)
                self.closed = levels.pop()
                stack = self.stack = self.closed.stack
                stack.append(items)
            elif op == 0x85:  # TUPLE1
                self.made += budget.NODE
                stack[-1] = (stack[-1],)
            elif op == 0x86:  # TUPLE2
                self.made += budget.NODE
                stack[-2:] = ((stack[-2], stack[-1]),)
            elif op == 0x87:  # TUPLE3
                self.made += budget.NODE
                stack[-3:] = ((stack[-3], stack[-2], stack[-1]),)
            elif op == 0x52:  # REDUCE
                arguments = stack.pop()
                self.call(stack.pop(), arguments)
                if arguments is self.items and getattr(stack[-1], "origin", number) is None:
                    self.forget(number, self.closed)
            elif op == 0x51:  # BINPERSID
                self.lasting += budget.TENSOR
                stack.append(persistent(stack.pop(), self.opcode_at))
            elif op == 0x62:  # BUILD
                self.position = position
                self.build(number)
                position = self.position
            elif op == 0x4A:  # BININT
                self.made += budget.NUMBER
                stack.append(_I32(data, position)[0])
                position += 4
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo.get(_U32(data, position)[0]))
                position += 4
            elif op == 0x2E:  # STOP
                if position < self.frame_end < sys.maxsize:
                    self.fail("the pickle ends inside a frame, what follows is read in two ways")
                self.position = position
                self.count(number)
                return self.finish()
            else:
                self.position = position
                handler = _OPCODES.get(op)
                if handler is None:
                    self.fail(f"unknown pickle opcode 0x{op:02x}")
                handler(self)
                position, stack = self.position, self.stack
        raise LimitExceeded(f"a pickle of more than {MAX_OPCODES} opcodes", offset=position)

    def read_at_once(self, phrase: Phrase) -> None:
        """Count what was read at once: of its texts all, of its other opcodes what they made."""
        texts = phrase.nodes[1::2]
        self.made += sum(map(str.__sizeof__, texts))
        self.lasting += (1 + len(texts)) * budget.TENSOR
        self.passed += phrase.opcodes - 3 * len(texts)

    def blocks(self) -> Iterator[range]:
        """Yield numbers of opcodes in blocks, and count what was made of each."""
        for first in range(0, MAX_OPCODES, _BLOCK):
            yield range(first, min(first + _BLOCK, MAX_OPCODES))
            self.count(first + _BLOCK)

    def count(self, number: int) -> None:
        """Count what was made, and guess at the rest by how much of the bytes that was."""
        made = self.made + self.lasting + (number - self.passed) * budget.PLACE
        made += len(self.memo.others) * budget.PAIR + len(self.globals) * budget.NAME
        made += len(self.levels) * 2 * budget.NODE
        done = 1 + self.opcode_at - self.start
        left = len(self.data) - self.opcode_at
        self.budget.spend(made - self.counted, further=made * left / done)
        self.counted = made

    def forget(self, number: int, level: _Level) -> None:
        """Count no more what a value was made of, where nothing else can hold on to it."""
        memo = self.memo
        if memo.moved or level.changes != self.changes:
            return
        if memo.fetched.isdisjoint(range(level.memo, len(memo))):
            self.made = min(self.made, level.made)
            self.passed += number - level.number

    def fail(self, what: str) -> NoReturn:
        raise Malformed(what, offset=self.opcode_at)

    def refuse(self, what: str) -> NoReturn:
        raise Unsupported(f"{what} in a pickle", offset=self.opcode_at)

    def finish(self) -> Node:
        if self.levels or len(self.stack) != 1:
            self.fail("the pickle ends with other than one value on its stack")
        return self.stack[0]

    def push(self, node: Node, nbytes: int = 0) -> None:
        """Put a node on the stack, of so many bytes of memory."""
        self.made += nbytes
        self.stack.append(node)

    def push_inner(self, node: Node) -> None:
        """Put a node on the stack that holds others."""
        self.push(node, budget.NODE)

    def push_text(self, node: str | bytes) -> None:
        """Put a text on the stack, which may take four bytes a letter."""
        self.push(node, node.__sizeof__())

    def pop_level(self) -> list[Node]:
        """Take everything above the topmost mark, and the mark."""
        if not self.levels:
            self.fail("no mark on the stack")
        items, self.closed = self.stack, self.levels.pop()
        self.stack = self.closed.stack
        return items

    def take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0:
            self.fail("a negative length")
        if end > len(self.data):
            raise _Short
        if count > _LONG:
            self.budget.spend(0, brief=count)
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def signed(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little", signed=True)

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise _Short
        return self.take(end + 1 - self.position)[:-1]

    def named(self, module: str, name: str) -> Global:
        found = Global(module, name)
        self.made += 3 * budget.TEXT
        if found not in self.globals:
            self.changes += 1
            self.globals[found] = self.opcode_at
        return found

    def call(self, callee: Node, args: Node, how: str = "reduce", kwargs: Node = None) -> None:
        if type(args) is not tuple:
            self.fail("a call whose arguments are not a tuple")
        self.made += budget.CALL
        made = Object(callee, args, how, kwargs, [], self.opcode_at)
        node = self.vocabulary.called(made)
        if type(node) is tuple:
            self.made += budget.NODE
        elif node is not made:
            self.lasting += budget.TENSOR
        if callee != ORDERED_DICT and (isinstance(node, Object) or calls_argument(callee)):
            self.changes += 1
            self.calls.append(node if isinstance(node, Object) else made)
        self.stack.append(node)

    def step(self, kind: str, items: list[Any]) -> None:
        """Add items to the object on top of the stack, joined to those of its last step."""
        self.changes += 1
        match self.stack[-1]:
            case list() as target if kind == "append":
                target.extend(items)
            case Dict() as target if kind == "setitem":
                target.pairs.extend(items)
            case Set(frozen=False) as target if kind == "additems":
                target.items.extend(items)
            case Object() as target if kind != "additems":
                self.note_step(target)
                if target.steps and target.steps[-1][0] == kind:
                    target.steps[-1][1].extend(items)
                else:
                    self.made += budget.NODE
                    target.steps.append((kind, items))
            case target:
                self.note_odd(target, kind, items)
                self.fail(f"{kind} on a {type(target).__name__}")

    def note_step(self, target: Object) -> None:
        """Keep an OrderedDict that gets more after its state."""
        after = target.steps and target.steps[-1][0] == "build"
        if after and target.callee == ORDERED_DICT and id(target) not in self.odd:
            self.odd.add(id(target))
            self.calls.append(target)

    def note_odd(self, target: Node, kind: str, payload: Node) -> None:
        """Keep what is done to a name, or to a tensor whose attributes may be methods."""
        attributes = kind != "setitem" and getattr(target, "origin", None) is not None
        if isinstance(target, Global) or attributes:
            self.calls.append(Object(target, (payload,), kind, offset=self.opcode_at))

    def pairs(self, items: list[Node]) -> list[tuple[Node, Node]]:
        if len(items) % 2:
            self.fail("a key without a value")
        nbytes = len(items) // 2 * budget.PAIR
        self.made += nbytes
        if nbytes > _LONG:
            self.budget.spend(0, brief=nbytes)
        keys_and_values = iter(items)
        return list(zip(keys_and_values, keys_and_values, strict=True))

    def build(self, number: int) -> None:
        self.changes += 1
        self.made += budget.NODE
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Object):
            self.note_step(target)
        node = self.vocabulary.built(target, state)
        if node is None:
            self.note_odd(target, "build", state)
            self.fail(f"state for a {type(target).__name__}")
        if self.position == self.frame_end:
            self.leave_frame(self.position)
        if node is not target:
            since = self.new_object_level.memo if target is self.new_object else 0
            self.memo.replace(target, node, since)
            self.made_small(number, target, state)
        # The memo keeps what it was, as that of joblib does.
        self.stack[-1], end = self.vocabulary.inline(node, self.position)
        if end != self.position and self.frame_end < sys.maxsize:
            self.fail("what is not an opcode, inside a frame")  # joblib reads it behind the frame
        self.position = end

    def made_small(self, number: int, target: Node, state: Node) -> None:
        """Forget an object that became something else, with the dict that was its state.

        Both are known to be new: nothing holds them but the stack, or the memo since then.
        """
        values = [value for _, value in state.pairs] if isinstance(state, Dict) else []
        texts = sum(value.__sizeof__() for value in values if isinstance(value, str))
        self.lasting += budget.TENSOR + 2 * texts  # which it may keep, and joined to others
        if texts > _BLOCK:
            self.count(number)
        made, level = self.new_object, self.new_object_level
        if target is made and state is self.new_dict and self.changes == level.changes + 3:
            self.calls.pop()  # the object alone: it, its items and its state are those changes
            self.changes = level.changes
            self.forget(number, level._replace(number=self.closed.number))

    def decimal(self, text: bytes) -> int:
        if len(text) > MAX_DIGITS:
            raise LimitExceeded("an integer of too many digits", offset=self.opcode_at)
        return int(text)

    def integer_line(self) -> None:
        text = self.line()
        if text.lstrip(b"-")[:1] == b"0" and text not in (b"0", b"00", b"01"):
            self.fail("an integer that C unpicklers read as octal or hexadecimal")
        boolean = text in (b"00", b"01")
        self.push(text == b"01" if boolean else self.decimal(text), budget.NUMBER + len(text))

    def long(self, count: int) -> None:
        data = self.take(count)
        small = len(data) <= 8
        number = int.from_bytes(data, "little", signed=True) if small else LongInteger(data)
        self.push(number, budget.NUMBER if small else budget.NODE + len(data))

    def old_string(self, data: bytes) -> None:
        """Push a Python 2 string as `torch.load` would see it: text where it is UTF-8."""
        self.widen(data)
        try:
            self.push_text(data.decode("utf-8"))
        except UnicodeDecodeError:
            self.push(OldString(data), budget.NODE + len(data))

    def quoted_line(self) -> None:
        text = self.line().strip()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
            self.fail("a string without its quotes")
        self.old_string(codecs.escape_decode(text[1:-1])[0])

    def global_line(self) -> Global:
        module = self.line().decode("utf-8")
        return self.named(module, self.line().decode("utf-8"))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            self.fail("a global whose name is not text")
        self.push(self.named(module, name))

    def newobj(self) -> None:
        args = self.stack.pop()
        self.new_object_level = _Level([], self.made, 0, len(self.memo), self.changes)
        self.call(self.stack.pop(), args, "newobj")
        self.new_object, self.new_dict = self.stack[-1], None

    def empty_dict(self) -> None:
        self.new_dict = Dict()
        self.push_inner(self.new_dict)

    def newobj_ex(self) -> None:
        kwargs, args = self.stack.pop(), self.stack.pop()
        self.call(self.stack.pop(), args, "newobj_ex", kwargs)

    def inst(self) -> None:
        callee = self.global_line()
        self.call(callee, tuple(self.pop_level()), "obj")

    def obj(self) -> None:
        items = self.pop_level()
        if not items:
            self.fail("an object without a class")
        self.call(items[0], tuple(items[1:]), "obj")

    def set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.made += budget.PAIR
        self.step("setitem", [(key, value)])

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_level()

    def put(self, key: int) -> None:
        self.memo.put(key, self.stack[-1])

    def get(self) -> None:
        self.push(self.memo.get(self.memo_key()))

    def memo_key(self) -> int:
        key = length(self.line(), 10)
        if key is None:  # digits alone, as picklers write it, and `Memo` looks for it
            self.fail("a memo key that is not a number")
        return key

    def proto(self) -> None:
        self.protocol = self.take(1)[0]
        if self.protocol > HIGHEST_PROTOCOL:
            self.refuse(f"protocol {self.protocol}")

    def frame(self) -> None:
        size = self.unsigned(8)
        if size > len(self.data) - self.position:
            raise _Short
        if self.frame_end not in (sys.maxsize, self.position):
            self.fail("a frame inside a frame")
        self.frame_end = self.position + size

    def leave_frame(self, position: int) -> None:
        """End a frame where an opcode does.

        C unpicklers up to Python 3.13.14 and 3.14.6 read an argument that goes on behind its frame
        from there alone (cpython#154848): they run what pickletools and others take for text.
        """
        if position != self.frame_end:
            self.fail("a pickle opcode crosses the end of its frame, which is read in two ways")
        self.frame_end = sys.maxsize

    def byte_array(self, data: bytes) -> None:
        self.push(ByteArray(data), budget.NODE + len(data))

    def text(self, data: bytes) -> None:
        self.widen(data)
        self.push_text(data.decode("utf-8", "surrogatepass"))

    def widen(self, data: bytes) -> bytes:
        """Count a long text before it is made of bytes."""
        if len(data) > _LONG:
            self.budget.spend(0, brief=_WIDEST * len(data))
        return data


_OPCODES: dict[int, Callable[[_Machine], object]] = {
    0x80: _Machine.proto,  # PROTO
    0x95: _Machine.frame,  # FRAME
    0x4E: lambda m: m.push(None),  # NONE
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    0x49: _Machine.integer_line,  # INT
    0x4C: lambda m: m.push(m.decimal(m.line().removesuffix(b"L")), budget.NUMBER),  # LONG
    0x8A: lambda m: m.long(m.unsigned(1)),  # LONG1
    0x8B: lambda m: m.long(m.signed(4)),  # LONG4
    0x46: lambda m: m.push(float(m.line()), budget.NUMBER),  # FLOAT
    0x47: lambda m: m.push(struct.unpack(">d", m.take(8))[0], budget.NUMBER),  # BINFLOAT
    0x53: _Machine.quoted_line,  # STRING
    0x54: lambda m: m.old_string(m.take(m.signed(4))),  # BINSTRING
    0x55: lambda m: m.old_string(m.take(m.unsigned(1))),  # SHORT_BINSTRING
    0x56: lambda m: m.push_text(m.widen(m.line()).decode("raw_unicode_escape")),  # UNICODE
    0x8C: lambda m: m.text(m.take(m.unsigned(1))),  # SHORT_BINUNICODE
    0x8D: lambda m: m.text(m.take(m.unsigned(8))),  # BINUNICODE8
    0x42: lambda m: m.push_text(m.take(m.unsigned(4))),  # BINBYTES
    0x43: lambda m: m.push_text(m.take(m.unsigned(1))),  # SHORT_BINBYTES
    0x8E: lambda m: m.push_text(m.take(m.unsigned(8))),  # BINBYTES8
    0x96: lambda m: m.byte_array(m.take(m.unsigned(8))),  # BYTEARRAY8
    0x29: lambda m: m.push(()),  # EMPTY_TUPLE
    0x5D: lambda m: m.push_inner([]),  # EMPTY_LIST
    0x7D: _Machine.empty_dict,  # EMPTY_DICT
    0x8F: lambda m: m.push_inner(Set([])),  # EMPTY_SET
    0x6C: lambda m: m.push_inner(m.pop_level()),  # LIST
    0x64: lambda m: m.push_inner(Dict(m.pairs(m.pop_level()))),  # DICT
    0x91: lambda m: m.push_inner(Set(m.pop_level(), frozen=True)),  # FROZENSET
    0x61: lambda m: m.step("append", [m.stack.pop()]),  # APPEND
    0x65: lambda m: m.step("append", m.pop_level()),  # APPENDS
    0x73: _Machine.set_one,  # SETITEM
    0x75: lambda m: m.step("setitem", m.pairs(m.pop_level())),  # SETITEMS
    0x90: lambda m: m.step("additems", m.pop_level()),  # ADDITEMS
    0x30: _Machine.pop,  # POP
    0x31: _Machine.pop_level,  # POP_MARK
    0x32: lambda m: m.push(m.stack[-1]),  # DUP
    0x67: _Machine.get,  # GET
    0x70: lambda m: m.put(m.memo_key()),  # PUT
    0x94: lambda m: m.put(m.memo.entries),  # MEMOIZE
    0x63: lambda m: m.push(m.global_line()),  # GLOBAL
    0x93: _Machine.stack_global,  # STACK_GLOBAL
    0x81: _Machine.newobj,  # NEWOBJ
    0x92: _Machine.newobj_ex,  # NEWOBJ_EX
    0x69: _Machine.inst,  # INST
    0x6F: _Machine.obj,  # OBJ
    0x50: lambda m: m.push(
        m.vocabulary.persistent(m.line().decode("ascii"), m.opcode_at)
    ),  # PERSID
    0x82: lambda m: m.refuse("an extension code"),  # EXT1
    0x83: lambda m: m.refuse("an extension code"),  # EXT2
    0x84: lambda m: m.refuse("an extension code"),  # EXT4
    0x97: lambda m: m.refuse("an out-of-band buffer"),  # NEXT_BUFFER
    0x98: lambda m: m.refuse("an out-of-band buffer"),  # READONLY_BUFFER
}
