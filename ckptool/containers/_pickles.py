"""Name what a pickle is that torch.save did not write: its outermost value, and who made it."""

from __future__ import annotations

from ckptool.errors import CkptoolError, FormatError
from ckptool.files.fileio import Reader
from ckptool.pickles import pickle_reader, safety
from ckptool.pickles.pickle_reader import Ended, Pickle
from ckptool.pickles.tree import Global, Node, Object
from ckptool.state import naming
from ckptool.state.checkpoint import named_items
from ckptool.text import listed, readable

SHORTEST = 16
MAX_READ = 64 << 20
MAX_DESCRIBED = 8 << 20  # bytes of a pickle that are read to describe it
# The top module of a name in the pickle -> the library that reads it.
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
    """Return what a pickle holds, and what helps; None for any other file."""
    if not _is_pickle(head):
        return None
    size = readable(reader.nbytes)
    if b"joblib.numpy_pickle" in head:
        return f"a plain pickle of joblib ({size}), with numpy arrays in it", "joblib.load reads it"
    what = f"a plain pickle ({size}) that torch.save did not write"
    try:
        parsed = pickle_reader.load(reader.read(0, min(reader.nbytes, MAX_DESCRIBED)))
    except CkptoolError:
        return what, ""
    dangerous = listed(map(str, safety.judge(parsed.globals).dangerous), 4)
    danger = f"; it would run code when loaded: {dangerous}" if dangerous else ""
    return f"{what}: {_content(parsed.tree)}{danger}", _hint(parsed, dangerous=bool(dangerous))


def pickled(reader: Reader, head: bytes) -> tuple[dict[Global, int], list[Object]]:
    """Return what a file that starts as a pickle names and calls, up to where it stops being one.

    Of any other file the head alone is read.
    """
    data = reader.read(0, min(reader.nbytes, MAX_READ)) if _is_pickle(head) else head
    try:
        parsed = pickle_reader.load(data)
    except FormatError as error:
        return error.named, error.calls
    return parsed.globals, parsed.calls


def _is_pickle(head: bytes) -> bool:
    """Check for the start of a pickle, and not by chance as a few letters of a text are one."""
    try:
        pickle_reader.load(head)
    except Ended as error:
        protocol = head[:1] == b"\x80" and len(head) > 1
        return protocol or (error.offset or 0) > SHORTEST
    except CkptoolError:
        return False
    return True


def _content(tree: Node) -> str:
    """Describe a value by the names of what is in it, or else by their kinds."""
    what = naming.what(tree)
    names = [name for name, _ in named_items(tree)]
    if names:
        return f"{what}, {listed(names, 6)}"
    if isinstance(tree, list | tuple) and tree:
        return f"{what}, {listed(dict.fromkeys(map(_kind, tree[:1000])), 4)}"
    return what


def _kind(node: Node) -> str:
    """Name the kind of a value, without the value."""
    if isinstance(node, Object):
        return naming.what(node)
    return type(node).__name__.lower().replace("nonetype", "None")


def _hint(parsed: Pickle, *, dangerous: bool) -> str:
    if Global("torch.storage", "_load_from_bytes") in parsed.globals:
        return "pickle.dump wrote tensors of torch: load it in Python, and torch.save it"
    tops = {name.module.partition(".")[0] for name in parsed.globals}
    library = next((library for top, library in _LIBRARIES.items() if top in tops), "")
    return f"{library} reads it" if library and not dangerous else ""
