"""What a model is run on: seeded random tensors, a picture, or a folder of pictures by class.

Inputs are made on the CPU, so that they are the same whatever the device. Pictures go through the
transforms of torchvision's weights for the model, or through ImageNet's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ckptool.errors import BadInput, MissingExtra
from ckptool.model import libraries, zoo
from ckptool.model.zoo import ModelLike
from ckptool.records import dataclass
from ckptool.tensors import dtype as dtypes
from ckptool.tensors.dtype import DType
from ckptool.text import several

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision has them
DEFAULT_SHAPE = (1, 3, 224, 224)
VOCABULARY = 100  # random integers stay below: any table of tokens is longer
_SHAPE = re.compile(r"(\d+(?:[,x]\d+)*)(?::(\w+))?")
_FLOATS = (DType.F32, DType.F16, DType.BF16, DType.F64)


@dataclass(frozen=True, slots=True)
class Options:
    """What to run a model on; `shapes` are `1,3,224,224`, or `1,16:int64` for whole numbers."""

    shapes: str | Sequence[str] = ()
    batch_size: int | None = None
    picture: str | None = None
    folder: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Positional arguments of one forward pass, on the CPU; the true classes where known."""

    arguments: tuple[Any, ...]
    labels: Any = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Batches, what they are in words, and the names of classes where they are known.

    `source` returns the batches anew each time; `kind` is `random`, `picture` or `folder`. After
    them comes a random batch like the first: pictures may all be one, and outputs for one input do
    not show whether they depend on it.
    """

    kind: str
    what: str
    count: int
    source: Any
    classes: tuple[str, ...] = ()
    seed: int = 0

    def __iter__(self) -> Iterator[Batch]:
        first = None
        for batch in self.source():
            first = first or batch
            yield batch
        if first is not None:
            yield _like(first, self.seed + 1)

    @property
    def total(self) -> int:
        """Return the number of batches, with the random one at the end."""
        return self.count + 1

    def first(self) -> Batch:
        """Return the first batch."""
        batch: Batch = next(iter(self.source()))
        return batch


def make(spec: ModelLike, options: Options, args: Mapping[str, Any] | None = None) -> Inputs:
    """Make the inputs that the options describe, for a model made with `args`.

    Raises `BadInput` for what cannot be made.
    """
    if options.batch_size is not None and options.batch_size < 1:
        raise BadInput("a batch has at least one element")
    if sum((bool(options.shapes), options.picture is not None, options.folder is not None)) > 1:
        raise BadInput("--input-shape, --input and --data exclude each other")
    if options.picture is not None:
        made = _picture(spec, options.picture, options.batch_size or 1)
    elif options.folder is not None:
        made = _folder(spec, options.folder, options.batch_size or 32)
    else:
        made = _random(spec, options, args or {})
    return replace(made, seed=options.seed)


def dtype(name: str | None) -> Any:
    """Return the torch dtype of a name, None for None."""
    if name is None:
        return None
    found = dtypes.named(name)
    if found not in _FLOATS:
        hint = dtypes.suggestion(name, _FLOATS)
        raise BadInput(f"`{name}` is not a dtype to run a model in", hint=hint)
    return getattr(libraries.torch(), found.torch_name)


# Random.


def _random(spec: ModelLike, options: Options, args: Mapping[str, Any]) -> Inputs:
    asked = [_shape(text) for text in several(options.shapes)] or [(default_shape(spec, args), "")]
    if options.batch_size is not None:
        asked = [((options.batch_size, *sizes[1:]), kind) for sizes, kind in asked]
    torch = libraries.torch()
    generator = torch.Generator().manual_seed(options.seed)
    made = tuple(_drawn(torch, generator, sizes, kind) for sizes, kind in asked)
    what = ", ".join(str(list(sizes)) + (f" {kind}" if kind else "") for sizes, kind in asked)
    what = f"2 random inputs of {what}, seed {options.seed}"
    return Inputs("random", what, 1, lambda: [Batch(made)])


def _like(batch: Batch, seed: int) -> Batch:
    """Draw a batch of the shapes and dtypes of another."""
    torch = libraries.torch()
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tuple(each.shape), str(each.dtype).partition(".")[2]) for each in batch.arguments]
    return Batch(tuple(_drawn(torch, generator, *each) for each in sizes))


def _shape(text: str) -> tuple[tuple[int, ...], str]:
    match = _SHAPE.fullmatch(text.replace(" ", ""))
    if not match:
        raise BadInput(f"`{text}` is not a shape", hint="--input-shape 1,3,224,224, or 1,16:int64")
    return tuple(int(size) for size in re.split("[,x]", match[1])), match[2] or ""


def _drawn(torch: Any, generator: Any, sizes: tuple[int, ...], kind: str) -> Any:
    found = dtypes.named(kind) if kind else DType.F32
    dtype = getattr(torch, found.torch_name, None) if found else None
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f"`{kind}` is not a dtype", hint="--input-shape 1,16:int64")
    try:
        if dtype.is_floating_point:
            return torch.randn(sizes, generator=generator).to(dtype)
        high = 2 if dtype is torch.bool else VOCABULARY
        return torch.randint(high, sizes, generator=generator).to(dtype)
    except (RuntimeError, MemoryError) as error:
        raise BadInput(f"no input of shape {list(sizes)} can be made here") from error


def known_shape(spec: ModelLike) -> bool:
    """Check whether torchvision's registry has the shape that a model was trained on."""
    return bool(getattr(_transforms(spec), "crop_size", None))


def default_shape(spec: ModelLike, args: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Return the shape that a model takes, else the one that it was trained on where that is known.

    torchvision's default weights may be of another size than the model without them.
    """
    crop = getattr(_transforms(spec), "crop_size", None)
    if args or crop != [DEFAULT_SHAPE[-1]]:
        size = _fixed_size(spec, args or {})
        if size:
            return (*DEFAULT_SHAPE[:2], *size)
    if not crop:
        return DEFAULT_SHAPE
    builder = libraries.torchvision().models.get_model_builder(zoo.named(spec))
    frames = (16,) if "video" in builder.__module__ else ()
    return (1, 3, *frames, crop[0], crop[-1])


def _fixed_size(spec: ModelLike, args: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the height and width that a model of torchvision or timm was made for, if it says so.

    Those are `image_size` of torchvision's ViTs, `img_size` of timm's patches, and `input_size` of
    its other models.
    """
    model: Any = spec
    if isinstance(spec, str):
        if not (spec.startswith(zoo.TIMM) or zoo.registered(spec)):
            return None
        try:
            model = zoo.build(spec, args, "meta")
        except BadInput:  # as of what cannot be made there
            return None
    patches = getattr(model, "patch_embed", None)
    config = getattr(model, "default_cfg", None)
    found = getattr(model, "image_size", None) or getattr(patches, "img_size", None)
    if found is None and isinstance(config, dict):
        found = config.get("input_size")
    if isinstance(found, int):
        return found, found
    return (found[-2], found[-1]) if isinstance(found, tuple | list) and len(found) > 1 else None


def _weights(spec: ModelLike) -> Any:
    name = zoo.registered(spec)
    if name is None:
        return None
    try:
        return libraries.torchvision().models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):  # a model without weights
        return None


def _transforms(spec: ModelLike) -> Any:
    weights = _weights(spec)
    return weights.transforms() if weights is not None else None


# Pictures.


def _prepared(spec: ModelLike) -> Any:
    """Return the transforms that make a model's input of a picture."""
    of_weights = _transforms(spec)
    if of_weights is not None:
        return of_weights
    libraries.torchvision()
    from torchvision import transforms

    resized = [transforms.Resize(256), transforms.CenterCrop(224)]
    return transforms.Compose([*resized, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def _classes(spec: ModelLike) -> tuple[str, ...]:
    imagenet = libraries.torchvision().models.ResNet18_Weights.IMAGENET1K_V1
    weights = _weights(spec) or imagenet
    return tuple(weights.meta.get("categories") or ())


def _opened(path: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        reason = "a picture needs pillow, which is not installed"
        raise MissingExtra(reason, hint="pip install pillow") from error
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path} cannot be read as a picture: {zoo.last_line(error)}") from error


def _picture(spec: ModelLike, path: str, batch_size: int) -> Inputs:
    tensor = _prepared(spec)(_opened(path))
    batch = tensor.unsqueeze(0).expand(batch_size, *tensor.shape).contiguous()
    what = f"{os.path.basename(path)} as {list(batch.shape)}"
    return Inputs("picture", what, 1, lambda: [Batch((batch,))], _classes(spec))


def _folder(spec: ModelLike, path: str, batch_size: int) -> Inputs:
    libraries.torchvision()
    from torchvision.datasets import ImageFolder

    try:
        pictures = ImageFolder(path, transform=_prepared(spec), loader=_opened)
    except (OSError, RuntimeError) as error:
        raise BadInput(
            f"{path} holds no pictures by class: {zoo.last_line(error)}",
            hint="a folder of folders, one for each class, with pictures in them",
        ) from error
    count = -(-len(pictures) // batch_size)
    what = f"{len(pictures)} pictures of {len(pictures.classes)} classes in {path}"
    batches = partial(_batches, pictures, batch_size)
    return Inputs("folder", what, count, batches, tuple(pictures.classes))


def _batches(pictures: Any, batch_size: int) -> Iterator[Batch]:
    torch = libraries.torch()
    indices = range(len(pictures))
    for start in indices[::batch_size]:
        rows = (pictures[index] for index in indices[start : start + batch_size])
        tensors, labels = zip(*rows, strict=True)
        sizes = {tuple(tensor.shape) for tensor in tensors}
        if len(sizes) > 1:
            raise BadInput(f"the pictures have different sizes: {sorted(sizes)[:2]}")
        yield Batch((torch.stack(tensors),), torch.tensor(labels))
