"""Sharded sets are read as one checkpoint, and a folder as what stands for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, listing, sampled, write_anew

from ckptool import containers
from ckptool.errors import CkptoolError, Malformed
from ckptool.state import checkpoint as places

torch = pytest.importorskip("torch")
hub = pytest.importorskip("huggingface_hub")
safetensors_torch = pytest.importorskip("safetensors.torch")
judge = pytest.importorskip("judge")

Run = Callable[..., Outcome]
LOOSELY = {"containers": False, "storage": False, "sharing": False, "metadata": False}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model() -> dict[str, Any]:
    """Give a state_dict whose keys are in no order that anybody sorts by."""
    shapes = {"wte": (8, 4), "h.10.w": (4, 4), "h.2.w": (4, 4), "ln.bias": (4,), "a.last": (2,)}
    state = {key: torch.arange(float(torch.Size(s).numel())).view(s) for key, s in shapes.items()}
    return state | {"steps": torch.tensor(3), "half": torch.ones(3, dtype=torch.bfloat16)}


def save(folder: Path, state: Mapping[str, Any], size: int = 170, *, safe: bool = True) -> Path:
    """Let huggingface_hub write a set."""
    folder.mkdir()
    hub.save_torch_state_dict(dict(state), folder, max_shard_size=size, safe_serialization=safe)
    assert len(list(folder.iterdir())) > 2
    return folder


def index_of(folder: Path) -> Path:
    return next(folder.glob("*.index.json"))


def rewrite_index(folder: Path, change: Callable[[dict[str, Any]], object], **how: Any) -> None:
    index = json.loads(index_of(folder).read_text())
    change(index)
    index_of(folder).write_text(json.dumps(index, **how))


def keys(path: Path) -> list[str]:
    return list(places.find(containers.read(path)).entries)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("target", ["out.pth", "out.safetensors"])
def test_what_huggingface_hub_writes_is_merged(
    run: Run, here: Path, safe: bool, target: str
) -> None:
    state = model()
    folder = save(here / "set", state, safe=safe)
    done = run("convert", "--json", folder, target)
    assert (done.code, done.document["read"], done.document["written"]) == (0, 7, 7)
    load = safetensors_torch.load_file if target.endswith("tensors") else judge.load
    loaded = load(target)
    assert judge.same(state, {key: loaded[key] for key in state}, **LOOSELY) == []
    if target == "out.pth":
        assert list(loaded) == list(state)
    assert keys(here / target) == list(state)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_the_index_and_the_folder_are_the_same_checkpoint(run: Run, here: Path, safe: bool) -> None:
    folder = save(here / "set", model(), safe=safe)
    by_folder, by_index = run("keys", folder), run("keys", index_of(folder))
    assert by_folder.code == by_index.code == 0
    assert by_folder.out == by_index.out
    assert f"{folder}: sharded " in by_folder.err
    document = run("keys", "--json", folder).document
    assert document["container"] == ("safetensors-sharded" if safe else "torch-sharded")
    assert document["count"] == 7


def test_an_index_sorted_by_key_leaves_the_order_to_the_shards(here: Path) -> None:
    """transformers sorts the index; its .bin shards still hold the model's order."""
    state = model()
    folder = save(here / "set", state, safe=False)
    rewrite_index(folder, lambda index: None, sort_keys=True)
    assert keys(folder) == list(state)


def test_shards_are_taken_by_number(good: Path) -> None:
    found = keys(good / "sharded_fp16")
    assert found == [f"blocks.{number}.weight" for number in range(11)]


def test_all_commands_take_a_folder(run: Run, here: Path) -> None:
    folder = save(here / "set", {f"module.{key}": value for key, value in model().items()})
    assert run("strip-prefix", folder, "plain.pth").code == 0
    assert list(judge.load("plain.pth")) == list(model())
    assert run("transfer", folder, "head.pth", "--drop", "h").code == 0
    assert list(judge.load("head.pth")) == ["wte", "ln.bias", "a.last", "steps", "half"]
    assert run("transfer", "plain.pth", "fits.pth", "--like", folder).code == 0
    assert run("add-prefix", folder, "more.safetensors").code == 0
    done = run("unwrap", folder, "weights.pth")
    assert (done.code, "nothing to unwrap" in done.err) == (2, True)


def test_load_state_dict_maps_all_shards(here: Path) -> None:
    import ckptool

    state = model()
    loaded = ckptool.load_state_dict(save(here / "set", state), check=True)
    assert judge.same(state, dict(loaded), **LOOSELY) == []
    assert list(loaded) == list(state)


def test_links_as_in_the_cache_of_huggingface_hub_are_followed(here: Path) -> None:
    folder = save(here / "set", model())
    (here / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(here / "blobs" / str(number))
        path.symlink_to(f"../blobs/{number}")
    assert keys(folder) == list(model())


def test_a_tie_in_a_torch_shard_stays_one(run: Run, here: Path, good: Path) -> None:
    assert run("convert", good / "sharded_legacy", "out.pth").code == 0
    loaded = judge.load("out.pth")
    assert list(loaded) == ["wte.weight", "h.weight", "lm_head.weight", "ln.bias"]
    assert loaded["wte.weight"].data_ptr() == loaded["lm_head.weight"].data_ptr()
    done = run("convert", good / "sharded_legacy", "out.safetensors")
    assert "1 tied, stored once (--untie writes each): lm_head.weight = wte.weight" in done.err


def test_module_versions_of_all_shards_are_joined(run: Run, here: Path, good: Path) -> None:
    whole = judge.load(good / "plain.pth")
    shards = {"pytorch_model-00001-of-00002.bin": 3, "pytorch_model-00002-of-00002.bin": 8}
    start, weight_map = 0, {}
    for name, end in shards.items():
        part = type(whole)(list(whole.items())[start:end])
        part._metadata = type(whole)(list(whole._metadata.items())[: 2 if start == 0 else None])
        torch.save(part, name)
        weight_map |= dict.fromkeys(part, name)
        start = end
    Path("pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert run("convert", "pytorch_model.bin.index.json", "out.pth").code == 0
    assert judge.same(whole, judge.load("out.pth")) == []


def test_what_stands_beside_the_entries_of_a_shard_is_named(run: Run, here: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, "m-00001-of-00001.bin")
    Path("m.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "m-00001-of-00001.bin"}, "metadata": {"more": [1]}})
    )
    done = run("convert", "--json", "m.bin.index.json", "out.pth")
    assert done.document["not_carried"] == ["m-00001-of-00001.bin: epoch", "more of the index"]


def test_texts_of_the_index_become_metadata(run: Run, here: Path) -> None:
    folder = save(here / "set", model())
    rewrite_index(folder, lambda index: index["metadata"].update(author="me"))
    assert run("convert", folder, "out.safetensors").code == 0
    from safetensors import safe_open

    with safe_open("out.safetensors", "pt") as opened:
        assert opened.metadata()["author"] == "me"
        assert opened.metadata()["format"] == "pt"


# Notes.


def test_a_wrong_total_and_files_of_another_set_are_noted(run: Run, here: Path) -> None:
    folder = save(here / "set", model())
    assert "index" not in run("keys", folder).err
    rewrite_index(folder, lambda index: index["metadata"].update(total_size=12))
    shutil.copy(
        folder / "model-00001-of-00002.safetensors", folder / "model-00003-of-00009.safetensors"
    )
    done = run("keys", folder)
    assert done.code == 0
    assert "the index says 12 bytes in all, the shards hold 294" in done.err
    assert "not named by the index, and not read: model-00003-of-00009.safetensors" in done.err


def test_a_shard_alone_says_what_it_is_of(run: Run, here: Path) -> None:
    folder = save(here / "set", model())
    name = folder / "model-00001-of-00002.safetensors"
    note = "this is shard 1 of 2; model.safetensors.index.json names all of them"
    done = run("keys", name)
    assert (done.code, note in done.err) == (0, True)
    os.unlink(index_of(folder))
    assert "this is shard 1 of 2\n" in run("keys", name).err


# Refusals.


def test_in_place_is_refused(run: Run, here: Path, good: Path) -> None:
    folder = save(here / "set", model())
    before = listing(here)
    done = run("add-prefix", "--in-place", folder)
    assert done.code == 2
    assert "is a folder: --in-place replaces one file" in done.err
    assert listing(here) == before
    assert run("add-prefix", "--in-place", good / "transformers").code == 2


def test_no_shard_is_overwritten(run: Run, here: Path) -> None:
    folder = save(here / "set", model())
    for path in folder.iterdir():
        done = run("convert", "--force", folder, path)
        assert (done.code, "error[same-file]" in done.err) == (5, True)


def test_a_shard_that_changes_meanwhile_is_noticed(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptool.files import publish

    folder = save(here / "set", model())
    real = publish.write_file

    def touch(*arguments: Any, **more: Any) -> Any:
        done = real(*arguments, **more)
        os.utime(folder / "model-00001-of-00002.safetensors")
        return done

    monkeypatch.setattr(publish, "write_file", touch)
    done = run("convert", folder, "out.pth")
    assert (done.code, "was changed while it was read" in done.err) == (3, True)
    assert not Path("out.pth").exists()


def test_a_damaged_byte_in_a_torch_shard_is_found_in_copying(
    run: Run, here: Path, good: Path
) -> None:
    shutil.copytree(good / "sharded_bin", "set")
    name = Path("set/pytorch_model-00002-of-00002.bin")
    weight = judge.load(name)["classifier.weight"].numpy().tobytes()
    content = name.read_bytes()
    name.write_bytes(content.replace(weight, weight[:-1] + b"\xff"))
    done = run("convert", "set", "out.pth")
    assert (done.code, "do not match their checksum" in done.err) == (3, True)
    assert "pytorch_model-00002-of-00002.bin" in done.err


def test_every_truncation_of_an_index_is_one_clear_error(good: Path, here: Path) -> None:
    shutil.copytree(good / "sharded_safetensors", "set")
    index = index_of(Path("set"))
    content = index.read_bytes()
    for size in sampled(range(len(content)), 3):
        write_anew(index, content[:size])
        with pytest.raises(CkptoolError):
            containers.read("set")


def test_every_changed_byte_of_an_index_is_read_or_refused(good: Path, here: Path) -> None:
    shutil.copytree(good / "sharded_safetensors", "set")
    index = index_of(Path("set"))
    content = index.read_bytes()
    fine = {"model"}
    for at in sampled(range(len(content)), 5):
        for value in (0, ord('"'), ord("a"), 0xFF):
            write_anew(index, content[:at] + bytes([value]) + content[at + 1 :])
            try:
                containers.read("set")
            except CkptoolError:
                continue
            fine.add("read")
    assert fine == {"model", "read"}


def test_a_damaged_shard_is_named_once(hostile: Path) -> None:
    with pytest.raises(Malformed) as raised:
        containers.read(hostile / "sharded_short_shard")
    assert raised.value.message.count("model-00002-of-00002.safetensors") == 1
    assert "index.json" not in raised.value.message
    assert str(raised.value.path).endswith("model-00002-of-00002.safetensors")


def test_a_shard_without_a_state_dict_is_refused(run: Run, here: Path, good: Path) -> None:
    """Of several candidates none is guessed, and `check` goes on with the next file."""
    for name in ("list_of_tensors.pth", "dino.pth", "no_tensors.pth"):
        shutil.copy(good / name, "m.bin")
        Path("m.bin.index.json").write_text(json.dumps({"weight_map": {"a": "m.bin"}}))
        done = run("keys", "m.bin.index.json")
        assert (done.code, "m.bin holds none of the keys" in done.err) == (3, True), done.err
        assert run("check", "m.bin.index.json").code == 1


def test_many_shard_names_take_linear_time(here: Path) -> None:
    weight_map = {f"k{number}": f"s{number}.safetensors" for number in range(20_000)}
    Path("m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(Malformed, match="20000 of 20000 shards that the index names are missing"):
        containers.read("m.safetensors.index.json")


# Folders.


def test_a_folder_stands_for_the_one_checkpoint_in_it(run: Run, good: Path) -> None:
    done = run("keys", good / "transformers")
    assert done.code == 0
    assert "is a folder; this is model.safetensors in it" in done.err
    assert done.out.count("\n") == 8


def test_a_folder_of_several_is_refused(run: Run, here: Path, good: Path) -> None:
    shutil.copytree(good / "transformers", "run")
    shutil.copy(good / "plain.pth", "run/pytorch_model.bin")
    done = run("keys", "run")
    assert (done.code, done.out) == (2, "")
    assert (
        "run is a folder of 2 checkpoints\n    model.safetensors\n    pytorch_model.bin" in done.err
    )
    assert "hint: name one of them" in done.err
    os.rename("run/pytorch_model.bin", "run/m.bin.index.json")
    assert run("keys", "run").code == 2


def test_a_folder_of_none_is_refused(run: Run, here: Path) -> None:
    (here / "run" / "sub").mkdir(parents=True)
    for name in ("resnet.pth", "notes.txt"):
        (here / "run" / name).touch()
    done = run("keys", "run")
    assert (done.code, done.out) == (3, "")
    assert (
        "error[not-a-checkpoint]: run is a folder (2 files, 1 folder)\n    resnet.pth" in done.err
    )


def test_some_shards_without_an_index_say_what_is_missing(run: Run, here: Path) -> None:
    folder = save(here / "set", model())
    os.unlink(index_of(folder))
    os.unlink(folder / "model-00002-of-00002.safetensors")
    done = run("keys", folder)
    assert done.code == 3
    assert "1 of 2 shards of model.safetensors, without their index" in done.err
