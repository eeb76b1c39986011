"""Small GLM-family graphs with random weights, one for each way such a model gets exported.

The architectures come from transformers. The list is not the full product of all settings (that
would be hundreds of graphs): each value of each setting occurs, and every pair that changes the
shape of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export import Target
from recipes import Recipe

HEADS, HEAD_SIZE, LAYERS = 8, 16, 2
KV_HEADS = {"mha": 8, "gqa": 2, "mqa": 1}


@dataclass(frozen=True)
class Variant:
    """One model and one way to export it."""

    target: Target
    architecture: str = "glm"  # glm, glm4 (sandwich norms), glm4moe
    kv: str = "gqa"  # a key of KV_HEADS
    bias: bool = False  # on the query, key and value projections
    dtype: str = "float32"
    attention: str = "eager"  # sdpa becomes one Attention node from opset 23 on
    expert_groups: int = 1
    qk_norm: bool = False

    @property
    def name(self) -> str:
        words = [
            self.architecture,
            self.kv,
            "bias" if self.bias else "",
            f"group{self.expert_groups}" if self.expert_groups > 1 else "",
            "qknorm" if self.qk_norm else "",
            self.target.suffix,
            "sdpa" if self.attention == "sdpa" else "",
            {"float32": "", "float16": "fp16", "bfloat16": "bf16"}[self.dtype],
        ]
        return "-".join(word for word in words if word)


def variants() -> list[Variant]:
    """The graphs that are worth having."""
    op17_legacy = Target(opset=17, legacy=True)
    op18, op20, op23 = Target(opset=18), Target(opset=20), Target(opset=23)
    op18_kv, op20_kv, op23_kv = (Target(opset=opset, cache=True) for opset in (18, 20, 23))
    return [
        Variant(op20),
        Variant(op20_kv),
        Variant(op23),
        Variant(op23, attention="sdpa"),
        Variant(op18),
        Variant(op18_kv),
        Variant(op23_kv),
        Variant(op23_kv, attention="sdpa"),
        Variant(op20, attention="sdpa"),
        Variant(op20, dtype="float16"),
        Variant(op20_kv, dtype="float16"),
        Variant(op20, dtype="bfloat16"),
        Variant(op23, dtype="bfloat16"),
        Variant(Target(opset=20, dynamic=False)),
        Variant(Target(opset=20, dynamic=False, cache=True)),
        Variant(Target(opset=20, optimize=False)),
        Variant(op17_legacy),
        Variant(op20, bias=True),
        Variant(op20, kv="mqa"),
        Variant(op23_kv, kv="mqa", bias=True),
        Variant(op20, kv="mha"),
        Variant(op18_kv, kv="mha", bias=True),
        Variant(op20, "glm4"),
        Variant(op20_kv, "glm4"),
        Variant(op23, "glm4", bias=True),
        Variant(op18, "glm4", kv="mha"),
        Variant(op23, "glm4", dtype="float16", attention="sdpa"),
        Variant(op20, "glm4moe"),
        Variant(op20_kv, "glm4moe"),
        Variant(op18, "glm4moe", qk_norm=True),
        Variant(op20, "glm4moe", expert_groups=2),
        # Its half-split rotary becomes a RotaryEmbedding node, which runs at batch one only.
        Variant(Target(opset=23, batch=1), "glm4moe", bias=True, expert_groups=2, attention="sdpa"),
    ]


def recipes() -> list[Recipe]:
    return [Recipe(v.name, "glm", partial(build, v), frozenset({"small", v.dtype})) for v in variants()]


def model(variant: Variant) -> Any:
    """The torch model of a variant, with random weights."""
    import torch
    import transformers
    from export import noise

    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": HEADS * HEAD_SIZE,
        "intermediate_size": 344,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS[variant.kv],
        "head_dim": HEAD_SIZE,
        "attention_bias": variant.bias,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "attn_implementation": variant.attention,
    }
    if variant.architecture == "glm4moe":
        settings |= {
            "first_k_dense_replace": 1,  # so that one layer is dense and one has experts
            "moe_intermediate_size": 72,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": variant.expert_groups,
            "topk_group": 1,
            "use_qk_norm": variant.qk_norm,
            "experts_implementation": "batched_mm",  # the default loops over data, which no exporter can
        }
    stem = {"glm": "Glm", "glm4": "Glm4", "glm4moe": "Glm4Moe"}[variant.architecture]
    config = getattr(transformers, f"{stem}Config")(**settings)
    result = getattr(transformers, f"{stem}ForCausalLM")(config)
    noise(result)
    return result.to(getattr(torch, variant.dtype))


def build(variant: Variant, folder: Path) -> None:
    from export import export_decoder

    export_decoder(model(variant), folder, variant.target)
