"""Small relatives of GLM with random weights: other decoders, an encoder, a vision transformer.

They show what an engine has understood and what it has only learned by heart.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from export import Target
from recipes import Recipe

HIDDEN, HEADS, HEAD_SIZE, INNER, VOCABULARY = 128, 8, 16, 344, 256
BATCH = {0: "batch"}
TOKENS = {0: "batch", 1: "sequence"}


def recipes() -> list[Recipe]:
    op20 = Target(opset=20)
    # A RotaryEmbedding node of opset 23 gets cos and sin of batch one, and runs at no other batch.
    op23 = Target(opset=23, batch=1)

    def recipe(architecture: str, target: Target = op20, attention: str = "eager") -> Recipe:
        words = [architecture, target.suffix, "sdpa" if attention == "sdpa" else ""]
        name = "-".join(word for word in words if word)
        return Recipe(
            name, "other", partial(build, architecture, target, attention), frozenset({"small", "float32"})
        )

    return [
        recipe("llama"),
        recipe("llama", Target(cache=True)),
        recipe("llama", op23, "sdpa"),
        recipe("qwen2"),
        recipe("qwen3"),
        recipe("gpt2"),
        recipe("gpt_neox"),
        recipe("bert"),
        recipe("vit"),
    ]


def settings(architecture: str) -> tuple[str, dict[str, Any]]:
    """The transformers class that models `architecture`, and its configuration."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 512,
    }
    grouped = common | {"num_key_value_heads": 2, "head_dim": HEAD_SIZE}
    match architecture:
        case "llama":
            return "LlamaForCausalLM", grouped
        case "qwen2":
            return "Qwen2ForCausalLM", grouped
        case "qwen3":
            return "Qwen3ForCausalLM", grouped
        case "gpt2":
            sizes = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": 2, "n_inner": INNER, "n_positions": 512}
            sizes |= {"bos_token_id": 0, "eos_token_id": 1}
            return "GPT2LMHeadModel", {"vocab_size": VOCABULARY, **sizes}
        case "gpt_neox":
            return "GPTNeoXForCausalLM", common
        case "bert":
            return "BertForSequenceClassification", common | {"num_labels": 3}
        case "vit":
            return "ViTForImageClassification", common | {"image_size": 32, "patch_size": 8, "num_labels": 3}
    raise ValueError(f"unknown architecture {architecture!r}")


def build(architecture: str, target: Target, attention: str, folder: Path) -> None:
    import transformers
    from export import export, export_decoder, noise

    head, options = settings(architecture)
    kind = getattr(transformers, head)
    if architecture == "vit":
        del options["vocab_size"], options["max_position_embeddings"]
    model = kind(kind.config_class(**options, attn_implementation=attention))
    noise(model)
    if head.endswith("Classification"):
        inputs, axes = classifier_inputs(architecture, target)
        export(first_output(model), folder, inputs, ["logits"], axes, target)
    else:
        export_decoder(model, folder, target)


def classifier_inputs(architecture: str, target: Target) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    """Sample inputs of an encoder and their dynamic axes."""
    import torch
    from export import token_inputs

    if architecture == "vit":
        pixels = torch.randn(target.batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": pixels}, {"pixel_values": BATCH}
    inputs = token_inputs(VOCABULARY, target)
    return inputs, {name: TOKENS for name in inputs}


def first_output(model: Any) -> Any:
    """`model` as a module that takes tensors by position and returns its logits."""
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, first, mask=None):  # type: ignore[no-untyped-def]
            result = self.encoder(first) if mask is None else self.encoder(first, mask)
            return result.logits

    return Classifier()
