"""The layers of a model in the order in which they run: shapes, parameters, multiply-adds.

The model runs once on the meta device, where tensors have shapes and no memory; on the CPU where
it cannot. Hooks of ours say what each module returns, and `torch.utils.flop_counter`, which comes
with torch, counts the products of convolutions and matrices below them. torchinfo counts from the
weights alone: a linear layer on 197 tokens once, attention not at all, and the biases as products;
fvcore traces with torch.jit, which runs real numbers. Neither is needed, and no extra is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, cast

from ckptool.errors import BadInput
from ckptool.model import deferred, inputs, libraries, native, runner, subject, zoo
from ckptool.model.inputs import Batch, Inputs
from ckptool.model.live import CheckpointLike
from ckptool.model.runner import Place
from ckptool.model.zoo import ModelLike, named
from ckptool.records import dataclass, plain
from ckptool.tensors.dtype import BY_TORCH_NAME
from ckptool.tensors.tensor import shapes_of
from ckptool.text import several, visible

if TYPE_CHECKING:
    from ckptool.documents import models


@dataclass(frozen=True, slots=True)
class Layer:
    """A call of a module; its parameters are counted where it is called first.

    `weight` is the shape that the state_dict has, `kernel` the same with inputs before outputs
    (`[3, 64, 7, 7]`). `output` is None for a module that the input does not reach. `keys` are those
    of the state_dict, of which a file fills `filled`.
    """

    name: str
    kind: str
    weight: tuple[int, ...] | None
    kernel: tuple[int, ...] | None
    output: tuple[int, ...] | None
    parameters: int
    trainable: int
    multiply_adds: int
    dtype: str
    repeated: bool = False
    keys: tuple[str, ...] = ()
    filled: int | None = None


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a model, their totals, and what of them a file fills.

    `missing` are keys of the model that the file does not fill, `unexpected` keys of the file that
    no layer has, `mismatched` keys of both whose shapes differ.
    """

    model: str
    inputs: str
    layers: tuple[Layer, ...]
    parameters: int
    trainable: int
    multiply_adds: int
    file: str | None = None
    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __repr__(self) -> str:
        return f"<Layers of {visible(self.model)}: {len(self)}, {self.parameters} parameters>"

    def to_dict(self) -> models.Layers:
        """Return the document `layers/1`."""
        return cast("models.Layers", {"schema": "layers/1", **plain(self)})


def layers(
    model: ModelLike,
    file: CheckpointLike | None = None,
    *,
    model_args: Mapping[str, object] | None = None,
    input_shapes: str | Sequence[str] = (),
    depth: int | None = None,
    at: str | None = None,
) -> Layers:
    """List the modules of a model in the order in which they run, and which of them a file fills.

    `model` is a spec (`resnet50`, `file.py:factory`) made with `model_args`, or an `nn.Module`;
    `input_shapes` (`1,3,224,224`, `1,16:int64`; one for each argument) has the size of training as
    default for models of torchvision. Modules deeper than `depth` are counted in the one that holds
    them. `at` chooses among several state_dicts. Raises `NoSuchModel`, `BadInput`, `MissingExtra`,
    and what reading raises.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> for layer in ckptool.layers(model, input_shapes="1,3,32,32"):
    ...     print(layer.name, layer.kind, layer.weight, layer.output, layer.multiply_adds)
    0 Conv2d (8, 3, 3, 3) (1, 8, 30, 30) 194400
    1 ReLU None (1, 8, 30, 30) 0
    """
    shapes = several(input_shapes)
    if not shapes and not inputs.known_shape(model):
        raise BadInput(
            f"`{named(model)}` has no known input shape",
            option="--input-shape 1,3,224,224",
            hint="or what the model takes, once for each argument",
        )
    made = inputs.make(model, inputs.Options(shapes=shapes), model_args)
    found = _ran(model, model_args or {}, made, depth)
    if file is None:
        return found
    with native.opened(file, at) as source:
        outer = subject.wrapped(source)
        given = {outer.name(key): size for key, size in shapes_of(source.state.entries).items()}
        return _filled(found, zoo.shapes(model, model_args), given, source.path)


# The run.


@dataclass(slots=True)
class _Call:
    """One call of a module: operations in it, and those in no module that it calls."""

    name: str
    output: tuple[int, ...] | None = None
    dtype: Any = None
    flops: int = 0
    own: int = 0


def _ran(spec: ModelLike, args: Mapping[str, Any], made: Inputs, depth: int | None) -> Layers:
    """Run on the meta device, or on the CPU where the model cannot run there."""
    batch = made.first()
    try:
        model = zoo.build(spec, args, "meta").eval()
        calls, total = _calls(model, batch)
    except BadInput:
        with deferred.initial_values():
            model = zoo.build(spec, args, "cpu").eval()
        calls, total = _calls(model, batch)
    unique = {id(each): each for each in model.parameters()}.values()
    return Layers(
        model=named(spec),
        inputs=", ".join(str(list(each.shape)) for each in batch.arguments),
        layers=tuple(_rows(model, calls, depth)),
        parameters=sum(each.numel() for each in unique),
        trainable=sum(each.numel() for each in unique if each.requires_grad),
        multiply_adds=total // 2,
    )


def _calls(model: Any, batch: Batch) -> tuple[list[_Call], int]:
    """Return the calls of all modules as they end, and the operations of the whole."""
    torch = libraries.torch()
    from torch.utils.flop_counter import FlopCounterMode

    counter, calls, open_calls = FlopCounterMode(display=False), list[_Call](), list[_Call]()
    device = next((each.device for each in model.parameters()), torch.device("cpu"))

    def begin(name: str) -> Any:
        def note(module: Any, arguments: Any) -> None:
            open_calls.append(_Call(name, flops=counter.get_total_flops()))

        return note

    def end(module: Any, arguments: Any, output: Any) -> None:
        call = open_calls.pop()
        call.flops = counter.get_total_flops() - call.flops
        call.own += call.flops
        call.output, call.dtype = runner.shape(output), getattr(output, "dtype", None)
        if open_calls:
            open_calls[-1].own -= call.flops
        calls.append(call)

    with ExitStack() as undo:
        for name, module in model.named_modules():
            undo.callback(module.register_forward_pre_hook(begin(name)).remove)
            undo.callback(module.register_forward_hook(end).remove)
        undo.enter_context(_every_product(torch))
        undo.enter_context(runner.explained(model, batch))
        undo.enter_context(torch.inference_mode())
        moved = [runner.moved(argument, Place(device)) for argument in batch.arguments]
        with counter:
            model(*moved)
    return calls, int(counter.get_total_flops())


@contextmanager
def _every_product(torch: Any) -> Iterator[None]:
    """Keep attention from one fused operation, whose products nobody counts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# The table.


@dataclass(slots=True)
class _Owned:
    """What a row stands for: parameters and keys of its module, and of those folded into it."""

    parameters: dict[int, Any] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


def _rows(model: Any, calls: Sequence[_Call], depth: int | None) -> Iterator[Layer]:
    """Yield a row for each call of a leaf, and of what has parameters or products of its own.

    A module that calls none of its modules is a leaf: `nn.MultiheadAttention` uses the weights of
    its projection itself. What has parameters and is not called comes last.
    """
    modules = dict(model.named_modules())
    whole = _whole(calls, depth)
    owned = _owned(model, whole)
    seen: set[str] = set()
    for call in calls:
        folded = any(above in whole for above in _above(call.name))
        known = owned.get(call.name, _Owned())
        if folded or not (call.name in whole or known.parameters or call.own):
            continue
        products = call.flops if call.name in whole else call.own
        row = _row(call.name, modules[call.name], known, call)
        row = replace(row, multiply_adds=products // 2)
        again = replace(row, parameters=0, trainable=0, repeated=True, keys=())
        yield again if call.name in seen else row
        seen.add(call.name)
    for name, known in owned.items():
        if name not in seen and known.parameters:
            yield _row(name, modules[name], known, None)


def _whole(calls: Sequence[_Call], depth: int | None) -> set[str]:
    """Name the modules whose parts have no rows: leaves, and what is as deep as is asked for."""
    called = {call.name for call in calls}
    inner = {above for name in called for above in _above(name)}
    deep = {name for name in called if depth is not None and _depth(name) == depth}
    return (called - inner) | deep


def _above(name: str) -> Iterator[str]:
    """Yield the modules that hold one, from the inside; the last is the model, an empty text."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0


def _owned(model: Any, whole: set[str]) -> dict[str, _Owned]:
    """Assign parameters and keys to the modules that have rows for them."""
    owned: dict[str, _Owned] = {}

    def owner(key: str) -> _Owned:
        module = key.rpartition(".")[0]
        above = [name for name in (module, *_above(module)) if name in whole]
        return owned.setdefault(above[-1] if above else module, _Owned())

    for key, parameter in model.named_parameters(remove_duplicate=False):
        owner(key).parameters[id(parameter)] = parameter
    for key in model.state_dict():
        owner(key).keys.append(key)
    return owned


def _row(name: str, module: Any, known: _Owned, call: _Call | None) -> Layer:
    weight = getattr(module, "weight", None)
    sizes = tuple(weight.shape) if isinstance(weight, libraries.torch().Tensor) else None
    parameters = list(known.parameters.values())
    dtypes = [each.dtype for each in parameters] + ([call.dtype] if call else [])
    return Layer(
        name=name,
        kind=type(module).__name__,
        weight=sizes,
        kernel=sizes and (*sizes[1::-1], *sizes[2:]),
        output=call.output if call else None,
        parameters=sum(each.numel() for each in parameters),
        trainable=sum(each.numel() for each in parameters if each.requires_grad),
        multiply_adds=0,
        dtype=_dtype(dtypes[0]) if dtypes else "",
        keys=tuple(known.keys),
    )


def _dtype(dtype: Any) -> str:
    name = str(dtype or "").removeprefix("torch.")
    return BY_TORCH_NAME[name].name if name in BY_TORCH_NAME else name


# A file.


def _filled(
    found: Layers, wanted: zoo.Shapes, given: Mapping[str, tuple[int, ...]], path: str
) -> Layers:
    """Add what of each layer a file fills."""
    fits = {key for key, sizes in wanted.items() if given.get(key) == sizes}
    rows = [replace(row, filled=sum(key in fits for key in row.keys)) for row in found.layers]
    return replace(
        found,
        file=path,
        layers=tuple(rows),
        missing=tuple(key for key in wanted if key not in given),
        mismatched=tuple(key for key in wanted if key in given and key not in fits),
        unexpected=tuple(key for key in given if key not in wanted),
    )
