"""Checkpoints of DeepSpeed ZeRO: the files of all ranks are one, or one error names what is not."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome, sampled

import ckptool

torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")
safetensors_torch = pytest.importorskip("safetensors.torch")

sys.path.append(str(FIXTURES))
from zero_ranks import Model, save  # noqa: E402

Run = Callable[..., Outcome]
State = dict[str, Any]
OPTIM, STATES = "zero_pp_rank_{}_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values(*shape: int) -> Any:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def a_model(**more: Any) -> Model:
    """Give a model in two groups, with a frozen weight, buffers and a tie; names in no order."""
    return Model(
        [
            {"emb.weight": values(7, 3), "fc.weight": values(5, 3)},
            {"fc.bias": values(5), "norm.weight": values(3), "scalar": values()},
        ],
        frozen={"frozen.weight": values(4, 2).bfloat16()},
        buffers={"steps": torch.tensor(7), "scale": values(3)},
        ties={"head.weight": "emb.weight"},
        order="steps fc.bias emb.weight frozen.weight fc.weight scale norm.weight scalar "
        "head.weight".split(),
        **more,
    )


def saved(
    stage: int,
    world: int,
    name: str = "run/global_step3",
    *,
    optim: Callable[[State], object] | None = None,
    states: Callable[[State], object] | None = None,
    **more: Any,
) -> Model:
    """Save a model; what an optimizer and what states hold is changed by functions."""
    model = a_model(**more)

    def change(name: str, content: State) -> None:
        if optim and "optim" in name:
            optim(content["optimizer_state_dict"])
        elif states and "model" in name:
            states(content)

    save(Path(name), model, stage, world, change)
    return model


def bits(value: Any) -> Any:
    return value.contiguous().reshape(-1).view(torch.uint8).tolist()


def same(found: State, truth: State) -> bool:
    """Compare key, dtype, shape and bits, in order."""
    assert list(found) == list(truth)
    return all(
        (found[key].dtype, found[key].shape, bits(found[key]))
        == (value.dtype, value.shape, bits(value))
        for key, value in truth.items()
    )


def refused(run: Run, path: str, *words: str, code: int = 3, options: tuple[str, ...] = ()) -> str:
    """Convert, and expect one error with these words, and no output."""
    before = sorted(Path().rglob("*"))
    done = run("convert", *options, path, "out.pth")
    assert done.code == code, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err
    assert sorted(Path().rglob("*")) == before
    return done.err


# Joined.

CELLS = [
    (stage, world, dtype)
    for stage in (1, 2, 3)
    for world in (1, 2, 3, 5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


@pytest.mark.parametrize(("stage", "world", "dtype"), sampled(CELLS, 7))
@pytest.mark.parametrize("align", [1, 8])
def test_all_ranks_are_one_checkpoint(
    run: Run, stage: int, world: int, dtype: Any, align: int
) -> None:
    model = saved(stage, world, dtype=dtype, align=align)
    assert run("convert", "run", "out.pth").code == 0
    found = torch.load("out.pth", weights_only=True)
    assert same(found, model.truth())
    assert found._metadata == {"": {"version": 1}}
    assert found["head.weight"].data_ptr() == found["emb.weight"].data_ptr()
    for key in (*model.masters, "frozen.weight"):  # nothing of what pads the slices
        assert found[key].untyped_storage().nbytes() == found[key].nbytes
    assert run("convert", "run", "out.safetensors").code == 0
    safe = safetensors_torch.load_file("out.safetensors")
    assert same({key: safe[key] for key in found if key in safe}, _without_ties(model))
    assert run("diff", "run", "out.pth").code == 0


def _without_ties(model: Model) -> State:
    return {key: value for key, value in model.truth().items() if key not in model.ties}


@pytest.mark.parametrize("stage", [1, 3])
def test_any_file_of_a_step_is_the_checkpoint(run: Run, stage: int) -> None:
    model = saved(stage, 2)
    for path in ("run", "run/global_step3", *map(str, Path("run/global_step3").iterdir())):
        listed = run("keys", path).out.splitlines()
        assert [line.split("\t")[0] for line in listed] == list(model.truth())
        assert same(ckptool.load_state_dict(path), model.truth())


def test_the_weights_as_they_were_trained(run: Run) -> None:
    model = saved(2, 2)
    assert run("convert", "--values", "module", "run", "out.pth").code == 0
    found = torch.load("out.pth", weights_only=True)
    assert same(found, model.module(placeholders=False))
    assert found["head.weight"].data_ptr() == found["emb.weight"].data_ptr()
    shutil.rmtree("run")
    saved(3, 2)
    said = refused(run, "run", "placeholder", "--values", code=2, options=("--values", "module"))
    assert "master weights are complete" in said


def test_values_of_another_checkpoint_are_not_chosen(run: Run) -> None:
    torch.save({"w": values(2)}, "plain.pth")
    refused(run, "plain.pth", "one value of each", code=2, options=("--values", "module"))


def test_steps_are_chosen_by_latest_or_by_name(run: Run) -> None:
    saved(1, 2, "run/global_step3")
    saved(1, 2, "run/global_step12", step=12)
    said = refused(run, "run", "run/global_step3", "run/global_step12", code=2)
    assert said.index("global_step3") < said.index("global_step12")
    Path("run/latest").write_text("global_step3")
    assert "at step 3" in run("info", "run").out
    assert "at step 12" in run("info", "run/global_step12").out


def test_parameters_of_older_files_have_no_paddings() -> None:
    model = saved(2, 3, optim=lambda state: state.pop("param_alignment_paddings"))
    assert same(ckptool.load_state_dict("run"), model.truth())


def test_partitions_that_keep_their_padding_do_not_say_their_stage() -> None:
    """BF16_Optimizer, of stage 1 in bfloat16 until 0.16."""

    def keep_padding(state: State) -> None:
        del state["zero_stage"], state["param_alignment_paddings"]
        flats = state["single_partition_of_fp32_groups"]
        whole = [torch.empty(0).set_(flat.untyped_storage()) for flat in flats]
        state["single_partition_of_fp32_groups"] = whole

    model = saved(1, 3, optim=keep_padding)
    assert same(ckptool.load_state_dict("run"), model.truth())


def test_groups_of_stage_3_are_cut_into_sub_groups_anywhere() -> None:
    def cut(state: State) -> None:
        flat = torch.cat(state["fp32_flat_groups"])
        state["fp32_flat_groups"] = [each.clone() for each in flat.split(4)]

    model = saved(3, 2, optim=cut)
    assert same(ckptool.load_state_dict("run"), model.truth())


def test_ties_that_no_rank_names_are_those_of_the_module() -> None:
    for stage in (2, 3):
        name = f"run/{stage}/global_step3"
        model = saved(stage, 2, name, states=lambda content: content.update(shared_params={}))
        assert same(ckptool.load_state_dict(f"run/{stage}"), model.truth())


def test_frozen_parameters_that_were_left_out_stay_out(run: Run) -> None:
    def leave_out(content: State) -> None:
        del content["module"]["frozen.weight"]
        content["frozen_param_shapes"] = content["frozen_param_fragments"] = None

    model = saved(2, 2, states=leave_out)
    truth = model.truth()
    del truth["frozen.weight"]
    assert same(ckptool.load_state_dict("run"), truth)


def test_what_is_no_tensor_of_the_module_is_kept() -> None:
    extra = {"x._extra_state": {"scale": 2}}
    model = saved(1, 2, states=lambda content: content["module"].update(extra))
    assert ckptool.load_state_dict("run")["x._extra_state"] == {"scale": 2}
    assert list(ckptool.load_state_dict("run"))[:-1] == list(model.truth())


def test_buffers_that_differ_between_ranks_are_named(run: Run) -> None:
    ranks = iter((0, 0, 0, 1))  # the last alone, whose pickle is like that of the others

    def change(content: State) -> None:
        content["module"]["scale"] = content["module"]["scale"] + next(ranks)

    model = saved(3, 4, states=change)
    done = run("convert", "run", "out.pth")
    assert same(torch.load("out.pth", weights_only=True), model.truth())
    assert done.code == 0
    assert "differ between ranks" in done.err
    assert "scale" in done.err
    assert "steps" not in done.err


def test_a_checkpoint_of_deepspeed_without_zero_is_read_as_it_is(run: Run) -> None:
    Path("run").mkdir()
    shutil.copy(FIXTURES / "frameworks" / STATES, "run")
    assert run("unwrap", f"run/{STATES}", "out.pth").code == 0
    assert run("keys", "run").code == 0


# What is said of it.


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_info_says_framework_world_and_step(run: Run, stage: int) -> None:
    saved(stage, 2)
    said = run("info", "run").out
    assert f"DeepSpeed ZeRO stage {stage} at step 3: all 2 ranks are there and agree" in said
    assert "tensors-only" not in said
    commands = json.loads(run("info", "run", "--json").out)["suggestions"]
    for each in commands:
        assert run(*each["command"].split()[1:]).code == 0


@pytest.mark.parametrize("stage", [1, 3])
def test_info_of_a_file_names_the_command_that_gives_the_weights(run: Run, stage: int) -> None:
    model = saved(stage, 2)
    for path in Path("run/global_step3").iterdir():
        document = json.loads(run("info", str(path), "--json").out)
        if "optim" in path.name or stage == 3:
            assert document["part"]["rank"] == int("rank_1" in path.name)
            assert document["part"]["world"] == 2
        (command,) = [s["command"] for s in document["suggestions"] if "all ranks" in s["reason"]]
        assert run(*command.split()[1:]).code == 0
        written = command.split()[-1]
        assert same(torch.load(written, weights_only=True), model.truth())
        Path(written).unlink()


def test_check_says_that_all_ranks_are_there_and_agree(run: Run) -> None:
    saved(3, 2)
    done = run("check", "run")
    assert done.code == 0
    (row,) = done.out.splitlines()
    assert row.startswith("run/global_step3\tok\t")
    assert "all 2 ranks are there and agree" in done.err
    assert "not read: optimizer and training state" in done.err
    alone = run("check", f"run/global_step3/bf16_{OPTIM.format(1)}")
    assert "rank 1 of 2" in alone.out
    Path(f"run/global_step3/bf16_{OPTIM.format(0)}").unlink()
    done = run("check", "run")
    assert (done.code, "rank_0" in done.out) == (1, True)


def test_a_part_is_listed_alone_and_is_never_weights(run: Run) -> None:
    saved(3, 2)
    name = f"bf16_{OPTIM.format(1)}"
    shutil.copy(f"run/global_step3/{name}", name)
    assert "fp32_flat_groups" in run("keys", "--all", name).out
    refused(run, name, "mp_rank_00_model_states.pt")
    assert run("unwrap", "--in-place", "run/global_step3").code == 2


# Faults: one error, and nothing is written.


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 3])
def test_each_file_that_is_missing_is_named(run: Run, stage: int, world: int) -> None:
    saved(stage, world)
    for path in sorted(Path("run/global_step3").iterdir()):
        path.rename("aside")
        others = [str(each) for each in Path("run/global_step3").iterdir()]
        for start in ("run", others[0]):
            said = refused(run, start)
            assert path.name in said or ("optim_states.pt" in said and world == 1)
        Path("aside").rename(path)


@pytest.mark.parametrize("stage", [1, 3])
def test_each_file_that_is_truncated_is_named(run: Run, stage: int) -> None:
    saved(stage, 2)
    for path in sorted(Path("run/global_step3").iterdir()):
        content = path.read_bytes()
        for size in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            refused(run, "run", path.name)
        path.write_bytes(content + b"\0" * 10)
        refused(run, "run", path.name)
        path.write_bytes(content)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_byte_of_a_slice_that_was_changed_is_found(run: Run, stage: int) -> None:
    model = saved(stage, 2)
    half = model.masters["fc.bias"][:1].numpy().tobytes()  # in the file of rank 0
    path = Path(f"run/global_step3/bf16_{OPTIM.format(0)}")
    content = path.read_bytes()
    at = content.index(half)
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    refused(run, "run", path.name, "checksum")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("other", ["step", "world", "stage", "shapes"])
def test_each_file_of_another_save_is_named(run: Run, stage: int, other: str) -> None:
    saved(stage, 2)
    elsewhere = {"world": (stage, 3), "stage": (2 if stage == 3 else 3, 2)}.get(other, (stage, 2))
    if other == "shapes":
        model = a_model()
        model.groups[0]["fc.weight"] = values(8, 3)
        save(Path("other"), model, *elsewhere)
    else:
        saved(*elsewhere, name="other", step=5 if other == "step" else 3)
    if other == "step":  # the weights have moved on
        model = a_model(step=5)
        for group in model.groups:
            for key in group:
                group[key] = group[key] + 1
        save(Path("other"), model, *elsewhere)
    for path in sorted(Path("run/global_step3").iterdir()):
        strange = Path("other") / path.name
        if strange.exists():
            path.rename("aside")
            shutil.copy(strange, path)
            refused(run, "run")
            path.unlink()
            Path("aside").rename(path)


@pytest.mark.parametrize("content", [None, {}, 7, "text"], ids=str)
def test_each_file_that_holds_something_else_is_missing(run: Run, content: Any) -> None:
    saved(3, 4)
    for path in sorted(Path("run/global_step3").iterdir()):
        path.rename("aside")
        torch.save(content, path)
        refused(run, "run", path.name)
        Path("aside").replace(path)


def test_an_optimizer_that_was_not_loaded_has_stepped_less_often(run: Run) -> None:
    """`load_checkpoint(load_optimizer_states=False)`: the model is its masters, rounded."""
    saved(2, 2, states=lambda content: content.update(global_steps=1000))
    done = run("convert", "run", "out.pth")
    assert done.code == 0
    assert "stepped 3 times" in done.err


@pytest.mark.parametrize("stage", [2, 3])
def test_elements_beyond_the_shapes_are_refused(run: Run, stage: int) -> None:
    saved(
        stage,
        2,
        optim=lambda state: state.pop("param_alignment_paddings", None),
        states=lambda content: content["param_shapes"][0].popitem(),
    )
    refused(run, "run", "beyond the noted shapes")


@pytest.mark.parametrize(
    ("why", "words"),
    {
        "mp_rank_01_model_states.pt": ("model-parallel",),
        "pipeline": ("pipeline",),
        "layer_0_expert_0_mp_rank_00_model_states.pt": ("experts",),
        "partition counts": ("experts",),
        "zero": ("universal",),
    }.items(),
)
def test_what_is_more_than_a_join_is_refused_by_name(
    run: Run, why: str, words: tuple[str, ...]
) -> None:
    pipeline, counts = {"module": None}, {"partition_count": [2, 1]}
    saved(
        1,
        2,
        states=lambda content: content.update(pipeline if why == "pipeline" else {}),
        optim=lambda state: state.update(counts if why == "partition counts" else {}),
    )
    if why == "zero":
        for path in Path("run/global_step3").glob("*optim*"):
            path.unlink()
        Path("run/global_step3/zero/emb.weight").mkdir(parents=True)
    if why.endswith(".pt"):
        shutil.copy(f"run/global_step3/{STATES}", f"run/global_step3/{why}")
    refused(run, "run", *words)


def test_experts_are_joined_as_they_were_trained(run: Run) -> None:
    model = saved(1, 2, other={"num_experts": [2]})
    folder = Path("run/global_step3")
    truth = model.module(placeholders=False)
    for number in range(2):
        expert = {f"moe.deepspeed_moe.experts.deepspeed_experts.{number}.w": values(2).bfloat16()}
        torch.save(expert, folder / f"layer_0_expert_{number}_mp_rank_00_model_states.pt")
        truth |= expert
    refused(run, "run", "experts", "--values module")
    assert run("convert", "--values", "module", "run", "out.pth").code == 0
    assert same(torch.load("out.pth", weights_only=True), truth)
    (folder / "layer_0_expert_0_mp_rank_00_model_states.pt").unlink()
    Path("out.pth").unlink()
    refused(run, "run", "expert 0 of layer 0", options=("--values", "module"))


# Hostile.


class Call:
    """What would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ckptool-was-executed",)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "shape",
    [[-7, 3], [1 << 40, 3], [1 << 62, 1 << 62], [1 << 70], "seven", [7.0, 3], [0, 1 << 63], None],
    ids=str,
)
def test_shapes_that_lie_are_refused(run: Run, stage: int, shape: Any) -> None:
    lie = {"emb.weight": shape}
    saved(stage, 2, states=lambda content: content["param_shapes"][0].update(lie))
    refused(run, "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partition_count", 1 << 40),
        ("partition_count", -1),
        ("partition_count", []),
        ("zero_stage", 9),
        ("zero_stage", "two"),
        ("param_alignment_paddings", [[1 << 62, 1 << 62], [0, 0, 0]]),
        ("param_alignment_paddings", [[-5, 5], [0, 0, 0]]),
        ("param_alignment_paddings", "none"),
        ("single_partition_of_fp32_groups", "none"),
        ("single_partition_of_fp32_groups", [torch.zeros(2, 2), torch.zeros(9)]),
        ("single_partition_of_fp32_groups", [torch.zeros(1).expand(40), torch.zeros(9)]),
        ("single_partition_of_fp32_groups", []),
    ],
)
def test_slices_that_lie_are_refused(run: Run, name: str, value: Any) -> None:
    saved(2, 2, optim=lambda state: state.update({name: value}))
    refused(run, "run")


def test_a_call_in_a_file_is_not_made_and_not_written(run: Run) -> None:
    model = saved(2, 2, optim=lambda state: state.update(overflow=Call()))
    assert run("check", "run").code == 4
    done = run("convert", "run", "out.pth")
    assert done.code == 0
    assert "would run code" in done.err
    assert same(torch.load("out.pth", weights_only=True), model.truth())
    assert not Path("ckptool-was-executed").exists()
