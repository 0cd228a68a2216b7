"""Models built without spending time on initial values that a file replaces.

Most of the time that making a model takes goes into random numbers (vit_h_14: 20 s), and loading
a file overwrites them. So the initial values of a parameter are put off: they are computed when
anything reads its memory, at the latest when the context ends, and never where a copy covers the
parameter before. What a constructor computes from values, and what no file fills, stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import get_ident
from typing import Any

from ckptool.model import libraries

Call = Callable[[], Any]

# Methods that overwrite a tensor whole, whatever it held, and those that go on from there.
_FILLS = frozenset(
    "uniform_ normal_ zero_ fill_ log_normal_ exponential_ cauchy_ geometric_ random_".split()
)
_CHANGES = frozenset("erfinv_ mul_ add_ sub_ div_ clamp_ clamp_min_ clamp_max_ neg_".split())
# What tells about a tensor without its values, returns one that shares its memory, or takes none.
_LOOKS = frozenset(
    "shape dim size ndim numel nelement dtype device is_meta layout requires_grad is_leaf stride "
    "is_contiguous element_size is_floating_point is_complex is_sparse is_quantized is_cuda nbytes "
    "is_mkldnn itemsize grad grad_fn requires_grad_ storage_offset is_nested is_inference __len__ "
    "data detach view _set_grad_enabled empty zeros ones tensor".split()
)


@contextmanager
def initial_values() -> Iterator[None]:
    """Put off the initial values of parameters made on the CPU within the context."""
    torch = libraries.torch()
    waiting, owner = _Waiting(torch), get_ident()

    def put_off(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def initialise(tensor: Any, *given: Any, **named: Any) -> Any:
            if get_ident() != owner or not waiting.takes(tensor, given, named):
                return function(tensor, *given, **named)
            return waiting.put_off(tensor, lambda: function(tensor, *given, **named))

        return initialise

    with ExitStack() as undo:
        for name, function in [*vars(torch.nn.init).items()]:
            if name.endswith("_") and not name.endswith("__") and callable(function):
                undo.callback(setattr, torch.nn.init, name, function)
                setattr(torch.nn.init, name, put_off(function))
        undo.enter_context(_mode(waiting))
        yield
    waiting.settle()


def _mode(waiting: _Waiting) -> Any:
    """Return the context in which torch calls pass by `waiting` (torch/overrides.py)."""
    from torch.overrides import TorchFunctionMode

    class Passing(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
        def __torch_function__(
            self, function: Any, types: Any, given: Any = (), named: Any = None
        ) -> Any:
            return waiting.passed(function, given, named or {})

    return Passing()


class _Waiting:
    """Calls put off, by the memory that they fill; the parameters stay alive with them."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._calls: dict[int | None, list[Call]] = {}
        self._filling = False

    def takes(self, tensor: Any, given: Any, named: Any) -> bool:
        """Check whether a call fills a whole parameter from nothing but numbers."""
        plain = not self._filling and not any(map(self._is_object, (*given, *named.values())))
        return plain and isinstance(tensor, self._torch.nn.Parameter) and self._covers(tensor)

    def put_off(self, tensor: Any, call: Call) -> Any:
        """Keep a call instead of all that would have filled the same memory before."""
        self._calls[self._memory(tensor)] = [call]
        return tensor

    def passed(self, function: Any, given: Any, named: Any) -> Any:
        """Run one function of torch, after the calls put off for what it reads."""
        name = _name(function)
        if name in _LOOKS or not (self._calls or name in _FILLS):
            return function(*given, **named)
        target, rest = (given[0], given[1:]) if given else (None, ())
        if name in _FILLS and self.takes(target, rest, named):
            return self.put_off(target, lambda: function(*given, **named))
        known = self._calls.get(self._memory(target), ())
        if known and name in _CHANGES and self.takes(target, rest, named):
            self._calls[self._memory(target)] = [*known, lambda: function(*given, **named)]
            return target
        if name == "copy_" and rest and self._replaces(target, rest[0]):
            self._calls.pop(self._memory(target), None)
        for tensor in self._tensors((given, named)):
            self._fill(self._memory(tensor))
        return function(*given, **named)

    def settle(self) -> None:
        """Run all that is still put off."""
        for memory in [*self._calls]:
            self._fill(memory)

    def _fill(self, memory: int | None) -> None:
        calls = [*self._calls] if memory is None else [memory] if memory in self._calls else []
        self._filling = True
        for each in calls:
            with self._torch.no_grad(), self._torch._C.DisableTorchFunction():
                for call in self._calls.pop(each):
                    call()
        self._filling = False

    def _memory(self, tensor: Any) -> int | None:
        """Return the address of a tensor's memory; None (it may be any) where it has none."""
        if not isinstance(tensor, self._torch.Tensor):
            return 0
        try:
            with self._torch._C.DisableTorchFunction():
                return int(tensor.untyped_storage().data_ptr())
        except Exception:  # sparse, lazy, and subclasses of others
            return None

    def _covers(self, tensor: Any) -> bool:
        """Check whether a tensor is all of its memory, in order."""
        if not self._memory(tensor):
            return False
        with self._torch._C.DisableTorchFunction():
            whole = tensor.nbytes == tensor.untyped_storage().nbytes()
            return bool(whole and tensor.is_contiguous() and tensor.device.type == "cpu")

    def _replaces(self, target: Any, source: Any) -> bool:
        """Check whether copying overwrites all of the target's memory with something else."""
        tensor = self._torch.Tensor
        if not (isinstance(target, tensor) and isinstance(source, tensor)):
            return False
        apart = self._memory(target) != self._memory(source)
        with self._torch._C.DisableTorchFunction():
            return apart and target.shape == source.shape and self._covers(target)

    def _is_object(self, value: Any) -> bool:
        return not isinstance(value, bool | int | float | str | type(None))

    def _tensors(self, value: Any) -> Iterator[Any]:
        if isinstance(value, self._torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for item in value:
                yield from self._tensors(item)
        elif isinstance(value, dict):
            yield from self._tensors(list(value.values()))


def _name(function: Any) -> str:
    """Return the name of a function of torch; of a property, that of the property."""
    name = getattr(function, "__name__", "")
    return getattr(function.__self__, "__name__", "") if name == "__get__" else name
