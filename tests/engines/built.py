"""Engines that were built by TensorRT-RTX, and devices to try them on: descriptions, as no GPU is needed here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt

from mope_deploy.bundle import Bundle
from mope_deploy.engines import built_engines
from mope_deploy.engines.open import _rebuild
from mope_deploy.engines.tensorrt.backends import open_backend
from mope_deploy.engines.tensorrt.device import Device, this_device
from mope_deploy.engines.tensorrt.session import check_engine
from mope_deploy.engines.tensorrt.sidecar import EngineFiles, Sidecar, engine_files
from mope_deploy.errors import EngineError
from tests.engines.test_inspect import document, layer

AMPERE = Device(
    os=this_device().os,
    gpu="RTX 3090",
    compute_capability="8.6",
    driver="580.65.06",
    cuda="13.0",
    l4t=this_device().l4t,
)
VERSION = trt.__version__
FP32 = document(layer("gemm", "Float", "Float"), layer("kgen", "Float"))  # of an engine inspector


def files_of(bundle: Bundle) -> EngineFiles:
    return engine_files(bundle, bundle.graph(), "tensorrt_rtx")


def check(bundle: Bundle, device: Device = AMPERE) -> bytes:
    files = files_of(bundle)
    return check_engine(
        Sidecar.read(files.sidecar), files, bundle, bundle.graph(), open_backend("tensorrt_rtx"), device
    )


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def refusal(bundle: Bundle, device: Device = AMPERE) -> str:
    with pytest.raises(EngineError) as caught:
        check(bundle, device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rebuilt(bundle: Bundle) -> str:
    return _rebuild(bundle, None, built_engines(bundle, None))[0]
