from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import judge
import pytest
from ghost_net import ghost_net

from ckptool import containers as formats
from ckptool.errors import (
    AmbiguousStateDict,
    BadInput,
    CkptoolError,
    DoesNotLoad,
    Malformed,
    NoDevice,
    NothingMatched,
    OutOfMemory,
)
from ckptool.model import loading, revive
from ckptool.state import checkpoint

torch = pytest.importorskip("torch")
GOOD = Path(__file__).parent.parent.parent / "fixtures" / "good"
# What the file holds more than one of is chosen.
CHOSEN = {
    "dino.pth": "teacher",
    "ema.pth": "model_ema",
    "gan.pth": "generator",
    "parts.pth": "backbone",
}
# A view of a storage is that storage here, and a copy in torch.
COPIED_BY_TORCH = ("legacy_views.pth", "torch_0_1.tar")
STORAGES = ("storages.pth",)  # hold bare storages, which are left out


def _readable() -> list[str]:
    names = []
    for path in sorted(path for path in GOOD.iterdir() if path.is_file()):
        try:
            checkpoint.find(formats.read(path), CHOSEN.get(path.name))
        except CkptoolError:
            continue
        names.append(path.name)
    return names


def _by_torch(name: str, at: tuple[str, ...]) -> Any:
    if name.endswith(".safetensors"):
        import safetensors.torch

        return safetensors.torch.load_file(GOOD / name)
    if name.startswith("script"):
        return torch.jit.load(GOOD / name, map_location="cpu").state_dict()
    try:
        found = judge.load(GOOD / name)
    except Exception:
        found = judge.load(GOOD / name, weights_only=False)
    for step in at:
        found = found[step] if isinstance(found, dict) else found[int(step)]
    return found.state_dict() if isinstance(found, torch.nn.Module) else found


@pytest.mark.parametrize("name", _readable())
def test_every_good_file_loads_as_torch_loads_it(name: str) -> None:
    judge.skip_unread(name)
    loaded = loading.load(formats.read(GOOD / name), at=CHOSEN.get(name))
    try:
        theirs = _by_torch(name, loaded.at)
    except Exception as error:
        assert loaded.state_dict  # torch itself cannot read it here, the README says why
        pytest.skip(f"torch: {error}")
    if name in STORAGES:
        theirs = {key: value for key, value in theirs.items() if key not in loaded.left_out}
    elif name == "torch_0_1_gnu.tar":
        loaded.state_dict.pop("empty")  # the judge leaves it out, and says why
    else:
        assert not loaded.left_out
    is_torch = not name.endswith(".safetensors")
    made_by_module = name.startswith(("script", "whole_model"))  # the file itself has none
    assert not judge.same(
        loaded.state_dict,
        theirs,
        containers=False,
        metadata=is_torch and not made_by_module,
        order=is_torch,
        sharing=is_torch,
        storage=is_torch and name not in COPIED_BY_TORCH,
    )


def test_enough_of_the_good_files_hold_a_state_dict() -> None:
    assert len(_readable()) > 70


def test_what_is_mapped_takes_no_memory_and_reaches_no_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    before = path.read_bytes()
    loaded = loading.load_state_dict(path)
    loaded["weight"].fill_(1.0)
    assert path.read_bytes() == before
    assert float(loading.load_state_dict(path)["weight"].sum()) == 0.0


def test_tied_tensors_are_one_tensor() -> None:
    loaded = loading.load_state_dict(GOOD / "tied.pth")
    pointers = [value.data_ptr() for value in loaded.values()]
    assert len(set(pointers)) < len(pointers)


def test_odd_offsets_are_aligned() -> None:
    for name in ("unaligned.pth", "unaligned.safetensors"):
        for value in loading.load_state_dict(GOOD / name).values():
            assert value.data_ptr() % value.element_size() == 0


def test_several_state_dicts_need_a_choice() -> None:
    with pytest.raises(AmbiguousStateDict):
        loading.load_state_dict(GOOD / "ema.pth")
    assert loading.load_state_dict(GOOD / "ema.pth", at="model_ema")


def test_the_meta_device_has_shapes_only() -> None:
    loaded = loading.load_state_dict(GOOD / "plain.pth", device="meta")
    assert all(value.is_meta for value in loaded.values())


def test_a_device_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(NoDevice):
        loading.load_state_dict(GOOD / "plain.pth", device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_sharing_survives_the_way_to_a_gpu() -> None:
    loaded = loading.load_state_dict(GOOD / "tied.pth", device="cuda")
    assert all(value.is_cuda for value in loaded.values())
    assert len({value.data_ptr() for value in loaded.values()}) < len(loaded)


def test_checksums_are_read_on_request() -> None:
    path = GOOD.parent / "hostile" / "crc_mismatch.pth"
    assert loading.load_state_dict(path)
    with pytest.raises(Malformed, match="checksum"):
        loading.load_state_dict(path, check=True)
    assert loading.load_state_dict(GOOD / "quantized.pth", check=True)


@pytest.mark.parametrize("axis", [-1, 2, 99])
def test_a_quantizer_that_does_not_fit(axis: int) -> None:
    """torch before 2.13 would write beyond its memory."""
    read = formats.read(GOOD / "qtensors.pth")
    state = checkpoint.find(read)
    info = state.entries["per_channel"]
    arguments = list(info.origin.args)
    arguments[4] = (*arguments[4][:3], axis)
    broken = replace(info, origin=replace(info.origin, args=tuple(arguments)))
    with pytest.raises(Malformed, match="quantizer"):
        loading.revive(read, replace(state, entries={"per_channel": broken}))


def test_what_is_not_plain_is_left_out_and_named() -> None:
    with pytest.warns(UserWarning, match="left out") as said:
        loaded = loading.load_state_dict(GOOD / "storages.pth")
    assert [str(each.message).split()[3] for each in said] == ["typed:", "untyped:"]
    assert "typed" not in loaded


def test_nothing_hostile_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in sorted((GOOD.parent / "hostile").iterdir()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loading.load_state_dict(path)
            except CkptoolError:
                continue
    assert not list(tmp_path.iterdir())


def test_torch_refusing_a_tensor_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, info: Any) -> None:
        raise RuntimeError("set_storage: no\nmore lines")

    monkeypatch.setattr(revive.Reviver, "_dense", refuse)
    with pytest.raises(Malformed, match=r"torch refuses it: set_storage: no$"):
        loading.load_state_dict(GOOD / "plain.pth")


def test_out_of_memory_on_the_way_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, info: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(revive.Reviver, "_dense", full)
    with pytest.raises(OutOfMemory):
        loading.load_state_dict(GOOD / "plain.pth")


# Into a model.


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A training checkpoint of a ghost net with 7 classes, wrapped in DataParallel."""
    torch.manual_seed(1)
    model = torch.nn.DataParallel(ghost_net(7))
    path = tmp_path / "trained.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    return path


def test_everything_matches(trained: Path) -> None:
    model = ghost_net(7)
    found = loading.load_matching(model, trained)
    assert found.filled == 1.0
    assert found.missing + found.unexpected + found.mismatched + found.dropped == ()
    assert found.wrappers == ("module.",)
    assert found.at == ("state_dict",)
    saved = torch.load(trained)["state_dict"]
    assert all(
        torch.equal(value, saved[f"module.{key}"]) for key, value in model.state_dict().items()
    )


def test_another_head_is_listed_and_left_alone(trained: Path) -> None:
    model = ghost_net(3)
    head = model.classifier.weight.clone()
    found = loading.load_matching(model, trained)
    assert [(each.key, each.here, each.there) for each in found.mismatched] == [
        ("classifier.weight", (7, 16), (3, 16)),
        ("classifier.bias", (7,), (3,)),
    ]
    assert found.missing == ()
    total = sum(each.numel() for each in model.parameters())
    assert found.filled == pytest.approx(1 - (3 * 16 + 3) / total)
    assert torch.equal(model.classifier.weight, head)
    assert not found.unexpected


def test_dropped_patterns_are_matched_after_peeling(trained: Path) -> None:
    found = loading.load_matching(ghost_net(7), trained, drop=["classifier", "*.running_var"])
    assert "module.classifier.weight" in found.dropped
    assert "classifier.weight" in found.missing
    with pytest.raises(NothingMatched):
        loading.load_matching(ghost_net(7), trained, drop=["head"])


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_a_wrapped_model_takes_a_file_wrapped_otherwise(trained: Path, wrap: Any) -> None:
    model = ghost_net(7)
    found = loading.load_matching(wrap(model), trained)
    assert found.filled == 1.0
    assert found.matched[0] == "features.0.primary.0.weight"
    assert found.unexpected == ()
    saved = torch.load(trained)["state_dict"]["module.classifier.bias"]
    assert torch.equal(model.classifier.bias, saved)


def test_unexpected_keys_are_listed(trained: Path) -> None:
    model = ghost_net(7)
    del model.classifier
    found = loading.load_matching(model, trained)
    assert found.unexpected == ("classifier.weight", "classifier.bias")
    assert "classifier.weight" not in found.matched


def test_metadata_moves_with_the_keys(trained: Path) -> None:
    """Without its version, a batch norm believes that the file is older than its counter."""
    saved = torch.load(trained)
    del saved["state_dict"]["module.features.0.primary.1.num_batches_tracked"]
    torch.save(saved, trained)
    found = loading.load_matching(ghost_net(7), trained)
    assert found.missing == ("features.0.primary.1.num_batches_tracked",)


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 2)
        self.head = torch.nn.Linear(2, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_parameter_is_not_missing(tmp_path: Path) -> None:
    path = tmp_path / "tied.pth"
    torch.save(OrderedDict({"embedding.weight": torch.ones(5, 2)}), path)
    model = _Tied()
    found = loading.load_matching(model, path)
    assert (found.tied, found.missing, found.filled) == (("head.weight",), (), 1.0)
    assert torch.equal(model.head.weight, torch.ones(5, 2))


def test_a_model_on_meta_is_refused(trained: Path) -> None:
    with torch.device("meta"):
        model = ghost_net(7)
    with pytest.raises(BadInput, match="meta device"):
        loading.load_matching(model, trained)


def test_a_lazy_module_takes_its_shape_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "linear.pth"
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    model = torch.nn.LazyLinear(2)
    assert loading.load_matching(model, path).mismatched == ()
    assert model.weight.shape == (2, 3)


def test_what_torch_refuses_beyond_shapes(tmp_path: Path) -> None:
    class Picky(torch.nn.Linear):
        def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
            raise ValueError("version 7 is too old")

    path = tmp_path / "linear.pth"
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    with pytest.raises(DoesNotLoad) as caught:
        loading.load_matching(Picky(3, 2), path)
    assert "version 7 is too old" in caught.value.evidence[-1]


def test_quantized_and_extra_state_go_into_a_model() -> None:
    found = loading.load_state_dict(GOOD / "quantized.pth")
    assert found["0._packed_params._packed_params"][0].is_quantized
    extra = loading.load_state_dict(GOOD / "extra_state.pth")
    assert extra["scaler._extra_state"] == {"scale": 65536.0, "growth_interval": 2000}
    assert extra["tokenizer._extra_state"] == b"\x00\x01vocab\xff"
