"""What the steps of a recipe mean, in plain torch, and recipes at random to judge ckptool by.

Nothing of ckptool is used. Keys here are names and numbers (`a.0.b.10.c`), so that a template
stands for a family: all keys that differ in their numbers alone.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

State = dict[str, torch.Tensor]
Step = tuple[str, Any]
LETTERS = "ijklmn"
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
CASTS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
MOVES = (
    "split fuse stack unstack transpose permute reshape squeeze unsqueeze rope interleave slice"
).split()


def family(key: str) -> str:
    """Return the template of a key: a letter for each number."""
    letters = iter(LETTERS)
    return re.sub(r"(?<=\.)\d+(?=\.|$)", lambda _: f"{{{next(letters)}}}", key)


def held(text: str, key: str) -> dict[str, str] | None:
    found = re.fullmatch(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(text)), key)
    return found.groupdict() if found else None


def filled(text: str, fields: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w)\}", lambda found: fields[found[1]], text)


# Steps.


def applied(state: State, step: Step) -> State:
    word, fields = step
    if word == "rename":
        return renamed(state, fields)
    if word in ("add", "strip"):
        cut = len(fields) if word == "strip" else 0
        return {("" if cut else fields) + key[cut:]: tensor for key, tensor in state.items()}
    if word in ("drop", "keep"):
        return {
            key: tensor
            for key, tensor in state.items()
            if (family(key) in fields) == (word == "keep")
        }
    if word == "cast":
        once = {id(tensor): cast(tensor, CASTS[fields["to"]]) for tensor in state.values()}
        return {key: once[id(tensor)] for key, tensor in state.items()}
    return joining(dict(state), word, fields) if "from" in fields else each(state, word, fields)


def cast(tensor: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    return tensor.to(to) if tensor.is_floating_point() else tensor


def renamed(state: State, rules: list[list[str]]) -> State:
    made = {}
    for key, tensor in state.items():
        found = ((new, held(old, key)) for old, new in rules)
        new = next((filled(new, fields) for new, fields in found if fields is not None), key)
        made[new] = tensor
    return made


def each(state: State, word: str, fields: Mapping[str, Any]) -> State:
    chosen = fields["keys"]
    return {
        key: remade(tensor, word, fields) if family(key) in chosen or key in chosen else tensor
        for key, tensor in state.items()
    }


def remade(tensor: torch.Tensor, word: str, fields: Mapping[str, Any]) -> torch.Tensor:
    rows, rest = tensor.shape[:1].numel(), tensor.shape[1:]
    match word:
        case "transpose":
            return tensor.transpose(*fields["dims"])
        case "permute":
            return tensor.permute(*fields["dims"])
        case "reshape":
            return tensor.reshape(fields["shape"])
        case "squeeze":
            return tensor.squeeze(fields["dim"])
        case "unsqueeze":
            return tensor.unsqueeze(fields["dim"])
        case "slice":
            numbers = torch.arange(tensor.shape[fields["dim"]])
            parts = [
                numbers[slice(*map(int, part.split(":")))] if ":" in part else [int(part)]
                for part in fields["rows"].split(",")
            ]
            wanted = [int(number) for part in parts for number in part]
            return tensor.index_select(fields["dim"], torch.tensor(wanted))
        case "rope":
            half = rows // fields["heads"] // 2
            pairs = (half, 2) if fields["to"] == "half" else (2, half)
            return tensor.reshape(fields["heads"], *pairs, *rest).transpose(1, 2).reshape_as(tensor)
        case "interleave":
            cut = (fields["parts"], fields["heads"], rows // fields["heads"] // fields["parts"])
            return tensor.reshape(*cut, *rest).transpose(0, 1).reshape_as(tensor)
    raise AssertionError(word)


def joining(state: State, word: str, fields: Mapping[str, Any]) -> State:
    """Apply a step of groups; where the new tensors stand is not said here."""
    source, target, dim = fields["from"], fields["to"], fields.get("dim", 0)
    sources = [source] if isinstance(source, str) else source
    groups: dict[str, dict[Any, tuple[str, dict[str, str]]]] = defaultdict(dict)
    for key in state:
        for number, text in enumerate(sources):
            if (found := held(text, key)) is not None:
                rest = {name: value for name, value in found.items() if name != "e"}
                member = int(found["e"]) if "e" in found else number
                groups[repr(sorted(rest.items()))][member] = key, found
    for members in groups.values():
        keys = [members[number][0] for number in sorted(members)]
        fields_held = next(iter(members.values()))[1]
        tensors = [state[key] if word in ("copy", "tie") else state.pop(key) for key in keys]
        match word:
            case "split":
                size = tensors[0].shape[dim] // len(target)
                parts = tensors[0].split(fields.get("sizes", size), dim)
                for text, part in zip(target, parts, strict=True):
                    state[filled(text, fields_held)] = part
            case "unstack":
                for number, part in enumerate(tensors[0].unbind(dim)):
                    state[filled(target, {**fields_held, "e": str(number)})] = part
            case "fuse":
                state[filled(target, fields_held)] = torch.cat(tensors, dim)
            case "stack":
                state[filled(target, fields_held)] = torch.stack(tensors, dim)
            case "copy":
                state[filled(target, fields_held)] = tensors[0].clone()
            case "tie":
                state[filled(target, fields_held)] = tensors[0]
    return state


def tied(state: Mapping[str, torch.Tensor]) -> set[frozenset[str]]:
    """Return the groups of keys whose tensors are one: the same elements of a storage."""
    places: dict[object, set[str]] = defaultdict(set)
    for key, tensor in state.items():
        if tensor.numel():
            places[tensor.data_ptr(), tensor.shape, tensor.dtype].add(key)
    return {frozenset(keys) for keys in places.values() if len(keys) > 1}


# Recipes at random.


class Draw:
    """A state_dict and a recipe for it, the same for a number each time."""

    def __init__(self, number: int, steps: int, back: bool) -> None:
        self.random = random.Random(number)
        torch.manual_seed(number)
        self.names = 0
        self.start = self.state = self.tensors()
        self.back = back
        self.recipe: list[Step] = []
        while len(self.recipe) < steps:
            self.add()

    def name(self) -> str:
        self.names += 1
        return f"x{self.names}"

    def tensors(self) -> State:
        made = {}
        for _ in range(self.random.randint(1, 4)):
            layers, experts = self.random.randint(1, 3), self.random.choice((1, 2, 11))
            shape = [self.random.choice((0, 1, 2, 3, 4, 6, 8)) for _ in range(self.dims())]
            dtype = self.random.choice(DTYPES)
            texts = (f"{self.name()}.{{i}}.w", f"{self.name()}.{{i}}.e.{{j}}.w", self.name())
            text = self.random.choice(texts)
            for i in range(layers if "{i}" in text else 1):
                for j in range(experts if "{j}" in text else 1):
                    key = text.replace("{i}", str(i)).replace("{j}", str(j))
                    made[key] = self.strided((torch.randn(shape) * 100).to(dtype))
        if self.random.random() < 0.3:
            made[self.name()] = made[self.random.choice(list(made))]
        keys = list(made)
        self.random.shuffle(keys)
        return {key: made[key] for key in keys}

    def dims(self) -> int:
        return self.random.randint(1, 3)

    def strided(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return it as it is, or as a view that a checkpoint may have."""
        match self.random.randint(0, 3):
            case 0:
                return tensor.transpose(0, -1).contiguous().transpose(0, -1)
            case 1:
                return torch.cat([tensor, tensor])[len(tensor) :]
        return tensor

    def families(self) -> dict[str, list[str]]:
        """Return families of tensors alike, those of which moves can be made."""
        found: dict[str, list[str]] = defaultdict(list)
        for key in self.state:
            found[family(key)].append(key)
        return {
            text: keys
            for text, keys in found.items()
            if len({(self.state[key].shape, self.state[key].dtype) for key in keys}) == 1
        }

    def add(self) -> None:
        """Add a step, if the word that was drawn fits a family that was drawn."""
        families = self.families()
        if not families:
            self.recipe.append(("add", "p."))
            self.state = applied(self.state, self.recipe[-1])
            return
        text = self.random.choice(list(families))
        words = [*("rename swap add copy tie".split()), *([] if self.back else ["drop", "cast"])]
        if not self.shared(families[text]):  # a step has to take all names of a tensor
            words += [each for each in MOVES if not (self.back and each == "slice")]
        word = self.random.choice(words)
        shape = list(self.state[families[text][0]].shape)
        step = getattr(self, f"a_{word}")(text, shape, families)
        if step is not None:
            self.recipe.append(step)
            self.state = applied(self.state, step)

    def dim(self, shape: list[int], more: int = 0) -> int | None:
        return self.random.randrange(len(shape) + more) if shape or more else None

    def a_rename(self, text: str, shape: list[int], families: Any) -> Step:
        return "rename", [[text, self.fresh(text)]]

    def fresh(self, text: str) -> str:
        """Return a template with the same numbers, and another name."""
        return ".".join([self.name(), *re.findall(r"\{\w\}", text), "t"])

    def a_swap(self, text: str, shape: list[int], families: Any) -> Step | None:
        fields = re.findall(r"\{\w\}", text)
        alike = [each for each in families if re.findall(r"\{\w\}", each) == fields]
        other = self.random.choice(alike)
        return None if other == text else ("rename", [[text, other], [other, text]])

    def a_add(self, *_: Any) -> Step:
        return "add", f"{self.name()}."

    def a_drop(self, text: str, shape: list[int], families: Any) -> Step | None:
        return ("drop", [text]) if len(families) > 2 and "{" not in text else None

    def a_copy(self, text: str, shape: list[int], families: Any) -> Step:
        return "copy", {"from": text, "to": self.fresh(text)}

    def a_cast(self, *_: Any) -> Step:
        return "cast", {"to": self.random.choice(list(CASTS))}

    def a_tie(self, text: str, shape: list[int], families: Any) -> Step:
        return "tie", {"from": text, "to": self.fresh(text)}

    def shared(self, keys: list[str]) -> bool:
        return any(group & set(keys) for group in tied(self.state))

    def a_split(self, text: str, shape: list[int], families: Any) -> Step | None:
        dim = self.dim(shape)
        if dim is None or shape[dim] < 2:
            return None
        fields = {"from": text, "to": [self.fresh(text), self.fresh(text)], "dim": dim}
        if shape[dim] % 2 or self.random.random() < 0.5:
            first = self.random.randint(1, shape[dim] - 1)
            fields["sizes"] = [first, shape[dim] - first]
        return "split", fields

    def a_fuse(self, text: str, shape: list[int], families: Any) -> Step | None:
        dim = self.dim(shape)
        alike = [
            other
            for other in families
            if other != text
            and not self.shared(families[other])
            and self.numbers(families[other]) == self.numbers(families[text])
            and self.fits(families[text][0], families[other][0], dim)
        ]
        if dim is None or not shape or not alike:
            return None
        other = self.random.choice(alike)
        lengths = [self.state[families[each][0]].shape[dim] for each in (text, other)]
        fields = {"from": [text, other], "to": self.fresh(text), "dim": dim}
        if lengths[0] != lengths[1] or self.random.random() < 0.5:
            fields["sizes"] = lengths
        if not all(lengths):
            return None
        return "fuse", fields

    def numbers(self, keys: list[str]) -> list[list[str]]:
        return sorted(re.findall(r"(?<=\.)\d+(?=\.|$)", key) for key in keys)

    def fits(self, one: str, other: str, dim: int | None) -> bool:
        first, second = self.state[one], self.state[other]
        shapes = [
            [size for at, size in enumerate(tensor.shape) if at != dim]
            for tensor in (first, second)
        ]
        return (first.ndim, first.dtype) == (second.ndim, second.dtype) and shapes[0] == shapes[1]

    def a_stack(self, text: str, shape: list[int], families: Any) -> Step | None:
        fields = re.findall(r"\{\w\}", text)
        if not fields:
            return None
        source = text.replace(fields[-1], "{e}")
        new = self.fresh(source.replace("{e}", ""))
        counts = defaultdict(set)
        for key in families[text]:
            got = held(source, key) or {}
            counts[repr({k: v for k, v in got.items() if k != "e"})].add(int(got["e"]))
        if any(numbers != set(range(len(numbers))) for numbers in counts.values()):
            return None
        if len({len(numbers) for numbers in counts.values()}) > 1:
            return None
        return "stack", {"from": source, "to": new, "over": "e", "dim": self.dim(shape, 1)}

    def a_unstack(self, text: str, shape: list[int], families: Any) -> Step | None:
        dim = self.dim(shape)
        if dim is None or not shape[dim] or len(re.findall(r"\{", text)) > 2:
            return None
        return "unstack", {"from": text, "to": f"{self.fresh(text)}.{{e}}", "over": "e", "dim": dim}

    def a_transpose(self, text: str, shape: list[int], families: Any) -> Step | None:
        if not shape:
            return None
        dims = [self.random.randrange(-len(shape), len(shape)) for _ in range(2)]
        return "transpose", {"keys": families[text], "dims": dims}

    def a_permute(self, text: str, shape: list[int], families: Any) -> Step | None:
        if not shape:
            return None
        dims = list(range(len(shape)))
        self.random.shuffle(dims)
        return "permute", {"keys": families[text], "dims": dims}

    def a_reshape(self, text: str, shape: list[int], families: Any) -> Step | None:
        if not shape:
            return None
        new = list(shape)
        if len(new) > 1:
            new[:2] = [new[0] * new[1]]
        elif new and new[0] % 2 == 0:
            new[:1] = [2, new[0] // 2]
        return "reshape", {"keys": families[text], "shape": new, "was": shape}

    def a_squeeze(self, text: str, shape: list[int], families: Any) -> Step | None:
        if 1 not in shape:
            return None
        return "squeeze", {"keys": families[text], "dim": shape.index(1)}

    def a_unsqueeze(self, text: str, shape: list[int], families: Any) -> Step:
        return "unsqueeze", {"keys": families[text], "dim": self.dim(shape, 1)}

    def a_slice(self, text: str, shape: list[int], families: Any) -> Step | None:
        dim = self.dim(shape)
        if dim is None or shape[dim] < 2:
            return None
        last = self.random.randrange(1, shape[dim])
        rows = self.random.choice((f"0:{last}", f"{last},0", f"0:{last},{last}", f"{last}"))
        return "slice", {"keys": families[text], "dim": dim, "rows": rows}

    def a_rope(self, text: str, shape: list[int], families: Any) -> Step | None:
        if not shape or shape[0] % 4:
            return None
        heads, to = self.random.choice((1, 2)), self.random.choice(("half", "interleaved"))
        return "rope", {"keys": families[text], "heads": heads, "to": to}

    def a_interleave(self, text: str, shape: list[int], families: Any) -> Step | None:
        if not shape or shape[0] % 4:
            return None
        return "interleave", {"keys": families[text], "heads": 2, "parts": 2}
