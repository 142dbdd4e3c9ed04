"""docs/encoders.md says what the tests hold, and docs/add-an-encoder.md shows code that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mope_deploy.model.backbones import LayeredEncoder, families
from tests.families.page import PAGE, page
from tests.families.table import FAMILIES

ROOT = PAGE.parents[1]


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.families.page --write"


def test_every_family_of_the_library_has_a_row(tmp_path: Path) -> None:
    """A family without a row would be used untested."""
    from mope_deploy.model.backbones.sources import load_source

    found = set()
    for i, row in enumerate(FAMILIES):
        module = load_source(f"dir:{row.make(tmp_path / str(i) / 'encoder')}").module
        family = next(family for family in families() if family.accepts(module))
        assert (family.modality, issubclass(family, LayeredEncoder)) == (row.modality, row.main), row.name
        found.add(family)
    assert found == set(families())


BLOCK = re.compile(r"<!-- from (?P<file>[\w/.]+) -->\n```python\n(?P<code>.*?)```", re.DOTALL)


@pytest.mark.parametrize("match", BLOCK.finditer((ROOT / "docs/add-an-encoder.md").read_text(encoding="utf-8")))
def test_the_guide_shows_the_code_as_it_is(match: re.Match[str]) -> None:
    code = (ROOT / match["file"]).read_text(encoding="utf-8")
    assert match["code"] in code, f"docs/add-an-encoder.md is behind {match['file']}"
