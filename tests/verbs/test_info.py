"""`ckptool info`: what it says is what torch sees, and every command that it suggests works."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import struct
import sys
import types
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome, sampled

import ckptool

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")

Run = Callable[..., Outcome]
GOOD = sorted(path for path in (FIXTURES / "good").iterdir() if path.is_file())
HOSTILE = sorted((FIXTURES / "hostile").iterdir())


def by_name(path: Path) -> str:
    return path.name


def copied(path: Path, folder: Path) -> Path:
    copy = shutil.copytree if path.is_dir() else shutil.copy
    return Path(copy(path, folder / path.name))


def pasted(run: Run, command: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Outcome:
    """Run a suggested command as a shell would, in the folder of its file."""
    words = shlex.split(command)
    assert words[0] == "ckptool"
    monkeypatch.chdir(folder)
    return run(*words[1:])


# What it says.


def as_torch_sees(path: Path) -> dict[str, Any]:
    """Load a file with torch, or with safetensors."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    whole: dict[str, Any] = judge.load(path)
    return whole


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("plain.pth", ()),
        ("plain_legacy.pth", ()),
        ("model_best.pth.tar", ("state_dict",)),
        ("half.pth", ()),
        ("every_dtype.pth", ()),
        ("every_dtype.safetensors", ()),
        ("big_endian.pth", ()),
        ("strided.pth", ()),
        ("parameters.pth", ()),
        ("tied.pth", ()),
        ("nested.pth", ("model", "state_dict")),
        ("rezipped.pth", ()),
    ],
)
def test_counts_are_those_of_torch(run: Run, good: Path, name: str, at: tuple[str, ...]) -> None:
    found = run("info", "--json", good / name).document
    state = as_torch_sees(good / name)
    for step in found["at"]:
        state = state[step]
    assert tuple(found["at"]) == at
    tensors = [value for value in state.values() if torch.is_tensor(value)]
    assert found["count"] == len(tensors)
    assert found["elements"] == sum(tensor.numel() for tensor in tensors)
    assert found["nbytes"] == sum(t.numel() * t.element_size() for t in tensors)
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.dtype)] += tensor.numel() * tensor.element_size()
    assert sorted(sizes.values()) == sorted(each["nbytes"] for each in found["dtypes"].values())
    assert found["requires_grad"] == sum(tensor.requires_grad for tensor in tensors)
    assert len(found["not_contiguous"]) == sum(not tensor.is_contiguous() for tensor in tensors)


def test_the_document_has_the_fields_of_the_contract(run: Run, good: Path) -> None:
    path = good / "model_best.pth.tar"
    found = run("info", "--json", path).document
    assert found["schema"] == "info/1"
    assert found["file"] == str(path)
    assert found["container"] == "torch-zip"
    assert found["at"] == ["state_dict"]
    assert (found["count"], found["nbytes"]) == (8, 704)
    assert found["beside"] == ["epoch", "arch", "best_acc1", "optimizer"]
    assert found["safety"] == "plain"
    assert "torch._utils._rebuild_tensor_v2" in found["globals"]
    assert found["suggestions"][0]["command"].startswith("ckptool strip-prefix")


@pytest.mark.parametrize("path", GOOD, ids=by_name)
def test_parts_add_up_to_the_file(run: Run, path: Path) -> None:
    done = run("info", "--json", path)
    if done.code == 3:
        return
    found = done.document
    stored = sum(each["stored"] for each in found["candidates"])
    beside = sum(each["nbytes"] for each in found["beside_values"])
    known = stored + beside + sum(found["bytes"][key] for key in ("unread", "structure", "other"))
    assert known == path.stat().st_size


# What it suggests.

CORPUS = Path(os.environ.get("CKPTOOL_CORPUS") or "no corpus")
ROWS = json.loads((CORPUS / "index.json").read_text()) if CORPUS.is_dir() else []


@pytest.mark.skipif(not ROWS, reason="CKPTOOL_CORPUS names no folder with index.json")
@pytest.mark.parametrize("name", [row["path"] for row in ROWS])
def test_every_suggestion_on_a_real_file_works(
    run: Run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(CORPUS / name, tmp_path)
    done = run("info", "--json", path)
    assert done.code in (0, 3)
    assert (done.out == "") == (done.code == 3)
    for each in done.document["suggestions"] if done.code == 0 else []:
        outcome = pasted(run, each["command"], monkeypatch, tmp_path)
        assert outcome.code == 0, f"{each['command']}\n{outcome.err}"


# The structure is sound, and what is wrong with the bytes only reading them shows.
BAD_BYTES = """
    crc_mismatch.pth inflate_lies.pth inflate_short.pth inflate_garbage.pth local_extra_shifts.pth
""".split()


@pytest.mark.parametrize("path", sampled([*GOOD, *HOSTILE], 5), ids=by_name)
def test_every_suggestion_works_when_pasted(
    run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    done = run("info", "--json", path.name)
    assert done.code in (0, 3), done.err
    if done.code == 3:
        assert done.out == ""
        return
    for each in done.document["suggestions"]:
        outcome = pasted(run, each["command"], monkeypatch, tmp_path)
        if path.name in BAD_BYTES and outcome.code == 3:
            continue  # the bytes are damaged, which only reading them shows
        assert outcome.code == 0, f"{each['command']}\n{outcome.err}"
    assert not (tmp_path / "ckptool-was-executed").exists()


def test_outputs_are_named_beside_the_input_and_never_overwrite(
    run: Run, good: Path, tmp_path: Path
) -> None:
    (tmp_path / "a b").mkdir()
    path = copied(good / "model_best.pth.tar", tmp_path / "a b")
    (path.parent / "model_best.stripped.pth").touch()
    command = run("info", "--json", path).document["suggestions"][0]["command"]
    assert shlex.split(command)[-1] == str(path.parent / "model_best.stripped-2.pth")


def test_a_name_like_an_option_is_still_a_name(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(good / "data_parallel.pth", tmp_path / "-x.pth")
    monkeypatch.chdir(tmp_path)
    command = run("info", "--json", "--", "-x.pth").document["suggestions"][0]["command"]
    assert pasted(run, command, monkeypatch, tmp_path).code == 0


class Hook:
    """Would run a command when loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo > ckptool-was-executed",)


@pytest.mark.parametrize(
    "state_dict",
    [{"module.w": torch.ones(2)}, {"w": torch.ones(1).expand(1 << 20)}, {"w": Hook()}],
    ids=["wrapped", "far", "inside"],
)
def test_suggestions_on_what_would_run_code_work_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_dict: dict[str, Any]
) -> None:
    state_dict = {**state_dict, "module.b": torch.ones(1)}
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": state_dict, "hook": Hook()}, path)
    found = run("info", "--json", path).document
    assert found["safety"] == "dangerous"
    assert found["suggestions"]
    for each in found["suggestions"]:
        assert pasted(run, each["command"], monkeypatch, tmp_path).code == 0
    assert not (tmp_path / "ckptool-was-executed").exists()


def suggested(run: Run, path: Path, verb: str) -> list[str]:
    found = run("info", "--json", path).document["suggestions"]
    return [each["command"] for each in found if each["command"].split()[1] == verb]


@pytest.mark.parametrize(
    "name",
    "foreign.pth foreign_legacy.pth protocol4.pth protocol1.pth stdlib.pth dino.pth".split(),
)
def test_what_weights_only_refuses_is_accepted_afterwards(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = copied(good / name, tmp_path)
    with pytest.raises(Exception, match=r"Unsupported|WeightsUnpickler|weights_only"):
        judge.load(path)
    commands = suggested(run, path, "convert")
    assert commands
    assert pasted(run, commands[0], monkeypatch, tmp_path).code == 0
    assert judge.load(shlex.split(commands[0])[-1])


def test_bytes_that_no_tensor_uses_are_really_dropped(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slices.pth"
    flat = torch.arange(10_000.0)
    torch.save({"a": flat[:100], "b": flat[50:150], "c": flat[5000:5100]}, path)
    assert run("info", "--json", path).document["bytes"]["unused"] == 4 * (10_000 - 250)
    (command,) = suggested(run, path, "convert")
    assert pasted(run, command, monkeypatch, tmp_path).code == 0
    written = Path(shlex.split(command)[-1])
    assert written.stat().st_size < 3 * 400 + 1000
    found, wanted = as_torch_sees(written), judge.load(path)
    assert judge.same(found, wanted, order=False, storage=False, sharing=False) == []


def test_records_that_nothing_refers_to_are_really_dropped(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(good / "plain.pth", tmp_path)
    with zipfile.ZipFile(path, "a") as opened:
        opened.writestr("plain/data/99", bytes(50_000))
    assert run("info", "--json", path).document["bytes"]["unread"] == 50_000
    (command,) = suggested(run, path, "convert")
    assert pasted(run, command, monkeypatch, tmp_path).code == 0
    written = Path(shlex.split(command)[-1])
    assert written.stat().st_size < path.stat().st_size - 50_000
    assert judge.same(judge.load(written), judge.load(good / "plain.pth")) == []


@pytest.mark.parametrize("name", ["cuda_tagged.pth", "mps_tagged.pth", "big_endian.pth"])
def test_what_is_bound_to_a_machine_loads_anywhere_afterwards(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = copied(good / name, tmp_path)
    (command,) = suggested(run, path, "convert")
    assert pasted(run, command, monkeypatch, tmp_path).code == 0
    found, wanted = as_torch_sees(Path(shlex.split(command)[-1])), judge.load(good / "plain.pth")
    assert judge.same(dict(found), dict(wanted), order=False, metadata=False, storage=False) == []


# Training frameworks.

WEIGHTS = {
    "lightning.ckpt": ("PyTorch Lightning", "inner"),
    "timm.pth.tar": ("timm", "state_dict_ema"),
    "mmengine.pth": ("MMEngine (OpenMMLab)", "weights"),
    "mmcv.pth": ("mmcv (OpenMMLab)", "clean"),
    "nanogpt.pt": ("nanoGPT", "clean"),
    "opacus.pt": ("Opacus", "clean"),
    "fastai.pth": ("fastai", "weights"),
    "torchtune.pt": ("torchtune, a recipe in training", "weights"),
    "megatron.pt": ("Megatron-LM", "weights"),
    "detectron2.pth": ("detectron2", "weights"),
    "fairseq.pt": ("fairseq", "weights"),
    "opennmt.pt": ("OpenNMT-py", "model"),
    "mp_rank_00_model_states.pt": ("DeepSpeed", "weights"),
    "moco.pth.tar": ("MoCo", "inner"),
    "torchvision.pth": ("a training script of torchvision", "model_ema"),
    "ultralytics.pt": ("Ultralytics YOLO", "weights"),
}
NO_WEIGHTS = {
    "training_args.bin": "the arguments of transformers' Trainer",
    "lora.safetensors": "a LoRA of kohya's sd-scripts",
    "adapter_model.safetensors": "an adapter of PEFT (LoRA)",
}
FRAMEWORKS = FIXTURES / "frameworks"


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_suggestion_gets_the_weights_out_of_a_framework(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    framework, tag = WEIGHTS[name]
    path = copied(FRAMEWORKS / name, tmp_path)
    found = run("info", "--json", path).document
    assert found["framework"] == framework
    commands = [each["command"] for each in found["suggestions"]]
    (command,) = [each for each in commands if each.endswith(f".{tag}.pth")]
    assert pasted(run, command, monkeypatch, tmp_path).code == 0
    weights, wanted = judge.load(shlex.split(command)[-1]), judge.load(good / "plain.pth")
    assert judge.same(dict(weights), dict(wanted), metadata=False) == []


@pytest.mark.parametrize("path", sorted(FRAMEWORKS.iterdir()), ids=by_name)
def test_every_suggestion_on_a_framework_works(
    run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = copied(path, tmp_path)
    found = run("info", "--json", here).document
    wanted = WEIGHTS[path.name][0] if path.name in WEIGHTS else NO_WEIGHTS[path.name]
    assert found["framework"] == wanted
    for each in found["suggestions"]:
        assert pasted(run, each["command"], monkeypatch, tmp_path).code == 0


def test_the_imagenet_example_and_opacus_are_recognised(run: Run, good: Path) -> None:
    found = run("info", good / "model_best.pth.tar")
    assert "looks like\tthe ImageNet example of PyTorch, with epoch, arch" in found.out


@pytest.mark.filterwarnings("ignore")  # of torch.jit
@pytest.mark.parametrize("name", ["script.pt", "whole_model.pth", "whole_model_legacy.pth"])
def test_a_program_or_a_whole_model_gives_its_state_dict(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = copied(good / name, tmp_path)
    offered = [each["command"] for each in run("info", "--json", path).document["suggestions"]]
    command = offered[0]
    assert not any(each.endswith(".new.pth") for each in offered)  # which would need the code too
    assert pasted(run, command, monkeypatch, tmp_path).code == 0
    if name == "script.pt":
        wanted = torch.jit.load(path).state_dict()
    else:
        wanted = judge.load(path, weights_only=False).state_dict()
    found = judge.load(shlex.split(command)[-1])
    assert (
        judge.same(
            {key: value.detach() for key, value in found.items()},
            {key: value.detach() for key, value in wanted.items()},
            storage=False,
        )
        == []
    )


# What is no checkpoint.


def described(run: Run, path: Path) -> str:
    done = run("info", path)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error[not-a-checkpoint]")
    again = run("info", "--json", path)
    assert (again.code, again.out) == (3, "")
    return done.err


OTHERS: dict[str, tuple[bytes, str]] = {
    "model.gguf": (
        b"GGUF"
        + struct.pack("<IQQ", 3, 291, 1)
        + struct.pack("<Q", 20)
        + b"general.architecture"
        + struct.pack("<IQ", 8, 5)
        + b"llama",
        "a GGUF file of llama.cpp (69 B, version 3, 291 tensors, general.architecture llama)",
    ),
    "model.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\x00", "an ONNX model by pytorch 2.1.0"),
    "saved_model.pb": (b"\x08\x01\x12\xff", "a TensorFlow SavedModel"),
    "x.index": (bytes(60) + b"1\x57\xfb\x80\x8b\x24\x75\x47\xdb", "of a TensorFlow checkpoint"),
    "x.data-00000-of-00001": (b"\x01\xff", "the data of a TensorFlow checkpoint"),
    "model.bin": (
        b"\x06\0\0\0\x10\0TransformerSpec\0" + bytes(9),
        "a CTranslate2 model, TransformerSpec",
    ),
    "config.json": (b'{"architectures": ["BertModel"]}', "configuration of a transformers model"),
    "x.json": (b'{"a": 1, "b": 2}', "a JSON text (16 B) with a, b"),
    "denied.pth": (b"<Error><Code>AccessDenied</Code></Error>", "that says `AccessDenied`"),
    "missing.pth": (b"Entry not found", "a text file (15 B): 'Entry not found'"),
    "train.pth": (b"import torch\n\ntorch.save(1, 'x')\n" * 9, "a script"),
    "page.pth": (b"<html><title>Sign in</title></html>", "its title: Sign in"),
    "rdf.pth": (b"PAR1" + bytes(9), "a Parquet table"),
    "scores.pkl": (pickle.dumps({"loss": [1.0]}), "dict of 1, loss"),
    "arrays.pkl": (pickle.dumps([np.zeros(2)]), "list of 1, numpy array"),
    "evil.pkl": (b"cposix\nsystem\n(S'true'\ntR.", "it would run code when loaded: posix.system"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_for_what_they_are(run: Run, tmp_path: Path, name: str) -> None:
    content, wanted = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    assert wanted in described(run, tmp_path / name)


def test_pickled_tensors_without_torch_save_are_read(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"fc.weight": torch.zeros(2)}))
    assert "plain pickle, written by pickle.dump or joblib" in run("info", path).out


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["weight.npy", "bias.npy"], "numpy arrays (.npz): weight, bias"),
        (["x/__init__.py", "x-1.dist-info/WHEEL"], "a Python package (wheel)"),
        (["config.json", "model.weights.h5"], "a Keras model (.keras)"),
        (["notes.txt"], "a zip archive that torch.save did not write: notes.txt"),
    ],
)
def test_zip_archives_are_named_for_what_is_in_them(
    run: Run, tmp_path: Path, names: list[str], wanted: str
) -> None:
    path = tmp_path / "archive.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    assert wanted in described(run, path)


def test_a_git_lfs_pointer_brings_the_command_that_fetches_it(run: Run, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3145728\n"
    (tmp_path / "a b").mkdir()
    path = tmp_path / "a b" / "model.pth"
    path.write_bytes(pointer)
    assert "the file of 3.0 MiB is on a server" in described(run, path)
    (tmp_path / ".git").mkdir()
    said = described(run, path)
    assert f"hint: git -C {tmp_path} lfs pull --include 'a b/model.pth'\n" in said


@pytest.mark.parametrize(
    ("names", "wanted", "shown"),
    [
        ([], "is a folder (empty)", None),
        (
            ["trainer_state.json", "optimizer.pt", "config.json"],
            "a checkpoint of transformers' Trainer (3 files)",
            "optimizer.pt",
        ),
        (
            ["random_states_0.pkl", "optimizer.bin", "pytorch_model_1.bin"],
            "a checkpoint of accelerate",
            "pytorch_model_1.bin",
        ),
    ],
)
def test_a_folder_is_named_for_what_is_in_it(
    run: Run, tmp_path: Path, names: list[str], wanted: str, shown: str | None
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(bytes(3 if name.startswith("optimizer") else 1))
    said = described(run, folder)
    assert wanted in said
    assert ("hint: " in said) == (shown is not None)
    if shown is not None:
        assert f"hint: ckptool info {folder / shown}" in said


# How it looks.


def test_off_a_terminal_there_are_tabs_and_bytes(run: Run, good: Path) -> None:
    rows = [line.split("\t") for line in run("info", good / "dino.pth").out.splitlines()]
    assert ["candidate", "`teacher`", "8", "155", "624"] in rows
    assert {row[0] for row in rows} >= {"file", "container", "dtype", "bytes", "safety"}
    assert any(row[0] == "suggestion" and len(row) == 3 for row in rows)


def test_what_comes_from_a_file_is_escaped(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    torch.save({"a\x1b[31m\u202e": torch.zeros(1), "b": {"c\t\n\x1b": 1}}, path)
    for arguments in ((), ("--json",)):
        out = run("info", *arguments, path).out
        assert "\x1b" not in out
        assert "\u202e" not in out
    torch.save({"state_dict": {"w": torch.zeros(1)}, "no\x1b\tte": "x\x1b[2J\ny"}, path)
    rows = run("info", path).out.splitlines()
    assert any("no\\x1b\\tte\t'x\\x1b[2J\\ny'" in row for row in rows)


def test_dangerous_calls_are_shown_and_never_made(
    run: Run, hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("info", hostile / "eval_in_namespace.pth")
    assert done.code == 0
    assert "dangerous: it would run code when loaded" in done.out
    assert "builtins.eval(" in done.out
    assert list(tmp_path.iterdir()) == []


def test_at_chooses_what_is_described(run: Run, good: Path) -> None:
    found = run("info", "--json", "--at", "teacher", good / "dino.pth").document
    assert (found["at"], found["count"]) == (["teacher"], 8)
    assert all("--at teacher" in each["command"] for each in found["suggestions"][:1])
    assert run("info", "--at", "nobody", good / "dino.pth").code == 2


def test_the_library_gives_the_same_facts(good: Path) -> None:
    facts = ckptool.info(good / "model_best.pth.tar")
    commands = facts.suggestions
    assert facts.total.count == 8
    assert commands[0].command.startswith("ckptool strip-prefix")


@pytest.mark.parametrize("name", ["sharded_safetensors", "dcp"])
def test_outputs_of_a_folder_stand_beside_it(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = Path(shutil.copytree(good / name, tmp_path / name))
    index = next(p for p in folder.iterdir() if p.name == ".metadata" or ".index." in p.name)
    for start, given in (
        (folder, "."),
        (folder, index.name),
        (tmp_path, name),
        (tmp_path, f"{name}/{index.name}"),
        (tmp_path, folder),
    ):
        monkeypatch.chdir(start)
        suggested = run("info", "--json", given).document["suggestions"]
        assert suggested
        for each in suggested:
            output = Path(os.path.abspath(shlex.split(each["command"])[-1]))
            assert output.parent == tmp_path
            assert output.name.startswith(f"{name}.")


def test_safety_of_a_program_is_not_that_of_a_state_dict(run: Run, good: Path) -> None:
    done = run("info", good / "script.pt")
    assert "loads with torch.load" not in done.out
    assert "a TorchScript archive is a program, for torch.jit.load" in done.out
    assert run("info", "--json", good / "script.pt").document["safety"] == "program"


def test_safety_names_the_protocol_that_torch_takes(run: Run, good: Path) -> None:
    (line,) = (
        line for line in run("info", good / "protocol4.pth").out.splitlines() if "safety" in line
    )
    assert line.endswith("weights_only=True) in protocol 2; this is protocol 4")


def test_the_protocol_of_an_index_is_not_held_against_it(run: Run) -> None:
    done = run("info", FIXTURES / "good" / "dcp")
    (line,) = (line for line in done.out.splitlines() if line.startswith("safety"))
    assert line.endswith("torch.load(weights_only=True)")


def test_a_broken_index_is_no_hint_at_itself(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"other": {}}')
    done = run("info", path)
    assert (done.code, "hint:" in done.err) == (3, False)


def test_text_of_python_2(run: Run, tmp_path: Path) -> None:
    """`info` says what torch.load needs; `--tensors-only` gives what weights_only accepts."""
    torch = pytest.importorskip("torch")
    old = b"\x80\x02}(U\x04noteU\x04caf\xe9U\x04k\xe9y\x2eK\x01U\x01wK\x02u."
    source, out = tmp_path / "old.pth", tmp_path / "out.pth"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("a/data.pkl", old)
        archive.writestr("a/version", "3\n")
    with pytest.raises(UnicodeDecodeError):
        torch.load(source, weights_only=False)
    assert "encoding='latin1'" in run("info", source).out
    assert run("convert", source, out, "--tensors-only").code == 0
    assert torch.load(out, weights_only=True) == {"note": "caf\xe9", "k\xe9y.": 1, "w": 2}
    assert "latin1" not in run("info", out).out


def test_dicts_that_lose_their_class_are_named(run: Run, tmp_path: Path) -> None:
    """Judged by torch: what was a `defaultdict` is a plain dict, and the report says so."""
    torch = pytest.importorskip("torch")
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    counts = defaultdict(int, {"seen": 1})
    torch.save({"w": torch.ones(2), "counts": counts, "again": defaultdict(list, k=[1])}, source)
    done = run("convert", source, out, "--tensors-only")
    assert "without their class: collections.defaultdict x 2" in done.err
    assert type(torch.load(out, weights_only=True)["counts"]) is dict
    assert "without their class" not in run("convert", "--force", out, source).err


def saved_object(module: str, **state: Any) -> Any:
    """Make an object of a class that no installed package needs to have."""
    kind = type(module.rpartition(".")[2], (), {"__module__": module.rpartition(".")[0]})
    made = kind()
    vars(made).update(state)
    return made


W = torch.ones(2)
WRITERS: dict[str, Callable[[], Any]] = {
    "metatrain": lambda: {"architecture_name": "soap", "model_state_dict": {"w": W}},
    "AllenNLP": lambda: {"_text_field_embedder.token_embedder_tokens.weight": W, "b": W},
    "AllenNLP, the state of training": lambda: {"batch_num_total": 3, "optimizer": {"state": {}}},
    "DeePMD-kit": lambda: {"model": {"model.Default.atomic_model.w": W, "model._extra_state": 1}},
    "the state of a scheduler alone": lambda: {"base_lrs": [0.1], "last_epoch": 3},
    "MACE": lambda: saved_object("mace.modules.models.MACE", w=W),
    "a graph of PyTorch Geometric": lambda: saved_object("torch_geometric.data.data.Data", x=W),
    "fastai, an exported Learner": lambda: saved_object("fastai.learner.Learner", model=1),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_writers_are_recognised(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    value, path = WRITERS[writer](), tmp_path / "saved.pt"
    if not isinstance(value, dict):
        kind = type(value)
        steps = kind.__module__.split(".")
        for name in (".".join(steps[:count]) for count in range(1, len(steps) + 1)):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        setattr(sys.modules[kind.__module__], kind.__name__, kind)
    torch.save(value, path)
    framework = run("info", path, "--json").document["framework"]
    assert framework.partition(" (")[0] == writer
