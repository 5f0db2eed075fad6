"""The words that ROUGE compares, in any script."""

from __future__ import annotations

import re
import unicodedata

from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

_WITHOUT_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese: scripts that put no space between words."""
_WORD = re.compile(f"[{_WITHOUT_SPACES}]|[^\\W_{_WITHOUT_SPACES}]+")


class AnyScript(Tokenizer):  # type: ignore[misc] # rouge_score ships no types
    """rouge_score's own words for plain English, and words of other scripts, which that would drop.

    Of scripts without spaces each letter is a word, as ROUGE is computed for Chinese. Accents stay. Only
    English words are stemmed.
    """

    def __init__(self) -> None:
        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        words = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
        return [
            found for word in words for found in (self._english.tokenize(word) if word.isascii() else [word])
        ]
