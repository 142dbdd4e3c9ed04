"""A dry run finds what would stop the run before its first step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mope_deploy.errors import ConfigError, DataError, MopeError, UsageError
from mope_deploy.model import MoPE
from tests.train.tools import moved_rows, write_rows
from train.config import Recipe
from train.run import plan

Make = Callable[..., Recipe]


def test_what_the_machine_has_not(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"train\.device: received cuda, but PyTorch finds no GPU"):
        plan(recipe("train.device=cuda"))
    with pytest.raises(ConfigError, match=r"train\.precision: received fp16"):
        plan(recipe("train.precision=fp16"))
    with pytest.raises(ConfigError, match=r"train\.batch_size: received 8, expected a multiple of 3"):
        plan(recipe("train.accumulation=3"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        with pytest.raises(ConfigError, match=r"train\.precision: received bf16, which this GPU cannot"):
            plan(recipe("train.precision=bf16"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
        with pytest.raises(UsageError, match=r"too little room on the disk of .*received 0 MB free"):
            plan(recipe())


def test_where_nothing_can_be_written(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/run cannot be made; received .*file cannot be written to"):
        plan(recipe(f"run.dir={tmp_path / 'file' / 'run'}"))


def test_files_that_cannot_be_decoded(recipe: Make, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = moved_rows(tiny / "train.jsonl")
    file = write_rows(tmp_path / "train.jsonl", [*rows, rows[0] | {"image": str(tmp_path / "bad.png")}])
    with pytest.raises(DataError, match=f"{file}:61: image"):
        plan(recipe(f"data.train={file}"))
    found = plan(recipe(f"data.train={file}", "data.skip_bad=true"))
    assert found.rows == {"train": 60, "validation": 24, "test": 26}


def test_a_batch_that_the_model_cannot_take(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MopeError("ids of 15 tokens, an encoder of 13")

    monkeypatch.setattr(MoPE, "forward", refuse)
    with pytest.raises(MopeError, match="an encoder of 13"):
        plan(recipe())


def test_a_warm_up_that_never_ends_is_said(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    plan(recipe("optim.warmup_steps=24"))
    assert "warning: optim.warmup_steps=24 is no less than the 24 steps" in capsys.readouterr().err
    plan(recipe("optim.warmup_steps=23"))
    assert "warning" not in capsys.readouterr().err
