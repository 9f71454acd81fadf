"""The tokenizer of the tiny Wan: one token per word, number or mark."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from ditmem_jax.models.wan.tokenizer import END, PAD, clean
from ditmem_jax.storage.files import write_text

UNKNOWN = "<unk>"
PIECE = r"\d+(?:\.\d+)?|[^\W\d]+|[^\w\s]"  # a number (6.2 is one), a word, a mark


def train_tokenizer(captions: Iterable[str], path: str | Path) -> None:
    """Writes a `tokenizer.json` that knows every word of the captions, the most frequent first.

    Case does not count. Tokens 0, 1, 2 are `<pad>`, `</s>`, `<unk>`; equal captions give equal files.
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    counts = Counter(
        word
        for caption in captions
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(clean(caption)))
    )
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocab = {word: number for number, word in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    write_text(Path(path), tokenizer.to_str(pretty=True) + "\n")
