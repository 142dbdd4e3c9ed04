"""Fixtures: folders of tiny encoders, for the conftest of every folder of tests that builds models on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import bert_folder, vit_folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("encoders") / "vit")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("encoders") / "bert")
