"""The readme of the package: README.md with absolute links to files of the repository. All else: pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def readme() -> str:
    """README.md as a package index shows it, where no file stands beside it."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)
    assert found, "pyproject.toml names no repository"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!\w+:|#)", rf"\1{found[1]}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!\w+:|#)", rf"\1{found[1]}/blob/main/", text)


if __name__ == "__main__":
    setup(long_description=readme(), long_description_content_type="text/markdown")
