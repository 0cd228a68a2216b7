"""Nothing that a checkpoint carries besides its tensors goes without a word, on any road."""

from __future__ import annotations

import inspect
import json
import math
import shlex
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import ckptool
from ckptool.errors import EditError, NothingMatched

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
from safetensors import safe_open  # noqa: E402  # safetensors may be absent


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Versioned(torch.nn.Linear):
    """As torchvision's MNASNet: without its version it loads nothing."""

    _version = 2

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *more: Any
    ) -> None:
        if local_metadata.get("version") not in (1, 2):
            raise ValueError("version should be set to 1 or 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(Versioned(3, 4), torch.nn.BatchNorm1d(4), Versioned(4, 2))


def loaded(path: str) -> Any:
    return torch.load(path, weights_only=True)


# `_metadata`.


def to_safetensors(name: str) -> str:
    ckptool.convert(name, "there.safetensors")
    return "there.safetensors"


def to_shards(name: str) -> str:
    ckptool.convert(name, "there", max_shard_size=60)
    return "there"


def to_one_shard(name: str) -> str:
    ckptool.convert(name, "there", max_shard_size="1GB")
    return "there"


def to_torch_shards(name: str) -> str:
    ckptool.convert(name, "there", max_shard_size=60, to="torch")
    return "there"


def through_torch(name: str) -> str:
    ckptool.convert(name, "one.safetensors")
    ckptool.convert("one.safetensors", "two.pth")
    ckptool.convert("two.pth", "three", max_shard_size=60)
    return "three"


ROADS: list[Callable[[str], str]] = [
    to_safetensors,
    to_shards,
    to_one_shard,
    to_torch_shards,
    through_torch,
]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("how", ["zip", "legacy", "wrapped"])
def test_module_versions_survive(road: Callable[[str], str], how: str) -> None:
    state = model().state_dict()
    torch.save(
        {"state_dict": state, "epoch": 1} if how == "wrapped" else state,
        "a.pth",
        _use_new_zipfile_serialization=how != "legacy",
    )
    there = road("a.pth")
    ckptool.convert(there, "back.pth")
    back = loaded("back.pth")
    assert list(back) == list(state)
    assert back._metadata == state._metadata
    assert list(back._metadata) == list(state._metadata)
    model().load_state_dict(back, strict=True)
    model().load_state_dict(ckptool.load_state_dict(there), strict=True)
    assert ckptool.load_matching(model(), there).filled == 1.0
    assert ckptool.verify("a.pth", there, model(), devices="cpu", input_shapes="5,3").identical
    assert ckptool.diff("a.pth", there).equal


def test_the_index_of_shards_holds_the_versions() -> None:
    torch.save(model().state_dict(), "a.pth")
    ckptool.convert("a.pth", "there", max_shard_size=60)
    index = json.loads(Path("there/model.safetensors.index.json").read_text())
    assert json.loads(index["metadata"]["ckptool"])["metadata"]["0"] == {"version": 2}
    for shard in Path("there").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            assert '"metadata"' not in file.metadata().get("ckptool", "")


@pytest.mark.parametrize("edit", [ckptool.edits.add_prefix(), ckptool.edits.drop("1")])
def test_module_versions_follow_an_edit_into_safetensors(edit: Any) -> None:
    torch.save(model().state_dict(), "a.pth")
    ckptool.convert("a.pth", "straight.pth", steps=[edit])
    ckptool.convert("a.pth", "there.safetensors", steps=[edit])
    ckptool.convert("there.safetensors", "round.pth")
    assert loaded("round.pth")._metadata == loaded("straight.pth")._metadata


def test_bare_tensors_get_no_note() -> None:
    torch.save(OrderedDict(a=torch.ones(1)), "a.pth")
    ckptool.convert("a.pth", "a.safetensors")
    with safe_open("a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 62), 1 << 62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from(["", "a", "a.b", "\u00e4", "ckptool"]), plain, max_size=4))
def test_any_plain_versions_come_back_equal(metadata: dict[str, Any]) -> None:
    state: Any = OrderedDict(a=torch.ones(1))
    state._metadata = OrderedDict(metadata)
    torch.save(state, "p.pth")
    done = ckptool.convert("p.pth", "p.safetensors", force=True)
    ckptool.convert("p.safetensors", "q.pth", force=True)
    back = loaded("q.pth")._metadata
    assert back == state._metadata
    assert repr(back) == repr(state._metadata)  # which tells 1 from True and 1.0
    assert not done.not_carried


@pytest.mark.parametrize(
    "odd", [(1, 2), math.inf, {1: 2}, b"x", "\ud800", 1 << 70, torch.ones(1), torch.float16]
)
def test_versions_that_json_cannot_hold_are_named_and_left(odd: Any) -> None:
    state: Any = OrderedDict(a=torch.ones(1))
    state._metadata = OrderedDict({"a": {"version": 1}, "b.c": {"version": odd}})
    torch.save(state, "a.pth")
    done = ckptool.convert("a.pth", "a.safetensors")
    assert done.not_carried == ("_metadata of b.c",)
    ckptool.convert("a.safetensors", "b.pth")
    assert loaded("b.pth")._metadata == {"a": {"version": 1}}


@pytest.mark.parametrize("odd", ["none", 3, {1: {"version": 1}}, [1]])
def test_versions_that_are_no_dict_of_modules_are_named_and_left(odd: Any) -> None:
    state: Any = OrderedDict(a=torch.ones(1))
    state._metadata = odd
    torch.save(state, "a.pth")
    assert ckptool.convert("a.pth", "a.safetensors").not_carried == ("_metadata",)
    ckptool.convert("a.safetensors", "b.pth")
    assert not hasattr(loaded("b.pth"), "_metadata")


def test_versions_that_repeat_without_end_are_left() -> None:
    deep: Any = {"x": 1}
    for _ in range(12):
        deep = {str(each): deep for each in range(12)}
    state: Any = OrderedDict(a=torch.ones(1))
    state._metadata = OrderedDict({"": {"version": 1}, "a": deep})
    torch.save(state, "a.pth")
    assert ckptool.convert("a.pth", "a.safetensors").not_carried == ("_metadata of a",)


@pytest.mark.parametrize(
    "note", ['{"v":1,"metadata":[1]}', '{"v":1,"metadata":' + '{"a":' * 50 + "1" + "}" * 51]
)
def test_a_note_of_no_versions_is_ignored_and_reported(note: str) -> None:
    safetensors_torch.save_file({"a": torch.ones(1)}, "a.safetensors", {"ckptool": note})
    done = ckptool.convert("a.safetensors", "a.pth")
    assert any("ignored" in each for each in done.notes)
    assert not hasattr(loaded("a.pth"), "_metadata")


@pytest.mark.parametrize("name", ["mnasnet0_5", "mnasnet1_3"])
def test_mnasnet_takes_its_weights_back(name: str) -> None:
    zoo = pytest.importorskip("torchvision.models")
    net = getattr(zoo, name)()
    torch.save({"state_dict": torch.nn.DataParallel(net).state_dict(), "epoch": 1}, "a.pth")
    ckptool.convert("a.pth", "a.safetensors", steps=[ckptool.edits.strip_wrappers()])
    ckptool.convert("a.safetensors", "back.pth")
    getattr(zoo, name)().load_state_dict(loaded("back.pth"), strict=True)
    fresh = getattr(zoo, name)()
    fresh.load_state_dict(ckptool.load_state_dict("a.safetensors"), strict=True)
    assert ckptool.load_matching(getattr(zoo, name)(), "a.safetensors").filled == 1.0


@pytest.mark.parametrize("edit", [None, ckptool.edits.add_prefix()])
def test_a_distributed_checkpoint_says_what_it_has_no_place_for(edit: Any) -> None:
    safetensors_torch.save_file({"a.b": torch.ones(2)}, "l.safetensors", TEXTS)
    ckptool.convert("l.safetensors", "l.pth")
    state = loaded("l.pth")
    state._metadata = OrderedDict({"a": {"version": 2}})
    for name, whole in (("bare", state), ("around", {"model": state, "epoch": 1})):
        torch.save(whole, f"{name}.pth")
        steps = [edit] if edit else []
        said = "\n".join(ckptool.convert(f"{name}.pth", name, steps=steps, to="dcp").notes)
        assert "cannot hold `_metadata`" in said
        assert "cannot hold `_safetensors_metadata`" in said


# `__metadata__`.

TEXTS = {"ss_tag_frequency": '{"cat": 3}', "modelspec.title": "katze \u00fc", "format": "pt"}


def test_the_texts_of_safetensors_go_through_torch() -> None:
    safetensors_torch.save_file({"a": torch.ones(2), "b": torch.ones(3)}, "l.safetensors", TEXTS)
    ckptool.convert("l.safetensors", "l.pth")
    state = loaded("l.pth")
    assert state._safetensors_metadata == {k: v for k, v in TEXTS.items() if k != "format"}
    assert list(state) == ["a", "b"]
    torch.nn.ParameterDict(state).load_state_dict(state, strict=True)
    torch.save({"state_dict": state, "epoch": 1}, "w.pth")
    for source in ("l.pth", "w.pth"):
        for target in ("back.safetensors", "again.pth"):
            ckptool.convert(source, target, steps=[ckptool.edits.add_prefix()], force=True)
            ckptool.convert(target, "last.safetensors", force=True)
            with safe_open("last.safetensors", "pt") as file:
                assert {k: v for k, v in file.metadata().items() if k != "ckptool"} == TEXTS
    for word in ("safetensors", "torch"):
        ckptool.convert("l.pth", f"set_{word}", max_shard_size=8, to=word)
        ckptool.convert(f"set_{word}", "whole.safetensors", force=True)
        with safe_open("whole.safetensors", "pt") as file:
            assert file.metadata() == TEXTS


def test_a_file_of_torch_gets_no_texts() -> None:
    torch.save(model().state_dict(), "a.pth")
    ckptool.convert("a.pth", "a.safetensors")
    ckptool.convert("a.safetensors", "b.pth")
    assert not hasattr(loaded("b.pth"), "_safetensors_metadata")


def test_diff_reports_the_texts() -> None:
    for name, text in (("a", "1"), ("b", "2"), ("c", None)):
        texts = {"format": "pt"} | ({"tag": text} if text else {})
        safetensors_torch.save_file({"a": torch.ones(2)}, f"{name}.safetensors", texts)
    found = ckptool.diff("a.safetensors", "b.safetensors")
    assert not found.equal
    assert [each.key for each in found] == ["__metadata__.tag"]
    alone = ckptool.diff("a.safetensors", "c.safetensors")
    assert alone.equal
    assert any("`__metadata__`: tag" in note for note in alone.notes)
    ckptool.convert("a.safetensors", "a.pth")
    assert ckptool.diff("a.safetensors", "a.pth").equal
    assert not ckptool.diff("a.pth", "b.safetensors").equal


def test_average_keeps_what_the_first_carries() -> None:
    safetensors_torch.save_file({"a": torch.ones(2)}, "a.safetensors", TEXTS)
    ckptool.average(["a.safetensors", "a.safetensors"], "mean.pth")
    assert loaded("mean.pth")._safetensors_metadata["modelspec.title"] == "katze \u00fc"


# Tensors that are more than their data.


class Marked(torch.Tensor):  # type: ignore[misc]
    """A subclass, which torch pickles by name."""


def test_what_safetensors_leaves_of_tensors_is_named() -> None:
    marked = torch.nn.Parameter(torch.ones(2))
    marked.tag = "x"  # type: ignore[attr-defined]
    state: Any = OrderedDict(
        p=torch.nn.Parameter(torch.ones(2)),
        frozen=torch.nn.Parameter(torch.ones(2), requires_grad=False),
        grad=torch.ones(2, requires_grad=True),
        tagged=marked,
        buffer=torch.ones(2),
        noted=torch.ones(2),
        odd=torch.ones(2).as_subclass(Marked),
    )
    state["noted"].persistent = True  # as an nn.Buffer: pickled with its class, torch.Tensor
    state.owner = "me"
    torch.save(state, "a.pth")
    done = ckptool.convert("a.pth", "a.safetensors")
    said = "\n".join(done.notes)
    assert "Parameters become plain tensors: p, frozen, tagged" in said
    assert "requires_grad of tensors: grad" in said
    assert "attributes of tensors: tagged, noted" in said
    assert "noted (" not in said
    assert f"class of tensors: odd ({__name__}.Marked)" in said
    assert "buffer" not in said
    assert done.not_carried == ("owner",)
    assert "requires_grad" in "\n".join(ckptool.convert("a.pth", "a_dcp", to="dcp").notes)


# Optimizers.


def trained(prefix: str = "module.") -> tuple[Any, Any, list[str]]:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(1, 3)).sum().backward()
    optimizer.step()
    state = {prefix + key: value for key, value in net.state_dict().items()}
    return state, optimizer.state_dict(), list(state)


def by_name(optimizer: Any, names: list[str]) -> Any:
    groups = [{**optimizer["param_groups"][0], "params": names}]
    return {
        "state": {names[at]: value for at, value in optimizer["state"].items()},
        "param_groups": groups,
    }


def flat(optimizer: Any) -> Any:
    slots = {
        f"state.{name}.{slot}": value
        for name, slots in optimizer["state"].items()
        for slot, value in slots.items()
    }
    rates = {f"param_groups.{name}.lr": 0.1 for name in optimizer["state"]}
    return {**slots, **rates}


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "fsdp": lambda optimizer: {"optimizer": optimizer},
    "composer": lambda optimizer: {"optimizers": {"Adam": optimizer}},
    "lightning": lambda optimizer: {"optimizer_states": [optimizer]},
    "dcp, flattened": lambda optimizer: {"optim": flat(optimizer)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", ["zip", "legacy", "dcp"])
def test_an_optimizer_by_name_follows_a_rename(layout: str, container: str) -> None:
    state, optimizer, names = trained()
    wrap, target = LAYOUTS[layout], "out.pth"
    torch.save(
        {"model": state, **wrap(by_name(optimizer, names))},
        "a.pth",
        _use_new_zipfile_serialization=container != "legacy",
    )
    steps = [ckptool.edits.strip_prefix(), ckptool.edits.rename("weight", "w")]
    if container == "dcp":
        ckptool.convert("a.pth", "a_dcp", to="dcp")
    done = ckptool.convert("a_dcp" if container == "dcp" else "a.pth", target, steps=steps)
    back = loaded(target)
    assert list(back.pop("model")) == ["w", "bias"]
    wanted = wrap(by_name(optimizer, ["w", "bias"]))
    assert repr(back) == repr(wanted)
    assert any("names its parameters: 2 of 2 renamed" in note for note in done.notes)


def test_names_without_the_wrapper_follow_too() -> None:
    state, optimizer, _ = trained("module.")
    torch.save({"model": state, "optimizer": by_name(optimizer, ["weight", "bias"])}, "a.pth")
    ckptool.convert("a.pth", "b.pth", steps=[ckptool.edits.rename("module.weight", "module.w")])
    assert list(loaded("b.pth")["optimizer"]["state"]) == ["w", "bias"]
    ckptool.strip_prefix("a.pth", "c.pth")
    assert list(loaded("c.pth")["optimizer"]["state"]) == ["weight", "bias"]


def test_param_names_follow_and_indexes_stay() -> None:
    state, optimizer, names = trained()
    optimizer["param_groups"][0]["param_names"] = names
    torch.save({"model": state, "optimizer": optimizer}, "a.pth")
    ckptool.strip_prefix("a.pth", "b.pth")
    back = loaded("b.pth")["optimizer"]
    assert back["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert list(back["state"]) == back["param_groups"][0]["params"] == [0, 1]


def test_what_a_note_proposes_leaves_the_optimizer_out() -> None:
    state, optimizer, _ = trained()
    steps = [ckptool.edits.drop("module.bias")]
    for whole, name in (
        ({"state_dict": state, "optimizer_states": [optimizer]}, "optimizer_states"),
        ({"state": {"model": state, "optim izers": {"A": optimizer}}}, "state.optim izers"),
    ):
        torch.save(whole, "a.pth")
        said = "\n".join(ckptool.convert("a.pth", "o.pth", steps=steps, force=True).notes)
        assert f"--drop-beside {shlex.quote(name)}" in said
        done = ckptool.convert("a.pth", "o.pth", steps=steps, force=True, drop_beside=name)
        assert done.not_carried == (name,)
        assert "index" not in "\n".join(done.notes)
    torch.save((state, optimizer), "a.pth")
    said = "\n".join(ckptool.convert("a.pth", "o.pth", steps=steps, force=True, at="0").notes)
    assert "by index" in said
    assert "--drop-beside" not in said


def test_after_a_drop_it_says_which_the_optimizer_is_by() -> None:
    state, optimizer, names = trained()
    steps = [ckptool.edits.drop("module.bias")]
    torch.save({"model": state, "optimizer": optimizer}, "index.pth")
    torch.save({"model": state, "optimizer": by_name(optimizer, names)}, "name.pth")
    torch.save({"model": state, "optimizer": "none"}, "none.pth")
    said = {
        name: "\n".join(ckptool.convert(f"{name}.pth", "o.pth", steps=steps, force=True).notes)
        for name in ("index", "name", "none")
    }
    assert "by index" in said["index"]
    assert "--drop-beside optimizer" in said["index"]
    assert "names its parameters" in said["name"]
    assert "module.bias" in said["name"]
    assert "index" not in said["name"]
    assert "optimizer" not in said["none"]


# What is beside the state_dict.


def training() -> None:
    state, optimizer, _ = trained()
    whole = {"epoch": 3, "state_dict": state, "optimizer": optimizer, "lr_scheduler": {"a": 1}}
    torch.save({**whole, "args": {"lr": 0.1}}, "t.pth")


@pytest.mark.parametrize("verb", [ckptool.convert, ckptool.strip_prefix, ckptool.add_prefix])
def test_what_is_beside_is_left_out_by_name(verb: Any) -> None:
    training()
    done = verb("t.pth", "o.pth", drop_beside=["optimizer", "*scheduler*"])
    assert list(loaded("o.pth")) == ["epoch", "state_dict", "args"]
    assert done.not_carried == ("optimizer", "lr_scheduler")
    assert done.read == done.written == 2


def test_a_name_in_place_and_one_deeper() -> None:
    torch.save(
        {"state": {"model": {"a": torch.ones(1)}, "optimizers": 1, "n": 2}, "rng": 3}, "t.pth"
    )
    shutil.copy("t.pth", "u.pth")
    ckptool.convert("t.pth", in_place=True, drop_beside="optimizers")
    ckptool.convert("u.pth", in_place=True, drop_beside=["state.optimizers", "rng"])
    assert set(loaded("t.pth")) == {"state", "rng"}
    assert set(loaded("t.pth")["state"]) == {"model", "n"}
    assert set(loaded("u.pth")) == {"state"}


@pytest.mark.parametrize("name", ["nothing", "state_dict", "opt"])
def test_a_name_that_selects_nothing_shows_what_is_there(name: str) -> None:
    training()
    with pytest.raises(NothingMatched) as raised:
        ckptool.convert("t.pth", "o.pth", drop_beside=name)
    assert "epoch, optimizer, lr_scheduler, args" in raised.value.evidence[0]
    assert not Path("o.pth").exists()


def test_what_would_run_code_can_be_left_out() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit",))

    torch.save({"state_dict": {"a": torch.ones(1)}, "hook": Evil(), "epoch": 1}, "t.pth")
    ckptool.convert("t.pth", "o.pth", drop_beside="hook")
    assert list(loaded("o.pth")) == ["state_dict", "epoch"]


# Further records of a torch zip.


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_further_records_are_kept_on_request(method: int) -> None:
    training()
    text = b'{"version": 1}' * 40
    with zipfile.ZipFile("t.pth", "a", method) as archive:
        archive.writestr("t/anemoi-metadata/m.json", text)
        archive.writestr("t/extra/\u00fc", b"")
    before = Path("t.pth").read_bytes()
    with pytest.raises(EditError, match="2 extra records"):
        ckptool.strip_prefix("t.pth", in_place=True)
    assert Path("t.pth").read_bytes() == before
    assert "anemoi-metadata/m.json" in ckptool.strip_prefix("t.pth", "a.pth").not_carried
    with pytest.raises(EditError):
        ckptool.convert("t.pth", "a.safetensors", keep_records=True)
    with pytest.raises(EditError):
        ckptool.convert("t.pth", "s", max_shard_size=8, to="torch", keep_records=True)
    ckptool.strip_prefix("t.pth", in_place=True, keep_records=True)
    with zipfile.ZipFile("t.pth") as archive:
        assert archive.testzip() is None
        assert archive.read("archive/anemoi-metadata/m.json") == text
        assert archive.read("archive/extra/\u00fc") == b""
    assert list(loaded("t.pth")["state_dict"]) == ["weight", "bias"]
    torch.load("t.pth", weights_only=True, mmap=True)
    assert ckptool.check("t.pth").status.value == "ok"


# The library is not a trap: one text is one pattern, wherever several may be given.


def test_one_text_is_one_pattern_everywhere() -> None:
    net = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(12)])
    torch.save({"state_dict": net.state_dict(), "10": 1, "1": 2, "0": 3}, "seq.pth")
    ten = {"10.weight", "10.bias"}
    edits, names = ckptool.edits, [*net.state_dict()]
    assert {key for key, _ in ckptool.keys("seq.pth", select="10").entries} == ten
    assert ckptool.diff("seq.pth", "seq.pth", select="10").tensors == 2
    dropped = ckptool.transfer("seq.pth", "a.pth", drop="10").rewrite.dropped
    assert {each.key for each in dropped} == ten
    assert ckptool.transfer("seq.pth", "b.pth", keep="10").rewrite.written == 2
    assert set(ckptool.load_matching(net, "seq.pth", drop="10").dropped) == ten
    assert ckptool.convert("seq.pth", "c.pth", drop_beside="10").not_carried == ("10",)
    for edit, gone in (
        (edits.drop("10"), ten),
        (edits.keep("10"), {*names} - ten),
        (edits.without("10.bias", "why"), {"10.bias"}),
    ):
        key_map, _ = edits.apply([edit], names)
        assert set(key_map.dropped) == gone
    assert edits.select("10", names) == ten
    assert ckptool.strip_prefix("seq.pth", "f.pth", prefix="10").renamed == 2
    assert ckptool.diff("seq.pth", "seq.pth", ignore_prefix="10").equal  # of two they would collide
    stripped, _ = edits.apply([edits.strip_prefix("10")], names)
    assert {old for old, _ in stripped.renamed} == ten
    cast = edits.cast("bfloat16", only="10", except_="10.bias")
    ckptool.convert("seq.pth", "d.pth", steps=[cast])
    changed = [
        key for key, value in loaded("d.pth")["state_dict"].items() if value.dtype != torch.float32
    ]
    assert changed == ["10.weight"]
    found = ckptool.verify("seq.pth", "seq.pth", net, devices="cpu", input_shapes="3,2")
    assert len(found.runs) == 1
    ckptool.convert("seq.pth", "g.pth", dtype="bf16", dtype_only="10", dtype_except="10.bias")
    halves = [key for key, info in ckptool.keys("g.pth").entries if info.dtype.name == "BF16"]
    assert halves == ["10.weight"]
    Path("1.toml").write_text("recipe = 1\n[[step]]\nrename = [['10', '12']]", encoding="utf-8")
    named = ckptool.diff("seq.pth", "seq.pth", recipe="1.toml").to_dict()["only_left"]
    assert named == ["12.weight", "12.bias"]
    assert ckptool.average("seq.pth", "e.pth").rewrite.written == len(names)
    torch.save({"10.weight": torch.zeros(9, 2)}, "more.pth")
    torch.save({"10.weight": torch.zeros(3, 2)}, "less.pth")
    how = {"like": "more.pth", "min_match": 0, "force": True}
    assert ckptool.transfer("less.pth", "h.pth", init="10=zeros", **how).initialised == (
        "10.weight",
    )
    done = ckptool.transfer("less.pth", "h.pth", adapt="10.weight=vocab", **how)
    assert [each["key"] for each in done.to_dict()["adapted"]] == ["10.weight"]


def test_every_keyword_that_takes_several_takes_one_text() -> None:
    """A new keyword that takes several must be in the test above."""
    tried = {
        "select", "drop", "keep", "devices", "input_shapes", "patterns", "only", "except_",
        "unwanted", "drop_beside", "sources", "dtype_only", "dtype_except", "recipe",
        "prefix", "ignore_prefix", "adapt", "init",
    }  # fmt: skip
    functions = [getattr(ckptool, name) for name in ckptool.__all__]
    functions += [each for each in vars(ckptool.edits).values() if inspect.isfunction(each)]
    functions = [each for each in functions if inspect.isfunction(each)]
    hints = [
        (name, str(hint))
        for each in [*functions, ckptool.verbs.options.WriteOptions]
        for name, hint in each.__annotations__.items()
        if not name.startswith("_")
    ]
    texts = {n for n, hint in hints if "Sequence[str" in hint or "Iterable[str" in hint}
    assert {n for n, hint in hints if "str | Sequence[str" in hint} <= tried
    internal = {
        "keys",
        "paths",
        "names",
        "entries",
        "given",
        "weights",
        "wrappers",
        "before",
        "after",
    }
    assert texts <= tried | internal
