"""Which engine is opened, and which is built again."""

from __future__ import annotations

from typing import Any

import pytest

from mope_deploy.bundle import Bundle
from mope_deploy.engines import open_session
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.engines.tensorrt.sidecar import (
    Sidecar,
    engine_files,
)
from mope_deploy.errors import EngineError, MopeError
from tests.engines.built import check, files_of, rebuilt, rewrite


def test_auto_says_why_the_engine_is_not_used(built: Bundle) -> None:
    session = open_session(built)
    assert session.name == "onnxruntime"
    assert "model.tensorrt_rtx.engine needs a GPU to run" in session.why
    files_of(built).engine.write_bytes(b"x")
    assert "is damaged; received 1 bytes" in open_session(built).why
    with pytest.raises(EngineError, match="is damaged"):
        open_session(built, engine="tensorrt")


def test_auto_without_an_engine(bundle: Bundle) -> None:
    assert "no TensorRT engine was built" in open_session(bundle).why
    with pytest.raises(EngineError, match="no TensorRT engine was built"):
        open_session(bundle, engine="tensorrt")
    assert open_session(bundle, engine="onnxruntime").why == ""
    assert open_session(bundle, threads=1).why == ""


def test_rebuilding_keeps_sizes_and_options(built: Bundle) -> None:
    def options(document: dict[str, Any]) -> None:
        document["workspace"] = 2**28
        document["precision"]["tf32"] = True

    rewrite(files_of(built).sidecar, options)
    files_of(built).engine.write_bytes(b"damaged")
    assert rebuilt(built) == "tensorrt_rtx"
    made = Sidecar.read(files_of(built).sidecar)
    assert made.profile == {"batch": Sizes(1, 2, 4), "text_length": Sizes(1, 12, 12)}
    assert (made.workspace, made.precision.tf32) == (2**28, True)
    check(built)
    files_of(built).sidecar.write_text("{", encoding="utf-8")  # nothing to keep: the defaults
    rebuilt(built)
    assert Sidecar.read(files_of(built).sidecar).profile["batch"] == Sizes(1, 4, 16)


def test_rebuilding_with_a_library_that_is_gone(built: Bundle) -> None:
    """The engine of another library than the one installed today: its sizes still count."""
    rewrite(files_of(built).sidecar, lambda d: d.update(backend="tensorrt"))
    theirs = engine_files(built, built.graph(), "tensorrt")
    files_of(built).sidecar.rename(theirs.sidecar)
    files_of(built).engine.rename(theirs.engine)
    assert "tensorrt is not installed" in open_session(built).why
    assert rebuilt(built) == "tensorrt_rtx"
    assert Sidecar.read(files_of(built).sidecar).profile["batch"] == Sizes(1, 2, 4)


def test_rebuilding_is_not_begun_where_nothing_can_run(built: Bundle) -> None:
    before = files_of(built).engine.read_bytes()
    with pytest.raises(EngineError, match="running a TensorRT engine needs a GPU"):
        open_session(built, rebuild=True)
    assert files_of(built).engine.read_bytes() == before
    for options in ({"threads": 2}, {"providers": ["CPUExecutionProvider"]}, {"engine": "onnxruntime"}):
        with pytest.raises(MopeError, match="belongs to"):
            open_session(built, rebuild=True, **options)
