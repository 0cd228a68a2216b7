"""Name what a folder is that is no checkpoint by itself: what wrote it, and what is in it."""

from __future__ import annotations

import os
from collections.abc import Collection

from ckptool.containers import _registry
from ckptool.errors import NotACheckpoint
from ckptool.files import archives
from ckptool.text import counted, quoted, readable, table

MAX_NAMES = 10_000
MAX_SHOWN = 12
# Names that must all be there (`a|b` is either) -> what a folder looks like.
_KINDS: tuple[tuple[str, str], ...] = (
    ("model_index.json", "a pipeline of diffusers; its models are in the folders inside"),
    ("trainer_state.json", "a checkpoint of transformers' Trainer"),
    ("adapter_config.json", "an adapter of PEFT"),
    ("modules.json config_sentence_transformers.json", "a model of sentence-transformers"),
    ("random_states_0.pkl", "a checkpoint of accelerate"),
    ("latest zero_to_fp32.py", "a checkpoint of DeepSpeed; zero_to_fp32.py joins its parts"),
    ("mp_rank_00_model_states.pt", "a part of a checkpoint of DeepSpeed"),
    ("latest_checkpointed_iteration.txt", "checkpoints of Megatron-LM"),
    ("saved_model.pb", "a TensorFlow SavedModel"),
    ("checkpoint model.ckpt.index", "a TensorFlow checkpoint"),
    ("hparams.yaml checkpoints", "a log folder of Lightning; see checkpoints/ inside"),
    ("config.json weights.th vocabulary", "an unpacked model of AllenNLP"),
    ("data.pkl", "an unpacked torch file; zip it again, or get the file itself"),
)


def refuse(path: str) -> NotACheckpoint:
    """Make the error for a folder: what it looks like, its files, the one to look at."""
    try:
        with os.scandir(path) as entries:
            found = [entry for entry, _ in zip(entries, range(MAX_NAMES), strict=False)]
            files = {each.name: each.stat().st_size for each in found if each.is_file()}
    except OSError:
        return NotACheckpoint(f"{path} is a folder", path=path)
    names = {each.name for each in found}
    kind = next((f", {what}" for wanted, what in _KINDS if _has(names, wanted)), "")
    endings = (*_registry.suffixes(), *archives.SUFFIXES, ".model", ".index.json")
    weights = {name: size for name, size in files.items() if name.endswith(endings)}
    ordered = sorted(weights, key=lambda name: (-weights[name], name))
    likely = sorted(ordered, key=_is_state)
    return NotACheckpoint(
        f"{path} is a folder{kind} ({_counts(found, files)})",
        path=path,
        evidence=table([(name, readable(weights[name])) for name in ordered[:MAX_SHOWN]], (1,)),
        hint=f"ckptool info {quoted(os.path.join(path, likely[0]))}" if likely else "",
    )


def _is_state(name: str) -> bool:
    """Tell whether a file is named for what is no weights."""
    return name.startswith(("optim", "sched", "rng", "random_states", "training_args", "scaler"))


def _has(names: Collection[str], wanted: str) -> bool:
    return all(any(name in names for name in each.split("|")) for each in wanted.split())


def _counts(found: list[os.DirEntry[str]], files: dict[str, int]) -> str:
    if not found:
        return "empty"
    folders = len(found) - len(files)
    parts = [counted(len(files), "file")] if files else []
    parts += [counted(folders, "folder")] if folders else []
    return ", ".join(parts)
