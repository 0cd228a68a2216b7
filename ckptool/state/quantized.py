"""Quantized weights and their scales: what a cast leaves as it is, because it belongs together.

Packed integers, and float8 or smaller, mean nothing without the scales beside them. Those have no
mark of their own, so it is names that tell: `weight_scale_inv` (DeepSeek), `weight_scale` and
`input_scale` (compressed-tensors, FBGEMM, ModelOpt), `scales` and `qzeros` (GPTQ, AWQ, MLX), `SCB`
and `weight.absmax` (bitsandbytes), `weight._scale` (quanto), `weight_quantizer.scale` (Quark),
`k_scale` of an attention, `codebooks` (AQLM).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ckptool.pickles.subclasses import tensors_in
from ckptool.pickles.tree import Node
from ckptool.tensors.dtype import DType

_SCALE = re.compile("(?i)scale|absmax|amax|quant_map|zero|codebook|centroid|^scb$|^q?biases$")
_ZERO_POINT = "(?i)zero_?point"
_WITH_SCALE = {dtype for dtype in DType if dtype.quantized}  # torch keeps it in the tensor
# Not I64, which is that of counters and indices, nor BOOL, that of masks.
_PACKED = {
    *(DType.I8, DType.U8, DType.I16, DType.U16, DType.I32, DType.U32),
    *(dtype for dtype in DType if dtype.safetensors_name.startswith(("F4", "F6_", "F8_"))),
    *_WITH_SCALE,
}


def quantized(entries: Mapping[str, Node]) -> tuple[set[str], set[str]]:
    """Return the keys of quantized tensors, and those of their scales.

    A module is quantized where it has a packed tensor, and scales in it or directly below. Scales
    directly around it are its own too.
    """
    scales: dict[str, set[str]] = {}
    packed: dict[str, set[str]] = {}
    modules = set()
    for key, value in entries.items():
        module, _, name = key.rpartition(".")
        if module in entries:  # `weight.absmax` is beside `weight`
            module = _around(module)
        dtypes = {tensor.dtype for tensor in tensors_in(value)}
        is_scale = _SCALE.search(name)
        if is_scale:
            scales.setdefault(module, set()).add(key)
        if re.search(_ZERO_POINT, name) if is_scale else dtypes & _PACKED:
            packed.setdefault(module, set()).add(key)
        if dtypes & _WITH_SCALE:
            modules.add(module)
    modules |= packed.keys() & {*scales, *map(_around, scales)}
    near = modules | {*map(_around, modules)} - {""}
    weights = {key for module in modules for key in packed[module] - scales.get(module, set())}
    return weights, {
        key
        for module, keys in scales.items()
        if module in near or _around(module) in modules
        for key in keys
    }


def _around(module: str) -> str:
    return module.rpartition(".")[0]
