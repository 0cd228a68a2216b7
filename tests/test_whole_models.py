"""Whole models: the state_dict that `model.state_dict()` gives, read without the model's code.

The judge is the live model. What ckptool makes of its file is made in a process in which neither
torch nor torchvision can be imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import Outcome, environment

from ckptool import formats

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")
judge = pytest.importorskip("judge")
nn = torch.nn

Run = Callable[..., Outcome]
LEGACY = {"_use_new_zipfile_serialization": False}
LABELS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ARCHITECTURES = torchvision.models.list_models(module=torchvision.models)

# Lists and unwraps every file of a folder, without torch.
READER = """
import json, os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "numpy"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import ckptool

folder, options = sys.argv[1], ckptool.Options(sync=False)
found = {}
for name in sorted(os.listdir(folder)):
    path = os.path.join(folder, name)
    listing = ckptool.keys(path)
    rows = [(key, info.dtype.label, info.shape) for key, info in listing.entries]
    found[name] = [listing.state.module, rows]
    ckptool.unwrap(path, f"{folder}/{name}.state", options=options)
print(json.dumps(found))
"""


def read_without_torch(folder: Path) -> dict[str, Any]:
    """Give what ckptool says of each file of a folder; each is unwrapped into `NAME.state`."""
    done = subprocess.run(
        [sys.executable, "-c", READER, folder],
        capture_output=True,
        env=environment({"PYTHONPATH": str(Path(formats.__file__).parent.parent.parent)}),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows(state: Any) -> list[list[Any]]:
    return [[key, LABELS[tensor.dtype], [*tensor.shape]] for key, tensor in state.items()]


def assert_same_state(out: Path, state: Any) -> None:
    """A file holds a state_dict: tensors, no Parameters, in this order, shared as they are."""
    found = judge.load(out)
    assert type(found) is OrderedDict
    assert judge.same(state, found, metadata=False) == []


@contextmanager
def quick_init() -> Iterator[None]:
    """Leave weights as memory gives them: those of the largest models take minutes to draw."""
    names = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    with mock.patch.multiple(nn.init, **{name: lambda tensor, *_, **__: tensor for name in names}):
        yield


def shrunk(model: Any) -> Any:
    """Make each tensor of a model one number of its own, seen in the tensor's shape."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and id(value) not in made:
                    number = torch.full((1,) * value.dim(), len(made) + 1, dtype=value.dtype)
                    small = number.expand(value.shape)
                    is_parameter = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(small) if is_parameter else small
                    made[-id(value)] = value  # alive: the id of a dead tensor is soon another's
                if value is not None:
                    store[name] = made[id(value)]
    return model


def test_every_torchvision_classifier(tmp_path: Path) -> None:
    states, classes = {}, {}
    for number, name in enumerate(ARCHITECTURES):
        more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with quick_init():
            model = shrunk(torchvision.models.get_model(name, weights=None, **more))
        # The legacy format looks up the source of every class, which takes its time.
        torch.save(model, tmp_path / name, **(LEGACY if number % 4 == 0 else {}))
        states[name] = model.state_dict()
        classes[name] = f"{type(model).__module__}.{type(model).__qualname__}"
    found = read_without_torch(tmp_path)
    assert len(found) == len(ARCHITECTURES) >= 80
    for name, state in states.items():
        assert found[name] == [classes[name], rows(state)]
        assert_same_state(tmp_path / f"{name}.state", state)


# Smaller models, with all that torch.nn knows.


class Old(nn.Module):
    """A module whose file lacks what came later, as those of torch before 1.4 do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        del state["_non_persistent_buffers_set"], state["_state_dict_pre_hooks"]
        return state


class Slotted(nn.Module):
    """A module with __slots__: its state is a pair."""

    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.extra = 3


class Buffers(nn.Module):
    """Every way to hold a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("none", None)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool), persistent=False)
        self.register_buffer("nothing", None)
        self.made = nn.Buffer(torch.ones(4))
        self.attribute = torch.ones(5)
        self.tagged = nn.Parameter(torch.ones(3), requires_grad=False)
        self.tagged.note = "an attribute of a Parameter"
        self.small = nn.Parameter(torch.ones(3).half())


class Tied(nn.Module):
    """A language model: the head is the embedding; the layers are one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16)
        self.layers = nn.ModuleList([layer, layer])
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.rows = nn.ParameterList([nn.Parameter(self.embedding.weight.data[2:4])])
        self.turned = nn.ParameterDict({"t": nn.Parameter(torch.arange(6.0).view(2, 3).t())})


def main_module() -> Any:
    """Make a module whose class is of `__main__`."""
    kind = type("Net", (nn.Module,), {"__module__": "__main__"})
    sys.modules["__main__"].Net = kind  # type: ignore[attr-defined]
    model = kind()
    model.fc = nn.Linear(2, 2)
    return model


def pruned() -> Any:
    import torch.nn.utils.prune

    return torch.nn.utils.prune.random_unstructured(nn.Linear(4, 3), "weight", amount=3)


def faked() -> Any:
    """Observe and fake quantization: classes that name their entries themselves, as they are."""
    import torch.ao.quantization as ao

    return nn.Sequential(nn.Linear(2, 2), ao.FakeQuantize(), ao.HistogramObserver(bins=4))


def meeting(model: Any) -> Any:
    """Give a lazy model its first input."""
    model(torch.ones(2, 4))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(4, 3),
    "half": lambda: nn.Linear(4, 3).half(),
    "batch_norm": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(2, affine=False)),
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=2),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, add_bias_kv=True),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16),
    "parallel": lambda: nn.DataParallel(nn.Sequential(nn.Linear(2, 2))),
    "compiled": lambda: torch.compile(nn.Linear(2, 2)),
    "traced": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
    "containers": lambda: nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)]), "b": nn.PReLU()}),
    "buffers": Buffers,
    "tied": Tied,
    "slotted": Slotted,
    "old": Old,
    "main": main_module,
    "lazy": lambda: meeting(nn.Sequential(nn.LazyLinear(3))),
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "pruned": pruned,
    "faked": faked,
    "channels_last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "frozen": lambda: nn.Linear(2, 2).requires_grad_(False),
}
WAYS: dict[str, dict[str, Any]] = {
    "zip": {},
    "legacy": LEGACY,
    "protocol1": {"pickle_protocol": 1},
    "protocol3": {"pickle_protocol": 3},
    "protocol4": {"pickle_protocol": 4},
    "protocol5_legacy": {"pickle_protocol": 5, **LEGACY},
}


def test_models_of_every_kind(tmp_path: Path) -> None:
    states = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in MODELS.items():
            torch.manual_seed(1)
            model = make()
            for way, how in WAYS.items():
                torch.save(model, tmp_path / f"{name}.{way}", **how)
                states[f"{name}.{way}"] = model.state_dict()
    found = read_without_torch(tmp_path)
    for name, state in states.items():
        others = [key for key, value in state.items() if not torch.is_tensor(value)]
        assert others == [], name
        assert found[name][1] == rows(state), name
        assert_same_state(tmp_path / f"{name}.state", state)
