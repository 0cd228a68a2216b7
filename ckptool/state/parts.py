"""Files that are parts of a checkpoint: what one rank wrote, which is never the weights.

The content decides; the name of a file is asked for its rank alone, where the content does not say
it, and for a few names that always mean a part, if others of the kind are in the folder. Each
framework has a function here that looks at what it writes:

- DeepSpeed ZeRO: `zero/stage_1_and_2.py` and `zero/stage3.py` (`state_dict` of the optimizers),
  `engine.py` (`_save_checkpoint`, `_get_zero_param_shapes`); `zero_to_fp32.py` joins them
- FSDP: `_flat_param` (torch/distributed/fsdp/_flat_param.py), fairscale's `flat_param_0`
- DTensor, ShardedTensor: a piece of each tensor (`holdings`)
- distributed checkpoints in safetensors: torch/distributed/checkpoint/_hf_utils.py
- Megatron-LM, NeMo, fairseq: sizes of model parallelism among the arguments of the training
- torch_xla's `xser`: each tensor in a file of its own
- by name: Llama's `consolidated.00.pth` (llama/generation.py, a file for each model-parallel rank),
  DeepSpeed's `layer_00-...` (pipe/module.py, `ckpt_layer_path`), vLLM's sharded state
  (sharded_state_loader.py, DEFAULT_PATTERN), TensorRT-LLM's `rank0.safetensors`
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import field, replace
from math import prod

from ckptool.errors import PartialCheckpoint
from ckptool.files import paths
from ckptool.pickles.holdings import Meshes, held
from ckptool.pickles.subclasses import sizes_of
from ckptool.pickles.tree import Dict, Global, Node, Object, items, named_items
from ckptool.records import dataclass
from ckptool.tensors.tensor import CompositeTensor, TensorInfo, shapes_of, tensors_of
from ckptool.text import argument, counted, length, listed, shape

SHARDING_INFO = "DCP_SHARDING_INFO"
_RANK = r"rank_?([0-9]+)"
_FLAT = r"(.*\.)?_?flat_param(_\d+)?"
_OF_RANK = {  # the rank is the group; where it is empty, parts are numbered differently
    r"consolidated\.(\d+)\.pth": "a model-parallel checkpoint of Llama",
    r"()layer_\d+-model_\d+-model_states\.pt": "a pipeline-parallel checkpoint of DeepSpeed",
    r"model-rank-(\d+)-part-\d+\.safetensors": "a sharded state of vLLM",
    r"rank(\d+)\.safetensors": "a checkpoint of TensorRT-LLM",
}
_XSER = Global("torch_xla.utils.serialization", "TensorReference")
# How many ways a model was cut, where arguments of a training say so.
_CUTS = {
    "tensor_model_parallel_size": "tensor parallelism",
    "pipeline_model_parallel_size": "pipeline parallelism",
    "model_parallel_size": "model parallelism",
    "mp_world_size": "tensor parallelism",
}


@dataclass(frozen=True, slots=True)
class Part:
    """What a file is a part of, and where the values are.

    `rank` and `world` are None where nothing says which part it is, and of how many.
    """

    kind: str
    where: str
    rank: int | None = None
    world: int | None = None

    @property
    def text(self) -> str:
        """Describe it in a sentence without a subject."""
        of = f" of {self.world}" if self.world else ""
        which = f"rank {self.rank}{of} of " if self.rank is not None else "a part of "
        if self.rank is None and self.world:
            which = f"one of {self.world} parts of "
        return f"{which}{self.kind}: {self.where}"


@dataclass(frozen=True, slots=True)
class File:
    """What the functions here look at: a file, and the entries of a state_dict in it or none.

    What is beside them is read once: the shapes that ZeRO notes of parameters, how many ways the
    model was cut, whether tensors are in files of their own.
    """

    path: str
    top: Mapping[str, Node]
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...] | None]
    cuts: Mapping[str, int]
    references: bool
    entries: Mapping[str, Node] = field(default_factory=dict)

    def part(
        self, kind: str, where: str, rank: int | None = None, world: int | None = None
    ) -> Part:
        """Make a part; its name tells the rank where its content does not."""
        if rank is None and (named := re.search(_RANK, os.path.basename(self.path))):
            rank = int(named[1])
        return Part(kind, where, rank, world if world and world > (rank or 0) else None)


def recognise(
    path: str, tree: Node, metadata: Mapping[str, str], states: Iterable[Mapping[str, Node]]
) -> Part | None:
    """Return what a file is a part of, judged by what may be its weights: entries of each.

    A file without a state_dict has none.
    """
    top = dict(named_items(tree))
    file = File(path, top, metadata, _noted_shapes(top), _cuts(top), _refers(top))
    files = [replace(file, entries=entries) for entries in states] or [file]
    found = (test(each) for each in files for test in _TESTS)
    return next((part for part in found if part is not None), None)


def refuse(path: str, part: Part) -> PartialCheckpoint:
    """Return the error of a command that needs the weights."""
    return PartialCheckpoint(
        f"{path} is {part.text}",
        path=path,
        hint=f"ckptool keys --all {argument(path)}   lists what is in this part",
    )


# What frameworks write.


def _zero_optimizer(file: File) -> Part | None:
    """Recognise the slices of float32 weights that each rank of ZeRO has."""
    state = {} if file.entries else dict(named_items(file.top.get("optimizer_state_dict")))
    if state.keys().isdisjoint(("single_partition_of_fp32_groups", "fp32_flat_groups")):
        return None
    count = state.get("partition_count")
    counts = count if isinstance(count, list) else [count]
    world = max((each for each in counts if type(each) is int), default=None)
    stage = state.get("zero_stage")
    if isinstance(stage, Object) and stage.args:  # an enum member
        stage = stage.args[0]
    kind = f"DeepSpeed ZeRO{f' stage {stage}' if type(stage) is int else ''}"
    where = "slices of the weights without names; all ranks and model_states.pt make them"
    return file.part(kind, where, world=world)


def _zero_model(file: File) -> Part | None:
    """Recognise a model whose parameters are elsewhere: of other shapes than are noted beside."""
    held = shapes_of(file.entries) if file.shapes else {}
    empty = [key for key, sizes in held.items() if sizes != file.shapes.get(key, sizes)]
    if not empty:
        return None
    world = file.top.get("dp_world_size")
    where = (
        f"{len(empty)} of {counted(len(file.shapes), 'parameter')} are placeholders; "
        "the values are in the optim_states.pt files of all ranks"
    )
    return file.part("DeepSpeed ZeRO stage 3", where, world=world if type(world) is int else None)


def _noted_shapes(top: Mapping[str, Node]) -> dict[str, tuple[int, ...] | None]:
    shapes: dict[str, tuple[int, ...] | None] = {}
    for name in ("param_shapes", "frozen_param_shapes"):
        groups = top.get(name)
        for group in groups if isinstance(groups, list) else [groups]:
            shapes |= {key: sizes_of(value) for key, value in named_items(group)}
    return shapes


def _placeholders(file: File) -> Part | None:
    """Recognise what was saved under ZeRO stage 3 or FSDP and not gathered: empty weights."""
    weights = [
        value
        for key, value in file.entries.items()
        if isinstance(value, TensorInfo) and key.rpartition(".")[2] == "weight"
    ]
    empty = sum(each.shape == (0,) for each in weights)
    if empty < 2 or 2 * empty < len(weights):
        return None
    where = (
        f"{empty} of {counted(len(weights), 'weight')} are placeholders of shape [0]; "
        "the values were not gathered from the other ranks"
    )
    return file.part("a model that was sharded (ZeRO stage 3, FSDP)", where)


def _pieces(file: File) -> Part | None:
    """Recognise DTensors and ShardedTensors of which other ranks have the rest."""
    cut = [(key, each) for key, each in file.entries.items() if isinstance(each, CompositeTensor)]
    meshes: Meshes = {}
    found = [(key, each, has) for key, each in cut if (has := held(each, meshes)) is not None]
    if not found:
        return None
    key, first, has = found[0]
    rank = next((each.rank for *_, each in found if each.rank is not None), None)
    world = max((each.world for *_, each in found if each.world is not None), default=None)
    sizes = ", ".join(shape(piece.tensor.shape) for piece in has.pieces) or "nothing"
    where = (
        f"{len(found)} of {len(file.entries)} entries are pieces "
        f"({key}: {sizes} of {shape(first.shape)}); the values are in the files of all ranks"
    )
    return file.part(f"a model of {first.layout}s", where, rank, world)


def is_flat(key: str) -> bool:
    """Check for the key of parameters that FSDP made one."""
    return "flat_param" in key and re.fullmatch(_FLAT, key) is not None


def _flat(file: File) -> Part | None:
    """Recognise parameters that FSDP made one, whose names and shapes are not in the file."""
    flat = [key for key in tensors_of(file.entries) if is_flat(key)]
    if not flat:
        return None
    where = f"{flat[0]} holds parameters in a row, their names and shapes are not in the file"
    return file.part("a model flattened by FSDP", where)


def _distributed(file: File) -> Part | None:
    """Recognise a shard of a distributed checkpoint in safetensors: where its pieces begin."""
    if SHARDING_INFO not in file.metadata:
        return None
    import json

    info: object = None
    with suppress(ValueError, RecursionError):
        info = json.loads(file.metadata[SHARDING_INFO])
    if not isinstance(info, dict) or not file.entries:
        return None
    offsets = ((key, each.get("saved_offsets")) for key, each in info.items() if type(each) is dict)
    key, begins = next(((k, o) for k, o in offsets if isinstance(o, list) and any(o)), ("", None))
    begin = f"{key} begins at {begins} of the whole; " if begins else ""
    where = f"{begin}the other pieces of its tensors are in the other shards"
    return file.part("a distributed checkpoint in safetensors", where)


def _parallel(file: File) -> Part | None:
    """Recognise a model that was cut, by the arguments of its training."""
    if not file.entries or not file.cuts:
        return None
    how = " and ".join(f"{what} of {count}" for what, count in file.cuts.items())
    where = f"trained with {how}; the other ranks have the rest of the weights"
    return file.part("a model-parallel checkpoint", where, world=prod(file.cuts.values()))


def _cuts(top: Mapping[str, Node]) -> dict[str, int]:
    return {
        _CUTS[name]: value
        for name, value in _arguments(top)
        if name in _CUTS and type(value) is int and value > 1
    }


def _arguments(top: Mapping[str, Node]) -> Iterator[tuple[str, Node]]:
    """Yield the arguments of a training, by name, and the sizes at the top."""
    yield from top.items()
    for name in ("args", "cfg", "hyper_parameters"):
        node = top.get(name)
        inside = named_items(node) or _attributes(node)
        yield from inside
        for _, each in inside:
            if isinstance(each, Dict):
                yield from named_items(each)


def _attributes(node: Node) -> list[tuple[str, Node]]:
    return named_items(node.state) if isinstance(node, Object) else []


def _references(file: File) -> Part | None:
    """Recognise entries that say in which file a tensor is."""
    if not file.references:
        return None
    where = f"the values are in {os.path.basename(file.path)}.tensors/"
    return Part("a checkpoint of torch_xla (xser)", where)


def _refers(top: Mapping[str, Node]) -> bool:
    inside = (value for each in top.values() for _, value in items(each) or [])
    return any(isinstance(value, Object) and value.callee == _XSER for value in inside)


def _named(file: File) -> Part | None:
    """Recognise a part by its name, where the folder has others."""
    folder, name = paths.split(file.path)
    for pattern, kind in _OF_RANK.items() if file.entries else ():
        match = re.fullmatch(pattern, name)
        if match is None or not paths.is_folder(folder or "."):
            continue
        names = [each.name for each in paths.listing(folder)]
        matches = filter(None, (re.fullmatch(pattern, each) for each in names))
        ranks = {each[0]: each[1] or each[0] for each in matches}
        rank = match[1] or name
        others = sorted(each for each in ranks if ranks[each] != rank)
        if others:
            where = f"the other tensors, or pieces of these, are in {listed(others, 3)}"
            world = len(set(ranks.values()))
            return Part(kind, where, length(match[1], 10), world)
    return None


_TESTS: tuple[Callable[[File], Part | None], ...] = (
    _zero_optimizer,
    _zero_model,
    _pieces,
    _flat,
    _placeholders,
    _distributed,
    _parallel,
    _references,
    _named,
)
