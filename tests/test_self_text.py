"""Calibration text that the model writes itself: what it is, when it is written, and when it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import recipes
from helpers import model

from onnx_autoglm import UserError, optimize, self_text
from onnx_autoglm.data import Dataset
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.self_text import write_text, write_texts

ROOT = Path(__file__).parents[1] / "build" / "models"
MLP = "g (float[n,6] x) => (float[n,4] y) <float[6,12] a, float[12,4] c> { h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"
FFN: dict[str, Any] = {"prune": {"ffn-channel": 0.5}}


def path_of(name: str) -> Path:
    return recipes.build(name, ROOT) / "model.onnx"


def opened(name: str) -> ir.Model:
    return canonicalize(open_model(path_of(name)))


def tokens_of(data: Dataset) -> np.ndarray:
    assert data.token_input is not None
    return np.concatenate([feed[data.token_input] for feed in data])


@pytest.mark.parametrize("name", ["glm-gqa-op20", "glm-gqa-op20-kv"])
def test_the_same_seed_writes_the_same_text(name: str) -> None:
    source = opened(name)
    first, again, other = (write_text(source, tokens=1024, window=64, seed=seed) for seed in (0, 0, 1))
    assert first.name == "self-written" and first.rows == 1024 and len(first.feeds) == 16
    assert first.sha256 == again.sha256 != other.sha256
    assert np.array_equal(tokens_of(first), tokens_of(again))
    assert not first.samples & other.samples
    (feed, *_) = first
    assert set(feed) == {value.name for value in source.graph.inputs}
    assert feed["input_ids"].shape == (1, 64) and feed["attention_mask"].shape == (1, 64)


def test_it_is_text_of_the_model_not_noise() -> None:
    """The model finds its own text more likely than random tokens."""
    from onnx_autoglm.quality import measure

    source = opened("glm-gqa-op20-kv")
    written = write_text(source, tokens=4096, window=128, seed=0)
    noise = np.random.default_rng(0).integers(0, 256, (32, 128))
    feeds = tuple({**feed, "input_ids": row[None]} for feed, row in zip(written, noise, strict=True))
    random = Dataset("noise", "", noise.size, feeds, "input_ids")
    assert measure(source, written).perplexity < 0.8 * measure(source, random).perplexity


def test_several_texts_share_no_row() -> None:
    first, second = write_texts(opened("glm-gqa-op20-kv"), tokens=[1024, 640], window=64, seed=0)
    assert (first.rows, second.rows) == (1024, 640)
    assert not first.samples & second.samples


def test_without_a_cache_rows_are_short_and_text_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text, "MOST_TOKENS_UNCACHED", 1024)
    lengths: list[int] = []
    generate = self_text.Decoder.generate

    def watched(decoder: Any, prompts: np.ndarray, tokens: int, **rest: Any) -> np.ndarray:
        lengths.append(tokens)
        return generate(decoder, prompts, tokens, **rest)

    monkeypatch.setattr(self_text.Decoder, "generate", watched)
    data = write_text(opened("glm-gqa-op20"), tokens=4096, window=64, seed=0)
    assert (data.rows, len(data.feeds), lengths) == (1024, 16, [31])


def test_there_are_always_enough_runs_for_statistics() -> None:
    assert len(write_text(opened("glm-gqa-op20-kv"), tokens=128, window=64, seed=0).feeds) == 10


# --- in optimize


def test_a_language_model_learns_from_its_own_text_by_default(tmp_path: Path) -> None:
    report = optimize(path_of("glm-gqa-op20-kv"), tmp_path / "out", **FFN, calib_tokens=2048, window=64)
    assert report.repair["method"] == "affine" and report.repair["calibration"]["name"] == "self-written"
    assert report.repair["calibration"]["rows"] == 2048
    assert next(entry for entry in report.passes if entry["name"] == "score")["criterion"] == "obs"
    assert next(entry for entry in report.passes if entry["name"] == "write text")["tokens"] == 2048
    assert report.quality["data"]["name"] == "self-written, held out"
    assert report.quality["data"]["rows"] == 4096 and report.quality["ratio"] > 0.9
    assert any("2,048 tokens that the model wrote itself" in note for note in report.notes)


def test_a_cut_cache_is_measured_too(tmp_path: Path) -> None:
    report = optimize(
        path_of("glm-gqa-op20-kv"), tmp_path / "out", prune={"kv-group": 0.5}, calib_tokens=1024, window=64
    )
    assert report.quality["ratio"] > 0.9


def refuse_to_write(*_: Any, **__: Any) -> list[Dataset]:
    raise AssertionError("text was written")


@pytest.mark.parametrize("given", [{"criterion": "l2", "repair": "none"}, {"calib": "none"}])
def test_no_text_is_written_that_nobody_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    monkeypatch.setattr("onnx_autoglm.evidence.write_texts", refuse_to_write)
    report = optimize(path_of("glm-gqa-op20-kv"), tmp_path / "out", **FFN, **given)
    assert report.repair == {"method": "none", "consumers": [], "calibration": None} and not report.quality
    assert next(entry for entry in report.passes if entry["name"] == "score")["criterion"] == "l2"
    assert not any("itself" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "why"), [("bert-op20", "next-token scores"), ("glm-gqa-op20-static", "exactly 5 tokens")]
)
def test_a_model_that_cannot_write_is_pruned_by_norms_and_a_note_says_why(
    tmp_path: Path, name: str, why: str
) -> None:
    report = optimize(path_of(name), tmp_path / "out", **FFN)
    assert report.repair["method"] == "none" and not report.quality
    (note,) = [note for note in report.notes if "cannot write its own" in note]
    assert why in note


def test_asked_for_it_is_an_error_where_it_cannot_be(tmp_path: Path) -> None:
    ir.save(model(MLP), tmp_path / "model.onnx")
    with pytest.raises(UserError, match="--calib self: the model has no token input .* pass --calib PATH"):
        optimize(tmp_path / "model.onnx", tmp_path / "out", **FFN, calib="self")
    with pytest.raises(UserError, match="obs needs calibration data.*no token input"):
        optimize(tmp_path / "model.onnx", tmp_path / "out", **FFN, criterion="obs")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_real_model_prunes_well_on_its_own_text(tmp_path: Path) -> None:
    """On real text, which it never saw: the norms alone make it thousands of times worse."""
    from onnx_autoglm.data import load_dataset
    from onnx_autoglm.quality import measure

    source = path_of("smollm2-glm-kv")
    report = optimize(
        source, tmp_path / "out", prune={"ffn-channel": 0.2}, calib="self", calib_tokens=4096, window=128
    )
    assert 1 < report.quality["ratio"] < 1.6
    text = Path(__file__).parents[1] / "models" / "texts" / "speech.txt"
    perplexities = []
    for path in (source, tmp_path / "out" / "model.onnx"):
        opened_model = canonicalize(open_model(path))
        tokenizer = source.with_name("tokenizer.json")
        data = load_dataset(text, opened_model, tokenizer=tokenizer, window=256, limit=2048)
        perplexities.append(measure(opened_model, data).perplexity)
    assert perplexities[1] < 1.5 * perplexities[0]
