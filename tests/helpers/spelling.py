"""Tokenizers that split the same text differently."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHARACTERS = ["\0", *sorted(set(string.printable) - set("\r\t\x0b\x0c"))]


def characters(texts: list[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character. The first token stands for unknown characters."""
    fast = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token=texts[0]))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token=texts[0])


def byte_pairs(text: str, size: int = 320, special: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and the frequent pairs of bytes in a text, as GPT-2 splits it.

    Args:
        text: the training text.
        size: the size of the vocabulary.
        special: special tokens by their role.
    """
    special = special or {}
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, **special)


def pieces(words: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters, some words, and bytes for the rest, as Llama 2 splits a text.

    A space belongs to the word after it, the first word gets one, and a text begins with <s>. Two line ends are one
    token.
    """
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n"]
    merges = [("\n", "\n")]
    for word in words:
        merges += [("▁" + word[:i], word[i]) for i in range(len(word))]
    texts = dict.fromkeys([*marks, *string.printable[:95].replace(" ", ""), *("".join(pair) for pair in merges)])
    model = models.BPE(
        {text: i for i, text in enumerate(texts)},
        list(dict.fromkeys(merges)),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    fast = Tokenizer(model)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks[:3]])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def words(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words and letters, as T5 splits a text.

    A text without a token is <unk>, as there are no bytes to fall back to. A space belongs to the word after it, and
    the first word gets one.
    """
    known = dict.fromkeys(["<unk>", "</s>", *texts, *string.ascii_lowercase])
    fast = Tokenizer(models.Unigram([(text, -float(i)) for i, text in enumerate(known)], unk_id=0))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="</s>")
