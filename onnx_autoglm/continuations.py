"""Greedy continuations of prompts beside a true text: BLEU-4 and ROUGE-L.

Both come from the libraries that papers use (sacrebleu, rouge-score), so numbers can be compared with theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.errors import UserError

Words = Callable[[str], list[str]]


@dataclasses.dataclass(frozen=True)
class TextScores:
    """`bleu` (BLEU-4 over all texts) and `rouge_l` (mean F-measure), both from 0 to 100; `words` says what a word is."""

    bleu: float
    rouge_l: float
    words: str


def cut_prompts(rows: Sequence[np.ndarray], tokens: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts `[texts, half]` and their true continuations `[texts, tokens]` from windows of equal length.

    The first half of a window is the prompt. The `limit` windows are spread evenly over the text.

    Raises UserError if half a window is shorter than `tokens`.
    """
    windows = np.stack([row.reshape(-1) for row in rows])
    half = windows.shape[1] // 2
    if half < 1 or windows.shape[1] - half < tokens:
        raise UserError(
            f"--generate {tokens} needs windows of at least {2 * tokens} tokens, these have {windows.shape[1]}: "
            f"pass --window {2 * tokens} (and enough text), or generate less"
        )
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(limit, len(windows))).round().astype(int))
    return windows[chosen, :half], windows[chosen, half : half + tokens]


def continue_prompts(model: ir.Model, prompts: np.ndarray, tokens: int) -> np.ndarray:
    """Greedy continuations `[texts, tokens]` of prompts `[texts, length]`, one text at a time.

    Raises UserError if the model cannot be decoded.
    """
    from onnx_autoglm.decode import Decoder

    decoder = Decoder(model)
    return np.concatenate([decoder.generate(prompt[None], tokens) for prompt in prompts])


def score_texts(candidates: Sequence[str], references: Sequence[str]) -> TextScores:
    """BLEU-4 and ROUGE-L of candidates, each against the reference at its place.

    Words are those of the usual tokenizers (13a); in texts with Chinese characters each of these is a word, where
    the usual ones would see none.

    Raises UserError if a library is missing.
    """
    require_libraries()
    import sacrebleu
    from rouge_score import rouge_scorer

    name = "zh" if _is_chinese(references) else "13a"
    bleu = sacrebleu.corpus_bleu(list(candidates), [list(references)], tokenize=name)
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Splitter() if name == "zh" else None)
    pairs = zip(references, candidates, strict=True)
    rouge = [scorer.score(reference, candidate)["rougeL"].fmeasure for reference, candidate in pairs]
    return TextScores(float(bleu.score), 100 * float(np.mean(rouge)), name)


def require_libraries() -> None:
    """Raises UserError if sacrebleu or rouge-score is not installed."""
    try:
        import rouge_score
        import sacrebleu

        assert rouge_score and sacrebleu
    except ImportError as error:
        raise UserError(
            f"--generate needs sacrebleu and rouge-score ({error.name} is missing): pip install 'onnx-autoglm[eval]'"
        ) from error


class _Splitter:
    """Words for rouge-score, whose own tokenizer drops everything but a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

        return TokenizerZh()(text.lower()).split()


def _is_chinese(texts: Sequence[str]) -> bool:
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum("\u4e00" <= letter <= "\u9fff" for letter in letters) > 0.1 * len(letters)
