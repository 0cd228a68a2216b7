"""Which bytes of a file belong to what: a storage counts once, for what reaches it first."""

from __future__ import annotations

from ckptool.pickles.tree import Global, Node, children
from ckptool.tensors.tensor import TENSORS, Packing, Storage, TensorInfo, span


def unused_nbytes(tree: Node) -> int:
    """Count the bytes of storages that no tensor reaches."""
    ledger = Ledger()
    ledger.take(tree)
    return ledger.unused()


def stored(storage: Storage) -> int:
    """Count the bytes that a storage takes of its file."""
    return storage.packed_nbytes if storage.packing is Packing.DEFLATED else storage.nbytes


class Ledger:
    """The storages that a walk has met, and which bytes of each a tensor reaches."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._seen: set[int] = set()
        self._reached: dict[Storage, list[tuple[int, int]]] = {}

    def take(self, node: Node) -> int:
        """Count what was not met before under a node; give the number of tensors."""
        count = 0
        stack: list[tuple[Node, bool]] = [(node, False)]
        while stack:
            here, of_tensor = stack.pop()
            if isinstance(here, _LEAVES):
                continue
            if isinstance(here, Storage):
                if not of_tensor:  # one that a tensor is made of says nothing of its own
                    self._reach(here, 0, here.nbytes)
                continue
            if id(here) in self._seen:
                continue
            self._seen.add(id(here))
            if isinstance(here, TensorInfo):
                self._reach_of(here)
            count += isinstance(here, TENSORS) and not of_tensor
            inside = of_tensor or isinstance(here, TENSORS)
            stack.extend((each, inside) for each in children(here) if not isinstance(each, _LEAVES))
        return count

    def _reach_of(self, info: TensorInfo) -> None:
        length = info.dtype.nbytes(span(info.shape, info.stride))
        self._reach(info.storage, info.start, info.start + length)

    def _reach(self, storage: Storage, start: int, stop: int) -> None:
        reached = self._reached.get(storage)
        if reached is None:
            reached = self._reached[storage] = []
            self.nbytes += stored(storage)
        reached.append((start, stop))

    def storages(self) -> list[Storage]:
        """List the storages met."""
        return list(self._reached)

    def unused(self) -> int:
        """Count the bytes that no tensor reaches."""
        return sum(
            storage.nbytes - _covered(reached)
            for storage, reached in self._reached.items()
            if storage.packing is Packing.PLAIN and (0, storage.nbytes) not in reached
        )


_LEAVES = (str, int, float, bytes, type(None), Global)


def _covered(reached: list[tuple[int, int]]) -> int:
    covered = end = 0
    for start, stop in sorted(reached):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered
