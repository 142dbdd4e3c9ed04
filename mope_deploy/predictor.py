"""Bundle → :meth:`Predictor.predict`: labels with probabilities, without torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from mope_deploy.arguments import check_flag, check_integer, check_path
from mope_deploy.bundle import Bundle
from mope_deploy.data import Sample, Samples
from mope_deploy.engines import CACHE_MB, Session, open_session
from mope_deploy.engines.golden import Verification, check_inputs_are_golden, check_outputs_are_golden
from mope_deploy.errors import EngineError, MediaError, UsageError
from mope_deploy.preprocess import AudioSource, ImageSource, Preprocessing, VideoSource

if TYPE_CHECKING:
    from mope_deploy.engines.cache import CacheUse

__all__ = ["Prediction", "Predictor", "Verification", "load"]


@dataclass(frozen=True)
class Prediction:
    """What the model says about one sample.

    Args:
        label: the most probable name; for multi-label tasks every name whose probability reaches the threshold.
        probability: of ``label``, 0 to 1; None for multi-label tasks, where each name has its own.
        probabilities: of every name, 0 to 1; they sum to 1 in single-label tasks.
        routing: float32 (layers, K), the weights of the experts, if asked for.
        notices: what the user should know about this sample: a text or a clip that was cut, a silent clip.
    """

    label: str | tuple[str, ...]
    probability: float | None
    probabilities: Mapping[str, float]
    routing: NDArray[np.float32] | None = None
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``probability``, ``routing`` and ``notices`` only where there are any."""
        found = {
            "label": self.label if isinstance(self.label, str) else list(self.label),
            "probability": self.probability,
            "probabilities": dict(self.probabilities),
            "routing": None if self.routing is None else self.routing.tolist(),
            "notices": list(self.notices) or None,
        }
        return {name: value for name, value in found.items() if value is not None}


def load(
    path: str | os.PathLike[str],
    *,
    engine: str = "auto",
    graph: str | None = None,
    threads: int | None = None,
    arena: bool | None = None,
    providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
    rebuild: bool = False,
    cache_mb: int = CACHE_MB,
    verify: bool = True,
) -> Predictor:
    """Open a bundle, ready to predict.

    Args:
        path: the bundle's folder.
        engine, graph, threads, arena, providers, rebuild, cache_mb: see :func:`mope_deploy.engines.open_session`.
        verify: compare every file's SHA-256 first.

    Raises:
        UsageError: ``path`` is no bundle; no such engine or graph; an argument of another type.
        BundleError: the bundle is damaged or altered.
        EngineError: the engine refuses the graph.
    """
    folder = check_path("the bundle", path, expected="the path of its folder")
    bundle = Bundle.open(folder, verify=check_flag("verify", verify))
    preprocessing = bundle.preprocessing  # a broken tokenizer is found before the engine spends its seconds
    session = open_session(
        bundle,
        engine=engine,
        graph=graph,
        threads=threads,
        arena=arena,
        providers=providers,
        rebuild=rebuild,
        cache_mb=cache_mb,
    )
    bundle.check_unchanged()  # labels and weights are of one bundle, though others may be renamed to its name
    return Predictor(bundle=bundle, session=session, preprocessing=preprocessing, graph=graph)


class Predictor:
    """A bundle in an engine; made by :func:`load`.

    Threads may share one. No other process can be handed one: each loads its own. After a fork it goes on if it has one
    thread on a CPU; else it says why not.

    Attributes:
        bundle, session, preprocessing: what it is made of.
        labels: the names, in the order of the logits.
    """

    def __init__(
        self, *, bundle: Bundle, session: Session, preprocessing: Preprocessing, graph: str | None = None
    ) -> None:
        self.bundle, self.session, self.preprocessing = bundle, session, preprocessing
        self.graph = bundle.graph(graph, engine=session.name).name
        self.task = bundle.manifest.task
        self.labels = self.task.labels
        self._feeds = [spec.name for spec in session.inputs]

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a predictor cannot be pickled, copied or handed to another process",
            expected="one of its own in each process",
            todo=f"call mope_deploy.load({str(self.bundle.path)!r}) there",
        )

    @property
    def cache(self) -> CacheUse | None:
        """What became of the inputs that a split graph need not run again; None where nothing is kept."""
        kept = getattr(self.session, "cache", None)
        return None if kept is None else kept.use

    def predict(
        self,
        image: ImageSource | Sequence[ImageSource | None] | None = None,
        text: str | Sequence[str | None] | None = None,
        *,
        audio: AudioSource | Sequence[AudioSource | None] | None = None,
        video: VideoSource | Sequence[VideoSource | None] | None = None,
        routing: bool = False,
        batch_size: int = 32,
    ) -> Prediction | list[Prediction]:
        """Predict one sample, or a list of them.

        Args:
            image: a path, a Pillow image, a uint8 array (H, W), (H, W, 3) or (H, W, 4), or a list of these.
            text: a string or a list of strings. One text with many images, or one image with many texts, goes with
                each; and so on for every modality. In a list, None stands for an input that is missing, if it may be.
            audio: a path, a :class:`mope_deploy.preprocess.Waveform`, or a list of these.
            video: a path, a uint8 array (frames, H, W, 3) RGB, or a list of these.
            routing: also return the experts' weights.
            batch_size: samples that run at once; it changes the numbers by rounding only.

        Returns:
            One :class:`Prediction`, or a list of them if either argument is a list.

        Raises:
            UsageError: an input that the model reads is missing and may not be, or lists differ in length.
            MediaError: an input that cannot be used; in a list, with its position.
        """
        given = {"image": image, "text": text, "audio": audio, "video": video}
        read = self.bundle.manifest.modalities
        for name, value in given.items():
            if (value is not None) != (name in read) and name not in self.preprocessing.missing:
                problem = f"{name} is missing" if name in read else f"this model reads no {name}"
                raise UsageError(problem, expected=" and ".join(read))
        many = {name: len(given[name]) for name in read if isinstance(given[name], list | tuple)}  # type: ignore[arg-type]
        if len(set(many.values())) > 1:
            received = ", ".join(f"{count} of {name}" for name, count in many.items())
            raise UsageError(
                "lists of inputs", received=received, expected="equal lengths, or one single input for all"
            )
        batch_size, routing = check_integer("batch_size", batch_size, 1), check_flag("routing", routing)
        loaded = self._broadcast({name: given[name] for name in read}, many)
        found = [one for batch in _batches(loaded, batch_size) for one in self._predict(batch, routing=routing)]
        return found if many else found[0]

    def predict_batches(
        self, samples: Samples | Iterable[Sample], *, batch_size: int = 16, routing: bool = False
    ) -> Iterator[tuple[Sample, Prediction]]:
        """Predict the rows of a data file as a stream, ``batch_size`` in memory at a time.

        Args:
            samples: from :func:`mope_deploy.data.open_samples`; its ``skip_bad`` is honoured, ``skipped`` filled.
            batch_size: samples that run at once.
            routing: also return the experts' weights.

        Raises:
            UsageError: ``samples`` are none, or another argument is of another type.
            DataError: naming file and line of a row that cannot be used.
        """
        batch_size, routing = check_integer("batch_size", batch_size, 1), check_flag("routing", routing)
        if isinstance(samples, str | os.PathLike) or not isinstance(samples, Iterable):
            todo = "open a data file with mope_deploy.data.open_samples"
            raise UsageError("samples", received=type(samples).__name__, expected="rows of a data file", todo=todo)
        return self._stream(samples, batch_size=batch_size, routing=routing)

    def _stream(
        self, samples: Samples | Iterable[Sample], *, batch_size: int, routing: bool
    ) -> Iterator[tuple[Sample, Prediction]]:
        if isinstance(samples, Samples):
            pairs: Iterator[tuple[Sample, dict[str, Any]]] = samples.load(self.preprocessing)
        else:
            pairs = ((sample, _sample(sample).load(self.preprocessing)) for sample in samples)
        for batch in _batches(pairs, batch_size):
            predictions = self._predict([loaded for _, loaded in batch], routing=routing)
            yield from zip((sample for sample, _ in batch), predictions, strict=True)

    def verify(self) -> Verification:
        """Repeat the golden samples: from the raw files to the input arrays, and from the arrays to the outputs.

        Preprocessing must give the stored arrays to the last bit; outputs must lie within the manifest's tolerances.

        Raises:
            ParityError: they do not; the message has the figures.
            BundleError: the golden files are damaged.
        """
        check_inputs_are_golden(self.bundle, self.preprocessing)
        return check_outputs_are_golden(self.bundle, self.session, graph=self.graph)

    def _broadcast(self, given: Mapping[str, Any], many: Mapping[str, int]) -> Iterator[dict[str, Any]]:
        """Samples as :meth:`Preprocessing.collate` takes them; a single input beside a list is loaded once."""
        once = {name: self._load(name, value, None) for name, value in given.items() if name not in many}
        for i in range(max(many.values(), default=1)):
            loaded = {**once, **{name: self._load(name, given[name][i], i) for name in many}}
            notices = [notice for _, heard in loaded.values() for notice in heard]
            yield {name: value for name, (value, _) in loaded.items()} | {"notices": tuple(notices)}

    def _load(self, name: str, value: Any, position: int | None) -> tuple[Any, list[str]]:
        """What preprocessing makes of one input, and what should be known about it."""
        if value is None and name in self.preprocessing.missing:
            return None, []
        notices: list[str] = []
        try:
            return self.preprocessing.load(name, value, on_notice=notices.append), notices
        except MediaError as error:
            raise error if position is None else MediaError(f"{name}[{position}]: {error}") from error

    def _predict(self, loaded: Sequence[Mapping[str, Any]], *, routing: bool) -> list[Prediction]:
        """One batch through the graph."""
        shape = self.bundle.manifest.routing
        if routing and shape is None:
            reason = "it was exported without, or its model has no dynamic prompts"
            raise UsageError(f"this bundle has no routing output: {reason}")
        notices: list[tuple[str, ...]] = [tuple(sample.get("notices", ())) for sample in loaded]

        def truncated(index: int, tokens: int) -> None:
            assert self.preprocessing.text is not None
            limit = self.preprocessing.text.max_length
            notices[index] += (f"text truncated from {tokens:,} to {limit:,} tokens",)

        arrays = self.preprocessing.collate(loaded, on_truncate=truncated)
        outputs = ["logits", "routing"] if routing else ["logits"]
        found = self.session.run({name: arrays[name] for name in self._feeds}, outputs)
        logits = found["logits"].astype(np.float64)  # (B, C)
        if not np.isfinite(logits).all():
            what = f"{self.session.name} on {self.session.device} returned NaN or infinite logits"
            raise EngineError(what, todo=f"run: mope verify {self.bundle.path}")
        weights = found["routing"] if routing else [None] * len(loaded)  # (B, layers, K)
        named = [dict(zip(self.labels, row, strict=True)) for row in self.task.probabilities(logits).tolist()]
        rows = zip(logits, named, weights, notices, strict=True)
        return [Prediction(*self.task.name(row), *rest) for row, *rest in rows]


def _sample(one: object) -> Sample:
    if not isinstance(one, Sample):
        raise UsageError("samples", received=f"a {type(one).__name__} among them", expected="mope_deploy.data.Sample")
    return one


T = TypeVar("T")


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
