"""The documents of commands that look at files."""

from typing import Annotated as A, Any, Literal, NotRequired, TypedDict

from ckptool.documents.shared import (
    At,
    Cast,
    Container,
    DTypeName,
    Key,
    MaybePart,
    NoAt,
    Shape,
    Total,
)


class Error(TypedDict):
    """Any command that fails, on stderr."""

    error: A[str, "slug of the error: not-a-checkpoint, output-exists, usage, interrupted ..."]
    message: A[str, "what is wrong, in one sentence"]
    evidence: A[list[str], "lines that show it: keys, candidates, calls of a pickle"]
    hint: A[str, "command or option that helps; may be empty"]
    exit: A[int, "exit code of the process"]


_Class = TypedDict("_Class", {"class": NotRequired[A[str, "class of a tensor subclass"]]})


class Tensor(_Class):
    """A tensor."""

    key: A[str, "key in the state_dict; with --all the path in the file"]
    dtype: DTypeName
    shape: Shape
    nbytes: A[int, "bytes of the elements"]
    layout: NotRequired[A[str, "of a tensor made of several: sparse_coo, per_tensor_affine ..."]]
    min: NotRequired[A[float | None, "with --stats: least finite value; null if there is none"]]
    max: NotRequired[A[float | None, "with --stats: largest finite value"]]
    mean: NotRequired[A[float | None, "with --stats: mean of the finite values, in float64"]]
    std: NotRequired[A[float | None, "with --stats: standard deviation (correction 0)"]]
    zeros: NotRequired[A[int, "with --stats: number of zeros"]]
    nan: NotRequired[A[int, "with --stats: number of NaNs"]]
    inf: NotRequired[A[int, "with --stats: number of infinities"]]


class Keys(TypedDict):
    """keys: the tensors of a checkpoint."""

    schema: Literal["keys/1"]
    file: A[str, "path or URL as given"]
    container: Container
    at: At
    module: A[str, "class of a whole model that was read as its state_dict; empty for a dict"]
    count: A[int, "number of tensors listed"]
    nbytes: A[int, "bytes of the tensors listed"]
    tensors: A[list[Tensor], "in file order, or as --sort says"]
    beside: A[list[str], "names of what else the file contains"]
    part: MaybePart
    arrays: A[list[Tensor], "arrays of numpy in the file, which are not tensors"]


class Candidate(Total):
    """A dict that may be the state_dict."""

    at: At
    stored: A[int, "bytes of the file that no other candidate needs"]
    prefix: A[str, "prefix that all keys share"]
    wrappers: A[list[str], "prefixes of wrappers that --prefix auto removes at the start"]
    inside: A[list[str], "those that it removes inside keys"]
    bookkeeping: A[list[str], "keys of a wrapper's own entries"]
    module: A[str, "class of a whole model; empty for a dict"]
    classes: A[dict[str, int], "number of modules of each class"]


class BesideValue(TypedDict):
    """What else the file contains."""

    name: str
    what: A[str, "the value if it is short, or its kind"]
    tensors: A[int, "number of tensors in it"]
    nbytes: A[int, "bytes of the tensors in it"]


class FileBytes(TypedDict):
    """Bytes of the file that are not those of the tensors counted."""

    other: A[int, "tensors outside the state_dict"]
    unused: A[int, "storages that no tensor uses"]
    unread: A[int, "records that nothing refers to"]
    structure: A[int, "pickle, headers, padding"]


class DangerousCall(TypedDict):
    """A call or name in a pickle that would run code."""

    what: A[str, "the call"]
    byte: A[int, "offset in the pickle"]
    at: A[str, "where its result is in the checkpoint; may be empty"]


class Suggestion(TypedDict):
    """A command that would help."""

    reason: str
    command: str


class Info(Total):
    """info: what a file is and what is in it."""

    schema: Literal["info/1"]
    file: A[str, "path or URL as given"]
    container: Container
    plugin: NotRequired[A[str, "package whose plugin read the file"]]
    generation: A[str, "torch that wrote it; empty if that cannot be told"]
    protocol: A[int | None, "protocol of the pickle; null if there is none"]
    byteorder: A[str, "little or big"]
    file_nbytes: A[int, "bytes of the file, or of all files of a set"]
    framework: A[str | None, "what saved it; null if that cannot be told"]
    part: MaybePart
    at: NoAt
    candidates: list[Candidate]
    dtypes: A[dict[str, Total], "totals by dtype"]
    wrappers: A[list[str], "prefixes that --prefix auto removes"]
    ties: A[dict[str, str], "key of a tied tensor: key that it is the same tensor as"]
    views: A[list[str], "keys of tensors that are part of a larger storage"]
    not_contiguous: A[list[str], "keys of tensors that are not contiguous"]
    requires_grad: A[int, "number of tensors that require gradients"]
    devices: A[dict[str, int], "number of storages by device"]
    module_metadata: A[bool, "whether the state_dict has _metadata (module versions)"]
    beside: A[list[str], "names of what else the file contains"]
    beside_values: list[BesideValue]
    bytes: FileBytes
    unread: A[list[str], "records that nothing refers to"]
    metadata: A[dict[str, str], "__metadata__ of safetensors"]
    safety: A[str, "plain, foreign, dangerous, or program"]
    imports: A[list[str], "modules that torch.load(weights_only=True) needs imported"]
    versions: A[list[str], "names that only some versions of torch accept"]
    globals: A[list[str], "names in the pickles"]
    foreign: A[list[str], "those that torch.load(weights_only=True) refuses"]
    dangerous: A[list[DangerousCall], "those that would run code"]
    notes: list[str]
    suggestions: list[Suggestion]


class DangerousName(TypedDict):
    """A call in a pickle that would run code."""

    module: str
    name: str
    arguments: A[list[str] | None, "null where it is named and not called"]
    pickle: A[str, "record of the file"]
    offset: A[int, "byte in the pickle"]
    at: A[str, "where its result is in the checkpoint; may be empty"]
    text: A[str, "the call in one line"]


class NotFinite(TypedDict):
    """A tensor with NaN or infinities."""

    key: Key
    nan: A[int, "number of NaNs"]
    inf: A[int, "number of infinities"]


class CheckedFile(TypedDict):
    """A file that was checked."""

    file: str
    status: A[str, "ok, damaged, unsafe, not-a-checkpoint, unsupported or too-large"]
    detail: A[str, "what was found"]
    container: A[str | None, "null if it is not a checkpoint"]
    safety: A[str | None, "plain, foreign, dangerous, program; null if it was not judged"]
    imports: A[list[str], "modules that torch.load(weights_only=True) needs imported"]
    versions: A[list[str], "names that only some versions of torch accept"]
    globals: A[list[str], "names in the pickles beyond the plain ones"]
    calls: list[DangerousName]
    part: MaybePart
    sha256: A[str | None, "null without --sha256"]
    not_finite: A[list[NotFinite], "with --finite"]
    cast: A[Cast | None, "what a cast would lose; null without --as"]
    notes: list[str]
    checked: A[list[str], "what was looked at"]
    not_checked: A[list[str], "what was not looked at"]


class NotCheckpoint(TypedDict):
    """A file of a folder that is not a checkpoint."""

    file: str
    detail: A[str, "what it is"]


class NotLookedAt(TypedDict):
    """A file that was not looked at."""

    file: str
    reason: str


class Check(TypedDict):
    """check: structure, checksums and safety of files."""

    schema: Literal["check/1"]
    files: list[CheckedFile]
    not_checkpoints: list[NotCheckpoint]
    not_looked_at: list[NotLookedAt]


class DiffSide(TypedDict):
    """One of two files."""

    file: str
    container: Container
    at: A[list[str] | None, "steps to the state_dict; null if tensors were compared by path"]


class Change(TypedDict):
    """What differs under a key of both: `left` and `right`, or of values how many and how far."""

    key: Key
    what: A[str, "dtype, shape, layout, quantizer, attributes, value or values"]
    left: NotRequired[str]
    right: NotRequired[str]
    equal_after_rounding: NotRequired[
        A[bool | None, "of a dtype: whether one rounded to the other's is that; null if unknown"]
    ]
    relative: NotRequired[A[float | None, "norm of the difference by that of the left tensor"]]
    cosine: NotRequired[A[float | None, "cosine similarity of both tensors; null if unknown"]]
    count: NotRequired[A[int, "elements that differ by more than the tolerance"]]
    of: NotRequired[A[int, "elements compared"]]
    within: NotRequired[A[int, "elements that differ within the tolerance"]]
    first: NotRequired[A[list[int] | None, "index of the first that differs"]]
    max_abs: NotRequired[A[float | None, "largest difference of finite values; null if none"]]
    max_ulp: NotRequired[A[int | None, "largest difference in units in the last place"]]
    nan_payloads: NotRequired[A[int, "NaN against another NaN"]]
    nan_one_side: NotRequired[A[int, "NaN against a number"]]
    zero_signs: NotRequired[A[int, "0.0 against -0.0"]]
    infinities: NotRequired[A[int, "infinity against anything else"]]


class Found(TypedDict):
    """What differs in a part of two checkpoints."""

    only_left: A[list[str], "keys that only the first file has"]
    only_right: A[list[str], "keys that only the second file has"]
    changed: list[Change]
    within_tolerance: A[list[Change], "values that differ within the tolerance"]


class Diff(Found):
    """diff: how two checkpoints differ."""

    schema: Literal["diff/1"]
    equal: A[bool, "whether nothing differs, but within the tolerance"]
    left: DiffSide
    right: DiffSide
    beside: A[Found, "the same for what is outside the state_dict"]
    tensors: A[int, "number of tensors compared"]
    nbytes: A[int, "bytes of the tensors compared"]
    structure: A[bool, "whether values were left out (--structure)"]
    atol: float
    rtol: float
    notes: list[str]


class PlotLayer(TypedDict):
    """A layer: sizes, with --stats the values of its largest tensor, or how far it moved."""

    module: A[str, "path of the layer, dotted"]
    tensors: A[list[str], "names of its tensors in it"]
    parameters: A[int, "number of elements"]
    nbytes: A[int, "bytes of the elements"]
    min: NotRequired[A[float | None, "least finite value; null if there is none"]]
    max: NotRequired[A[float | None, "largest finite value"]]
    mean: NotRequired[A[float | None, "mean of the finite values"]]
    std: NotRequired[A[float | None, "standard deviation (correction 0)"]]
    not_finite: NotRequired[A[int, "number of NaNs and infinities in all its tensors"]]
    quantiles: NotRequired[A[dict[str, float], "share of the elements: value that they are below"]]
    relative: NotRequired[A[float | None, "norm of the change by that of the first file's tensors"]]
    cosine: NotRequired[A[float | None, "cosine similarity of both; null if unknown"]]


class Plot(TypedDict):
    """plot: what a picture shows."""

    schema: Literal["plot/1"]
    kind: A[str, "sizes, values or change"]
    file: str
    other: A[str | None, "the second file; null if there is one"]
    tensors: A[int, "number of tensors"]
    parameters: A[int, "number of elements"]
    nbytes: A[int, "bytes of the elements"]
    layers: A[list[PlotLayer], "in file order"]
    notes: list[str]
    target: NotRequired[A[str, "picture that was written"]]


class Many(TypedDict):
    """keys and info of several files, edits into OUTDIR/: a document for each file."""

    schema: Literal["many/1"]
    files: A[
        list[dict[str, Any]],
        "the document of each file, or an error/1 with the field `file`, which has no `schema`",
    ]


class Show(TypedDict):
    """show: values of a tensor, or a plain value."""

    schema: Literal["show/1"]
    file: str
    key: A[str, "key or path of the value"]
    dtype: A[str | None, "null for a plain value"]
    shape: A[list[int] | None, "shape of all elements; null for a plain value"]
    values: A[Any, "row-major and flat; NaN and infinity as text, complex numbers as pairs"]
    truncated: A[bool, "whether values are left out"]
    kept_shape: A[list[int] | None, "shape of the values of a truncated tensor, else null"]
