"""On a GPU: build, prove, run, against the float64 oracle. The one place where a TensorRT session really runs."""

from __future__ import annotations

import numpy as np
import pytest

from mope_deploy.bundle import Bundle
from mope_deploy.engines import open_session
from mope_deploy.engines.build import build_engine
from mope_deploy.engines.device import this_device
from mope_deploy.engines.sidecar import Proof, engine_files
from tests.device import tiny
from tests.device.test_engines import feeds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(this_device().gpu is None, reason="no GPU here")]


def test_build_prove_and_run(bundle: Bundle) -> None:
    sidecar, _ = build_engine(bundle, batch="2:3:4", text_length="3:6:12")
    session = open_session(bundle, engine="tensorrt")
    proof = Proof.read(engine_files(bundle, bundle.graph(), sidecar.backend).proof)
    assert proof is not None
    assert proof.device == this_device()
    for batch, length in ((1, 1), (3, 5), (4, 12), (13, 7)):  # below, within and beyond the sizes it was built for
        inputs = feeds(batch, length, seed=batch)
        found, want = session.run(inputs), tiny.oracle(inputs)
        for name, array in found.items():
            assert (array.dtype, array.shape) == (np.float32, want[name].shape)
            np.testing.assert_allclose(array, want[name], rtol=0, atol=1e-5 * np.abs(want[name]).max())
        assert session.run(inputs)["logits"].tobytes() == found["logits"].tobytes()
    assert list(session.run(feeds(), ["routing"])) == ["routing"]
    assert "proved by the golden samples" in open_session(bundle).why
