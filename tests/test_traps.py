"""The traps that real checkpoints hold, one test for each, named for it.

Where it can be shown, a test first lets the naive way fail: what torch, the safetensors library or
the usual script makes of the same file.
"""

from __future__ import annotations

import json
import os
import pickletools
import stat
import struct
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckptool
from ckptool.errors import (
    KeyCollision,
    Malformed,
    NothingMatched,
    NotRepresentable,
    WriteError,
)
from ckptool.state import edits
from ckptool.verbs import checking, surgery
from ckptool.verbs.checked import Status
from ckptool.verbs.surgery import Options, Rewrite

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
judge = pytest.importorskip("judge")

FOLDER = Path(__file__).parent.parent / "fixtures"
sys.path.append(str(FOLDER))

from containers import (  # noqa: E402
    Member,
    legacy,
    records,
    torch_members,
    torch_zip,
    zip_bytes,
)
from good_by_hand import floats  # noqa: E402
from opcodes import (  # noqa: E402
    FALSE,
    NONE,
    TRUE,
    build,
    integer,
    name,
    new,
    ordered_dict,
    pickled,
    storage,
    tensor,
    text,
    tuple_,
)

GOOD, HOSTILE = FOLDER / "good", FOLDER / "hostile"
STRIP = [edits.strip_prefix()]


def rewrite(source: Path, target: Path, *steps: edits.Edit, **more: Any) -> Rewrite:
    options = {key: more.pop(key) for key in list(more) if key in Options.__dataclass_fields__}
    return surgery.rewrite(
        source, target, list(steps), options=Options(**{"sync": False, **options}), **more
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in" / "source.pth"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.pth"


def nothing_written(out: Path) -> bool:
    return list(out.parent.iterdir()) == []


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


# torch zip: checksums.


def test_crc_of_a_storage_is_checked_for_torch_does_not(out: Path) -> None:
    damaged = HOSTILE / "crc_mismatch.pth"
    assert judge.same(judge.load(damaged), judge.load(GOOD / "plain.pth")) != []
    for target in (out, out.with_suffix(".safetensors")):
        with pytest.raises(Malformed, match="checksum"):
            rewrite(damaged, target)
    assert nothing_written(out)


def test_crc_of_a_large_storage_is_checked_to_its_last_byte(source: Path, out: Path) -> None:
    torch.save({"w": torch.arange(900_001, dtype=torch.float32)}, source)
    content = bytearray(source.read_bytes())
    content[content.rindex(struct.pack("<f", 900_000)) + 3] ^= 1
    source.write_bytes(content)
    assert judge.load(source)["w"][-1] != 900_000
    for target in (out, out.with_suffix(".safetensors")):
        with pytest.raises(Malformed, match="checksum"):
            rewrite(source, target)


def test_crc_is_checked_where_a_part_of_the_storage_is_written(source: Path, out: Path) -> None:
    flat = torch.arange(1000, dtype=torch.float32)
    torch.save({"a": flat[:10], "b": flat[20:30].view(2, 5).t()}, source)
    rewrite(source, out.with_suffix(".safetensors"))
    out.with_suffix(".safetensors").unlink()
    content = bytearray(source.read_bytes())
    content[content.index(struct.pack("<f", 777))] ^= 1  # no tensor reaches it
    source.write_bytes(content)
    with pytest.raises(Malformed, match="checksum"):
        rewrite(source, out.with_suffix(".safetensors"))
    assert nothing_written(out)


def test_crc_of_a_deflated_storage_is_checked(source: Path, out: Path) -> None:
    with zipfile.ZipFile(GOOD / "rezipped.pth") as opened:
        stored = opened.getinfo("plain/data/0")
    content = bytearray((GOOD / "rezipped.pth").read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(b"plain/data/0"))
    for at in (stored.header_offset + 14, entry + 16):
        assert content[at : at + 4] == struct.pack("<L", stored.CRC)
        content[at] ^= 1
    source.write_bytes(content)
    with pytest.raises(Malformed, match="checksum"):
        rewrite(source, out)


def test_crc_zero_everywhere_means_not_computed(out: Path) -> None:
    with zipfile.ZipFile(GOOD / "no_crc.pth") as opened:
        assert {member.CRC for member in opened.infolist()} == {0}
        with pytest.raises(zipfile.BadZipFile):
            opened.read("no_crc/data.pkl")
    rewrite(GOOD / "no_crc.pth", out)
    assert judge.same(judge.load(GOOD / "no_crc.pth"), judge.load(out)) == []
    with zipfile.ZipFile(out) as opened:
        assert opened.testzip() is None


def test_crc_zero_in_storages_alone_means_written_later(source: Path, out: Path) -> None:
    """As `torch.serialization.skip_data` leaves them for GPUDirect Storage to fill in."""
    found = records((GOOD / "plain.pth").read_bytes())
    data = [record for record in found if record.startswith("data/")]
    source.write_bytes(
        zip_bytes(
            [
                Member(f"archive/{record}", content, crc=0 if record in data else None)
                for record, content in found.items()
            ]
        )
    )
    rewrite(source, out)
    assert judge.same(judge.load(source), judge.load(out)) == []
    checked = checking.check(source)
    assert checked.status is Status.OK
    assert f"no checksums recorded for {len(data)} records" in checked.not_checked[0]
    source.write_bytes(source.read_bytes().replace(b"OrderedDict", b"OrderedDicT"))
    assert checking.check(source).status is not Status.OK


def test_crc_zero_on_one_record_alone_is_damage(source: Path, out: Path) -> None:
    members = [
        Member(f"archive/{record}", data, crc=0 if record == "data/0" else None)
        for record, data in records((GOOD / "plain.pth").read_bytes()).items()
    ]
    source.write_bytes(zip_bytes(members))
    judge.load(source)
    with pytest.raises(Malformed, match="checksum"):
        rewrite(source, out)


# torch zip: records.


def test_names_that_differ_in_case_alone_are_refused(source: Path, out: Path) -> None:
    body = pickled(ordered_dict([(text("w"), tensor(storage(text("0"), 2), [2]))]))
    members = torch_members(body, {"0": struct.pack("<2f", 1, 2)})
    loaded = []
    for place in range(len(members) + 1):
        variant = Member("archive/DATA/0", bytes(8))
        source.write_bytes(zip_bytes([*members[:place], variant, *members[place:]]))
        loaded.append(judge.load(source)["w"].tolist())
        with pytest.raises(Malformed, match="two records are named"):
            rewrite(source, out)
    assert [0, 0] in loaded  # torch may take DATA/0 for data/0
    assert nothing_written(out)


def test_local_headers_leave_sizes_to_the_directory(source: Path, out: Path) -> None:
    torch.save({"w": torch.ones(3)}, source)
    content = source.read_bytes()
    with zipfile.ZipFile(source) as opened:
        for member in opened.infolist():
            local = content[member.header_offset :][:30]
            flags, crc, packed, nbytes = struct.unpack_from("<H6xLLL", local, 6)
            assert (flags, crc, packed, nbytes) == (0x0808, 0, 0, 0)
            assert (member.CRC, member.file_size) != (0, 0)
    rewrite(source, out)
    assert judge.same(judge.load(source), judge.load(out)) == []


def test_deflated_members_are_stored_again_so_that_mmap_works(out: Path) -> None:
    zipped, wanted = GOOD / "rezipped.pth", judge.load(GOOD / "plain.pth")
    assert judge.same(wanted, judge.load(zipped)) == []
    assert judge.same(wanted, judge.load(zipped, mmap=True)) != []  # the packed bytes, unnoticed
    rewrite(zipped, out)
    assert judge.same(wanted, judge.load(out, mmap=True)) == []
    rewrite(zipped, out.with_suffix(".safetensors"))
    loosely = {"containers": False, "order": False, "metadata": False, "storage": False}
    loaded = safetensors_torch.load_file(out.with_suffix(".safetensors"))
    assert judge.same(wanted, loaded, sharing=False, **loosely) == []


def test_short_storage_would_read_into_the_next_record(out: Path) -> None:
    short = HOSTILE / "short_storage.pth"
    # under mmap, torch gives two numbers of the storage and two of what lies behind it
    assert judge.load(short, mmap=True)["fc.weight"].flatten()[:2].tolist() == [1.0, 2.0]
    with pytest.raises(Malformed, match="should have 16 bytes and has 8"):
        rewrite(short, out)
    assert nothing_written(out)


def test_format_version_would_make_torch_compute_wrong_offsets(out: Path) -> None:
    wanted = judge.load(GOOD / "plain.pth")
    rewrite(GOOD / "plain.pth", out)
    strictly = {"mmap": True, "calculated_offsets": True}
    assert judge.same(wanted, judge.load(out, **strictly)) == []
    with zipfile.ZipFile(GOOD / "plain.pth") as opened:
        assert "plain/.format_version" in opened.namelist()
    lying = out.with_name("lying.pth")
    with zipfile.ZipFile(out) as ours, zipfile.ZipFile(lying, "w") as made:
        for record in reversed(ours.namelist()):  # any layout but torch's own
            made.writestr(record, ours.read(record))
        made.writestr("archive/.format_version", b"1")
    assert judge.same(wanted, judge.load(lying)) == []
    assert judge.same(wanted, judge.load(lying, **strictly)) != []


def test_storages_are_aligned_for_mmap(out: Path) -> None:
    rewrite(GOOD / "unaligned.pth", out)
    loaded = judge.load(out, mmap=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())
    unaligned = judge.load(GOOD / "unaligned.pth", mmap=True)
    assert any(tensor.data_ptr() % 64 for tensor in unaligned.values())


def test_bytes_do_not_hang_on_the_name_of_the_file(source: Path, out: Path) -> None:
    state, other = {"w": torch.ones(3)}, source.with_name("other.pth")
    torch.save(state, source)
    torch.save(state, other)
    assert source.read_bytes() != other.read_bytes()
    rewrite(source, out)
    rewrite(other, out.with_name("two.pth"))
    assert out.read_bytes() == out.with_name("two.pth").read_bytes()


def test_torchs_own_save_of_one_file_varies_and_ours_does_not(source: Path, out: Path) -> None:
    """Legacy storage keys are addresses of memory."""
    alive, legacy = [], {"_use_new_zipfile_serialization": False}
    other = source.with_name("other.pth")
    for path in (source, other):
        state = {f"w{n}": torch.full((4,), float(n)) for n in range(3)}
        alive.append(state)  # or the second would get the addresses of the first
        torch.save(state, path, **legacy)
    assert source.read_bytes() != other.read_bytes()
    rewrite(source, out)
    rewrite(other, out.with_name("two.pth"))
    assert out.read_bytes() == out.with_name("two.pth").read_bytes()


@pytest.mark.parametrize("protocol", [1, 3, 4, 5])
def test_other_protocols_become_two_which_weights_only_reads(
    protocol: int, source: Path, out: Path
) -> None:
    state = {"w": torch.ones(3), "seen": {"a", "b"}, "blob": bytearray(b"\0\xff"), "raw": b"\xfe"}
    torch.save(state, source, pickle_protocol=protocol)
    with pytest.raises(Exception, match="Unsupported operand"):
        judge.load(source)
    rewrite(source, out)
    assert judge.same(state, judge.load(out, weights_only=True)) == []


def test_tensor_bytes_that_look_like_an_end_record(source: Path, out: Path) -> None:
    fake = b"PK\5\6" + bytes(18)
    content = torch_zip(
        pickled(ordered_dict([(text("w"), tensor(storage(text("0"), 11), [11]))])),
        {"0": fake + fake},
    )
    source.write_bytes(content)
    rewrite(source, out)
    assert judge.same(judge.load(source), judge.load(out)) == []


# Legacy.


def test_legacy_views_are_resolved(out: Path) -> None:
    wanted = judge.load(GOOD / "legacy_views.pth")
    rewrite(GOOD / "legacy_views.pth", out)
    loaded = judge.load(out)
    assert judge.same(wanted, loaded, storage=False) == []
    assert loaded["bias"].storage_offset() == 11  # in the root storage, not in its window
    assert len([name for name in records(out.read_bytes()) if name.startswith("data/")]) == 1


def test_legacy_ids_of_modules_become_plain_names(source: Path, out: Path) -> None:
    old = ("module", "torch.nn.modules.linear Linear", "linear.py", "class Linear: ...")
    body = tuple_(text(old[0]), name(*old[1].split()), text(old[2]), text(old[3])) + b"Q"
    source.write_bytes(torch_zip(pickled(body), {}))
    with pytest.raises(AssertionError, match="Unknown typename"):  # no zip may hold one
        judge.load(source, weights_only=False)
    rewrite(GOOD / "whole_model_legacy.pth", out)
    body = records(out.read_bytes())["data.pkl"]
    texts = [argument for _, argument, _ in pickletools.genops(body)]
    assert "module" not in texts
    assert not any("class Module" in str(argument) for argument in texts)
    wanted = judge.load(GOOD / "whole_model_legacy.pth", weights_only=False)
    assert judge.same(wanted, judge.load(out, weights_only=False)) == []


@pytest.mark.parametrize("file", ["old_rebuild.pth", "tensors_2017.pth", "python2.pth"])
def test_very_old_tensors_become_todays(file: str, out: Path) -> None:
    rewrite(GOOD / file, out)
    assert judge.same(judge.load(GOOD / file), judge.load(out, weights_only=True)) == []


def test_legacy_files_become_zips_that_mmap_reads(out: Path) -> None:
    with pytest.raises(RuntimeError, match="mmap"):
        judge.load(GOOD / "plain_legacy.pth", mmap=True)
    rewrite(GOOD / "plain_legacy.pth", out)
    assert judge.same(judge.load(GOOD / "plain.pth"), judge.load(out, mmap=True)) == []


# `_metadata`.


def test_metadata_follows_the_keys(source: Path, out: Path) -> None:
    """Without it a missing counter goes unnoticed: batch norm has it since version 2."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    state = torch.nn.DataParallel(model).state_dict()
    del state["module.0.num_batches_tracked"]
    torch.save(state, source)
    naive = OrderedDict((key.removeprefix("module."), t) for key, t in judge.load(source).items())
    model.load_state_dict(naive)  # nothing is missing, it says
    rewrite(source, out, *STRIP)
    with pytest.raises(RuntimeError, match=r"0\.num_batches_tracked"):
        model.load_state_dict(judge.load(out))


def test_metadata_of_quantized_modules_is_needed_to_load_them(source: Path, out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 3)))
    state = model.state_dict()
    wrapped = OrderedDict((f"module.{key}", value) for key, value in state.items())
    wrapped._metadata = OrderedDict(  # type: ignore[attr-defined]
        (f"module.{path}".rstrip("."), entry) for path, entry in state._metadata.items()
    )
    torch.save(wrapped, source)
    naive = OrderedDict((k.removeprefix("module."), v) for k, v in judge.load(source).items())
    with pytest.raises(KeyError, match="weight"):
        model.load_state_dict(naive)
    rewrite(source, out, *STRIP)
    model.load_state_dict(judge.load(out))


def test_metadata_of_the_wrapper_gives_way_to_the_models(source: Path, out: Path) -> None:
    state = OrderedDict([("module.w", torch.ones(2))])
    state._metadata = OrderedDict(  # type: ignore[attr-defined]
        [("", {"version": 1}), ("module", {"version": 7, "own": True})]
    )
    torch.save(state, source)
    rewrite(source, out, *STRIP)
    assert judge.load(out)._metadata == {"": {"version": 7, "own": True}}
    rewrite(out, source, edits.add_prefix(), force=True)
    metadata = judge.load(source)._metadata
    assert list(metadata.items()) == list(state._metadata.items())  # type: ignore[attr-defined]


def test_metadata_of_what_is_dropped_goes_and_no_other(source: Path, out: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(2, 2))
    )
    torch.save(model.state_dict(), source)
    rewrite(source, out, edits.drop(["2"]))
    assert list(judge.load(out)._metadata) == ["", "0", "1"]  # the ReLU never had keys
    rewrite(source, out, edits.drop(["0.bias"]), force=True)
    assert list(judge.load(out)._metadata) == ["", "0", "1", "2", "2.0"]


def test_metadata_is_not_invented(source: Path, out: Path) -> None:
    torch.save(OrderedDict([("module.w", torch.ones(2))]), source)
    rewrite(source, out, *STRIP)
    assert not hasattr(judge.load(out), "_metadata")
    rewrite(GOOD / "plain.safetensors", out, force=True)
    assert not hasattr(judge.load(out), "_metadata")


def test_flag_of_assign_is_taken_out(source: Path, out: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    state = model.state_dict()
    model.load_state_dict(state, assign=True)  # leaves the flag in the state_dict it was given
    assert all("assign_to_params_buffers" in entry for entry in state._metadata.values())
    torch.save(state, source)
    for steps in ([], [edits.add_prefix()]):
        rewrite(source, out, *steps, force=True)
        entries = judge.load(out)._metadata.values()
        assert list(entries)
        assert all(set(entry) == {"version"} for entry in entries)


# Keys that stand twice, strings that are shared, storages that are shared.


def test_a_key_twice_with_equal_values_is_noted(out: Path) -> None:
    result = rewrite(GOOD / "duplicate_keys.pth", out)
    assert any("weight appears twice" in note for note in result.notes)
    assert judge.same(judge.load(GOOD / "duplicate_keys.pth"), judge.load(out)) == []


def test_a_key_twice_with_different_values_is_refused(source: Path, out: Path) -> None:
    pairs = [
        (text("w"), tensor(storage(text("0"), 2), [2])),
        (text("w"), tensor(storage(text("1"), 2), [2])),
    ]
    stored = {"0": struct.pack("<2f", 1, 2), "1": struct.pack("<2f", 3, 4)}
    source.write_bytes(torch_zip(pickled(ordered_dict(pairs)), stored))
    assert judge.load(source)["w"].tolist() == [3, 4]  # torch takes the last, and says nothing
    with pytest.raises(Malformed, match="appears twice"):
        rewrite(source, out)
    assert nothing_written(out)


def test_a_key_twice_outside_is_the_last_as_in_torch(out: Path) -> None:
    rewrite(GOOD / "duplicate_outside.pth", out, edits.add_prefix())
    assert judge.load(out)["epoch"] == judge.load(GOOD / "duplicate_outside.pth")["epoch"] == 2


def test_one_string_as_key_and_as_value(out: Path) -> None:
    before = judge.load(GOOD / "same_string.pth")
    key = next(iter(before["state_dict"]))
    assert before["frozen"][0] is key  # one object in the file's memo too
    rewrite(GOOD / "same_string.pth", out, *STRIP)
    after = judge.load(out)
    assert list(after["state_dict"]) == ["classifier.weight", "classifier.bias"]
    for place in ("frozen", "wrapper", "last"):
        assert after[place] == before[place]


def test_a_storage_that_the_optimizer_shares(out: Path) -> None:
    rewrite(GOOD / "shared_with_optimizer.pth", out, edits.rename("classifier", "head"))
    loaded = judge.load(out)
    weight = loaded["state_dict"]["head.weight"]
    weight[0, 0] = 77
    assert loaded["optimizer"]["state"][0]["anchor"][0, 0] == 77
    assert loaded["hyper_parameters"]["class_weights"][0] == 77


def test_dropping_makes_the_optimizer_stale_and_says_so(out: Path, tmp_path: Path) -> None:
    training = GOOD / "model_best.pth.tar"

    def notes(*steps: edits.Edit, **more: Any) -> str:
        return "\n".join(rewrite(training, out, *steps, force=True, **more).notes)

    assert "optimizer" in notes(edits.drop(["module.classifier"]))
    assert "optimizer" not in notes(*STRIP)
    assert "optimizer" not in notes(edits.drop(["module.classifier"]), bare=True)
    again = rewrite(GOOD / "plain.pth", tmp_path / "x.pth", edits.drop(["classifier"]))
    assert "optimizer" not in "\n".join(again.notes)


def test_the_optimizer_is_keyed_by_index_and_left_alone(out: Path) -> None:
    rewrite(GOOD / "model_best.pth.tar", out, *STRIP)
    before, after = judge.load(GOOD / "model_best.pth.tar"), judge.load(out)
    assert judge.same(before["optimizer"], after["optimizer"]) == []
    assert set(after["optimizer"]["state"]) == {0, 1, 2, 3, 4}


# Prefixes.


def keys_after(source: Path, out: Path, keys: list[str], *steps: edits.Edit) -> list[str]:
    torch.save(OrderedDict((key, torch.ones(1)) for key in keys), source)
    rewrite(source, out, *steps)
    return list(judge.load(out))


def test_replace_would_eat_into_mlp_module(source: Path, out: Path) -> None:
    keys = ["module.mlp_module.layer0.weight", "module.a.module.b"]
    assert keys[0].replace("module.", "") == "mlp_layer0.weight"
    assert keys_after(source, out, keys, *STRIP) == ["mlp_module.layer0.weight", "a.module.b"]
    with pytest.raises(NothingMatched):
        rewrite(GOOD / "module_in_names.pth", out.with_name("none.pth"), *STRIP)
    with pytest.raises(NothingMatched):
        rewrite(
            GOOD / "module_in_names.pth",
            out.with_name("none.pth"),
            edits.strip_prefix(anywhere=True),
        )


def test_looking_at_the_first_key_only_is_not_enough(source: Path, out: Path) -> None:
    keys = ["head.weight", "module.a", "b", "module.c"]
    assert keys_after(source, out, keys, *STRIP) == ["head.weight", "a", "b", "c"]


def test_cutting_seven_characters_off_every_key_is_too_much(source: Path, out: Path) -> None:
    keys = ["module.a", "classifier.weight"]
    assert [key[7:] for key in keys] == ["a", "ier.weight"]
    assert keys_after(source, out, keys, *STRIP) == ["a", "classifier.weight"]


def test_a_prefix_is_taken_off_once(source: Path, out: Path) -> None:
    assert keys_after(source, out, ["module.module.a"], *STRIP) == ["module.a"]


def test_order_is_the_files_and_not_the_alphabets(source: Path, out: Path) -> None:
    keys = ["module.z", "module.a", "m", "module.b"]
    assert keys_after(source, out, keys, *STRIP) == ["z", "a", "m", "b"]


def test_two_keys_that_become_one_are_refused(out: Path) -> None:
    naive = {
        key.removeprefix("module."): tensor
        for key, tensor in judge.load(GOOD / "collision.pth").items()
    }
    assert len(naive) == 2  # of three: one is lost
    with pytest.raises(KeyCollision, match=r"module\.weight and weight"):
        rewrite(GOOD / "collision.pth", out, *STRIP)
    assert nothing_written(out)


def test_wrappers_are_peeled_in_both_orders(source: Path, out: Path) -> None:
    for prefix in ("_orig_mod.module.", "module._orig_mod.", "module.module._orig_mod."):
        auto = edits.strip_wrappers()
        out.unlink(missing_ok=True)
        assert keys_after(source, out, [f"{prefix}a.w", f"{prefix}b"], auto) == ["a.w", "b"]


def test_wrappers_that_not_all_keys_have_stay(source: Path, out: Path) -> None:
    with pytest.raises(NothingMatched):
        keys_after(source, out, ["module.a", "b"], edits.strip_wrappers())


def test_an_odd_key_is_kept_only_if_asked_for(source: Path, out: Path) -> None:
    assert keys_after(source, out, ["a.w", "\0", "b\0"], edits.keep(["a"])) == ["a.w"]


def test_module_inside_a_key_needs_anywhere(source: Path, out: Path) -> None:
    keys = ["features.module.0.weight", "submodule.x", "module.y.module"]
    anywhere = edits.strip_prefix(anywhere=True)
    wanted = ["features.0.weight", "submodule.x", "y.module"]
    assert keys_after(source, out, keys, anywhere) == wanted


# safetensors: order, shapes, ties, views.


def test_dtype_order_is_the_librarys(source: Path, out: Path) -> None:
    tensors = {
        f"{number:02}.{str(dtype)[6:]}": torch.ones(2, 8, dtype=torch.uint8).view(dtype).clone()
        for number, dtype in enumerate(ST_DTYPES)
    }
    torch.save(tensors, source)
    ours, theirs = out.with_suffix(".safetensors"), out.with_suffix(".theirs")
    rewrite(source, ours)
    safetensors_torch.save_file(tensors, theirs)
    order = [key for key in header_of(ours) if key != "__metadata__"]
    assert order == [key for key in header_of(theirs) if key != "__metadata__"]
    assert order != sorted(order)
    assert data_of(ours) == data_of(theirs)
    rewrite(ours, out)
    assert list(judge.load(out)) == list(tensors)


ST_DTYPES = [
    getattr(torch, name)
    for name in (
        "bool uint8 int8 float8_e5m2 float8_e4m3fn float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz "
        "int16 uint16 float16 bfloat16 int32 uint32 float32 complex64 float64 int64 uint64 "
        "float4_e2m1fn_x2"
    ).split()
]


def test_names_are_ordered_as_bytes_within_a_dtype(source: Path, out: Path) -> None:
    keys = ["b", "a.10", "a.2", "B", "\u00e9", "\U0001f600", "\uffee", "a", ""]
    tensors = {key: torch.ones(1) for key in keys}
    torch.save(tensors, source)
    ours, theirs = out.with_suffix(".safetensors"), out.with_suffix(".theirs")
    rewrite(source, ours)
    safetensors_torch.save_file(tensors, theirs)
    listed = [key for key in header_of(ours) if key != "__metadata__"]
    assert listed == [key for key in header_of(theirs) if key != "__metadata__"]


def test_four_bit_floats_count_twice_in_the_last_dimension(source: Path, out: Path) -> None:
    packed = torch.arange(6, dtype=torch.uint8).view(2, 3).view(torch.float4_e2m1fn_x2)
    torch.save({"w": packed}, source)
    ours = out.with_suffix(".safetensors")
    rewrite(source, ours)
    assert header_of(ours)["w"] == {"dtype": "F4", "shape": [2, 6], "data_offsets": [0, 6]}
    assert judge.same({"w": packed}, safetensors_torch.load_file(ours), storage=False) == []
    rewrite(ours, out)
    assert judge.same({"w": packed}, judge.load(out), containers=False, storage=False) == []


def test_exact_ties_are_written_once_and_come_back(out: Path) -> None:
    state = judge.load(GOOD / "tied.pth")
    ours = out.with_suffix(".safetensors")
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors_torch.save_file(dict(state), out.with_suffix(".theirs"))
    result = rewrite(GOOD / "tied.pth", ours)
    assert [(each.key, each.reason) for each in result.dropped] == [
        ("lm_head.weight", "tied to wte.weight")
    ]
    assert "lm_head.weight" not in header_of(ours)
    note = json.loads(header_of(ours)["__metadata__"]["ckptool"])
    assert note == {
        "v": 1,
        "order": ["wte.weight", "ln_f.weight", "ln_f.bias", "lm_head.weight"],
        "ties": {"lm_head.weight": "wte.weight"},
        "metadata": state._metadata,
    }
    rewrite(ours, out)
    loaded = judge.load(out)
    assert list(loaded) == list(state)
    assert loaded["lm_head.weight"].data_ptr() == loaded["wte.weight"].data_ptr()


def test_untie_writes_copies(out: Path) -> None:
    ours = out.with_suffix(".safetensors")
    result = rewrite(GOOD / "tied.pth", ours, untie=True)
    assert result.dropped == ()
    loaded = safetensors_torch.load_file(ours)
    assert torch.equal(loaded["lm_head.weight"], loaded["wte.weight"])
    rewrite(GOOD / "tied.pth", out, untie=True)
    loaded = judge.load(out)
    assert torch.equal(loaded["lm_head.weight"], loaded["wte.weight"])
    assert loaded["lm_head.weight"].data_ptr() != loaded["wte.weight"].data_ptr()
    assert judge.same(judge.load(GOOD / "tied.pth"), loaded, sharing=False) == []


def test_untie_works_on_what_is_more_than_a_tensor(source: Path, out: Path) -> None:
    base, hooked = torch.arange(4.0), torch.arange(3.0)
    one, other = torch.nn.Parameter(base), torch.nn.Parameter(base.view(4), requires_grad=False)
    tagged = hooked.view(3)
    tagged.note = "kept"
    torch.save({"one": one, "other": other, "hooked": hooked, "tagged": tagged}, source)
    rewrite(source, out, untie=True)
    before, after = judge.load(source), judge.load(out)
    assert judge.same(before, after, sharing=False) == []
    assert judge.same(before, after) != []
    assert len({tensor.data_ptr() for tensor in after.values()}) == 4


def test_renamed_ties_are_noted_under_their_new_names(out: Path) -> None:
    ours = out.with_suffix(".safetensors")
    rewrite(GOOD / "tied.pth", ours, edits.add_prefix())
    note = json.loads(header_of(ours)["__metadata__"]["ckptool"])
    assert note["ties"] == {"module.lm_head.weight": "module.wte.weight"}
    rewrite(ours, out, edits.rename("module.wte", "embed"))
    loaded = judge.load(out)
    assert loaded["module.lm_head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()


def test_a_slice_is_no_alias(source: Path, out: Path) -> None:
    flat = torch.arange(12, dtype=torch.float32)
    views = {
        "flat": flat,
        "start": flat[:4],  # the same address, fewer elements
        "matrix": flat.view(3, 4),  # the same bytes, another shape
        "turned": flat.view(3, 4).t(),  # another stride
        "middle": flat[4:8],
        "tie": flat.view(12),
    }
    torch.save(views, source)
    ours = out.with_suffix(".safetensors")
    result = rewrite(source, ours)
    assert [each.key for each in result.dropped] == ["tie"]
    loaded = safetensors_torch.load_file(ours)
    assert set(loaded) == set(views) - {"tie"}
    assert all(torch.equal(loaded[key], views[key]) for key in loaded)


def test_a_view_of_a_huge_storage_writes_its_own_bytes(source: Path, out: Path) -> None:
    base = torch.arange(1_000_000, dtype=torch.float32)
    torch.save({"w": base[500_000:500_004], "t": base.view(1000, 1000)[:, 3:5].t()}, source)
    assert source.stat().st_size > 4_000_000
    ours = out.with_suffix(".safetensors")
    rewrite(source, ours)
    assert ours.stat().st_size < 9_000
    loaded = safetensors_torch.load_file(ours)
    assert loaded["w"].tolist() == [500_000, 500_001, 500_002, 500_003]
    assert torch.equal(loaded["t"], base.view(1000, 1000)[:, 3:5].t())


def test_a_kilobyte_that_declares_gigabytes_is_refused(out: Path) -> None:
    ours = out.with_suffix(".safetensors")
    with pytest.raises(WriteError) as caught:
        rewrite(GOOD / "expanded_far.pth", ours)
    assert type(caught.value) is WriteError
    assert "4.0 GiB" in caught.value.message
    assert nothing_written(out)
    rewrite(GOOD / "expanded_far.pth", out)  # to torch it costs nothing
    assert out.stat().st_size < 5_000


def test_expansion_that_is_meant_is_written(source: Path, out: Path) -> None:
    mask = torch.tensor([0.5, 1.5]).view(2, 1).expand(2, 500_000)
    torch.save({"mask": mask}, source)
    ours = out.with_suffix(".safetensors")
    with pytest.raises(WriteError):
        rewrite(source, ours)
    with pytest.raises(WriteError):
        rewrite(source, ours, dry_run=True)
    assert nothing_written(out)
    rewrite(source, ours, allow_expand=True)
    assert torch.equal(safetensors_torch.load_file(ours)["mask"], mask)


# safetensors: names, metadata, bytes.


def test_a_tensor_named_metadata_is_not_representable(source: Path, out: Path) -> None:
    torch.save({"__metadata__": torch.ones(2), "w": torch.ones(2)}, source)
    ours = out.with_suffix(".safetensors")
    with pytest.raises(NotRepresentable) as caught:
        rewrite(source, ours)
    assert "__metadata__" in caught.value.evidence[0]
    assert nothing_written(out)
    rewrite(source, out)
    assert list(judge.load(out)) == ["__metadata__", "w"]
    rewrite(source, ours, edits.rename("__metadata__", "m"))
    assert set(safetensors_torch.load_file(ours)) == {"m", "w"}


def test_metadata_of_a_safetensors_file_is_kept_and_sorted(out: Path) -> None:
    ours = out.with_suffix(".safetensors")
    rewrite(GOOD / "metadata.safetensors", ours, edits.add_prefix())
    metadata = header_of(ours)["__metadata__"]
    assert metadata == header_of(GOOD / "metadata.safetensors")["__metadata__"]
    assert list(metadata) == sorted(metadata)


def test_a_note_that_fits_no_longer_is_ignored_and_said(source: Path, out: Path) -> None:
    for note in (
        '{"v":1,"order":["w"],"ties":{}}',
        '{"v":1,"order":["w","b","b"],"ties":{}}',
        '{"v":1,"order":["w","b","x"],"ties":{"x":"y"}}',
        '{"v":1,"order":["w","b"],"ties":{"b":"w"}}',
        '{"v":2,"order":["w","b"],"ties":{}}',
        '{"v":1,"order":[["w"],"b"],"ties":{}}',
        "[]",
        "not JSON",
    ):
        stale = source.with_suffix(".safetensors")
        tensors = {"b": torch.ones(2), "w": torch.zeros(3)}
        safetensors_torch.save_file(tensors, stale, {"format": "pt", "ckptool": note})
        result = rewrite(stale, out, force=True)
        assert list(judge.load(out)) == ["b", "w"]
        assert any("ignored" in each for each in result.notes), note


def test_a_note_that_fits_is_used(source: Path, out: Path) -> None:
    noted = source.with_suffix(".safetensors")
    note = '{"v":1,"order":["w","x","b"],"ties":{"x":"w"}}'
    tensors = {"b": torch.ones(2), "w": torch.zeros(3)}
    safetensors_torch.save_file(tensors, noted, {"format": "pt", "ckptool": note})
    rewrite(noted, out)
    loaded = judge.load(out)
    assert list(loaded) == ["w", "x", "b"]
    assert loaded["x"].data_ptr() == loaded["w"].data_ptr()


def test_bytes_of_nan_and_minus_zero_are_carried(out: Path) -> None:
    before = judge.load(GOOD / "special_values.pth")
    assert not torch.equal(before["weight"], before["weight"])  # NaN differs from itself
    ours = out.with_suffix(".safetensors")
    rewrite(GOOD / "special_values.pth", ours)
    rewrite(ours, out)
    words = judge.load(out)["weight"].view(torch.int32)
    assert words.tolist() == before["weight"].view(torch.int32).tolist()
    assert 0x7F800001 in words.tolist()  # a signalling NaN, which arithmetic would quiet
    assert judge.load(out)["scale"].view(torch.int32).item() == -(2**31)


def test_lazy_conjugates_and_negatives_are_resolved(out: Path) -> None:
    before = judge.load(GOOD / "conj.pth")
    ours = out.with_suffix(".safetensors")
    rewrite(GOOD / "conj.pth", ours)
    loaded = safetensors_torch.load_file(ours)
    for key, resolved in (("conj", before["conj"].resolve_conj()), ("neg", before["neg"])):
        raw = judge.storage_bytes(before[key].untyped_storage())
        meant = resolved.resolve_neg().contiguous()
        assert judge.storage_bytes(meant.untyped_storage()) not in raw
        assert judge.same(meant, loaded[key], storage=False) == []


def test_lazy_bits_both_at_once(source: Path, out: Path) -> None:
    base = torch.complex(torch.arange(6.0), torch.arange(6.0) - 2).view(2, 3)
    both = torch._neg_view(base.conj()).t()
    assert both.is_conj()
    assert both.is_neg()
    torch.save({"both": both}, source)
    ours = out.with_suffix(".safetensors")
    rewrite(source, ours)
    meant = both.resolve_conj().resolve_neg().contiguous()
    assert judge.same(meant, safetensors_torch.load_file(ours)["both"]) == []


def test_big_endian_bytes_are_swapped_for_safetensors_alone(out: Path) -> None:
    for file in ("big_endian.pth", "big_endian_odd.pth"):
        before = judge.load(GOOD / file)
        ours = out.with_suffix(".safetensors")
        rewrite(GOOD / file, ours, force=True)
        loaded = safetensors_torch.load_file(ours)
        assert all(judge.equal_bytes(before[key], loaded[key]) for key in before)
        rewrite(GOOD / file, out, force=True)
        ours_records, theirs = records(out.read_bytes()), records((GOOD / file).read_bytes())
        assert ours_records["byteorder"] == b"big"
        carried = {data for record, data in theirs.items() if record.startswith("data/")}
        assert carried == {data for r, data in ours_records.items() if r.startswith("data/")}


def test_what_safetensors_cannot_hold_is_listed_or_left_behind(out: Path) -> None:
    ours = out.with_suffix(".safetensors")
    with pytest.raises(NotRepresentable) as caught:
        rewrite(GOOD / "extra_state.pth", ours)
    assert {line.split()[0] for line in caught.value.evidence} == {
        "scaler._extra_state",
        "tokenizer._extra_state",
    }
    result = rewrite(GOOD / "extra_state.pth", ours, tensors_only=True)
    assert {each.key for each in result.dropped} == {
        "scaler._extra_state",
        "tokenizer._extra_state",
    }
    assert result.read == result.kept + result.renamed + len(result.dropped) == 9
    assert len(safetensors_torch.load_file(ours)) == 7


def test_what_stands_beside_is_named_when_left_behind(out: Path) -> None:
    result = rewrite(GOOD / "nested.pth", out.with_suffix(".safetensors"))
    assert set(result.not_carried) == {"model.model_args", "epoch", "best"}


# Modes and links, which the safetensors library gets wrong.


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_follows_the_umask(mask: int, out: Path) -> None:
    before = os.umask(mask)
    try:
        for target in (out, out.with_suffix(".safetensors")):
            rewrite(GOOD / "plain.pth", target)
            assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_mode_of_a_replaced_file_is_kept(out: Path) -> None:
    for target in (out, out.with_suffix(".safetensors")):
        target.write_bytes(b"old")
        target.chmod(0o640)
        rewrite(GOOD / "plain.pth", target, force=True)
        assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_symlink_is_written_through(out: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.pth"
    real.write_bytes(b"old")
    out.symlink_to(real)
    rewrite(GOOD / "plain.pth", out, force=True)
    assert out.is_symlink()
    assert judge.same(judge.load(GOOD / "plain.pth"), judge.load(real)) == []
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_dangling_symlink_is_written_through(out: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.pth"
    out.symlink_to(real)
    rewrite(GOOD / "plain.pth", out)
    assert out.is_symlink()
    assert judge.same(judge.load(GOOD / "plain.pth"), judge.load(real)) == []


# Odds and ends.


def test_records_that_no_tensor_uses_are_named(source: Path, out: Path) -> None:
    with zipfile.ZipFile(source, "w") as made:
        for record, data in records((GOOD / "plain.pth").read_bytes()).items():
            made.writestr(f"plain/{record}", data)
        made.writestr("plain/notes.txt", b"hello")
    result = rewrite(source, out)
    assert "notes.txt" in result.not_carried
    assert "notes.txt" not in records(out.read_bytes())


def test_a_key_that_is_only_a_dot_or_nothing(source: Path, out: Path) -> None:
    state = {"": torch.ones(1), ".": torch.ones(2), "a..b": torch.ones(3)}
    torch.save(state, source)
    ours = out.with_suffix(".safetensors")
    rewrite(source, ours)
    assert set(safetensors_torch.load_file(ours)) == set(state)
    rewrite(ours, out)
    assert list(judge.load(out)) == list(state)


def test_crc_of_ours_is_what_zlib_says(source: Path, out: Path) -> None:
    torch.save({"w": torch.arange(1_000_003, dtype=torch.int16), "e": torch.empty(0)}, source)
    rewrite(source, out)
    with zipfile.ZipFile(out) as opened:
        for member in opened.infolist():
            assert zlib.crc32(opened.read(member)) == member.CRC


def test_numbers_of_many_storages_are_in_order_of_first_use(source: Path, out: Path) -> None:
    shared = torch.ones(3)
    state = {f"k{n}": (torch.full((2,), float(n)) if n % 3 else shared) for n in range(300)}
    torch.save(state, source)
    rewrite(source, out)
    for how in ({}, {"mmap": True}, {"mmap": True, "calculated_offsets": True}):
        assert judge.same(state, judge.load(out, **how)) == []
    assert len([r for r in records(out.read_bytes()) if r.startswith("data/")]) == 201


def test_storage_keys_that_are_numbers_are_read(source: Path, out: Path) -> None:
    body = pickled(ordered_dict([(text("w"), tensor(storage(integer(0), 2), [2]))]))
    source.write_bytes(torch_zip(body, {"0": struct.pack("<2f", 1, 2)}))
    rewrite(source, out)
    assert judge.load(out)["w"].tolist() == [1, 2]


Run = Callable[..., Any]


def test_counts_add_up_on_the_command_line(run: Run, out: Path) -> None:
    command = ["convert", "--strip-prefix", "module", "--drop", "classifier", "--json"]
    outcome = run(*command, GOOD / "model_best.pth.tar", out)
    document = outcome.document
    assert (document["read"], document["renamed"], len(document["dropped"])) == (8, 6, 2)
    assert document["read"] == document["kept"] + document["renamed"] + len(document["dropped"])
    assert document["written"] == len(judge.load(out)["state_dict"]) == 6


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("order", [("tensor", "storage"), ("storage", "tensor")])
def test_bytes_and_their_bare_storage_stay_one(tmp_path: Path, order: tuple[str, str]) -> None:
    tensor = torch.arange(10, dtype=torch.uint8)
    both = {"tensor": tensor, "storage": tensor.untyped_storage()}
    torch.save({name: both[name] for name in order}, tmp_path / "in.pth")
    surgery.rewrite(tmp_path / "in.pth", tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert torch.equal(found["tensor"], tensor)
    assert found["tensor"].untyped_storage().data_ptr() == found["storage"].data_ptr()


def test_gradients_of_2017_are_listed(out: Path, tmp_path: Path) -> None:
    """A Parameter of torch 0.1 gets (data, grad, hooks, requires_grad, volatile) as its state."""

    def variable(module: str, kind: str, data: bytes, grad: bytes = NONE) -> bytes:
        state = tuple_(data, grad, ordered_dict(()), TRUE, FALSE)
        return build(new(name(module, kind)), state)

    def data(key: str) -> bytes:
        return tensor(storage(text(key), 2, NONE), [2])

    grad = variable("torch.autograd.variable", "Variable", data("502"))
    weight = variable("torch.nn.parameter", "Parameter", data("501"), grad)
    bias = variable("torch.nn.parameter", "Parameter", data("503"))
    body = pickled(ordered_dict([(text("weight"), weight), (text("bias"), bias)]))
    storages = [(key, 2, floats(at, at)) for at, key in enumerate(("501", "502", "503"))]
    path = tmp_path / "2017.pth"
    path.write_bytes(legacy(body, storages))
    assert list(ckptool.keys(path)) == ["weight", "bias"]
    found = ckptool.keys(path, all=True)
    assert list(found) == ["weight", "weight.grad", "bias"]
    other = tmp_path / "other.pth"
    other.write_bytes(legacy(body, [storages[0], ("502", 2, floats(7, 8)), storages[2]]))
    assert not ckptool.diff(path, other).equal
    plain = ckptool.convert(path, tmp_path / "a.safetensors", sync=False)
    assert any("attributes of tensors: weight" in note for note in plain.notes)
    ckptool.add_prefix(path, out, prefix="module.", sync=False)
    again = ckptool.keys(out, all=True)
    assert list(again) == ["module.weight", "module.weight.grad", "module.bias"]


def test_tensors_on_parameters_are_listed(out: Path, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.scale = torch.ones(3)
    weight.note = "w"
    torch.save({"weight": weight, "bias": torch.zeros(1)}, tmp_path / "a.pth")
    found = ckptool.keys(tmp_path / "a.pth", all=True)
    assert list(found) == ["weight", "weight.scale", "bias"]
    assert list(ckptool.keys(tmp_path / "a.pth")) == ["weight", "bias"]
    assert "3 tensors" in ckptool.check(tmp_path / "a.pth", finite=True).detail
