"""Writes docs/encoders.md from the table of families: ``python -m tests.families.page --write``.

Every "yes" on the page is a test of ``test_family.py`` that runs for that row, and every "no" of the column *main* one
that sees the error. ``test_page.py`` fails while the page is not what this would write.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.families.table import FAMILIES, MAIN, PRECISIONS, Family

PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"

_HEAD = """# Encoders

<!-- Written by `python -m tests.families.page --write` from tests/families/table.py; a test compares. Do not edit. -->

Any row can be a complementary encoder; those with "main" can also be the one that prompts condition, layer by layer.
One table decides the family from the encoder itself (`mope_deploy/model/backbones/families.py`), so a source is all
that a recipe names: `timm:NAME`, `hf:ID` or `dir:PATH`.

"""

_TAIL = """
What the columns say, and what holds them: `tests/families/test_family.py` runs the same tests for every row, on tiny
random encoders.

- **main**, **complementary**: without prompts every layer equals the library's own; a sample's prediction does not
  depend on its batch-mates or on padding; every layer is prompted, every trained tensor gets a gradient and nothing
  else does; values equal an independent float64 implementation in loops; a standalone checkpoint loads without the
  source.
- **onnx**: the prompted graph, with dense and with top-k layers, is as near to the eager model as the export gate asks
  for, at batch sizes and text lengths other than those it was traced with.
- **trt-rtx**, **int8**: TensorRT-RTX parses and builds that graph in {precisions}. Built, not run: these tests have
  no GPU.
- **fused**: `mope-export --fuse` finds every attention of it for ONNX Runtime. Where it says no, `--fuse` ends with an
  error that says so, and the canonical graph is the one to use.
- **prefix form**: prompts as ready keys and values instead of tokens. Every row runs in token form, which defines it.

## What an encoder's folder must hold

An encoder that is not what its files say is refused when it is loaded, in one line.

- **Weights** (`model.safetensors`, whole or in shards): every tensor of the encoder, of its shape, as floats of any
  width, each value finite. Heads of other tasks may be left over; tensors inside the encoder that its class does not
  read (relative positions, an adapter that was not merged) may not.
- **Sound and video**: their processor, as transformers saves it: in `processor_config.json` (under
  `feature_extractor`, `audio_processor`, `video_processor`, `image_processor`), `video_preprocessor_config.json` or
  `preprocessor_config.json`, in transformers' order. Without one the encoder is refused: rate and scale are not
  guessed.
- **Text**: a tokenizer. Where `tokenizer_config.json` says otherwise than `tokenizer.json` (letter case, accents, a
  leading space, special tokens), it is obeyed as transformers does; where the two are tokenizers of different kinds,
  and for `truncation_side: left`, the encoder is refused. `model_max_length` bounds the default of `max_length`. The
  highest token id must have a row in the encoder's embeddings.
- **Anything that is run as a whole** must be exportable. Architectures that were exported are listed in
  `mope_deploy/model/backbones/exported/dry.py`; any other is traced once when it is loaded (2 to 25 s), and refused
  if it branches on values (Longformer) or calls what no target has (TAPAS, mixtures of experts).

Without a network, what was fetched before is taken from the cache; anything else is an error within seconds (exit
code 1).

To add a family, see [add-an-encoder.md](add-an-encoder.md).
"""


def page() -> str:
    """The whole page."""
    lines = [
        "| family | stands for | modality | main | complementary | onnx | trt-rtx | int8 | fused | prefix form |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(family) for family in FAMILIES),
    ]
    return _HEAD + "\n".join(lines) + "\n" + _TAIL.format(precisions=", ".join(PRECISIONS))


def _line(family: Family) -> str:
    claims = (
        family in MAIN,
        True,  # complementary and onnx: every row, held by test_the_graphs_cover_every_row_in_each_of_its_roles
        True,
        bool(PRECISIONS),
        "int8" in PRECISIONS,
        family.fused,
        family.prefix_form,
    )
    cells = (family.name, family.covers, family.modality, *("yes" if claim else "–" for claim in claims))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.families.page --write")
    PAGE.write_text(page(), encoding="utf-8")
