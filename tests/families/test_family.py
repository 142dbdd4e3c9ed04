"""The same tests for every encoder family of ``table.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.gate.cases import generated_cases
from export.gate.parity import measure
from export.graph.fused import attention_layers, fuse, routers
from export.graph.split import part_inputs, split
from export.precision import lowering
from mope_deploy.errors import ConfigError, EngineError, ExportError
from mope_deploy.model import EncoderSpec, MoPE
from mope_deploy.model.backbones import load_encoder
from tests.export.rtx import build as build_engine
from tests.export.runtime import run_named
from tests.families.conftest import Graph, build, inputs_of
from tests.families.oracles.fusion import mope
from tests.families.table import FAMILIES, FUSED_GRAPHS, GRAPHS, MAIN, PRECISIONS, Family, by_name, partner

every = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
mains = pytest.mark.parametrize("family", MAIN, ids=lambda family: family.name)
Models = Callable[..., MoPE]


def pair(family: Family) -> tuple[str, str]:
    """Names of main and complementary encoder of a row's model: it is main wherever it can be."""
    other = partner(family)
    return (family.name, other.name) if family.main else (other.name, family.name)


def double(model: MoPE) -> MoPE:
    """A copy in float64, where rounding hides nothing."""
    return copy.deepcopy(model).double()


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal to rounding in float64: products of other shapes sum in another order."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def sample(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Sample i as a batch of one, without padding."""
    found = {name: value[i : i + 1] for name, value in inputs.items()}
    for mask, values in (("attention_mask", "input_ids"), ("audio_mask", "audio_values")):
        if mask in found:
            length = int(found[mask].sum())
            found |= {mask: found[mask][:, :length], values: found[values][:, :length]}
    return found


@every
def test_prompts_off_is_the_librarys_own_forward(
    family: Family, folder: Callable[[Family], Path], model: Models
) -> None:
    """Every layer's states and the pooled feature, padding included in the batch and left out of the comparison."""
    spec = EncoderSpec(modality=family.modality, source=f"dir:{folder(family)}")
    backbone = load_encoder(spec).backbone.double()
    assert backbone.depth == family.layers
    everything = inputs_of(model(*pair(family)), batch=4, double=True)
    inputs = {name: everything[name] for name in backbone.input_names}
    states: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for module in family.outputs(backbone.encoder)
    ]
    with torch.no_grad():
        pooled = family.pooled(backbone.encoder, inputs)
        for hook in hooks:
            hook.remove()
        assert len(states) == len(hooks)
        x, mask = backbone.embed(inputs)
        for i in range(family.layers):
            x = backbone.layer(i, x, None, mask)
            if i < len(states):
                real = inputs["attention_mask"].bool() if family.modality == "text" else slice(None)
                assert close(x[real].flatten(), states[i].reshape(x.shape)[real].flatten(), family.tolerance), (
                    f"layer {i}"
                )
        y = backbone.finish(x, mask)
    assert y.shape == (4, backbone.feature_width)
    assert close(y, pooled, family.tolerance)


@every
def test_predictions_do_not_depend_on_batch_mates(family: Family, model: Models) -> None:
    """Sample i of a padded batch of 16 is sample i alone, without padding; and samples do differ."""
    trained = double(model(*pair(family)))
    inputs = inputs_of(trained, batch=16, text_length=9, double=True)
    with torch.no_grad():
        together = trained(inputs)
        for i in range(16):
            alone = trained(sample(inputs, i))
            assert close(alone.logits[0], together.logits[i], family.tolerance), i
            assert close(alone.routing[0], together.routing[i], family.tolerance), i
    assert not close(together.logits[0], together.logits[1], 1e-3)


@mains
def test_y_does_not_depend_on_batch_mates(family: Family, model: Models) -> None:
    """The same in the complementary role, with static prompts of its own."""
    encoder = double(model(partner(family).name, family.name)).complementary[family.modality]
    inputs = inputs_of(model(*pair(family)), batch=16, text_length=9, double=True)
    with torch.no_grad():
        together = encoder(inputs)
        for i in range(16):
            assert close(encoder(sample(inputs, i))[0], together[i], family.tolerance), i
    assert not close(together[0], together[1], 1e-3)


@every
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_gradient_for_every_trained_tensor_and_none_else(family: Family, top_k: int, model: Models) -> None:
    """Accumulated until every expert was chosen."""
    trained = copy.deepcopy(model(*pair(family), "top2" if top_k else "dense")).train()
    for layer in trained.layers:
        # Undecided enough for the noise in training to choose every expert, however large y is.
        layer.router.temperature, layer.router.sigma = 1000.0, 1.0
    chosen = torch.zeros(trained.main.depth, 5)
    for seed in range(40):
        inputs = inputs_of(trained, batch=16, seed=seed)
        out = trained(inputs)
        nn.functional.cross_entropy(out.logits, torch.arange(16) % 3).backward()
        chosen += (out.routing.detach() > 0).sum(dim=0)
        if (chosen > 0).all():
            break
    assert (chosen > 0).all(), "the test needs every expert of every layer to be chosen"
    for name, parameter in trained.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
        if name.endswith("experts.prompts"):
            assert (parameter.grad.flatten(1).abs().sum(dim=1) > 0).all(), name


@mains
def test_every_layer_is_prompted(family: Family, model: Models) -> None:
    """In the main role by each kind of prompt, in the complementary one by its static prompts."""
    trained = double(model(*pair(family)))
    inputs = inputs_of(trained, batch=3, double=True)
    assert len(trained.layers) == family.layers
    other = double(model(partner(family).name, family.name))
    encoder = other.complementary[family.modality]
    assert len(encoder.prompts) == family.layers
    with torch.no_grad():
        logits, y = trained(inputs).logits, encoder(inputs)
        for layer in trained.layers:
            for tensor in (layer.static.tokens, layer.experts.prompts):
                kept = tensor.clone()
                tensor += torch.arange(tensor.shape[-1]) % 3  # a constant would vanish in a LayerNorm
                assert not close(trained(inputs).logits, logits, 1e-6)
                tensor.copy_(kept)
        for prompt in encoder.prompts:
            kept = prompt.tokens.clone()
            prompt.tokens += torch.arange(prompt.tokens.shape[-1]) % 3
            assert not close(encoder(inputs), y, 1e-6)
            prompt.tokens.copy_(kept)


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    """Every tensor of a module by name, buffers included that no checkpoint holds."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}


def run_oracle(trained: MoPE, rows: tuple[Family, Family], inputs: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    (encoder,) = trained.complementary_encoders().values()
    encoders: list[Any] = [trained.main.encoder, encoder.backbone.encoder]
    assert rows[0].oracle is not None
    assert rows[1].oracle is not None
    oracles = [row.oracle(weights_of(module), module) for row, module in zip(rows, encoders, strict=True)]
    logits, routing = [], []
    for i in range(len(next(iter(inputs.values())))):
        one = {name: value[0].double().numpy() for name, value in sample(inputs, i).items()}
        depths = rows[0].layers, rows[1].layers
        result = mope(weights_of(trained), trained.config, *oracles, depths, one)
        logits.append(result[0])
        routing.append(result[1])
    return np.array(logits), np.array(routing)


@mains
@pytest.mark.parametrize("role", ["main", "complementary"])
def test_equals_the_oracle(family: Family, role: str, model: Models) -> None:
    other = partner(family)
    rows = (family, other) if role == "main" else (other, family)
    trained = double(model(rows[0].name, rows[1].name))
    inputs = inputs_of(trained, batch=3, text_length=5, double=True)
    with torch.no_grad():
        out = trained(inputs)
    logits, routing = run_oracle(trained, rows, inputs)
    np.testing.assert_allclose(out.logits.numpy(), logits, rtol=0, atol=family.tolerance * np.abs(logits).max())
    np.testing.assert_allclose(out.routing.numpy(), routing, rtol=0, atol=family.tolerance)


@pytest.mark.parametrize("family", [row for row in FAMILIES if not row.main], ids=lambda family: family.name)
def test_an_encoder_without_layers_says_what_can_be_prompted(family: Family, folder: Callable[[Family], Path]) -> None:
    spec = EncoderSpec(modality=family.modality, source=f"dir:{folder(family)}")
    with pytest.raises(ConfigError, match=r"complementary encoder only") as caught:
        load_encoder(spec, main=True)
    for known in ("timm VisionTransformer", "timm SwinTransformer", "transformers BERT-like"):
        assert known in str(caught.value)
    with pytest.raises(ConfigError, match="with prompts=0"):
        load_encoder(EncoderSpec(**dict(spec) | {"prompts": 2}))


@every
def test_lone_samples_of_the_shortest_and_the_longest_length(family: Family, model: Models) -> None:
    trained = model(*pair(family))
    text = trained.preprocessing.text
    assert text is not None
    if family.longest:
        assert text.max_length == family.longest
    sound = trained.preprocessing.audio
    clips = (1, 1) if sound is None else (sound.min_samples, sound.max_samples)
    for length, clip in zip((1, text.max_length), clips, strict=True):
        out = trained(inputs_of(trained, batch=1, text_length=length, audio_length=clip))
        assert torch.isfinite(out.logits).all()
        assert torch.allclose(out.routing.sum(-1), torch.ones(()))


@every
def test_a_standalone_checkpoint_loads_without_the_source(
    family: Family, folder: Callable[[Family], Path], tmp_path: Path
) -> None:
    """The encoder's own folder is gone; architecture, weights and predictions are the same."""
    other = partner(family)
    rows = (family, other) if family.main else (other, family)
    made = family.make(tmp_path / "source")
    paths = (made, folder(other)) if family.main else (folder(other), made)
    trained = build(*paths, rows)
    trained.save_pretrained(tmp_path / "checkpoint", standalone=True)
    made.rename(tmp_path / "gone")
    inputs = inputs_of(trained, batch=2)
    loaded = MoPE.from_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, trained(inputs).logits)


graphs = pytest.mark.parametrize("names", GRAPHS, ids="-".join)


@graphs
def test_the_prompted_graph_is_faithful(names: tuple[str, str], graph: Callable[..., Graph], tmp_path: Path) -> None:
    """At other batch sizes and text lengths than the traced ones, with dense and with top-k layers; in parts too."""
    exported = graph(*names)
    kinds = {layer.router.top_k for layer in exported.model.layers}
    assert kinds == {0, 2}
    report = measure(exported.model, exported.file, exported.config, generated_cases(exported.config.graph))
    assert report.passed, report.problems()
    # The prompts do reach the graph: another model's file is not this one's.
    changed = copy.deepcopy(exported.model)
    with torch.no_grad():
        changed.layers[-1].static.tokens += torch.arange(changed.main.widths[-1]) % 3
    cases = generated_cases(exported.config.graph)
    assert not measure(changed, exported.file, exported.config, cases).passed
    cut = split(exported.file, tmp_path, part_inputs(exported.model), [case.inputs for case in cases[:2]])
    for case in cases[:3]:
        handed = {name: array for part in cut.part_files for name, array in run_named(part, case.inputs).items()}
        whole = run_named(exported.file, case.inputs)
        np.testing.assert_equal(run_named(cut.main[0], case.inputs | handed), whole)


@graphs
def test_tensorrt_rtx_builds_the_graph(names: tuple[str, str], graph: Callable[..., Graph], tmp_path: Path) -> None:
    """NVIDIA's own parser and compiler, without a GPU, at every precision; what it parsed is of that precision."""
    exported = graph(*names)
    for precision in PRECISIONS:
        file = exported.file if precision == "fp32" else tmp_path / f"{precision}.onnx"
        if precision != "fp32":
            low = lowering(exported.file, precision, calibration=_feeds(exported.model))
            assert sum(layer.startswith("main.") for layer in low.layers) >= exported.model.main.depth
            low.write(file)
        found = build_engine(file, precision, tmp_path / f"{precision}.engine", sizes=_sizes(exported))["precision"]
        lowered = {"fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")
        assert set(found["products"]) <= {lowered, "float32"}
        assert found["products"][lowered] >= 2 * exported.model.main.depth
        # The weights of each quantised product and its input, at least two products a layer of the main encoder.
        assert found["quantised"] >= 4 * exported.model.main.depth if precision == "int8" else found["quantised"] == 0


def _sizes(exported: Graph) -> dict[str, list[int]]:
    """Least, best and greatest size of each axis that varies."""
    text, sound = exported.model.preprocessing.text, exported.model.preprocessing.audio
    sizes = {"batch": [1, 2, 8]}
    if text is not None:
        sizes["text_length"] = [1, min(7, text.max_length), text.max_length]
    if sound is not None:
        sizes["audio_length"] = [sound.min_samples, 200, sound.max_samples]
    return sizes


def _feeds(trained: MoPE) -> Iterator[dict[str, np.ndarray]]:
    """To calibrate on."""
    for seed in range(3):
        yield {name: tensor.numpy() for name, tensor in inputs_of(trained, batch=4, seed=seed).items()}


def test_a_graph_that_was_not_lowered_is_refused(graph: Callable[..., Graph], tmp_path: Path) -> None:
    """What the graphs are built with finds one of another precision than it is called by."""
    exported = graph(*GRAPHS[0])
    for precision in PRECISIONS[1:]:
        with pytest.raises(EngineError, match=f"called {precision} and is something else"):
            build_engine(exported.file, precision, tmp_path / "e.engine", sizes=_sizes(exported))
    assert not (tmp_path / "e.engine").exists()


@pytest.mark.parametrize("names", FUSED_GRAPHS, ids="-".join)
def test_fusing_for_onnx_runtime_works_or_says_that_it_cannot(
    names: tuple[str, str], graph: Callable[..., Graph], tmp_path: Path
) -> None:
    exported = graph(*names)
    fused = exported.file.with_name("model.fused.onnx")
    counts = {"layers": attention_layers(exported.model), "routers": routers(exported.model)}
    if not all(by_name(name).fused for name in names):
        with pytest.raises(ExportError, match="did not find every attention layer"):
            fuse(exported.file, fused, **counts)
        assert not fused.exists()
        return
    fuse(exported.file, fused, **counts)
    cases = generated_cases(exported.config.graph)
    report = measure(exported.model, fused, exported.config, cases)
    assert report.passed, report.problems()
    given, probes = part_inputs(exported.model), [case.inputs for case in cases[:2]]
    raw = split(exported.file, tmp_path, given, probes, external=True)
    cut = split(fused, tmp_path, given, probes, weights_of=(exported.file, raw))
    assert {file.name for file in cut.main[1:]} == {"model.onnx.data"}
    assert measure(exported.model, cut.main[0], exported.config, cases, parts=cut.part_files).passed


def test_the_graphs_cover_every_row_in_each_of_its_roles() -> None:
    assert {main for main, _ in GRAPHS} == {family.name for family in MAIN}
    assert {complementary for _, complementary in GRAPHS} == {family.name for family in FAMILIES}
    fused = {name for names in FUSED_GRAPHS for name in names if all(by_name(name).fused for name in names)}
    assert fused == {family.name for family in FAMILIES if family.fused}
    assert {name for names in FUSED_GRAPHS for name in names} == {family.name for family in FAMILIES}
