"""Tiny random models of transformers, for the types that have conversion rules of their own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightTransform
from transformers.models.auto import modeling_auto

# The fields by which the configurations of transformers give sizes, and what makes them tiny.
SIZES = {
    **dict.fromkeys("hidden_size d_model n_embd embed_dim dim out_hidden_size".split(), 32),
    **dict.fromkeys("intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim".split(), 48),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size".split(), 16),
    **dict.fromkeys("num_hidden_layers n_layer num_layers depth encoder_layers".split(), 2),
    **dict.fromkeys("decoder_layers encoder_hidden_layers num_encoder_layers".split(), 2),
    **dict.fromkeys("num_decoder_layers num_key_value_heads num_experts_per_tok".split(), 2),
    **dict.fromkeys("num_attention_heads num_heads n_head encoder_attention_heads".split(), 4),
    **dict.fromkeys("decoder_attention_heads num_experts num_local_experts".split(), 4),
    **dict.fromkeys("n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("qk_rope_head_dim qk_nope_head_dim mamba_d_state mamba_dt_rank".split(), 4),
    **dict.fromkeys("head_dim patch_size q_lora_rank kv_lora_rank v_head_dim".split(), 8),
    **dict.fromkeys("n_shared_experts n_group topk_group first_k_dense_replace".split(), 1),
    **dict.fromkeys("image_size projection_dim".split(), 32),
    **dict.fromkeys("vocab_size unpadded_vocab_size".split(), 101),
    "max_position_embeddings": 64,
    "max_source_positions": 16,
    "num_mel_bins": 8,
}
HEADS = (  # the first that holds a class for a configuration
    "IMAGE_TEXT_TO_TEXT",
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "MASKED_LM",
    "",
)
LARGEST = 40_000_000  # parameters of a model that is still built


def shrink(config: Any) -> Any:
    """Set the sizes that a configuration and those in it have, and return it."""
    for name, size in SIZES.items():
        if type(getattr(config, name, None)) is int:
            with suppress(AttributeError, ValueError):
                setattr(config, name, size)
    with suppress(AttributeError):
        if (config.pad_token_id or 0) > 0:
            config.pad_token_id = 0
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list):
            different = list(dict.fromkeys(kinds))
            with suppress(AttributeError):
                setattr(config, name, (different * 2)[: config.num_hidden_layers])
    for inner in list(vars(config).values()):
        if isinstance(inner, transformers.PretrainedConfig):
            shrink(inner)
    return config


def class_of(config: Any) -> type:
    """Return the class of a model for a configuration."""
    for head in HEADS:
        classes = getattr(modeling_auto, f"MODEL_{head and f'FOR_{head}_'}MAPPING")
        if type(config) in classes:
            found = classes[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise LookupError("no class of a model")


def rules_of(model: Any) -> list[WeightTransform]:
    """Return the rules that `save_pretrained` reverts for a model that was not loaded."""
    rules = get_model_conversion_mapping(model, add_legacy=False)
    return [rule for rule in rules if not isinstance(rule, PrefixChange)]


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"takes more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def tiny(model_type: str) -> Any:
    """Return a model with random weights, None for a type without rules."""
    config = shrink(transformers.AutoConfig.for_model(model_type))
    model_class = class_of(config)
    with torch.device("meta"):
        model = model_class(config)
    if not rules_of(model):
        return None
    size = sum(tensor.numel() for tensor in model.state_dict().values())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters, even so")
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
            elif tensor.dtype != torch.bool:
                tensor.copy_(torch.randint(100, tensor.shape))
    return model
