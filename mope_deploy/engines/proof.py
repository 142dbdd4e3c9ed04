"""An engine proves itself before its first prediction: once for an engine, a device and a version of both.

What is remembered lies outside a bundle's hashed files, beside the engines that were built here
(:mod:`mope_deploy.engines.tensorrt.sidecar`). What is damaged there, or of anything else, proves nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mope_deploy.bundle import Bundle
from mope_deploy.engines.golden import MOST_TOLERANCE, Verification, check_outputs_are_golden
from mope_deploy.engines.onnxruntime.providers import Chosen
from mope_deploy.engines.onnxruntime.session import library_version
from mope_deploy.engines.session import Session
from mope_deploy.engines.tensorrt.device import this_device
from mope_deploy.engines.tensorrt.sidecar import Proof, proof_file
from mope_deploy.errors import MopeError
from mope_deploy.files import json_bytes, write_file
from mope_deploy.manifest import Graph

__all__ = ["prove_once", "prove_provider"]


def prove_once(
    file: Path, key: Mapping[str, Any], measure: Callable[[], tuple[Verification, Mapping[str, int]]]
) -> Verification | None:
    """``measure`` and remember that it went well, unless ``file`` says that of this very ``key``.

    Where the file cannot be written, this is done at every load.

    Args:
        file: of the proof; a folder that is a link, which could lead anywhere, is neither read nor written.
        key: of :meth:`Proof.covers`.
        measure: runs the golden samples; also gives what is known of the layers' types.

    Returns:
        What was measured, or None if there was no need.

    Raises:
        MopeError: what ``measure`` raises; nothing is remembered.
    """
    ours = not file.parent.is_symlink()
    known = Proof.read(file) if ours else None
    if known is not None and known.covers(**key) and known.logits_error <= MOST_TOLERANCE.logits:
        return None
    measured, layers = measure()
    proof = Proof(
        **key,
        logits_error=measured.logits_error,
        routing_error=measured.routing_error,
        layers=dict(layers),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    with contextlib.suppress(OSError, MopeError):  # a read-only bundle: proved again next time
        if ours:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, json_bytes(proof.to_dict()))
    return measured


def prove_provider(bundle: Bundle, graph: Graph, session: Session, chosen: Chosen) -> Verification | None:
    """:func:`prove_once` for ONNX Runtime on anything but the CPU.

    What a GPU's libraries compute depends on the card, its driver and their versions, as with built engines.

    Args:
        chosen: the providers with the options that each was given: another choice is another engine.

    Raises:
        ParityError: the golden samples do not come out.
        EngineError: the session fails at one of the sizes.
    """
    key = {
        "engine_sha256": hashlib.sha256(repr((graph.name, chosen)).encode()).hexdigest(),
        "bundle_sha256": bundle.sha256,  # of all files
        "version": library_version(),
        "device": this_device(),
    }
    return prove_once(
        proof_file(bundle, graph, f"onnxruntime.{session.device}"),
        key,
        lambda: (check_outputs_are_golden(bundle, session, graph=graph.name), {}),
    )
