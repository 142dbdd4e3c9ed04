"""The word-level tokenizer of the embedded text encoder: every word of digits-ve is one token."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from train.embedded.digits_ve.sentences import vocabulary

__all__ = ["MAX_LENGTH", "SPECIAL", "make_tokenizer", "tokenizer_config"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0–4
MAX_LENGTH = 32  # tokens, [CLS] and [SEP] included; the longest sentence of digits-ve has 16


def make_tokenizer() -> Tokenizer:
    """Lower-cases, splits at spaces and punctuation, adds [CLS] … [SEP]; an unknown word becomes [UNK]."""
    words = {word: number for number, word in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, words[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """What transformers needs beside ``tokenizer.json``."""
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "model_input_names": ["input_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    }
