"""ckptool: look into PyTorch checkpoints and edit them, without running what is in them.

The public names are loaded when they are first used (PEP 562); importing ckptool imports no
torch, no numpy and no network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ckptool import errors

if TYPE_CHECKING:
    from ckptool.containers import read as read
    from ckptool.errors import *  # noqa: F403  (mypy and pyright take a star for public)
    from ckptool.files.budget import max_memory as max_memory
    from ckptool.files.download import Downloaded as Downloaded
    from ckptool.model.layers import Layer as Layer, Layers as Layers, layers as layers
    from ckptool.model.loading import (
        Matching as Matching,
        load_matching as load_matching,
        load_state_dict as load_state_dict,
    )
    from ckptool.model.verification import Run as Run, Verification as Verification
    from ckptool.state import edits as edits
    from ckptool.state.checkpoint import Checkpoint as Checkpoint, StateDict as StateDict
    from ckptool.state.edits import Edit as Edit
    from ckptool.state.recipes import Recipe as Recipe
    from ckptool.tensors.tensor import TensorInfo as TensorInfo
    from ckptool.verbs.api import (
        add_prefix as add_prefix,
        convert as convert,
        download as download,
        info as info,
        keys as keys,
        strip_prefix as strip_prefix,
        unwrap as unwrap,
    )
    from ckptool.verbs.casting import Cast as Cast
    from ckptool.verbs.checked import Checked as Checked, Status as Status
    from ckptool.verbs.checking import check as check
    from ckptool.verbs.combining import Averaged as Averaged, average as average
    from ckptool.verbs.compare import diff as diff
    from ckptool.verbs.difference import Change as Change, Difference as Difference
    from ckptool.verbs.fitting import Fit as Fit, Mismatch as Mismatch, Transferred as Transferred
    from ckptool.verbs.listing import Listing as Listing
    from ckptool.verbs.match import Matched as Matched, match as match
    from ckptool.verbs.models import verify as verify
    from ckptool.verbs.options import WriteOptions as WriteOptions
    from ckptool.verbs.plan import Dropped as Dropped
    from ckptool.verbs.showing import Shown as Shown, show as show
    from ckptool.verbs.surgery import Rewrite as Rewrite, Shard as Shard
    from ckptool.verbs.survey import Suggestion as Suggestion, Survey as Survey
    from ckptool.verbs.transfer import transfer as transfer

__version__ = "0.1.0"

# The same names by module, for those who run: a test holds both together.
_PUBLIC = {
    name: module
    for module, names in {
        "ckptool.verbs.api": "add_prefix convert download info keys strip_prefix unwrap",
        "ckptool.verbs.casting": "Cast",
        "ckptool.verbs.checked": "Checked Status",
        "ckptool.verbs.checking": "check",
        "ckptool.state.checkpoint": "Checkpoint StateDict",
        "ckptool.verbs.combining": "Averaged average",
        "ckptool.verbs.compare": "diff",
        "ckptool.verbs.difference": "Change Difference",
        "ckptool.state.edits": "Edit edits",
        "ckptool.state.recipes": "Recipe",
        "ckptool.verbs.fitting": "Fit Mismatch Transferred",
        "ckptool.containers": "read",
        "ckptool.files.budget": "max_memory",
        "ckptool.verbs.listing": "Listing",
        "ckptool.files.download": "Downloaded",
        "ckptool.model.layers": "Layer Layers layers",
        "ckptool.model.loading": "Matching load_matching load_state_dict",
        "ckptool.model.verification": "Run Verification",
        "ckptool.verbs.match": "Matched match",
        "ckptool.verbs.models": "verify",
        "ckptool.verbs.options": "WriteOptions",
        "ckptool.verbs.plan": "Dropped",
        "ckptool.verbs.showing": "Shown show",
        "ckptool.verbs.surgery": "Rewrite Shard",
        "ckptool.verbs.survey": "Suggestion Survey",
        "ckptool.verbs.transfer": "transfer",
        "ckptool.tensors.tensor": "TensorInfo",
    }.items()
    for name in names.split()
}
_PUBLIC |= {
    name: "ckptool.errors"
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.CkptoolError)
}
__all__ = ["__version__", *_PUBLIC]


if not TYPE_CHECKING:  # to a checker, a name that is not there must be an error

    def __getattr__(name: str) -> object:
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(_PUBLIC[name])
        return module if name == "edits" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
