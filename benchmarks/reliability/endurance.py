"""One predictor for eight threads, and for a million predictions in one process."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np

from benchmarks.reliability.inputs import Found
from benchmarks.reliability.kit import Kit
from mope_deploy.data import open_samples
from mope_deploy.predictor import Predictor, load
from mope_deploy.progress import track

__all__ = ["THREADS", "try_memory", "try_threads"]

THREADS = 8
_FLAT_MB = 16  # that a process may grow by after its first tenth
_BATCH = 64


def try_threads(kit: Kit, count: int) -> Found:
    """``count`` predictions in each of eight threads, every one of them the answer that one thread gets."""
    found, predictor = Found(), load(kit.bundle, engine="onnxruntime", threads=1)
    samples = list(open_samples(kit.rows, task=predictor.task, modalities=("image", "text")))
    wanted = [_answer(predictor, sample.image, sample.text) for sample in samples]
    lock = threading.Lock()

    def work(first: int) -> None:
        for number in range(first, first + count):
            sample = samples[number % len(samples)]
            try:
                right = np.array_equal(_answer(predictor, sample.image, sample.text), wanted[number % len(samples)])
                outcome, detail = ("used", "") if right else ("wrong", "another answer")
            except Exception as error:
                outcome, detail = "traceback", f"{type(error).__name__}: {error}"
            with lock:
                found.add(number, outcome, detail)

    threads = [threading.Thread(target=work, args=(i * count,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def try_memory(kit: Kit, count: int) -> Found:
    """``count`` predictions in batches; memory of the process after the first tenth and at the end."""
    found, predictor = Found(), load(kit.bundle, engine="onnxruntime", threads=1)
    rows = open_samples(kit.rows, task=predictor.task, modalities=("image", "text"))
    prepared = [(predictor.preprocessing.load_image(s.image), s.text) for s in rows if s.image is not None]
    images = [prepared[i % len(prepared)][0] for i in range(_BATCH)]
    texts = [prepared[i % len(prepared)][1] for i in range(_BATCH)]
    batches, settled = -(-count // _BATCH), 0.0
    for number in track(range(batches), what="predictions, batches of 64", total=batches):
        made = predictor.predict(image=images, text=texts, batch_size=_BATCH)
        found.outcomes["used"] += len(made) if isinstance(made, list) else 1
        if number == batches // 10:
            gc.collect()
            settled = _resident_mb()
    gc.collect()
    found.megabytes = _resident_mb() - settled
    if found.megabytes > _FLAT_MB:
        found.faults.append((-1, f"memory: grew by {found.megabytes:.1f} MB after the first tenth"))
    return found


def _answer(predictor: Predictor, image: object, text: object) -> np.ndarray:
    found = predictor.predict(image=image, text=text)  # type: ignore[arg-type]
    assert not isinstance(found, list)
    return np.array(list(found.probabilities.values()))


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20
