"""What an index and a forge show of the project, and that its files agree with each other."""

from __future__ import annotations

import email
import email.message
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib
import yaml

import mope_deploy

ROOT = Path(__file__).parents[1]
PACKAGES = ("mope_deploy", "train", "export")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The wheel that pip would install, built from a copy: the source tree may be read-only."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    code = "import setuptools.build_meta as build; build.build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.Path(built)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.Path) -> email.message.Message:
    (folder,) = (one for one in wheel.iterdir() if one.name.endswith(".dist-info"))
    return email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))


def test_the_version_stands_in_one_place(metadata: email.message.Message) -> None:
    assert metadata["Version"] == mope_deploy.__version__
    assert "version" not in PROJECT["project"]


def test_an_index_shows_no_link_that_leads_nowhere(metadata: email.message.Message) -> None:
    text = metadata.get_payload()
    assert isinstance(text, str)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 15
    base = PROJECT["project"]["urls"]["Repository"]
    for link in links:
        assert link.startswith((f"{base}/blob/main/", f"{base}/raw/main/")), link
        assert (ROOT / link.split("/main/")[1].partition("#")[0]).is_file(), link
    assert any(link.endswith(".svg") and "/raw/" in link for link in links)
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_an_index_shows_what_python_and_where_from(metadata: email.message.Message) -> None:
    classifiers = metadata.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    pythons = [one.rpartition(" ")[2] for one in classifiers if re.search(r"Python :: 3\.\d+$", one)]
    assert metadata["Requires-Python"] == f">={pythons[0]}"
    urls = dict(one.split(", ", 1) for one in metadata.get_all("Project-URL", []))
    assert urls == PROJECT["project"]["urls"]
    assert all(url.startswith(urls["Repository"]) for url in urls.values())


def test_the_wheel_holds_every_file_that_is_not_a_module_too(wheel: zipfile.Path) -> None:
    """Presets, recipes, embedded weights: none of them is missed before somebody asks for it."""
    with zipfile.ZipFile(str(wheel.root.filename)) as file:
        inside = {name for name in file.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == wanted
    assert {f"{package}/py.typed" for package in PACKAGES} <= inside


def test_ci_runs_what_a_user_runs() -> None:
    described = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = described["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert any(".ci/run" in step.get("run", "") for step in job["steps"])
    assert described["permissions"] == {"contents": "read"}
    assert "secrets." not in json.dumps(described)


def test_the_hooks_are_those_of_make_check() -> None:
    """``python -m``, as in the Makefile: a console script's first line does not survive every path."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    tools = {hook["entry"].split()[2] for hook in hooks}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert tools == {"ruff", "mypy"} == set(re.findall(r"\$\(RUN\) (ruff|mypy)", makefile))
    assert all(hook["entry"].startswith(".venv/bin/python -m ") for hook in hooks)
    assert not re.search(r"/bin/(?!python)", makefile)


def test_the_citation_names_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Repository"]
    papers = {one["title"]: one["identifiers"][0]["value"] for one in citation["references"]}
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert len(papers) == 2
    for title, number in papers.items():
        assert title in readme
        assert number.removeprefix("arXiv:") in readme


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_what_a_reader_is_told_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).is_file(), link
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_name_rooms_that_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:mope_deploy|train|export|benchmarks|tests|examples)/[\w/.-]+)`", page.read_text(encoding="utf-8")
    )
    assert not [name for name in named if not (ROOT / name).exists()]
