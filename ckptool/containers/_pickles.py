"""Name what a pickle is that torch.save did not write: its outermost value, and who made it."""

from __future__ import annotations

from ckptool.errors import CkptoolError, FormatError
from ckptool.files.fileio import Reader
from ckptool.pickles import pickle_reader, safety
from ckptool.pickles.pickle_reader import Ended, Pickle
from ckptool.pickles.tree import Global, Node, Object
from ckptool.state import checkpoint as places, naming
from ckptool.text import listed, readable

SHORTEST = 16
MAX_READ = 64 << 20
MAX_SHOWN = 8 << 20  # of a pickle that is read to say what it holds
# The first part of a name in the pickle -> the library that reads it.
_LIBRARIES = {
    "sklearn": "scikit-learn",
    "joblib": "joblib",
    "xgboost": "XGBoost",
    "lightgbm": "LightGBM",
    "catboost": "CatBoost",
    "pandas": "pandas",
    "fastai": "fastai (Learner.export)",
    "skops": "skops",
    "spacy": "spaCy",
    "gensim": "gensim",
    "jax": "JAX",
    "jaxlib": "JAX",
    "flax": "Flax",
    "haiku": "Haiku",
    "paddle": "PaddlePaddle",
    "transformers": "transformers",
}


def describe(reader: Reader, head: bytes) -> tuple[str, str] | None:
    """Say what a pickle holds, and what helps; None for what is no pickle."""
    if not _starts(head):
        return None
    size = readable(reader.nbytes)
    if b"joblib.numpy_pickle" in head:
        return f"a plain pickle of joblib ({size}), with numpy arrays in it", "joblib.load reads it"
    what = f"a plain pickle ({size}) that torch.save did not write"
    try:
        found = pickle_reader.load(reader.read(0, min(reader.nbytes, MAX_SHOWN)))
    except CkptoolError:
        return what, ""
    return f"{what}: {_content(found)}{_danger(found)}", _hint(found)


def pickled(reader: Reader, head: bytes) -> tuple[dict[Global, int], list[Object]]:
    """Give what a file names and calls that starts as a pickle, up to where it stops being one."""
    data = reader.read(0, min(reader.nbytes, MAX_READ)) if _starts(head) else head
    try:
        parsed = pickle_reader.load(data)
    except FormatError as error:
        return error.named, error.calls
    return parsed.globals, parsed.calls


def _starts(head: bytes) -> bool:
    """Tell whether a file starts as a pickle, and not by chance as a few letters of a text do."""
    try:
        pickle_reader.load(head)
    except Ended as error:
        protocol = head[:1] == b"\x80" and len(head) > 1
        return protocol or (error.offset or 0) > SHORTEST
    except CkptoolError:
        return False
    return True


def _content(found: Pickle) -> str:
    tree = found.tree
    said = naming.what(tree)
    named = [key for key, _ in places.named_items(tree)]
    if named:
        return f"{said}, {listed(named, 6)}"
    if isinstance(tree, list | tuple) and tree:
        kinds = dict.fromkeys(_kind(item) for item in tree[:1000])
        return f"{said}, {listed(kinds, 4)}"
    return said


def _kind(node: Node) -> str:
    """Name the kind of a value, without the value."""
    if isinstance(node, Object):
        return naming.what(node)
    return type(node).__name__.lower().replace("nonetype", "None")


def _danger(found: Pickle) -> str:
    dangerous = safety.judge(found.globals).dangerous
    if not dangerous:
        return ""
    return f"; it would run code when loaded: {listed(map(str, dangerous), 4)}"


def _hint(found: Pickle) -> str:
    if Global("torch.storage", "_load_from_bytes") in found.globals:
        return "pickle.dump wrote tensors of torch: load it in Python, and torch.save it"
    tops = {name.module.partition(".")[0] for name in found.globals}
    made = [library for top, library in _LIBRARIES.items() if top in tops]
    return f"{made[0]} reads it" if made and not safety.judge(found.globals).dangerous else ""
