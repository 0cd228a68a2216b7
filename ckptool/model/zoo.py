"""A model spec -> `nn.Module`.

    resnet18                  torchvision's registry, any of its models, without weights
    path/to/file.py:factory   a function or class in a file
    package.module:factory    one that can be imported
    timm:NAME                 timm's registry, where timm is installed

A model's file is the user's own code and is run; nothing out of a checkpoint ever is. torchvision's
detection and segmentation builders download a backbone without `weights_backbone=None`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptool.errors import BadInput, MissingExtra, NoSuchModel, OutOfMemory
from ckptool.model import libraries
from ckptool.model.devices import is_out_of_memory
from ckptool.state.layouts import Layout, Shapes as Shapes

if TYPE_CHECKING:
    from torch import nn

TIMM = "timm:"
ModelLike: TypeAlias = "str | nn.Module"  # a spec, or a model in memory


def arguments(given: Sequence[str]) -> dict[str, Any]:
    """Read `name=value` texts; a value that is JSON is decoded, any other stays text."""
    read = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise BadInput(f"`{text}` is not name=value", hint="--model-arg num_classes=10")
        try:
            read[name] = json.loads(value)
        except ValueError:
            read[name] = value
    return read


def argument(name: str, value: Any) -> str:
    """Write an argument as `arguments` reads it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{name}={text}"


def named(spec: ModelLike) -> str:
    """Return the name of a model for messages: its spec, or the name of its class."""
    return spec if isinstance(spec, str) else type(spec).__name__


def build(spec: ModelLike, args: Mapping[str, Any] | None = None, device: str = "cpu") -> Any:
    """Make a model on `cpu`, or on `meta`, where it takes no memory; copy one that exists.

    Raises `NoSuchModel` for a spec that names nothing or no model, `BadInput` for a factory that
    fails, `MissingExtra` for a library that is not installed.
    """
    torch = libraries.torch()
    if not isinstance(spec, str):
        return _copied(spec, args, device)
    with _importable(spec):
        factory, fixed = _factory(spec)
        if isinstance(factory, torch.nn.Module):
            return _copied(factory, args, device, spec)
        with _explained(f"the model `{spec}` cannot be made"), torch.device(device):
            made = factory(**fixed, **(args or {}))
    if not isinstance(made, torch.nn.Module):
        raise NoSuchModel(
            f"`{spec}` gives a value of type {type(made).__name__}, not an nn.Module",
            hint="name a function or class that gives a model",
        )
    return made


def _copied(model: nn.Module, args: Mapping[str, Any] | None, device: str, spec: str = "") -> Any:
    if args:
        raise BadInput(f"`{spec or named(model)}` is a model already and takes no arguments")
    return copy.deepcopy(model).to(device)


def shapes(spec: ModelLike, args: Mapping[str, Any] | None = None) -> Shapes:
    """Return the shapes of the tensors of a model's state_dict, in order."""
    return layout(spec, args).shapes


def layout(spec: ModelLike, args: Mapping[str, Any] | None = None) -> Layout:
    """Return the shapes and dtypes of a model's state_dict, and which keys are tied to which.

    The model is made on the meta device, and on the CPU where its factory cannot do that.
    """
    try:
        model = build(spec, args, "meta")
    except BadInput:
        model = build(spec, args, "cpu")
    tensor = libraries.torch().Tensor
    tensors = {
        key: value
        for key, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, tensor)
    }
    firsts: dict[int, str] = {}
    ties = {key: firsts.setdefault(id(value), key) for key, value in tensors.items()}
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    dtypes = {key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()}
    return Layout(shapes, dtypes, ties)


def registered(spec: ModelLike) -> str | None:
    """Return the name under which torchvision knows a spec, None where it does not."""
    if not isinstance(spec, str) or ":" in spec or spec.endswith(".py") or os.sep in spec:
        return None
    return spec.lower() if spec.lower() in libraries.torchvision().models.list_models() else None


_Factory = tuple[Any, dict[str, Any]]  # a callable or a model, and its fixed arguments


def _factory(spec: str) -> _Factory:
    if spec.startswith(TIMM):
        return _timm(spec.removeprefix(TIMM))
    place, sign, name = spec.rpartition(":")
    if sign:
        module = _file(place) if _is_file(place) else _module(place)
        return _named(module, place, name), {}
    if _is_file(spec):
        raise NoSuchModel(
            f"`{spec}` names no factory",
            evidence=_choices(_file(spec)),
            hint=f"name it after a colon: {spec}:FACTORY",
        )
    return _torchvision(spec)


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place or os.path.isfile(place)


def _torchvision(name: str) -> _Factory:
    models = libraries.torchvision().models
    known = models.list_models()
    if name.lower() not in known:
        raise NoSuchModel(
            f"torchvision has no model `{name}`",
            evidence=_close(name.lower(), known),
            hint="a model of your own is FILE.py:FACTORY or package.module:FACTORY",
        )
    builder = models.get_model_builder(name)
    taken = inspect.signature(builder).parameters
    return builder, {name: None for name in ("weights", "weights_backbone") if name in taken}


def _timm(name: str) -> _Factory:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        reason = "this needs timm, which is not installed"
        raise MissingExtra(reason, hint="pip install timm") from error
    if not timm.is_model(name.partition(".")[0]):
        raise NoSuchModel(f"timm has no model `{name}`", evidence=_close(name, timm.list_models()))
    return timm.create_model, {"model_name": name, "pretrained": False}


def _close(name: str, known: Sequence[str]) -> list[str]:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=4, cutoff=0.6)
    return [f"did you mean {' or '.join(close)}"] if close else []


def _file(path: str) -> ModuleType:
    """Run a Python file as a module of its own; its folder is importable meanwhile."""
    real = os.path.realpath(path)
    if not os.path.isfile(real):
        raise NoSuchModel(f"there is no file {path}", hint="a spec is FILE.py:FACTORY")
    name = f"_ckptool_model_{abs(hash(real)):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, real)
    if spec is None or spec.loader is None:
        raise NoSuchModel(f"{path} is not a Python file", hint="a spec is FILE.py:FACTORY")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        with _explained(f"{path} cannot be run"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module(name: str) -> ModuleType:
    spec = None
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
    if spec is None:
        raise NoSuchModel(
            f"there is no module `{name}` to import",
            hint="a spec is package.module:FACTORY or FILE.py:FACTORY",
        )
    with _explained(f"the module {name} cannot be imported"):
        return importlib.import_module(name)


def _named(module: ModuleType, place: str, name: str) -> Any:
    factory: Any = module
    for step in name.split("."):
        factory = getattr(factory, step, None)
    if not callable(factory):
        choices = _choices(module)
        raise NoSuchModel(
            f"{place} has no function or class `{name}`",
            evidence=_close(name, choices) or choices[:8],
        )
    return factory


def _choices(module: ModuleType) -> list[str]:
    """List what a module defines itself and could be called."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]


@contextmanager
def _importable(spec: str) -> Iterator[None]:
    """Let a model's file import its neighbours, and a module be found in the current folder."""
    place, sign, _ = spec.rpartition(":")
    folder = os.path.dirname(os.path.realpath(place)) if _is_file(place) else os.getcwd()
    if not sign or spec.startswith(TIMM) or folder in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever code of the user's own raises into one line, and where it happened."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's advice on arguments nobody chose
            yield
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{what}: too little memory") from error
        raise BadInput(f"{what}: {last_line(error)}", evidence=_where(error)) from error


def last_line(error: BaseException) -> str:
    """Write an exception as the last line of its traceback, cut where it is long."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _where(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    others = [frame for frame in frames if os.path.dirname(__file__) not in frame.filename]
    return [f"{frame.filename}, line {frame.lineno}" for frame in others[-1:]]
