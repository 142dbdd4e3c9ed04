"""What is judged last: the files of a graph as they go into the bundle, whatever was done to them on the way.

See :mod:`export.gate.final` for what is compared, and with what.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from export.gate import Final, JudgedFile, PrecisionReport, changed, hashes, judge_again, near, require
from export.gate.parity_report import require_parity
from export.precision.check import HALVES
from export.precision.half import write_emulated
from export.variants import Variant, Work
from mope_deploy.errors import ParityError

__all__ = ["judge_final"]

_BY_PARITY = "compared with the eager model by the parity gate"
_ITSELF = "the file that the precision gate judged"
_AGAINST = "held against the file that the precision gate judged: weights and nodes by name, outputs on real samples"


def judge_final(work: Work, variant: Variant) -> Variant:
    """``variant`` with the judgement of its final files: called last, on every graph, before it is packed.

    * fp32: the parity gate, unless it judged these very bytes before.
    * int8, int8-dynamic: nothing more if they are the file that was judged, to the byte. Of what was made of that file,
      without its output ``routing`` or in parts, weights and nodes are compared by name and outputs on real samples;
      where these are not equal to the last bit, the gate is passed anew.
    * fp16, bf16: the same, of a float32 copy made of the written bytes that rounds as they say; and fp16, which ONNX
      Runtime can run, is run as it is, too.

    Raises:
        ParityError: the files are not what was judged.
        ExportError: one cannot be read.
    """
    files = variant.all_files
    found = hashes(files)
    work.on_step(f"judging the final {variant.files[0].name}")
    if variant.lowered is None:
        if found != variant.compared:
            main, parts = variant.files[0], variant.part_files
            require_parity(work.parity.compare(variant.name, main, work.final, parts))
        final = Final(found, _BY_PARITY)
    elif found == variant.lowered.sha256:
        final = Final(found, _ITSELF)
    else:
        with tempfile.TemporaryDirectory(prefix="mope-final-") as folder:
            variant, final = _against_judged(work, variant, Path(folder), found)
    if hashes(files) != found:
        raise ParityError(f"{files[0].name} changed while it was judged")
    return replace(variant, final=final)


def _against_judged(work: Work, variant: Variant, folder: Path, found: dict[str, str]) -> tuple[Variant, Final]:
    """The final files against the file that passed the gate."""
    assert variant.reference is not None
    assert variant.lowered is not None
    precision, asked = variant.precision, work.asked(variant.precision)
    written = (variant.files[0], *variant.part_files)
    was = variant.lowered.sha256
    if hashes([variant.reference.with_name(name) for name in was]) != was:
        raise ParityError(f"{written[0].name} is not the file that was judged: its bytes changed since")
    read = written
    if precision in HALVES:
        read = tuple(write_emulated(file, precision, folder / file.name) for file in written)
    if others := changed(read, variant.reference):
        shown = f"{', '.join(others[:3])}{', …' if len(others) > 3 else ''}"
        raise ParityError(f"{written[0].name} is not the file that was judged: other weights or nodes, {shown}")
    judged = JudgedFile(work.evaluation, variant.reference, work.routed, precision=precision)
    limits = near(asked, work.final, work.model)
    mark = variant.lowered.report.mark

    def compare(files: Sequence[Path], mark: str) -> PrecisionReport:
        found = judged.compare(files[0], work.final, parts=files[1:], precision=precision, asked=limits, mark=mark)
        return require(found, "is not the file that was judged")

    reports = [compare(read, mark)]
    if precision == "fp16":
        reports.append(compare(written, "CPU"))
    if not reports[0].exact or variant.split_error != 0:
        again = judge_again(
            work.evaluation, read[0], work.final, precision=precision, thresholds=asked, parts=read[1:], mark=mark
        )
        require(again, f"is not the model in {precision}")
        variant = replace(variant, judged=again, lowered=replace(variant.lowered, report=again))
    return variant, Final(found, _AGAINST, tuple(reports))
