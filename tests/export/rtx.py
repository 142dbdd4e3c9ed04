"""NVIDIA's own parser and builder, which work on a machine without a GPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt


class Log(trt.ILogger):
    """Collects errors: the parser and the builder return something usable after some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


@cache
def log() -> Log:
    """The one logger of this process: TensorRT keeps the first it was given."""
    return Log()


def parse_and_build(file: Path, *, longest: int) -> list[str]:
    """Every error that parsing and building a graph for compute capability 8.6 gives; none if both went well."""
    logger = log()
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        return [str(parser.get_error(i)) for i in range(parser.num_errors)] + logger.errors
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        sizes = [
            [{0: batch, 1: length}[axis] if size == -1 else size for axis, size in enumerate(tensor.shape)]
            for batch, length in ((1, 3), (2, 7), (16, longest))
        ]
        profile.set_shape(tensor.name, *sizes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return logger.errors + ([] if engine is not None else ["no engine was built"])
