"""Which library builds, and what for."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mope_deploy.engines.tensorrt.backends import Backend, choose_backend, open_backend
from mope_deploy.engines.tensorrt.build import compute_capabilities, why_not_run_here
from mope_deploy.engines.tensorrt.device import Device
from mope_deploy.errors import EngineError, MissingExtraError, UsageError
from tests.device.test_sidecar import SIDECAR


def test_the_library_that_fits() -> None:
    assert choose_backend(gpu=False).name == "tensorrt_rtx"
    assert choose_backend(gpu=True).name == "tensorrt_rtx"  # tensorrt is not installed here
    with pytest.raises(MissingExtraError, match=r"tensorrt is not installed; .*mope-deploy\[trt\].*python3-libnvinfer"):
        open_backend("tensorrt")


def test_compute_capabilities() -> None:
    rtx = open_backend("tensorrt_rtx")
    full = Backend("tensorrt", "10.3.0", json)  # any module without ComputeCapability: builds for the GPU at hand
    bare, orin = (
        Device(os="Linux x86_64", no_gpu="none"),
        Device(os="Linux aarch64", gpu="Orin", compute_capability="8.7"),
    )
    ada = Device(os="Linux x86_64", gpu="RTX 4090", compute_capability="8.9")
    assert compute_capabilities(rtx, ada) == ("8.9",)
    assert compute_capabilities(rtx, bare, "sm86,8.6, SM_120") == ("8.6", "12.0")
    assert compute_capabilities(full, orin) == compute_capabilities(full, orin, "87") == ("8.7",)
    with pytest.raises(UsageError, match=r"received 8\.6; expected .*: 8\.7"):
        compute_capabilities(full, orin, "8.6")
    with pytest.raises(EngineError, match=r"does not build for this GPU; received Orin, compute capability 8\.7"):
        compute_capabilities(rtx, orin)
    with pytest.raises(EngineError, match="builds only on the GPU that it builds for; received none"):
        compute_capabilities(full, bare)


def test_why_an_engine_does_not_run_where_it_was_built() -> None:
    sidecar = dataclasses.replace(SIDECAR, compute_capabilities=("8.6", "8.9"))
    ada = Device(os="Linux x86_64", gpu="RTX 4090", compute_capability="8.9")
    assert why_not_run_here(sidecar, ada) is None
    hopper = dataclasses.replace(ada, gpu="H200", compute_capability="9.0")
    assert why_not_run_here(sidecar, hopper) == "H200 is another GPU"
    assert why_not_run_here(sidecar, Device(os="Linux x86_64", no_gpu="no CUDA driver")) == "no CUDA driver"
