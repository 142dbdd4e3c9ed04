"""NVIDIA's own parser and builder, which work on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import tensorrt_rtx as trt

from mope_deploy.engines.backends import open_backend
from mope_deploy.engines.log import shared_log


def parse_and_build(file: Path, *, longest: int, audio: tuple[int, int, int] = (1, 1, 1)) -> list[str]:
    """Every error that parsing and building a graph for compute capability 8.6 gives; none if both went well."""
    log = shared_log(open_backend("tensorrt_rtx"))
    log.clear()
    builder = trt.Builder(log.logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(file)):
        return [str(parser.get_error(i)) for i in range(parser.num_errors)] + log.errors
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        sizes = [
            [{0: batch, 1: length}[axis] if size == -1 else size for axis, size in enumerate(tensor.shape)]
            for batch, length in zip(
                (1, 2, 16), audio if tensor.name.startswith("audio_") else (3, 7, longest), strict=True
            )
        ]
        profile.set_shape(tensor.name, *sizes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return log.errors + ([] if engine is not None else ["no engine was built"])
