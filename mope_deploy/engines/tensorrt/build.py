"""Build the TensorRT engine of a bundle's graph, from the bundle's own ONNX: whole and recorded, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.text import Text

from mope_deploy import errors
from mope_deploy.bundle import Bundle
from mope_deploy.console import err
from mope_deploy.engines.graph_file import check_graph_file
from mope_deploy.engines.tensorrt.backends import Backend, choose_backend
from mope_deploy.engines.tensorrt.device import Device, available_memory, this_device
from mope_deploy.engines.tensorrt.pair import building, put_sidecar
from mope_deploy.engines.tensorrt.profiles import make_profile
from mope_deploy.engines.tensorrt.sidecar import EngineFiles, Precision, Sidecar, engine_files, onnx_files, plain
from mope_deploy.errors import EngineError, UsageError
from mope_deploy.files import json_bytes, sha256
from mope_deploy.manifest import FileEntry, TensorSpec

__all__ = ["build_engine", "compute_capabilities", "why_not_run_here"]

# Main memory that a build takes: with tensorrt_rtx 1.7.1, graphs of 40 and 160 MB of weights took 308 and 670 MB.
BASE_BYTES, BYTES_PER_BYTE = 300 * 2**20, 3
_TURING = "7.5"  # has no FP32 matrix product in TensorRT-RTX: only where it is asked for by name
_PLAIN_EVERY_S = 5.0


def build_engine(
    bundle: Bundle,
    *,
    backend: str | None = None,
    graph: str | None = None,
    batch: str | None = None,
    text_length: str | None = None,
    audio_length: str | None = None,
    compute: str | None = None,
    tf32: bool = False,
    workspace: int | None = None,
    check_memory: bool = True,
    device: Device | None = None,
    folder: Path | None = None,
) -> tuple[Sidecar, EngineFiles]:
    """Build an engine; what was there before is replaced only by a finished one.

    Args:
        bundle: its manifest stays as it is, and so do engines that were exported with it.
        backend: ``tensorrt`` or ``tensorrt_rtx``; by default what fits this machine.
        graph: name of the graph; by default the first that the library takes.
        batch, text_length, audio_length: ``"min:opt:max"``, see :func:`.profiles.make_profile`.
        compute: compute capabilities, ``"8.6,12.0"``; see :func:`compute_capabilities`.
        tf32: let float32 products be rounded to TF32's ten bits of mantissa.
        workspace: limit of the builder's GPU scratch memory in MiB; by default what the bundle was exported for.
        check_memory: refuse to begin where main memory will not do.
        device: this machine; found out if not given.
        folder: where the engine goes; by default where :func:`engine_files` looks for those built on this device. An
            exporter gives a folder of its own and puts the two files into the bundle under
            :func:`mope_deploy.engines.tensorrt.sidecar.exported_names`.

    Raises:
        UsageError, MissingExtraError: sizes, graph, library or compute capabilities that cannot be.
        EngineError: too little memory, no GPU where one is needed, the parser's or builder's refusal (any ERROR line of
        its log), a file that cannot be written.
    """
    device = device or this_device()
    chosen = bundle.graph(graph, engine="tensorrt")  # all its libraries take the same graphs
    library = choose_backend(backend, gpu=device.gpu is not None)
    wanted = bundle.manifest.build
    profile = make_profile(
        bundle.manifest, chosen.inputs, batch=batch, text_length=text_length, audio_length=audio_length
    )
    workspace = wanted.workspace if workspace is None else workspace
    capabilities = compute_capabilities(library, device, compute)
    if workspace is not None and not 1 <= workspace <= 2**20:
        raise UsageError("--workspace", received=workspace, expected="1 to 1,048,576 MiB")
    if check_memory:
        _check_memory(sum(bundle.manifest.files[name].bytes for name in (chosen.file, *chosen.data)))
    check_graph_file(bundle.file(chosen.file), chosen)
    files = engine_files(bundle, chosen, library.name, folder=folder)
    _check_files(files, bundle)
    began = time.monotonic()
    with building(files) as staged:
        request = {
            "backend": library.name,
            "engine": str(staged),
            "onnx": os.path.abspath(bundle.file(chosen.file)),
            "precision": chosen.precision,
            "profile": {axis: [s.min, s.opt, s.max] for axis, s in profile.items()},
            "inputs": plain(chosen.inputs),
            "outputs": plain(chosen.outputs),
            "compute_capabilities": list(capabilities),
            "tf32": tf32,
            "workspace": None if workspace is None else workspace * 2**20,
        }
        with _shown(f"building {chosen.name} with {library.name} {library.version}") as progress:
            answer = _work(request, progress)
        bundle.check_unchanged()  # the builder read the graph by its path
        sidecar = Sidecar(
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            backend=library.name,
            version=answer["version"],
            graph=chosen.name,
            onnx=onnx_files(bundle, chosen),
            engine=FileEntry(sha256(staged), staged.stat().st_size),
            compute_capabilities=capabilities,
            built_on=device,
            profile=profile,
            inputs=_specs(answer["inputs"]),
            outputs=_specs(answer["outputs"]),
            precision=Precision(chosen.precision, **answer["precision"], tf32=tf32),
            workspace=request["workspace"],  # type: ignore[arg-type]
            seconds=round(time.monotonic() - began, 3),
            peak_bytes=answer["peak_bytes"],
        )
        put_sidecar(files, json_bytes(sidecar.to_dict()))
    return sidecar, files


def why_not_run_here(sidecar: Sidecar, device: Device) -> str | None:
    """What stands against running an engine on ``device``, where it was just built; None if nothing does."""
    if device.compute_capability is None:
        return device.no_gpu or "no GPU"
    if device.compute_capability not in sidecar.compute_capabilities:
        return f"{device.gpu} is another GPU"
    return None


def compute_capabilities(backend: Backend, device: Device, wanted: str | None = None) -> tuple[str, ...]:
    """What to build for.

    Args:
        backend: the library.
        device: this machine.
        wanted: ``"8.6,12.0"`` or ``"sm86,sm120"``. By default this machine's own; where it has no GPU, all that the
            library knows but 7.5, which lacks FP32 products there.

    Raises:
        UsageError: what the library cannot build for.
        EngineError: a library that builds only for the GPU at hand, without one; or a GPU unknown to it.
    """
    if backend.needs_gpu and device.compute_capability is None:
        raise EngineError(
            f"{backend.name} builds only on the GPU that it builds for",
            received=device.no_gpu or "no GPU",
            todo="build on the device: mope build BUNDLE; tensorrt_rtx builds without a GPU",
        )
    known = backend.compute_capabilities or (device.compute_capability,)
    known_text = ", ".join(filter(None, known))
    if wanted is not None:
        asked = tuple(dict.fromkeys(_capability(part) for part in wanted.split(",")))
        if strange := [capability for capability in asked if capability not in known]:
            raise UsageError(
                "--compute", received=strange[0], expected=f"of what {backend.name} builds for here: {known_text}"
            )
        return asked
    if device.compute_capability is not None:
        if device.compute_capability not in known:
            raise EngineError(
                f"{backend.name} {backend.version} does not build for this GPU",
                received=f"{device.gpu}, compute capability {device.compute_capability}",
                expected=known_text,
                todo="use --backend tensorrt here, or --compute to build for another GPU",
            )
        return (device.compute_capability,)
    return tuple(c for c in known if c is not None and c != _TURING)


def _capability(text: str) -> str:
    """``"8.6"`` of ``"8.6"``, ``"86"``, ``"sm86"`` or ``"SM_86"``."""
    digits = text.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "", 1)
    if not (digits.isascii() and digits.isdigit() and 2 <= len(digits) <= 3):
        raise UsageError("--compute", received=repr(text[:60]), expected="compute capabilities like 8.6,12.0")
    return f"{digits[:-1]}.{digits[-1]}"


def _check_memory(weights: int) -> None:
    needed, free = BASE_BYTES + BYTES_PER_BYTE * weights, available_memory()
    if free is not None and free < needed:
        raise EngineError(
            "too little free memory to build this engine",
            received=f"{free / 2**20:,.0f} MiB",
            expected=f"about {needed / 2**20:,.0f} MiB",
            todo="end other programs, add swap, or try all the same with --no-memory-check",
        )


def _check_files(files: EngineFiles, bundle: Bundle) -> None:
    """Before minutes of building: nothing that is listed or elsewhere is written over, and the folder can be."""
    listed = {bundle.path / name for name in bundle.manifest.files}
    for path in (files.engine, files.sidecar):
        if path in listed or path.is_symlink():
            belongs = "belongs to the exported bundle, which building must not alter"
            what = f"{path} {'is a symbolic link' if path.is_symlink() else belongs}"
            raise UsageError(what, todo="set MOPE_ENGINES to a folder for engines built here")
    try:
        files.engine.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=files.engine.parent):
            pass
    except OSError as error:
        raise EngineError(
            f"{files.engine.parent} cannot be written",
            received=error.strerror,
            todo="set MOPE_ENGINES to a folder that can",
        ) from error


def _work(request: Mapping[str, Any], progress: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Have the worker answer a request. It ends when we do, however that comes: its standard input ends then."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with tempfile.TemporaryFile() as noise:
        command = [sys.executable, "-m", "mope_deploy.engines.tensorrt.worker", request["engine"]]
        pipe = subprocess.PIPE
        worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=noise, env=environment)
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it is dead already, and has said why
                worker.stdin.write(json.dumps(request).encode() + b"\n")
                worker.stdin.flush()
            answer: dict[str, Any] | None = None
            for line in worker.stdout:
                message = json.loads(line)
                if message.pop("event") == "progress":
                    progress(message)
                else:
                    answer = message
            code = worker.wait()
        finally:
            worker.kill()
            worker.wait()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
        if answer is not None and code == 0:
            return answer
        if answer is not None:
            raise getattr(errors, answer.pop("kind"))(answer.pop("what"), **answer)
        noise.seek(0)
        raise _died(code, noise.read().decode("utf-8", errors="replace"))


def _died(code: int, noise: str) -> EngineError:
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else str(-code)
        memory = " (out of memory, most likely)" if name == "SIGKILL" else ""
        return EngineError(
            "the builder was ended before it finished",
            received=f"{name}{memory}",
            todo="free memory, or build with smaller --batch and --text-len" if memory else None,
        )
    last = next((line.strip() for line in reversed(noise.splitlines()) if line.strip()), "it said nothing")
    return EngineError(f"the builder failed with exit code {code}: {last[:300]}")


@contextmanager
def _shown(what: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Progress of a build on standard error: one changing line on a terminal, a plain line now and then elsewhere."""

    def text(message: Mapping[str, Any]) -> Text:
        steps = f" {message['step']}/{message['steps']}" if message["steps"] else ""
        return Text(f"{what}: {message['phase']}{steps}")

    if err.is_terminal:
        with err.status(Text(what)) as status:
            yield lambda message: status.update(text(message))
        return
    last = time.monotonic()
    err.print(Text(what))

    def now_and_then(message: Mapping[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last > _PLAIN_EVERY_S:
            last = time.monotonic()
            err.print(text(message))

    yield now_and_then


def _specs(found: Iterable[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(one["name"], one["dtype"], tuple(one["shape"])) for one in found)
