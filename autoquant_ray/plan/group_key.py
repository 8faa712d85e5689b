"""Which modules are scored as a group, by their names.

The rules are those of ModelOpt's searcher (``AutoQuantizeGradientSearcher.quant_grouping_rules`` of
0.47; 0.48 has no more that of DBRX's experts; a test compares them with the installed version) and
a last of ours. They
are written out here so that a plan can be made without ModelOpt, whose import takes longer than all
the rest of it.
"""

from __future__ import annotations

import re

_PARENTS = (
    r"^(.*?)\.(q_proj|k_proj|v_proj)$",
    r"^(.*?\.mlp\.experts)\.\d+\.(gate_proj|up_proj|down_proj)$",
    r"^(.*?\.mixer\.experts)\.\d+\.(up_proj|down_proj)$",
    r"^(.*?\.mlp\.experts\.local_experts)\.\d+\.(linear_fc1|linear_fc2)$",
    r"^(.*?)\.(gate_proj|up_proj)$",
    r"^(.*?)\.(\d+\.(w1|w2|w3))$",
    r"^(.*?)\.((w1_linear|w2_linear|w3_linear)\.\d+)$",
)
"""Patterns of names; what stands before the part that differs is the key."""

_LINEAR_ATTENTION = {
    "qkvz": r"^(.*?\.linear_attn)\.(?:in_proj_qkv|in_proj_z)$",
    "ba": r"^(.*?\.linear_attn)\.(?:in_proj_a|in_proj_b)$",
}
"""Which projections of linear attention vLLM fuses -> pattern of their names."""

_GATE_AND_UP = ("w1", "w3")


def group_key(name: str) -> str:
    """What the modules of a group have in common.

    Args:
        name: Of a module.

    Returns:
        The same text for all modules of a group; the name itself where it is alone.
    """
    for pattern in _PARENTS:
        if match := re.match(pattern, name):
            return match[1]
    for fused, pattern in _LINEAR_ATTENTION.items():
        if match := re.match(pattern, name):
            return f"{match[1]}/{fused}"
    # Engines fuse these as they do gate_proj and up_proj (LFM2), and ModelOpt has no rule for them.
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_GATE_AND_UP}" if last in _GATE_AND_UP else name
