"""`eval` as users run it and as Python calls it; BLEU and ROUGE; one trained model."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model
from test_cli import run
from test_data import word_text
from test_quality import CLASSIFIER, LANGUAGE, labelled

from onnx_autoglm import Evaluation, UserError, evaluate, optimize
from onnx_autoglm.continuations import cut_prompts, score_texts

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """model.onnx and other.onnx, a text with a tokenizer, and labelled samples for class.onnx and class2.onnx."""
    ir.save(model(LANGUAGE), tmp_path / "model.onnx")
    ir.save(model(LANGUAGE, seed=1), tmp_path / "other.onnx")
    ir.save(model(CLASSIFIER), tmp_path / "class.onnx")
    ir.save(model(CLASSIFIER, seed=1), tmp_path / "class2.onnx")
    word_text(tmp_path, 100)
    data = labelled()
    assert data.labels is not None
    np.savez(tmp_path / "set.npz", x=data.feeds[0]["x"], labels=data.labels[0])
    return tmp_path


def test_a_language_model_alone(folder: Path) -> None:
    found = evaluate(folder / "model.onnx", folder / "words.txt", window=20, tokens=70)
    assert isinstance(found, Evaluation) and found.metric == "perplexity"
    assert found.quality is not None and found.quality.tokens == 3 * 19  # type: ignore[union-attr]
    assert found.reference is found.agreement is found.kl is found.ratio is found.continuations is None
    assert found.data["name"] == "words.txt" and found.data["rows"] == 60


def test_beside_a_reference(folder: Path) -> None:
    models = {"model": folder / "other.onnx", "reference": folder / "model.onnx"}
    found = evaluate(data=folder / "words.txt", window=20, **models)
    alone = evaluate(folder / "model.onnx", folder / "words.txt", window=20)
    assert found.reference_quality == alone.quality != found.quality
    assert found.agreement is not None and found.kl is not None and found.kl > 0 and found.agreement < 1
    assert found.ratio == found.quality.perplexity / alone.quality.perplexity  # type: ignore[union-attr]


def test_the_pruned_model_takes_the_tokenizer_of_its_reference_and_agrees_with_the_report(
    folder: Path,
) -> None:
    out = folder / "out"
    report = optimize(
        folder / "model.onnx", out, prune={"ffn-channel": 0.5}, eval=folder / "words.txt", window=20
    )
    found = evaluate(
        out / "model.onnx", folder / "words.txt", reference=folder / "model.onnx", window=20
    ).as_json()
    assert (found["agreement"], found["kl"]) == (report.quality["agreement"], report.quality["kl"])
    assert found["quality"] == report.quality["result"]
    assert found["data"] == report.quality["data"]


def test_the_command_prints_a_table_or_json_and_writes_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    words = (
        "eval",
        folder / "class2.onnx",
        "--data",
        folder / "set.npz",
        "--reference",
        folder / "class.onnx",
    )
    table = run(*words)
    assert table.returncode == 0, table.stderr
    assert "top-5" in table.stdout and "agrees with the reference on" in table.stdout
    data = json.loads(run(*words, "--json").stdout)
    assert data["format"] == "onnx-autoglm/evaluation" and data["metric"] == "top-1"
    assert data["quality"]["samples"] == data["reference_quality"]["samples"] == 40
    assert data["ratio"] == pytest.approx(data["quality"]["top1"] / data["reference_quality"]["top1"])
    assert sorted(folder.iterdir()) == before
    assert "KL(reference" in run("eval", "--help").stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "no.txt"], "no.txt does not exist"),
        (["--data", "words.txt", "--window", "1"], "--window 1 is too small"),
        (["--data", "words.txt", "--generate", "0"], "--generate 0 is too small"),
        (["--data", "words.txt", "--generate", "60"], "needs windows of at least 120 tokens"),
        (["--data", "words.txt", "--tokenizer", "no.json"], "there is none (no.json): pass --tokenizer"),
        (["--data", "words.txt", "--reference", "class.onnx"], "has none"),
        (["--data", "words.txt", "--preprocess", "size=8"], "--preprocess is for images"),
        (["--data", "words.txt", "--reference", "no.onnx"], "no.onnx"),
    ],
)
def test_what_cannot_be_measured(folder: Path, words: list[str], expected: str) -> None:
    done = run("eval", "model.onnx", *words, cwd=folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr and expected in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_infinite_divergence_is_null_in_json(folder: Path) -> None:
    never = CLASSIFIER.replace("y = MatMul(r, c)", "z = MatMul(r, c) y = Add(z, low)").replace(
        "float[12,7] c>", "float[12,7] c, float[7] low>"
    )
    low = np.array([0] * 6 + [-np.inf], np.float32)
    ir.save(model(never, weights={"low": low}), folder / "never.onnx")
    words = (
        "eval",
        folder / "never.onnx",
        "--data",
        folder / "set.npz",
        "--reference",
        folder / "class.onnx",
    )
    assert json.loads(run(*words, "--json").stdout)["kl"] is None
    assert "KL inf nats" in run(*words).stdout


def test_samples_without_labels_need_a_reference(folder: Path) -> None:
    np.savez(folder / "plain.npz", x=labelled().feeds[0]["x"])
    with pytest.raises(UserError, match="pass --reference"):
        evaluate(folder / "class.onnx", folder / "plain.npz")
    found = evaluate(folder / "class.onnx", folder / "plain.npz", reference=folder / "class2.onnx")
    assert found.metric == "agreement" and found.quality is None and found.agreement == found.ratio
    assert (
        found.agreement
        == evaluate(folder / "class.onnx", folder / "set.npz", reference=folder / "class2.onnx").agreement
    )


@pytest.mark.parametrize("data", ["words.txt", "sample.npz"])
def test_a_result_whose_caches_shrank_is_judged_on_caches_that_fit(tmp_path: Path, data: str) -> None:
    import recipes

    source = recipes.build("glm-gqa-op18-kv", ROOT / "build/models") / "model.onnx"
    word_text(tmp_path, 100)
    (tmp_path / "sample.npz").write_bytes(source.with_name("sample.npz").read_bytes())
    report = optimize(
        source,
        tmp_path / "out",
        prune={"kv-group": 0.5},
        eval=tmp_path / data,
        tokenizer=tmp_path / "tokenizer.json",
    )
    assert any("past_key_values" in note for note in report.notes)
    assert 0 < report.quality["kl"] < 5 and report.quality["positions"] > 0
    assert report.quality["metric"] == ("perplexity" if data == "words.txt" else "agreement")


# --- continuations


def test_prompts_are_first_halves_spread_over_the_text() -> None:
    rows = [np.arange(10) + 10 * index for index in range(9)]
    prompts, truth = cut_prompts(rows, tokens=3, limit=3)
    assert prompts.tolist() == [list(range(at, at + 5)) for at in (0, 40, 80)]
    assert truth.tolist() == [[5, 6, 7], [45, 46, 47], [85, 86, 87]]
    assert len(cut_prompts(rows, tokens=5, limit=100)[0]) == 9
    with pytest.raises(UserError, match="--window 12"):
        cut_prompts(rows, tokens=6, limit=3)


def test_bleu_and_rouge_are_those_of_the_libraries() -> None:
    pytest.importorskip("rouge_score")
    sacrebleu = pytest.importorskip("sacrebleu")
    written, truth = ["the cat sat on a mat", "a b c d"], ["the cat sat on the mat", "e f g h"]
    found = score_texts(written, truth)
    assert found.bleu == pytest.approx(sacrebleu.corpus_bleu(written, [truth]).score) and found.bleu > 0
    assert found.rouge_l == pytest.approx(100 * (5 / 6 + 0) / 2) and found.words == "13a"
    same = score_texts(truth, truth)
    assert same.bleu == pytest.approx(100) and same.rouge_l == pytest.approx(100)


def test_chinese_is_counted_by_character() -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    found = score_texts(["今天天气很好"], ["今天天气不好"])
    assert found.words == "zh" and found.rouge_l == pytest.approx(100 * 5 / 6) and found.bleu > 0


class Counting:
    """Stands for the decoder: continues a prompt by repeating its last token."""

    made: ClassVar[list[ir.Model]] = []

    def __init__(self, model: ir.Model) -> None:
        self.made.append(model)

    def generate(
        self, prompts: np.ndarray, tokens: int, *, sampling: object = None, seed: int = 0
    ) -> np.ndarray:
        assert prompts.dtype == np.int64 and prompts.ndim == 2
        return np.repeat(prompts[:, -1:], tokens, axis=1)


def test_continuations_are_scored_against_the_text_and_the_reference(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    stub = types.ModuleType("onnx_autoglm.decode")
    stub.Decoder = Counting  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnx_autoglm.decode", stub)
    monkeypatch.setattr(Counting, "made", [])
    found = evaluate(
        folder / "model.onnx",
        folder / "words.txt",
        reference=folder / "other.onnx",
        window=20,
        generate=8,
        prompts=3,
    )
    made = found.continuations
    assert made is not None and len(Counting.made) == 2
    assert (made["prompts"], made["prompt_tokens"], made["tokens"]) == (3, 10, 8)
    assert made["scores"]["model_against_reference"]["rouge_l"] == pytest.approx(100)
    assert made["scores"]["model_against_text"] == made["scores"]["reference_against_text"]
    assert made["scores"]["model_against_text"]["rouge_l"] < 50
    with pytest.raises(UserError, match="--generate continues texts"):
        evaluate(folder / "class.onnx", folder / "set.npz", generate=4)


def test_missing_libraries_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(UserError, match=r"rouge_score is missing\): pip install 'onnx-autoglm\[eval\]'"):
        evaluate(folder / "model.onnx", folder / "words.txt", window=20, generate=8)


# --- a trained model


@pytest.mark.slow
def test_a_trained_model_and_its_pruned_self(tmp_path: Path) -> None:
    source = ROOT / "build/models/smollm2-glm/model.onnx"
    if not source.exists():
        pytest.skip("python models/build.py smollm2-glm -o build/models")
    text = ROOT / "models/texts/novel.txt"
    report = optimize(
        source, tmp_path / "out", prune={"ffn-channel": 0.02}, eval=text, eval_tokens=1024, window=256
    )
    found = evaluate(tmp_path / "out/model.onnx", text, reference=source, tokens=1024, window=256)
    assert found.reference_quality is not None and found.quality is not None
    assert 20 < found.reference_quality.perplexity < 80  # type: ignore[union-attr]
    assert found.reference_quality.accuracy > 0.25  # type: ignore[union-attr]
    assert found.ratio is not None and found.ratio > 1
    assert found.kl is not None and found.agreement is not None and found.kl > 0.01 and found.agreement < 0.99
    assert found.agreement == report.quality["agreement"] and found.ratio == pytest.approx(
        report.quality["ratio"]
    )
