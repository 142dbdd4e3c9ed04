"""What the site (mkdocs.yml) needs beyond its settings: links out of docs/, and the roles of docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
import tomllib
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Relative links to files outside docs/ lead to the repository.

    Raises:
        PluginError: there is no such file.
    """

    folder = Path(page.file.abs_src_path).parent

    def absolute(found: re.Match[str]) -> str:
        path = (folder / found[1]).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found[0]  # which MkDocs itself checks
        if not path.exists():
            raise PluginError(f"{page.file.src_path} links to {found[1]}, which does not exist")
        return f"]({REPOSITORY}/blob/main/{path.relative_to(ROOT).as_posix()}"

    return re.sub(r"\]\((\.\./[^)#]+)", absolute, markdown)


class Roles(griffe.Extension):
    """``:class:`Name``` in a docstring becomes a name in code type: the roles are Sphinx's, the site is Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r":(?:class|func|meth|mod|data|attr|exc):`", "`", obj.docstring.value)
