"""`generate`: batches, ends, seeds, text; the files beside a model; the hand-off to onnxruntime-genai."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recipes
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from onnx_autoglm import UserError
from onnx_autoglm.genai_config import genai_config, write_genai_config
from onnx_autoglm.generate import Generator
from onnx_autoglm.model_folder import ModelFolder
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.sampling import Sampling

ROOT = Path(__file__).parents[1] / "build" / "models"
TEXTS = ["Hello", "a longer prompt, with 中文 in it", "x"]
END = "<|endoftext|>"


def byte_tokenizer() -> Tokenizer:
    """A token per byte, but the last one: that ends a text."""
    letters = sorted(ByteLevel.alphabet())[:255]
    words = Tokenizer(BPE({letter: index for index, letter in enumerate(letters)}, []))
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    words.add_special_tokens([AddedToken(END, special=True)])
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 256 tokens with a KV cache, and a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("model")
    for file in recipes.build("glm-gqa-op20-kv", ROOT).glob("model.onnx*"):
        shutil.copy(file, folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator.open(folder / "model.onnx")


def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    words = [str(argument) for argument in arguments]
    return subprocess.run(
        [sys.executable, "-m", "onnx_autoglm", "generate", *words],
        capture_output=True,
        text=True,
        input=stdin,
        check=False,
    )


def test_a_batch_is_each_of_its_prompts(generator: Generator) -> None:
    for sampling in (Sampling(temperature=0), Sampling(0.8, top_p=0.9, repetition_penalty=1.3)):
        together = generator.generate(TEXTS, 12, sampling)
        streamed = ["", "", ""]
        for row, piece in generator.stream(TEXTS, 12, sampling):
            streamed[row] += piece
        assert streamed == [one.text for one in together]
        for text, one in zip(TEXTS[:1], together, strict=False):
            prompt = np.array([generator.encode(text)])
            alone = generator.engine.decoder.generate(prompt, 12, sampling=sampling)[0].tolist()
            assert one.tokens == alone[: len(one.tokens)]
            assert one.finish == "stop" or len(one.tokens) == 12


def test_seeds(generator: Generator) -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [one.tokens for one in generator.generate(TEXTS, 12, Sampling(), seed)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_stop_texts(generator: Generator) -> None:
    (whole,) = generator.generate(["Hello"], 16, Sampling(), seed=3)
    stop = whole.text[4:6]
    (cut,) = generator.generate(["Hello"], 16, Sampling(), seed=3, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish == "stop"


def test_longer_than_the_context(folder: Path) -> None:
    generator = Generator.open(folder / "model.onnx", context=8)
    with pytest.raises(UserError, match="longer than the context of 8 tokens"):
        generator.generate(["Hello"], 4)
    assert len(generator.generate(["Hello"], 3)[0].tokens) == 3


def test_what_ends_a_text(folder: Path, tmp_path: Path) -> None:
    words = byte_tokenizer()
    assert ModelFolder(folder / "model.onnx").ends(words) == (frozenset([255]), "tokenizer.json")
    ends = ModelFolder(tmp_path / "model.onnx", folder / "tokenizer.json").ends
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "!"}}')
    assert ends(words) == (frozenset([words.token_to_id("!")]), "tokenizer_config.json")
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "max_position_embeddings": 99}')
    assert ends(words) == (frozenset([7]), "config.json")
    assert ModelFolder(tmp_path / "model.onnx").context() == 99
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ends(words) == (frozenset([7, 9]), "generation_config.json")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json.*mend it"):
        ends(words)


def test_the_command(folder: Path, generator: Generator) -> None:
    expected = generator.generate(TEXTS, 6)
    done = run(folder / "model.onnx", "--prompt", "Hello", "--max-tokens", "6")
    assert (done.returncode, done.stdout) == (0, expected[0].text + "\n"), done.stderr
    many = [word for text in TEXTS[1:] for word in ("--prompt", text)]
    done = run(folder / "model.onnx", "--prompt", "-", *many, "--max-tokens", "6", "--json", stdin="Hello")
    assert [row["tokens"] for row in json.loads(done.stdout)] == [one.tokens for one in expected]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "nothing to continue"),
        (["--prompt", "x", "--temperature", "-1"], "options: temperature: "),
        (["--prompt", "x", "--eos", "nonsense"], "has no such token"),
        (["--prompt", ""], "at least one token"),
        (["--prompt", "x", "--tokenizer", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_one_line(folder: Path, arguments: list[str], expected: str) -> None:
    done = run(folder / "model.onnx", *arguments)
    assert done.returncode == 1 and expected in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_tokenizer_tokens_still_work(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.onnx", tmp_path)
    generator = Generator.open(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="pass --tokenizer"):
        generator.generate(["x"])
    assert [row for row, event in generator.tokens([[1, 2], [3]], 1) if event.finish] == [0, 1]


def test_onnxruntime_genai_writes_the_same_tokens(folder: Path, generator: Generator, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    for file in folder.glob("model.onnx*"):
        shutil.copy(file, tmp_path)
    write_genai_config(tmp_path / "model.onnx", frozenset([255]))
    model = genai.Model(str(tmp_path))
    for text in TEXTS:
        prompt = generator.encode(text)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + 12, do_sample=False)
        other = genai.Generator(model, parameters)
        other.append_tokens(np.array([prompt], np.int32))
        while not other.is_done():
            other.generate_next_token()
        written = other.get_sequence(0)[len(prompt) :].tolist()
        assert [token for token in written if token != 255] == generator.generate([text], 12)[0].tokens


def test_a_hand_off_that_cannot_work_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass --eos"):
        genai_config(canonicalize(open_model(folder / "model.onnx")), "model.onnx", frozenset(), 64)
    plain = canonicalize(open_model(recipes.build("glm-gqa-op20", ROOT) / "model.onnx"))
    with pytest.raises(UserError, match="KV cache of one shape"):
        genai_config(plain, "model.onnx", frozenset([0]), 64)
    shutil.copy(folder / "model.onnx", tmp_path)
    assert run(tmp_path / "model.onnx", "--genai-config", "--eos", "255").returncode == 0
    again = run(tmp_path / "model.onnx", "--genai-config", "--eos", "255")
    assert again.returncode == 1 and "is there already" in again.stderr
