"""Damaged and hostile inputs: one clear error, nothing executed, nothing left behind, no hang."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import FIXTURES, Outcome, environment, listing, sampled, step, write_anew
from watch import NEVER

from ckptool import containers
from ckptool.errors import CkptoolError, FormatError
from ckptool.pickles import safety
from ckptool.pickles.names import Level
from ckptool.state import modules
from ckptool.verbs import surgery
from ckptool.verbs.surgery import Options

Run = Callable[..., Outcome]
MARKER = "ckptool-was-executed"

# Hostile files that cannot be read: every command says the same, exit 3.
REFUSED = {
    "malformed": """
        absolute_name.pth bool_size.pth byteorder_empty.pth byteorder_unknown.pth bytes_1_tib.pth
        bytes_after.pth case_variant_names.pth crlf.pth dimensions_65.pth duplicate_keys_differ.pth
        duplicate_names.pth false_end_record.pth float_size.pth forged_mark.pth frame_straddles.pth
        header_beyond_file.pth in_persistent_id.pth inflate_bomb.pth legacy_duplicate_key.pth
        legacy_extra_key.pth legacy_module_call.pth legacy_no_keys.pth legacy_protocol_1002.pth
        legacy_truncated.pth legacy_view_beyond.pth legacy_wrong_count.pth local_crc_differs.pth
        local_extra_beyond.pth local_method_differs.pth local_name_differs.pth
        local_size_differs.pth long_negative.pth long_storage.pth lossy_utf8.pth low_count.pth
        member_inside_member.pth memo_undefined.pth missing_mark.pth missing_storage.pth
        negative_numel.pth negative_offset.pth negative_size.pth negative_stride.pth no_stop.pth
        none_size.pth nul_name.pth numel_2_63.pth odd_setitems.pth offset_2_63.pth
        offset_beyond_storage.pth overlapping_members.pth persistent_id_arity.pth
        persistent_id_number.pth persistent_id_path.pth persistent_id_text.pth rank_mismatch.pth
        safetensors_duplicate_escaped.safetensors safetensors_duplicate_key.safetensors
        safetensors_end_before_begin.safetensors safetensors_float_offset.safetensors
        safetensors_gap.safetensors safetensors_header_beyond_file.safetensors
        safetensors_metadata_number.safetensors safetensors_missing_field.safetensors
        safetensors_nan_token.safetensors safetensors_negative_shape.safetensors
        safetensors_not_json.safetensors safetensors_not_utf8.safetensors
        safetensors_overlap.safetensors safetensors_shape_mismatch.safetensors
        safetensors_shape_overflow.safetensors safetensors_trailing.safetensors
        safetensors_trailing_json.safetensors safetensors_truncated.safetensors
        setitem_on_tensor.pth short_storage.pth size_2_63.pth size_beyond_file.pth
        size_beyond_storage.pth stack_underflow.pth storage_is_text.pth stored_two_sizes.pth
        stride_2_63.pth stride_beyond_storage.pth truncated.pth truncated_end.pth
        two_dtypes_one_storage.pth two_lengths_one_storage.pth two_roots.pth two_stops.pth
        unicode_2_63.pth unknown_opcode.pth unknown_storage_class.pth wrapping_sizes.pth
        wrong_count.pth zero_size_huge.pth zip64_disagrees.pth zip64_end_beyond.pth
        zip64_end_elsewhere.pth zip64_field_beyond.pth zip64_huge_directory.pth zip64_no_end.pth
        zip64_no_sizes.pth zip64_short_field.pth zip64_size_2_63.pth zip64_without_locator.pth
        zip_slip.pth
        script_bad_constants.pt script_json_beyond.pt script_json_dtypes.pt
        script_json_escape.pt script_json_id.pt script_json_missing.pt script_json_negative.pt
        script_json_text.pt script_json_twice.pt script_json_type.pt script_no_module.pt
        script_short_storage.pt
        dcp_absolute dcp_beyond_file dcp_chunk_beyond dcp_chunk_flat dcp_chunk_negative dcp_dtype
        dcp_gap dcp_inside_part dcp_inside_tensor dcp_itself dcp_list_and_dict dcp_long_list
        dcp_missing_shard dcp_moved dcp_negative_offset dcp_no_chunks dcp_no_place
        dcp_no_storage_data dcp_nul dcp_offset_2_62 dcp_overlap dcp_same_place dcp_short_index
        dcp_short_shard dcp_size_2_62 dcp_traversal
        sharded_absolute sharded_backslash sharded_drive sharded_empty_name sharded_extra_key
        sharded_key_twice sharded_list sharded_metadata_list sharded_missing_index
        sharded_missing_key sharded_missing_shard sharded_no_shards sharded_not_utf8 sharded_nul
        sharded_number sharded_repeated_key sharded_short_shard sharded_swapped
        sharded_traversal sharded_truncated
        ranks_coordinate_beyond ranks_dim_beyond ranks_no_placement
        ranks_other_dtype ranks_other_key ranks_other_kind ranks_other_placement ranks_other_shape
        ranks_other_step ranks_other_world ranks_parameter_differs ranks_replicas_differ
        ranks_sharded_beyond ranks_sharded_gap ranks_sharded_overlap ranks_short_piece
        ranks_truncated ranks_twice
        zero_huge_shape zero_left_over zero_negative_shape zero_other_step zero_other_world
        zero_paddings zero_short zero_truncated
        dcp_safetensors_dimensions dcp_safetensors_far dcp_safetensors_gap
        dcp_safetensors_negative dcp_safetensors_no_key dcp_safetensors_overlap
        dcp_safetensors_text
        tar_absolute.tar tar_device.tar tar_duplicate.tar tar_hardlink.tar
        tar_pax_length.tar tar_pax_size.tar tar_pax_sparse.tar tar_second_header.tar
        tar_size_beyond.tar tar_size_binary.tar tar_size_negative.tar tar_size_text.tar
        tar_slip.tar tar_sparse.tar tar_storage_count.tar tar_storage_negative.tar
        tar_storage_twice.tar tar_storages_missing.tar tar_symlink.tar tar_tensor_beyond.tar
        tar_tensor_dimensions.tar tar_tensor_negative.tar tar_tensor_storage.tar tar_truncated.tar
        tar_unknown_key.tar tar_view_beyond.tar tar_view_unknown.tar
    """,
    "not-a-checkpoint": """
        bare_pickle.pkl bytes_before.pth empty_file.pth float_dump.bin gguf.gguf gzip.pth
        html_page.pth json.pth legacy_magic_call.pth legacy_popped_magic.pth lfs_pointer.pth
        missing_data_pkl.pth no_root.pth npz.npz one_byte.pth onnx.onnx plain_zip.zip png.pth
        safetensors_byte_order_mark.safetensors safetensors_header_2_64.safetensors
        safetensors_header_zero.safetensors safetensors_leading_space.safetensors
        safetensors_not_an_object.safetensors seven_zip.7z symlink_text.ckpt tar.pth tar_gz.pth
        text.pth zeros.pth sharded_itself sharded_lfs_shard sharded_link_text sharded_no_map
    """,
    "unsupported": """
        bzip2_member.pth dcp_transformed encrypted.pth extension_code.pth lzma_member.pth
        next_buffer.pth ranks_partial ranks_strided
        safetensors_unknown_dtype.safetensors script_json_data_type.pt patched.pth two_volumes.pth
    """,
    "limit-exceeded": """
        deep_key.pth deep_list.pth deep_tuple.pth safetensors_deep_json.safetensors
        safetensors_header_too_long.safetensors script_doubled.pt script_endless.pt
        script_json_deep.pt sharded_deep module_deep.pth dcp_deep
        dcp_safetensors_deep
    """,
    "partial-checkpoint": "ranks_flat ranks_huge_mesh ranks_missing zero_missing zero_no_model",
}
# Files that would run code: `keys` warns, a torch file is refused, the tensors can be kept. Beside
# each, what converting it to safetensors says.
DANGEROUS = {
    "build.pth": "ok",
    "build_on_call.pth": "ok",
    "call_by_attribute.pth": "ok",
    "call_of_function.pth": "ok",
    "call_of_result.pth": "ok",
    "commands_getoutput.pth": "ok",
    "dangerous_getattr_dotted.pth": "ok",
    "dcp_index_os_system": "ok",
    "dcp_os_system": "ok",
    "eval_in_namespace.pth": "ok",
    "in_hooks.pth": "ok",
    "in_key.pth": "no-state-dict",
    "in_metadata.pth": "ok",
    "in_state_dict.pth": "not-representable",
    "inst_os_system.pth": "ok",
    "legacy_keys_call.pth": "ok",
    "legacy_os_system.pth": "not-representable",
    "memo_call.pth": "ok",
    "memoized_names.pth": "ok",
    "module_os_system.pth": "ok",
    "named_only.pth": "ok",
    "nested_reduce.pth": "ok",
    "newobj.pth": "ok",
    "newobj_ex.pth": "ok",
    "obj_os_system.pth": "ok",
    "os_system.pth": "ok",
    "popped_call.pth": "ok",
    "popped_to_mark.pth": "ok",
    "python2_builtin_eval.pth": "ok",
    "ranks_os_system": "not-representable",
    "rebuild_from_type.pth": "ok",
    "script_os_system.pt": "ok",
    "tar_os_system.tar": "not-representable",
    "reduce_os_system.pth": "no-state-dict",
    "sharded_os_system": "ok",
    "stack_global_os_system.pth": "ok",
    "zero_call": "ok",
}
# Files that are odd, yet do no harm.
HARMLESS = {
    "billion_dups.pth": ("ok", "ok", "no-state-dict", "ok"),
    "billion_laughs.pth": ("ok", "ok", "no-state-dict", "ok"),
    "bytes_between.pth": ("ok", "ok", "ok", "ok"),
    "colliding_keys.pth": ("ok", "ok", "no-state-dict", "ok"),
    "crc_mismatch.pth": ("ok", "malformed", "malformed", "malformed"),
    "cycle.pth": ("ok", "ok", "no-state-dict", "ok"),
    "cyclic_state_dict.pth": ("ok", "ok", "not-representable", "ok"),
    "descriptor_absent.pth": ("ok", "ok", "ok", "ok"),
    "descriptor_wrong.pth": ("ok", "ok", "ok", "ok"),
    "inflate_garbage.pth": ("ok", "malformed", "malformed", "malformed"),
    "inflate_lies.pth": ("ok", "malformed", "malformed", "malformed"),
    "inflate_short.pth": ("ok", "malformed", "malformed", "malformed"),
    "legacy_big_endian.pth": ("ok", "ok", "ok", "ok"),
    "legacy_sixth_pickle.pth": ("ok", "ok", "ok", "ok"),
    "legacy_unsorted_keys.pth": ("ok", "ok", "ok", "ok"),
    "local_extra_shifts.pth": ("ok", "malformed", "malformed", "malformed"),
    "long_many_digits.pth": ("ok", "ok", "no-state-dict", "ok"),
    "memo_far.pth": ("ok", "ok", "no-state-dict", "ok"),
    "missing_version.pth": ("ok", "ok", "ok", "ok"),
    "module_in_itself.pth": ("ok", "ok", "malformed", "nothing-matched"),
    "module_laughs.pth": ("ok", "ok", "limit-exceeded", "nothing-matched"),
    "module_list.pth": ("ok", "ok", "no-state-dict", "nothing-matched"),
    "module_odd_parameters.pth": ("ok", "ok", "not-representable", "ok"),
    "module_same_names.pth": ("ok", "ok", "malformed", "nothing-matched"),
    "odd_keys.pth": ("ok", "ok", "not-representable", "ok"),
    "safetensors_metadata_null.safetensors": ("ok", "ok", "ok", "ok"),
    "safetensors_odd_keys.safetensors": ("ok", "ok", "ok", "ok"),
    "zip64_sizes.pth": ("ok", "ok", "ok", "ok"),
}
# The four commands of the tables below, in the order of their columns.
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("keys", "{source}"),
    ("convert", "{source}", "out.pth"),
    ("convert", "{source}", "out.safetensors"),
    ("convert", "--tensors-only", "{source}", "out.pth"),
)
CODES = {
    "ok": 0,
    "no-state-dict": 2,
    "nothing-matched": 2,
    "malformed": 3,
    "unsupported": 3,
    "limit-exceeded": 3,
    "not-a-checkpoint": 3,
    "partial-checkpoint": 3,
    "unsafe-pickle": 4,
    "not-representable": 5,
}
EXPECTED: dict[str, tuple[str, str, str, str]] = {
    **{name: (slug,) * 4 for slug, names in REFUSED.items() for name in names.split()},  # type: ignore[misc]
    **{name: ("ok", "unsafe-pickle", slug, "ok") for name, slug in DANGEROUS.items()},
    **HARMLESS,
    # Its only tensor is under the key that would run.
    "in_key.pth": ("ok", "unsafe-pickle", "no-state-dict", "nothing-matched"),
    "script_os_system.pt": ("ok",) * 4,  # a program is not written: with all that it names
    "zero_call": ("ok",) * 4,  # what is made of the files of ranks has tensors alone
}
HOSTILE = sorted((FIXTURES / "hostile").iterdir())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_hostile_file_is_in_one_table() -> None:
    tables = [*(names.split() for names in REFUSED.values()), [*DANGEROUS], [*HARMLESS]]
    named = [name for table in tables for name in table]
    assert sorted(named) == [path.name for path in HOSTILE]


@pytest.fixture
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow modules that repeat each other for a second with `--all` alone, and in `check`."""
    monkeypatch.setattr(modules, "MAX_REPEATS", modules.MAX_REPEATS // step(50))


@pytest.mark.usefixtures("few_repeats")
@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.name)
def test_hostile_files(run: Run, here: Path, path: Path) -> None:
    """What each command says of each file; what it writes is sound and carries nothing on."""
    for command, slug in zip(COMMANDS, EXPECTED[path.name], strict=True):
        done = run(*(part.format(source=path) for part in command))
        assert done.code == CODES[slug], (command, done.err)
        if slug == "ok":
            assert "error" not in done.err
            assert done.err.startswith("warning: ") is (path.name in DANGEROUS), command
            assert listing(here).keys() == {*command[2:], *command[3:]} - {str(path), "{source}"}
            for name in listing(here):
                written = containers.read(name)
                assert safety.judge(written.globals).level < Level.DANGEROUS
                os.unlink(name)
        else:
            assert done.out == ""
            assert f"error[{slug}]: " in done.err
            assert "Traceback" not in done.err
        assert listing(here) == {}
        assert not (path.parent / MARKER).exists()


@pytest.mark.usefixtures("few_repeats")
@pytest.mark.product(8)
@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.name)
@pytest.mark.parametrize(
    "command",
    [
        ("strip-prefix", "{source}", "out.pth"),
        ("add-prefix", "{source}", "out.pth"),
        ("unwrap", "{source}", "out.pth"),
        ("transfer", "{source}", "out.safetensors"),
        ("transfer", "{good}", "out.pth", "--like", "{source}"),
        ("keys", "--all", "--json", "{source}"),
    ],
    ids=" ".join,
)
def test_hostile_files_in_other_commands(
    run: Run, here: Path, good: Path, path: Path, command: tuple[str, ...]
) -> None:
    """A refusal is one of the expected kinds, and leaves nothing; what is written is sound."""
    places = {"source": path, "good": good / "plain.pth"}
    done = run(*(part.format(**places) for part in command))
    assert done.code in (0, 1, 2, 3, 4, 5), done.err
    if EXPECTED[path.name][0] != "ok" and "--all" not in command:
        assert done.code == 3
    if done.code:
        assert done.out == ""
        assert len(re.findall(r'error\[|^  "error": ', done.err, re.MULTILINE)) == 1
        assert listing(here) == {}
    for name in listing(here):
        assert name == command[2]
        assert safety.judge(containers.read(name).globals).level < Level.DANGEROUS


# Nothing is executed: an audit hook sees every import, open and call of the system.

# Good files of each container, of each way to fail, and of each way in which bytes are read.
WARM_UP = """
    plain.pth model_best.pth.tar dino.pth rezipped.pth strided.pth tied.pth foreign.pth
    no_tensors.pth list_of_tensors.pth extra_state.pth big_endian.pth conj.pth collision.pth
    plain_legacy.pth strided_legacy.pth python2.pth plain.safetensors shapes.safetensors
    plain_pickle.pkl torch_0_1.tar expanded_far.pth script.pt script_2019.pt
    sharded_safetensors sharded_bin transformers dcp dcp_two_ranks fsdp2_ranks dcp_safetensors
    zero1_ranks zero3_ranks
"""
WATCH = str(Path(__file__).with_name("watch.py"))


def test_nothing_in_a_file_is_executed(
    here: Path, good: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After a warm-up on good files, hostile ones cause no event of another kind.

    In one of 14 command lines, with `--all` in one of two, other ones for each file.
    """
    packed = tmp_path_factory.mktemp("packed") / "plain.pth.gz"
    packed.write_bytes(gzip.compress((good / "plain.pth").read_bytes()))
    warm_up = [*(str(good / name) for name in WARM_UP.split()), str(packed)]
    hostile = [str(path) for path in HOSTILE]
    done = subprocess.run(
        [sys.executable, WATCH],
        input=json.dumps([warm_up, hostile, step(14, 2)]),
        capture_output=True, text=True, timeout=300, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kinds, events = json.loads(done.stdout)
    assert "open" in kinds
    assert not set(kinds) & set(NEVER)
    spools = os.path.join(tempfile.gettempdir(), "ckptool-")  # what a gzip is unpacked to
    engine = str(containers.__file__).rpartition("/")[0]
    allowed = (sys.prefix, sys.base_prefix, str(here), engine, spools)
    for path, seen in events.items():
        assert seen
        assert {event for event, _ in seen} <= set(kinds), path
        for event, arguments in seen:
            told = [each.replace(path, "") for each in arguments]
            assert not any(MARKER in each for each in told), (path, event, told)
            if event == "open" and told[0].startswith(("'", '"')):
                opened = os.path.realpath(arguments[0].strip("'\""))
                below = opened.startswith((f"{path}/", *allowed))
                inside = opened == path or below or opened == "/dev/null"
                assert inside, (path, arguments)
    assert listing(here) == {}
    assert not (FIXTURES / "hostile" / MARKER).exists()


def test_the_hook_sees_what_runs(here: Path, hostile: Path) -> None:
    """The proof can fail: loading one of these files with pickle is seen."""
    done = subprocess.run(
        [sys.executable, WATCH, "unpickle"],
        input=json.dumps([[], [str(hostile / "reduce_os_system.pth")], 1]),
        capture_output=True, text=True, timeout=60, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, events = json.loads(done.stdout)
    (seen,) = events.values()
    assert "os.system" in {event for event, _ in seen}
    assert listing(here).keys() == {MARKER}


# Truncated at every byte, changed in every byte.


def small_zip(folder: Path) -> Path:
    """Write a small torch zip, of one tensor."""
    path = folder / "small.safetensors"
    header = b'{"module.a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"someseed")
    surgery.rewrite(path, folder / "small.pth")
    path.unlink()
    return folder / "small.pth"


@pytest.fixture(params=["torch zip", "old zip", "deflated", "legacy", "safetensors"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    good = FIXTURES / "good"
    match request.param:
        case "torch zip":
            return small_zip(tmp_path_factory.mktemp("small")).read_bytes()
        case "old zip":
            return (good / "odd_storage_keys.pth").read_bytes()
        case "deflated":
            return deflated({"archive/data.pkl": b"\x80\x02}.", "archive/version": b"3\n"})
        case "legacy":
            return (good / "legacy_views.pth").read_bytes()
    return (good / "metadata.safetensors").read_bytes()


def deflated(records: dict[str, bytes | int]) -> bytes:
    """Write a zip archive with deflated records; a number stands for so many MiB of zeros."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            with archive.open(name, "w") as record:
                for part in [data] if isinstance(data, bytes) else [b"\0" * (1 << 20)] * data:
                    record.write(part)
    return made.getvalue()


def test_truncated_at_every_byte(run: Run, here: Path, small: bytes) -> None:
    source = here / "in.pth"
    source.write_bytes(small)
    assert run("keys", source).code == 0
    for size in sampled(range(len(small)), 3):
        write_anew(source, small[:size])
        for command in (("keys", source), ("convert", source, "out.pth")):
            done = run(*command)
            assert (done.code, done.out) == (3, ""), (size, done)
            assert done.err.startswith("error["), size
            assert done.err.count("error[") == 1, size
            assert "Traceback" not in done.err, size
    assert listing(here) == {"in.pth": small[:size]}


def test_lengthened(run: Run, here: Path, small: bytes) -> None:
    """Bytes after the end are refused; behind a legacy file they are left behind and named."""
    source = here / "in.pth"
    source.write_bytes(small + b"more")
    done = run("convert", source, "out.pth")
    if small.startswith(b"\x80"):
        assert done.code == 0
        assert done.err.startswith("not written: what follows the storages\n")
    else:
        assert (done.code, done.out) == (3, "")
        assert listing(here) == {"in.pth": small + b"more"}


def test_changed_in_every_byte(here: Path, small: bytes) -> None:
    """Whatever a byte becomes: a `CkptoolError`, or a checkpoint that can be written."""
    source = here / "in.pth"
    outcomes = {"read": 0, "refused": 0}
    indices = sampled(range(len(small)), 3)
    for index in indices:
        for change in (0x01, 0x80, 0xFF):
            data = bytearray(small)
            data[index] ^= change
            write_anew(source, bytes(data))
            try:
                containers.read(source)
                surgery.rewrite(source, "out.pth", options=Options(force=True, sync=False))
                outcomes["read"] += 1
            except CkptoolError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > len(indices) // 2
    assert listing(here).keys() <= {"in.pth", "out.pth"}


# Not a checkpoint: named for what it is.

NAMED = {
    "empty_file.pth": "is empty (0 bytes)",
    "one_byte.pth": "is not a checkpoint: 1 B of unknown bytes",
    "html_page.pth": "is an HTML page (145 B); a server sends this when",
    "lfs_pointer.pth": "is a git-LFS pointer, not the file itself",
    "symlink_text.ckpt": "looks like the path of a symbolic link",
    "tar.pth": "is a tar archive",
    "tar_gz.pth": "is a gzip archive",
    "gzip.pth": "is a gzip archive",
    "seven_zip.7z": "is a 7z archive",
    "png.pth": "is a PNG image",
    "onnx.onnx": "is an ONNX model",
    "gguf.gguf": "is a GGUF file",
    "npz.npz": "is a zip archive of numpy arrays",
    "plain_zip.zip": "is a zip archive that torch.save did not write",
    "json.pth": "is a JSON text",
    "text.pth": "is a text file (35 B)",
    "zeros.pth": "is 4.0 KiB of zeros",
    "float_dump.bin": "unknown bytes",
    "bare_pickle.pkl": "is a plain pickle",
    "truncated.pth": "the file is truncated",
    "safetensors_truncated.safetensors": "the file should have 80 bytes and has 79",
    "crc_mismatch.pth": "do not match their checksum",
}


@pytest.mark.parametrize("name", NAMED)
def test_files_are_named_for_what_they_are(run: Run, here: Path, hostile: Path, name: str) -> None:
    done = run("convert", hostile / name, "out.pth")
    assert done.code == 3
    assert NAMED[name] in done.err
    assert str(hostile / name) in done.err.splitlines()[0]
    assert listing(here) == {}


def test_a_page_may_come_with_a_byte_order_mark(run: Run, here: Path) -> None:
    for text in ("\ufeff<!DOCTYPE HTML>\n<p>", "\n\n <html lang=en>", "<HEAD>"):
        (here / "page.pth").write_text(text, encoding="utf-8")
        assert "is an HTML page" in run("keys", "page.pth").err


@pytest.fixture
def odd_places(here: Path) -> Iterator[Path]:
    """Give a folder with one of each thing that is no regular file."""
    (here / "folder").mkdir()
    os.mkfifo(here / "pipe")
    os.symlink("nowhere", here / "dangling")
    os.symlink("circle", here / "circle")
    (here / "file").write_bytes(b"")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    yield here
    listener.close()


RUN = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from ckptool.cli.main import main
outcomes = []
for line in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        outcomes.append((main(line), out.getvalue(), err.getvalue()))
print(json.dumps(outcomes))
"""
ODD_PLACES = [
    ("folder", "not-a-checkpoint", "folder is a folder"),
    ("folder/", "not-a-checkpoint", "folder/ is a folder"),
    ("pipe", "not-a-checkpoint", "pipe is a pipe, not a file"),
    ("socket", "not-a-checkpoint", "socket is a socket, not a file"),
    ("/dev/zero", "not-a-checkpoint", "/dev/zero is a device, not a file"),
    ("/dev/null", "not-a-checkpoint", "/dev/null is a device, not a file"),
    ("/dev/stdin", "not-a-checkpoint", "/dev/stdin is a "),
    ("dangling", "no-such-file", "dangling does not exist"),
    ("circle", "no-such-file", "circle cannot be opened: too many levels of symbolic links"),
    ("missing", "no-such-file", "missing does not exist"),
    ("file/inside", "no-such-file", "file/inside cannot be opened: not a directory"),
    ("x" * 300, "no-such-file", "cannot be opened: file name too long"),
    ("", "no-such-file", "does not exist"),
]


@pytest.mark.parametrize(
    ("place", "slug", "said"), ODD_PLACES, ids=[row[0][:9] for row in ODD_PLACES]
)
def test_what_is_no_regular_file_is_named(
    odd_places: Path, good: Path, place: str, slug: str, said: str
) -> None:
    """In a process of their own, so that one that hangs can be ended."""
    lines = [
        ["keys", place],
        ["convert", place, "out.pth"],
        ["transfer", str(good / "plain.pth"), "out.pth", "--like", place],
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(lines)], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == len(lines)
    for code, out, err in outcomes:
        assert (code, out) == (3, "")
        assert err.startswith(f"error[{slug}]: ")
        assert said in err
    assert not (odd_places / "out.pth").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_named(run: Run, here: Path, good: Path) -> None:
    shutil.copy(good / "plain.pth", "locked.pth")
    (here / "locked.pth").chmod(0)
    done = run("keys", "locked.pth")
    assert done.code == 3
    assert "permission denied" in done.err


# Memory and time: never by what a file declares.

BOUND = 150 << 20  # bytes
SECONDS = 20


# Peak memory of a process, counted from its start: ru_maxrss also counts its parent at the fork.
MEASURED = """
import re, sys
from ckptool.cli.main import main
code = main()
with open("/proc/self/status") as status:
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", status.read())
print("peak", 1024 * int(peak[1]), file=sys.stderr)
sys.exit(code)
"""


def measured(*arguments: str, cwd: Path) -> tuple[int, int, str]:
    """Run a command line; give its exit code, peak memory in bytes, and what it said."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("peak memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    said, _, peak = done.stderr.rpartition("peak ")
    return done.returncode, int(peak), said


def test_the_measure_can_fail(here: Path) -> None:
    script = MEASURED.replace("code = main()", "code = len(b'1' * (200 << 20)) * 0")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stderr.rpartition("peak ")[2]) > BOUND


HUGE = """
    bytes_1_tib.pth unicode_2_63.pth long_many_digits.pth long_negative.pth memo_far.pth
    billion_dups.pth billion_laughs.pth colliding_keys.pth deep_tuple.pth deep_key.pth
    frame_straddles.pth inflate_bomb.pth inflate_lies.pth numel_2_63.pth size_2_63.pth
    wrapping_sizes.pth zero_size_huge.pth wrong_count.pth false_end_record.pth
    safetensors_header_2_64.safetensors safetensors_header_too_long.safetensors
    safetensors_shape_overflow.safetensors safetensors_deep_json.safetensors
"""


@pytest.mark.parametrize("name", HUGE.split())
def test_declared_sizes_cost_nothing(here: Path, hostile: Path, name: str) -> None:
    code, nbytes, said = measured("convert", str(hostile / name), "out.pth", cwd=here)
    assert nbytes < BOUND
    assert code in (0, 3), said


def test_a_tensor_that_declares_gigabytes_is_refused_before_writing(here: Path, good: Path) -> None:
    code, nbytes, said = measured(
        "convert", str(good / "expanded_far.pth"), "out.safetensors", cwd=here
    )
    assert (code, nbytes < BOUND) == (5, True)
    assert "--allow-expand" in said
    assert listing(here) == {}


@pytest.mark.thorough
def test_an_inflating_pickle_is_bounded(here: Path) -> None:
    """A megabyte of deflated zeros would be a gigabyte of pickle."""
    (here / "in.pth").write_bytes(deflated({"archive/data.pkl": 1024, "archive/version": b"3\n"}))
    code, nbytes, said = measured("keys", "in.pth", cwd=here)
    assert (code, nbytes < BOUND) == (3, True)
    assert said.startswith("error[limit-exceeded]: ")


def test_an_inflating_storage_is_streamed(here: Path) -> None:
    """A deflated storage of 256 MiB: refused at first, then written within bounds."""
    count = 64 << 20
    small_zip(here)
    with zipfile.ZipFile(here / "small.pth") as archive:
        pickled = archive.read("archive/data.pkl")
    two = b"K\x02"
    assert pickled.count(two) == 2  # elements of the storage, and the size
    pickled = pickled.replace(two, b"J" + struct.pack("<i", count))
    records = {"archive/data.pkl": pickled, "archive/data/0": 256, "archive/version": b"3\n"}
    (here / "in.pth").write_bytes(deflated(records))
    code, nbytes, said = measured("convert", "in.pth", "out.pth", cwd=here)
    assert (code, nbytes < BOUND) == (5, True), said
    code, nbytes, said = measured(
        "convert", "--allow-expand", "--no-sync", "in.pth", "out.pth", cwd=here
    )
    assert (code, nbytes < BOUND) == (0, True), said
    assert (here / "out.pth").stat().st_size > 4 * count


def test_a_directory_of_lies_costs_nothing(here: Path) -> None:
    """A zip64 end record that counts 2^40 entries, and a directory of 2^40 bytes."""
    data = small_zip(here).read_bytes()
    at = data.rindex(b"PK\6\6")
    for offset, value in ((24, 1 << 40), (32, 1 << 40), (40, 1 << 40), (48, 1 << 62)):
        lying = bytearray(data)
        lying[at + offset : at + offset + 8] = struct.pack("<Q", value)
        (here / "in.pth").write_bytes(lying)
        code, nbytes, said = measured("keys", "in.pth", cwd=here)
        assert (code, nbytes < BOUND) == (3, True), said


def test_a_sparse_file_of_a_terabyte_is_not_read_through(here: Path) -> None:
    """Only metadata is looked at: zeros, and a safetensors header before a terabyte of data."""
    try:
        with (here / "zeros.pth").open("wb") as file:
            file.truncate(1 << 40)
    except OSError:
        pytest.skip("no files of a terabyte here")
    code, nbytes, said = measured("keys", "zeros.pth", cwd=here)
    assert (code, nbytes < BOUND) == (3, True)
    assert "1.0 TiB of zeros" in said
    header = json.dumps({"a": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}})
    with (here / "large.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + (1 << 40))
    code, nbytes, said = measured("keys", "large.safetensors", cwd=here)
    assert (code, nbytes < BOUND) == (0, True), said
    assert "1.0 TiB" in said


def test_time_is_linear_in_the_file(here: Path) -> None:
    """Many small things: keys that collide as hashes, memo entries, repeated names."""
    pairs = b"".join(b"X\x05\0\0\0%05dK\x01" % index for index in range(60_000))
    pickled = b"\x80\x02}(" + pairs + b"u."
    (here / "in.pth").write_bytes(
        deflated({"archive/data.pkl": pickled, "archive/version": b"3\n"})
    )
    code, nbytes, said = measured("keys", "in.pth", cwd=here)
    assert (code, nbytes < BOUND) == (0, True), said


def test_crc_errors_say_what_was_found(run: Run, here: Path, hostile: Path) -> None:
    done = run("convert", hostile / "crc_mismatch.pth", "out.pth")
    recorded, found = done.err.splitlines()[1].split("recorded ")[1].split(", found ")
    assert recorded != found
    with zipfile.ZipFile(hostile / "crc_mismatch.pth") as archive:
        crcs = {f"{info.CRC:08x}" for info in archive.infolist()}
    assert recorded in crcs


def test_errors_carry_path_and_offset(hostile: Path) -> None:
    with pytest.raises(FormatError) as caught:
        containers.read(hostile / "unknown_opcode.pth")
    assert (caught.value.path, caught.value.offset) == (str(hostile / "unknown_opcode.pth"), 2)
