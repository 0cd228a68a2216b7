"""Which training framework wrote a checkpoint, told by the names in it alone.

A row of the table gives names that must be at the top of the file (`a|b` is either), and what
gets the weights out where `ckptool unwrap` alone does not do. The names are those that each
framework's own saving code writes; nothing more is concluded than that a file looks like one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ckptool.pickles.tree import Global, Node, Object
from ckptool.records import dataclass
from ckptool.state import checkpoint as places
from ckptool.state.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Framework:
    """What a file looks like: the names seen, the prefix of the inner model, a word on it."""

    name: str
    seen: tuple[str, ...]
    prefix: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a row may look at: the names at the top, the keys, the text of safetensors."""

    top: Mapping[str, Node]
    keys: Sequence[str]
    metadata: Mapping[str, str]
    root: str

    def inside(self, name: str) -> list[str]:
        """Return the names one level down."""
        return [key for key, _ in places.named_items(self.top.get(name))]


Test = Callable[[Shape], bool]


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    names: str = ""
    also: Test | None = None
    prefix: str = ""
    note: str = ""


def _inside(name: str, *wanted: str) -> Test:
    """Make a test for any of some names in a dict at the top."""
    return lambda shape: any(each in shape.inside(name) for each in wanted)


def _said(*wanted: str) -> Test:
    """Make a test for any of some names, or starts of names, in safetensors' metadata."""
    return lambda shape: any(key.startswith(wanted) for key in shape.metadata)


def _keyed(*wanted: str) -> Test:
    """Make a test for keys of which each of some texts is a part of at least one."""
    return lambda shape: all(any(text in key for key in shape.keys) for text in wanted)


def _rooted(*wanted: str) -> Test:
    """Make a test for the class of the object that the file is, or the start of its name."""
    return lambda shape: shape.root.startswith(wanted)


def _version(name: str, value: Node) -> Test:
    return lambda shape: type(shape.top.get(name)) is type(value) and shape.top[name] == value


_EMA = "`{}` holds the averaged weights, which are the ones usually evaluated"

# The more particular stand first: the first row that fits is taken.
_ROWS = (
    _Row("PyTorch Lightning", "state_dict pytorch-lightning_version|hparams_name", prefix="model."),
    _Row("PyTorch Lightning", "state_dict hyper_parameters", prefix="model."),
    _Row("PyTorch Lightning", "state_dict loops callbacks", prefix="model."),
    _Row("DeepSpeed", "module ds_version|ds_config"),
    _Row("MMEngine (OpenMMLab)", "meta state_dict message_hub"),
    _Row("MMEngine (OpenMMLab)", "meta state_dict", _inside("meta", "mmengine_version")),
    _Row("mmcv (OpenMMLab)", "meta state_dict", _inside("meta", "mmcv_version", "mmdet_version")),
    _Row("Ultralytics YOLO", "model ema train_args", note=_EMA.format("ema")),
    _Row("Ultralytics YOLO", "model train_args"),
    _Row("YOLOv5", "model ema updates", note=_EMA.format("ema")),
    _Row("nanoGPT", "model model_args iter_num"),
    _Row("fairseq", "model args|cfg last_optimizer_state|optimizer_history|task_state"),
    _Row("OpenNMT-py", "model generator opt vocab|fields"),
    _Row("Megatron-LM", "model checkpoint_version iteration"),
    _Row("Megatron-LM", "model iteration opt_param_scheduler|num_floating_point_operations_so_far"),
    _Row("torchtune, a recipe in training", "model epochs_run|max_steps_per_epoch"),
    _Row("torchtune, the state of a recipe", "seed epochs_run total_epochs"),
    _Row("timm", "arch state_dict state_dict_ema", note=_EMA.format("state_dict_ema")),
    _Row("timm", "arch state_dict version metric|args", _version("version", 2)),
    _Row("detectron2", "model iteration optimizer|scheduler|__author__"),
    _Row("Opacus", "module_state_dict privacy_accountant_state_dict"),
    _Row("DINO", "student teacher", note=_EMA.format("teacher")),
    _Row("Whisper", "dims model_state_dict"),
    _Row("BasicSR", "params params_ema", note=_EMA.format("params_ema")),
    _Row("Coqui TTS", "model config step model_loss"),
    _Row("Chemprop 1", "args state_dict data_scaler"),
    _Row("RSL-RL", "model_state_dict optimizer_state_dict iter infos"),
    _Row("MoCo", "arch state_dict", _keyed("encoder_q.", "queue"), prefix="encoder_q."),
    _Row("the ImageNet example of PyTorch", "epoch arch state_dict best_acc1|best_prec1"),
    _Row("a training script of torchvision", "model optimizer lr_scheduler epoch args"),
    _Row("fastai", "model opt", lambda shape: len(shape.top) == 2),
    _Row("fastai, an exported Learner", also=_rooted("fastai.learner.", "fastai.basic_train.")),
    _Row("metatrain", "architecture_name model_state_dict|model_ckpt_version"),
    _Row("MACE", also=_rooted("mace.modules.")),
    _Row("DeePMD-kit", "model", _keyed(".atomic_model.", "_extra_state")),
    _Row("AllenNLP", also=_keyed("text_field_embedder")),
    _Row(
        "AllenNLP, the state of training",
        "batch_num_total metric_tracker|val_metric_per_epoch|optimizer",
        note="it holds no weights; those are in another file",
    ),
    _Row(
        "a graph of PyTorch Geometric",
        also=_rooted("torch_geometric.data."),
        note="it holds data, not the weights of a model",
    ),
    _Row("a LoRA of kohya's sd-scripts", also=_said("ss_network_", "ss_base_model_")),
    _Row("a LoRA of kohya's sd-scripts", also=_keyed("lora_down.weight", "lora_up.weight")),
    _Row(
        "an adapter of PEFT (LoRA)",
        also=_keyed("base_model.model.", ".lora_A", ".lora_B"),
        note="it holds what was added to a model, not the model",
    ),
    _Row("a LoRA of diffusers", also=_keyed(".lora_A.weight", ".lora_B.weight")),
    _Row("Stability AI's model metadata (modelspec)", also=_said("modelspec.")),
    _Row(
        "a textual inversion (diffusers)",
        also=lambda shape: len(shape.keys) == 1 and shape.keys[0].startswith("<"),
    ),
    _Row(
        "the arguments of transformers' Trainer",
        also=_rooted("transformers.training_args.TrainingArguments"),
        note="it holds no weights",
    ),
    _Row("a random state of transformers' Trainer", "python numpy cpu", note="it holds no weights"),
    _Row(
        "the state of a scheduler alone (scheduler.pt of transformers' Trainer)",
        "base_lrs last_epoch",
        note="it holds no weights; those are in another file",
    ),
    _Row(
        "the state of an optimizer alone",
        "state param_groups",
        note="it holds no weights; those are in another file",
    ),
)


def recognise(checkpoint: Checkpoint, keys: Sequence[str]) -> Framework | None:
    """Return which framework a checkpoint looks like; `keys` have no wrapper prefixes any more."""
    tree = checkpoint.tree
    root = tree.callee if isinstance(tree, Object) else None
    kind = str(root) if isinstance(root, Global) else ""
    shape = Shape(dict(places.named_items(tree)), keys, checkpoint.metadata, kind)
    for row in _ROWS:
        seen = _seen(row, shape)
        if seen is not None and (row.also is None or row.also(shape)):
            prefix = row.prefix if any(key.startswith(row.prefix) for key in keys) else ""
            return Framework(row.name, tuple(seen), prefix, row.note)
    return None


def _seen(row: _Row, shape: Shape) -> list[str] | None:
    """List the names of a row that are there, None where one is missing."""
    seen: list[str] = []
    for names in row.names.split():
        there = [name for name in names.split("|") if name in shape.top]
        if not there:
            return None
        seen += (_with_value(name, shape.top[name]) for name in there)
    return seen


def _with_value(name: str, value: Node) -> str:
    """Show the value of a version, as that tells most."""
    plain = isinstance(value, str | int | float) and "version" in name
    return f"{name} {str(value)[:20]}" if plain else name
