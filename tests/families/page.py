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
