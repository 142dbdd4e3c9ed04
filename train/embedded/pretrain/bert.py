"""Pretraining of the embedded text encoder: a three-layer BERT that reads sentences of digits-ve and sees no picture.

Half of each batch has words masked, to be restored; the other half is read whole, and the class token names what the
sentence says: its kind, its first and second colour, and its claim. Labels play no part: whether a sentence is true is
a matter of the picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from train.embedded.digits_ve.scenes import COLOURS
from train.embedded.digits_ve.sentences import CLAIMS, PHRASES, TEMPLATES
from train.embedded.pretrain.save import check_target, optimise, save_folder
from train.embedded.pretrain.tokenizer import MAX_LENGTH, SPECIAL, make_tokenizer, tokenizer_config

__all__ = ["ReadingAccuracy", "pretrain_bert"]

_MASKED_SHARE = 0.2
_PAD, _MASK = SPECIAL.index("[PAD]"), SPECIAL.index("[MASK]")
_NO_COLOUR = len(COLOURS)
_FIRST_CLAIM = dict(zip(CLAIMS, np.cumsum([0, *(len(words) for words in CLAIMS.values())]).tolist(), strict=False))
_CLASSES = {
    "template": len(TEMPLATES),
    "first colour": len(COLOURS),
    "second colour": len(COLOURS) + 1,  # or none
    "claim": sum(len(words) for words in CLAIMS.values()),
}


@dataclass(frozen=True)
class ReadingAccuracy:
    """How often a linear reading of the class token is right about a whole sentence (kind, colours and claim), 0–1."""

    sentence: float
    masked_words: float


@dataclass(frozen=True)
class _Batch:
    """Sentences as tokens: input_ids and attention_mask (B, T) int64, and what each says (B, 4) int64."""

    input_ids: Tensor
    attention_mask: Tensor
    says: Tensor


def pretrain_bert(
    out: Path, *, sentences: int = 200_000, batch: int = 128, peak_lr: float = 1e-3, seed: int = 0
) -> ReadingAccuracy:
    """Train the text encoder and write it to ``out`` in transformers' folder format, tokenizer included.

    Arguments are those of :func:`train.embedded.pretrain.vit.pretrain_vit`, with ``sentences`` for scenes; half of a
    batch is masked.

    Returns:
        accuracies on 2,000 further sentences.
    """
    check_target(out)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=MAX_LENGTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=_PAD, dtype="float32",
        architectures=["BertModel"],
    )  # fmt: skip
    model = BertModel(config)
    heads = _Heads(config)

    def loss() -> Tensor:
        masked = F.cross_entropy(*_restored(model, heads, _draw(batch // 2, tokenizer, rng)))
        return masked + _reading_loss(model, heads, _draw(batch - batch // 2, tokenizer, rng))

    optimise(model, heads, loss, steps=sentences // batch, lr=peak_lr, decay=0.01, what="digits-ve-bert")
    accuracy = _evaluate(model, heads, _draw(2000, tokenizer, np.random.default_rng([seed, 1])))
    tokenizer.no_padding()
    files = {
        "config.json": json.loads(config.to_json_string(use_diff=True)),
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": tokenizer_config(),
    }
    save_folder(out, files, model.state_dict())
    return accuracy


class _Heads(nn.Module):
    """Thrown away after the pretraining. The pooler is taught the same as the class token, for those who read it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.words = nn.Linear(config.hidden_size, config.vocab_size)
        self.token = nn.ModuleList(nn.Linear(config.hidden_size, count) for count in _CLASSES.values())
        self.pooler = nn.ModuleList(nn.Linear(config.hidden_size, count) for count in _CLASSES.values())


def _draw(count: int, tokenizer: Tokenizer, rng: np.random.Generator) -> _Batch:
    """Sentences of all kinds alike, about any two colours, claiming anything."""
    texts, says = [], []
    for _ in range(count):
        kind = int(rng.integers(len(TEMPLATES)))
        template = list(TEMPLATES)[kind]
        phrase = PHRASES[template][int(rng.integers(len(PHRASES[template])))]
        claim = int(rng.integers(len(CLAIMS[template])))
        first, second = (int(colour) for colour in rng.permutation(len(COLOURS))[:2])
        texts.append(phrase.fill((first, second), claim))
        second = second if "{b}" in phrase.pattern else _NO_COLOUR
        says.append((kind, first, second, _FIRST_CLAIM[template] + claim))
    tokenizer.enable_padding(pad_id=_PAD, pad_token="[PAD]")
    encoded = tokenizer.encode_batch(texts)
    return _Batch(
        input_ids=torch.tensor([one.ids for one in encoded]),
        attention_mask=torch.tensor([one.attention_mask for one in encoded]),
        says=torch.tensor(says),
    )


def _restored(model: BertModel, heads: _Heads, batch: _Batch) -> tuple[Tensor, Tensor]:
    """A share of the words is replaced by [MASK]: logits (W, vocabulary) of those, and the words (W,) they were."""
    hide = (torch.rand(batch.input_ids.shape) < _MASKED_SHARE) & (batch.input_ids >= len(SPECIAL))
    masked = batch.input_ids.masked_fill(hide, _MASK)
    states = model(input_ids=masked, attention_mask=batch.attention_mask).last_hidden_state
    return heads.words(states)[hide], batch.input_ids[hide]


def _reading_loss(model: BertModel, heads: _Heads, batch: _Batch) -> Tensor:
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    losses = [
        F.cross_entropy(head(feature), batch.says[:, part])
        for feature, parts in ((out.last_hidden_state[:, 0], heads.token), (out.pooler_output, heads.pooler))
        for part, head in enumerate(parts)
    ]
    return torch.stack(losses).sum() / 2


@torch.no_grad()
def _evaluate(model: BertModel, heads: _Heads, batch: _Batch) -> ReadingAccuracy:
    model.eval()
    token = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[:, 0]
    read = torch.stack([head(token).argmax(-1) for head in heads.token], dim=1)
    logits, words = _restored(model, heads, batch)
    restored = logits.argmax(-1) == words
    return ReadingAccuracy((read == batch.says).all(1).float().mean().item(), restored.float().mean().item())
