"""The documents of downloads and of commands that run a model."""

from typing import Annotated as A, Any, Literal, TypedDict


class Download(TypedDict):
    """download: what was downloaded."""

    schema: Literal["download/1"]
    url: A[str, "without user, password and query"]
    path: A[str, "file written"]
    nbytes: A[int, "bytes of the file"]
    sha256: str
    resumed_from: A[int, "bytes that an earlier run had downloaded"]
    already_there: A[bool, "whether the file existed and was not downloaded"]
    checked: A[str, "what the content was compared with"]
    weights: A[str | None, "torchvision's name of the weights; null for a URL"]


class WeightsEntry(TypedDict):
    """Weights that torchvision has."""

    name: str
    model: str
    member: A[str, "member of torchvision's enum"]
    default: A[bool, "whether the bare model name means it"]
    url: str
    file: str
    sha256_prefix: A[str | None, "start of the sha256, from the file name"]
    nbytes: A[int | None, "bytes of the file"]
    parameters: A[int | None, "number of parameters"]
    top1: A[float | None, "accuracy on ImageNet in percent"]


class Weights(TypedDict):
    """download --list: torchvision's weights."""

    schema: Literal["weights/1"]
    weights: list[WeightsEntry]


class Layer(TypedDict):
    """A call of a module."""

    name: str
    kind: A[str, "class"]
    weight: A[list[int] | None, "shape of the weight; null if it has none"]
    kernel: A[list[int] | None, "the same with inputs before outputs"]
    output: A[list[int] | None, "shape of the output; null if the input does not reach it"]
    parameters: A[int, "number of parameters, counted where the module is called first"]
    trainable: A[int, "number of parameters that require gradients"]
    multiply_adds: int
    dtype: A[str, "dtype of the weight; empty if it has none"]
    repeated: A[bool, "whether the module was called before"]
    keys: A[list[str], "keys of the state_dict"]
    filled: A[int | None, "number of keys that the file fills; null without FILE"]


class Layers(TypedDict):
    """layers: the layers of a model."""

    schema: Literal["layers/1"]
    model: str
    inputs: A[str, "what the model was run on"]
    layers: list[Layer]
    parameters: int
    trainable: int
    multiply_adds: int
    file: A[str | None, "null without FILE"]
    missing: A[list[str], "keys of the model that the file does not have"]
    mismatched: A[list[str], "keys of both in different shapes"]
    unexpected: A[list[str], "keys of the file that the model does not have"]


class OutputDifference(TypedDict):
    """How far an output differs."""

    path: A[str, "which output; empty for the only one"]
    what: A[str, "what differs"]
    max_abs: A[float | None, "largest difference; null if it is not a finite number"]
    ulp: A[int | None, "largest difference in units in the last place; null if not a float"]
    nan: A[int, "number of NaNs that differ"]
    beyond: A[bool, "whether it exceeds the tolerance"]


class ClassOfPicture(TypedDict):
    """A likely class of a picture."""

    index: int
    name: str
    probability: A[float | None, "0 to 1"]


class Accuracy(TypedDict):
    """Accuracy over a folder of pictures."""

    count: A[int, "number of pictures"]
    reference: A[float, "share that is right, 0 to 1"]
    candidate: A[float | None, "null without CANDIDATE"]


class Setting(TypedDict):
    """A hyper-parameter in which two models differ."""

    name: str
    reference: Any
    candidate: Any
    modules: A[list[list[str]], "[module of the reference, module of the candidate]"]


class Run(TypedDict):
    """What was measured on a device."""

    device: str
    device_name: str
    identical: A[bool | None, "null if the reference is not deterministic, or without CANDIDATE"]
    deterministic: bool
    bitwise: A[bool, "whether all bytes of the outputs are equal, whatever the tolerance"]
    max_abs_diff: A[float | None, "largest difference; null if it is not a finite number"]
    max_ulp: A[int | None, "largest difference in units in the last place"]
    nan_differs: A[int, "number of NaNs that differ"]
    first_difference: A[str | None, "first module whose output differs; empty: the model itself"]
    differences: list[OutputDifference]
    parameters: A[list[str], "parameters that differ"]
    top1_agreement: A[float | None, "share of inputs with the same likeliest class, 0 to 1"]
    top_reference: list[ClassOfPicture]
    top_candidate: list[ClassOfPicture]
    accuracy: A[Accuracy | None, "null without --data"]
    modules: A[int, "number of modules compared"]
    seconds_reference: A[list[float], "of each forward pass after the first"]
    seconds_candidate: list[float]
    notes: list[str]
    verdict: A[str | None, "as of the whole; null without CANDIDATE"]
    why: A[str, "of inconclusive: nan, constant, independent, inside, not-deterministic"]
    differing: A[list[str], "modules whose outputs differ"]
    candidate_difference: A[str | None, "partner of first_difference in the candidate's model"]
    settings: list[Setting]


class Verify(TypedDict):
    """verify: the outputs of a model on two files."""

    schema: Literal["verify/1"]
    verdict: A[str | None, "identical, different or inconclusive; null without CANDIDATE"]
    identical: A[bool | None, "whether the verdict is identical; null without CANDIDATE"]
    reference: str
    candidate: str | None
    model: str
    inputs: A[str, "what the model was run on"]
    dtype: str
    torch: A[str, "version of torch"]
    left_out: A[list[str], "with --partial: modules that are not in both files"]
    notes: list[str]
    runs: A[list[Run], "one for each device"]
    candidate_model: A[str | None, "null if it is the same model"]
