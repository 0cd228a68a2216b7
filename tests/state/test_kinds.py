"""Tensors in the guise of other objects are entries, and nothing of the weights is lost unsaid."""

from __future__ import annotations

import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

ARRAYS = {
    "weight": np.arange(6, dtype="f4").reshape(3, 2),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(3, 2)),
    "big": np.arange(3, dtype=">i4"),
    "empty": np.zeros((0, 2), "f2"),
    "scalar": np.array(True),
    "complex": np.array([1 + 2j], "c8"),
}


class Rebuilt:
    """What a pickle calls, with its arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("with_tensor", [False, True])
def test_arrays_of_a_state_dict_are_its_tensors(
    run: Callable[..., Any], protocol: int, with_tensor: bool
) -> None:
    entries = {**ARRAYS, **({"tensor": torch.ones(2)} if with_tensor else {})}
    around = {"model": entries, "numpy": np.random.default_rng(0).random(3), "epoch": 3}
    torch.save(around, "arrays.pth", pickle_protocol=protocol)
    document = run("keys", "arrays.pth", "--json").document
    said = {each["key"]: (each.get("class"), each["shape"]) for each in document["tensors"]}
    for key, array in ARRAYS.items():
        assert said[key] == ("numpy.ndarray", list(array.shape))
    assert [each["key"] for each in document["arrays"]] == ["numpy"]
    for target, options in (("out.safetensors", ()), ("plain.pth", ("--unwrap", "--tensors-only"))):
        assert run("convert", "arrays.pth", target, *options).code == 0
        loaded = load_file(target) if "safe" in target else torch.load(target, weights_only=True)
        for key, array in ARRAYS.items():
            meant = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
            assert torch.equal(loaded[key], meant), key
            assert loaded[key].dtype == meant.dtype
    assert run("strip-prefix", "--prefix", "we", "arrays.pth", "x.pth").code == 2
    assert run("convert", "--rename", "weight=w", "arrays.pth", "renamed.pth").code == 0
    renamed = torch.load("renamed.pth", weights_only=False)
    assert type(renamed["model"]["w"]) is np.ndarray
    assert np.array_equal(renamed["model"]["w"], ARRAYS["weight"])
    assert np.array_equal(renamed["numpy"], around["numpy"])


def test_numbers_of_numpy_stay_numbers_and_random_states_are_no_weights(
    run: Callable[..., Any],
) -> None:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "acc": np.float32(0.5)}
    torch.save({"state_dict": {"w": torch.ones(2)}, **states}, "rng.pth")
    document = run("keys", "rng.pth", "--json").document
    assert [each["key"] for each in document["tensors"]] == ["w"]
    assert [each["key"] for each in document["arrays"]] == ["numpy.1"]
    assert run("keys", "--all", "rng.pth", "--json").document["count"] == 1
    assert run("convert", "--tensors-only", "rng.pth", "plain.pth").code == 0
    plain = torch.load("plain.pth", weights_only=True)
    assert plain["acc"] == 0.5
    assert "numpy" not in plain


@pytest.mark.parametrize("made", ["array", "list", "cast", "tensor"])
def test_tensors_of_devices_without_storages(run: Callable[..., Any], made: str) -> None:
    from torch import _utils

    weight = torch.arange(6.0).reshape(2, 3)
    dtype = torch.bfloat16 if made == "cast" else torch.float32
    name = "_rebuild_device_tensor_from_numpy"
    data: Any = weight.tolist() if made == "list" else weight.numpy()
    if made == "tensor":
        name, data = "_rebuild_device_tensor_from_cpu_tensor", weight
        if not hasattr(_utils, name):
            pytest.skip("torch before 2.6 pickles arrays")
    call = Rebuilt(getattr(_utils, name), data, dtype, "xla:0", False)
    torch.save({"state_dict": {"fc.weight": call}, "epoch": 1}, "xla.pth")
    (listed,) = run("keys", "xla.pth", "--json").document["tensors"]
    assert listed["shape"] == [2, 3]
    assert run("convert", "xla.pth", "out.safetensors").code == 0
    assert torch.equal(load_file("out.safetensors")["fc.weight"], weight.to(dtype))
    assert run("strip-prefix", "--prefix", "fc", "xla.pth", "out.pth").code == 0
    (again,) = run("keys", "out.pth", "--json").document["tensors"]
    assert (again["key"], again["dtype"]) == ("weight", listed["dtype"])


def _wrapped(name: str = "Int4Tensor") -> Any:
    """Make a tensor that holds two others, of a library that is not here."""
    from torch import _tensor, _utils

    module = sys.modules.setdefault("tensorlib", ModuleType("tensorlib"))
    kind = type(name, (torch.Tensor,), {})
    kind.__module__ = "tensorlib"
    setattr(module, name, kind)
    layout, device = torch.strided, torch.device("cpu")
    arguments = (kind, torch.bfloat16, (4, 8), (8, 1), 0, layout, device, False)
    state = {"qdata": torch.ones(4, 4, dtype=torch.uint8), "scale": torch.ones(4, 1)}
    rebuild = _utils._rebuild_wrapper_subclass
    return Rebuilt(_tensor._rebuild_from_type_v2, rebuild, kind, arguments, state)


def test_a_wrapper_subclass_is_an_entry_with_its_class(run: Callable[..., Any]) -> None:
    torch.save({"module.w": _wrapped(), "module.b": torch.ones(4)}, "ao.pth")
    wrapped, _ = run("keys", "ao.pth", "--json").document["tensors"]
    assert (wrapped["class"], wrapped["dtype"]) == ("tensorlib.Int4Tensor", "BF16")
    assert (wrapped["shape"], wrapped["nbytes"]) == ([4, 8], 32)
    assert run("strip-prefix", "ao.pth", "out.pth").code == 0
    assert run("diff", "ao.pth", "out.pth", "--ignore-prefix", "auto").code == 0
    refused = run("convert", "ao.pth", "out.safetensors")
    assert refused.code == 5
    assert "needs its class, tensorlib.Int4Tensor" in refused.err
    assert "--tensors-only" not in refused.err
    dropped = run("convert", "--tensors-only", "ao.pth", "b.pth", "--json").document
    assert [each["key"] for each in dropped["dropped"]] == ["module.w"]
    assert not [note for note in dropped["notes"] if "attributes" in note]
    assert dropped["written"] == 1 == len(torch.load("b.pth", weights_only=True))


@pytest.mark.filterwarnings("ignore")
def test_none_of_the_weights_is_refused(run: Callable[..., Any]) -> None:
    """Of what only its class can rebuild, of packed layers, of a frozen module."""
    torch.save({"w": _wrapped()}, "ao.pth")
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    traced = torch.jit.trace(model, torch.zeros(1, 3))
    torch.jit.save(torch.jit.freeze(traced), "frozen.pt")
    lines = [
        ("ao.pth", "convert --tensors-only ao.pth out.pth"),
        ("frozen.pt", "unwrap frozen.pt out.pth"),
        ("frozen.pt", "convert frozen.pt out.safetensors"),
    ]
    try:
        packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        torch.save(packed, "packed.pt")
    except (RuntimeError, AttributeError):  # no engine for it here
        pass
    else:
        lines += [
            ("packed.pt", "unwrap packed.pt out.pth"),
            ("packed.pt", "convert --tensors-only packed.pt out.pth"),
        ]
    for _, line in lines:
        refused = run(*line.split())
        assert (refused.code, refused.out) == (2, ""), (line, refused)
        assert "none of the weights would be written" in refused.err
        assert ("torch.jit.freeze" in refused.err) == ("frozen" in line)
        assert not list(Path().glob("out*"))
    torch.jit.save(traced, "traced.pt")
    assert run("unwrap", "traced.pt", "out.pth").code == 0
    assert torch.equal(torch.load("out.pth")["0.weight"], model[0].weight)


def test_an_array_whose_text_is_not_bytes_is_none(run: Any, tmp_path: Path) -> None:
    """Protocol 2 writes bytes as Latin-1 text; what numpy would refuse is not guessed."""
    torch.save(
        {"w": np.array([200, 1, 2, 3], dtype="u1"), "x": torch.ones(1)}, tmp_path / "good.pth"
    )
    found = run("keys", tmp_path / "good.pth", "--json").document["tensors"]
    assert [each["key"] for each in found] == ["w", "x"]
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as source,
        zipfile.ZipFile(tmp_path / "odd.pth", "w") as made,
    ):
        for name in source.namelist():
            old, new = "\xc8\1\2\3".encode(), "\u0100\1\2\3".encode()  # U+0100 is no byte
            made.writestr(name, source.read(name).replace(old, new))
    found = run("keys", tmp_path / "odd.pth", "--json").document["tensors"]
    assert [each["key"] for each in found] == ["x"]
