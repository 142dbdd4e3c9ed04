"""``mope build``: the TensorRT engine of a bundle, for this device."""

from __future__ import annotations

from typing import Annotated

from mope_deploy.cli.options import BundleFolder, Graph, option
from mope_deploy.cli.printing import say

__all__ = ["build"]

_COMPUTE = "Compute capabilities, 8.6,12.0 (tensorrt_rtx). Default: this GPU's; all of them where there is none."
_Text = str | None


def build(
    bundle: BundleFolder,
    backend: Annotated[_Text, option("tensorrt or tensorrt_rtx; by default what fits this machine.")] = None,
    graph: Graph = None,
    batch: Annotated[_Text, option("Batch sizes, min:opt:max. Default: 1:4:16.")] = None,
    text_len: Annotated[_Text, option("Tokens of a text, min:opt:max. Default: all that the bundle makes.")] = None,
    audio_len: Annotated[_Text, option("Samples of a clip, min:opt:max. Default: all that the bundle makes.")] = None,
    compute: Annotated[_Text, option(_COMPUTE)] = None,
    tf32: Annotated[bool, option("Let float32 products be rounded to TF32, which is faster.", "--tf32")] = False,
    workspace: Annotated[int | None, option("Limit of the builder's GPU scratch memory, MiB.", min=1)] = None,
    no_memory_check: Annotated[bool, option("Begin even if free memory looks too small.", "--no-memory-check")] = False,
) -> None:
    """Build the TensorRT engine for this device from the bundle's ONNX, and prove it on the golden samples."""
    from mope_deploy.bundle import Bundle
    from mope_deploy.engines import open_session
    from mope_deploy.engines.tensorrt.build import build_engine, why_not_run_here
    from mope_deploy.engines.tensorrt.device import this_device

    opened, device = Bundle.open(bundle), this_device()
    sidecar, files = build_engine(
        opened,
        backend=backend,
        graph=graph,
        batch=batch,
        text_length=text_len,
        audio_length=audio_len,
        compute=compute,
        tf32=tf32,
        workspace=workspace,
        check_memory=not no_memory_check,
        device=device,
    )
    sizes = ", ".join(f"{axis} {size}" for axis, size in sidecar.profile.items())
    products = ", ".join(f"{count} of {dtype}" for dtype, count in sidecar.precision.products.items())
    say(f"{files.engine}: {sidecar.engine.bytes / 1e6:,.1f} MB")
    say(f"{sidecar.backend} {sidecar.version}, for {', '.join(sidecar.compute_capabilities)}; {sizes}")
    say(
        f"{sidecar.precision.declared}, products: {products}{', TF32 allowed' if tf32 else ''}; "
        f"{sidecar.seconds:,.1f} s, at most {sidecar.peak_bytes / 2**20:,.0f} MiB of memory"
    )
    if reason := why_not_run_here(sidecar, device):
        say(f"built, not run here: {reason}")
        say("the golden samples are run when the engine is first loaded, before any prediction")
        return
    session = open_session(opened, engine="tensorrt", graph=graph)
    say(f"golden samples come out right on {session.device}")
    say(f"next: mope run {bundle} --engine tensorrt --data in.jsonl")
