"""MoPE: complementary encoders run first, then y conditions every layer of the main encoder (2403.10568, figure 2).

Token form, which is the definition: layer i runs on [x ; P_s ; P_d ; P_m], the prompts' own outputs are dropped and
layer i + 1 gets prompts of its own. Prefix form, equal up to rounding and faster: they enter layer i as keys and values
alone. It is what a model computes unless the token form is asked for, where its encoders have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mope_deploy.model.backbones.base import Form, LayeredEncoder
from mope_deploy.model.complementary import ComplementaryEncoder
from mope_deploy.model.config import MoPEConfig
from mope_deploy.model.heads import ClassificationHead
from mope_deploy.model.mapper import Mapper
from mope_deploy.model.prompts import LayerPrompts
from mope_deploy.model.tensors import check_tensors
from mope_deploy.preprocess import Preprocessing, present_name
from mope_deploy.task import MultiLabel, SingleLabel

__all__ = ["MoPE", "MoPEOutput"]


class MoPEOutput(NamedTuple):
    """What a MoPE model computed for a batch.

    Attributes:
        logits: (B, C), before softmax (one label) or sigmoid (several).
        routing: weights that mixed the experts, (B, layers, K), rows sum to 1; None without dynamic prompts.
        soft_routing: the same before top-k selection; equal to ``routing`` under dense routing.
    """

    logits: Tensor
    routing: Tensor | None
    soft_routing: Tensor | None


class MoPE(nn.Module):
    """A mixture of prompt experts over frozen encoders. Built by :mod:`mope_deploy.model.build`.

    Args:
        config: every value that defines the model apart from weights.
        main: the frozen encoder X.
        complementary: the encoders Y by modality, in the order of their mapped tokens.
        layers: the prompts of each layer of ``main``.
        mappers: mappers shared by all layers, by modality; empty if layers have their own or mapping is off.
        head: from the main encoder's pooled feature to logits.
        preprocessing: how raw samples become the inputs of these encoders.
    """

    def __init__(
        self,
        *,
        config: MoPEConfig,
        main: LayeredEncoder,
        complementary: Mapping[str, ComplementaryEncoder],
        layers: list[LayerPrompts],
        mappers: Mapping[str, Mapper],
        head: ClassificationHead,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        assert len(layers) == main.depth
        self.config = config
        self.preprocessing = preprocessing
        self.main = main
        self.complementary = nn.ModuleDict(complementary)
        self.layers = nn.ModuleList(layers)
        self.mappers = nn.ModuleDict(mappers)
        self.head = head
        # Their values are made in :mod:`mope_deploy.model.build`.
        widths = {name: complementary[name].backbone.feature_width for name in config.missing}
        self.stand_ins = nn.ParameterDict({name: nn.Parameter(torch.zeros(w)) for name, w in widths.items()})

    @property
    def task(self) -> SingleLabel | MultiLabel:
        """What logits and labels mean."""
        return self.config.make_task()

    def complementary_encoders(self) -> dict[str, ComplementaryEncoder]:
        """The complementary encoders by modality."""
        return cast("dict[str, ComplementaryEncoder]", dict(self.complementary.items()))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, the main modality's first."""
        names = list(self.main.input_names)
        for name, encoder in self.complementary_encoders().items():
            names += encoder.backbone.input_names
            if name in self.stand_ins:
                names.append(present_name(name))
        return tuple(names)

    @property
    def vocabulary(self) -> int | None:
        """Token ids are below it; None without a text encoder."""
        backbones: list[Any] = [self.main, *(each.backbone for each in self.complementary_encoders().values())]
        return next((backbone.vocabulary for backbone in backbones if backbone.modality == "text"), None)

    def forward(
        self, inputs: Mapping[str, Tensor], y: Mapping[str, Tensor] | None = None, *, form: Form = "prefix"
    ) -> MoPEOutput:
        """Logits and routing of a batch.

        Args:
            inputs: tensors by input name, as ``Preprocessing.collate`` makes them: ``pixel_values`` (B, 3, H, W)
                float32, ``input_ids`` and ``attention_mask`` (B, T) int64 with at least one real token per row, and so
                on; ``<modality>_present`` int64 (B,) of each modality that may be missing.
            y: features of some or all complementary encoders, as :meth:`encode_complementary` returns them, to skip
                those encoders.
            form: ``"token"`` for the definition; ``"prefix"`` where the encoders have that, which is the same up to
                rounding.
        """
        known = y or {}
        y = {
            name: self._or_stand_in(name, known[name] if name in known else encoder(inputs, form=form), inputs)
            for name, encoder in self.complementary_encoders().items()
        }
        x, shared = self.main.embed(inputs)  # (B, N, D)
        tokens = [mapper(y[name]) for name, mapper in self.mappers.items()]
        # {D: (B, M, D)}
        mapped = {D: torch.stack([token[D] for token in tokens], dim=1) for D in tokens[0]} if tokens else {}
        weights, soft = [], []
        for i, layer in enumerate(self.layers):
            prompts, routing = layer(self.main.pool(x, shared), y, mapped.get(self.main.widths[i]))
            x = self.main.run_layer(i, x, prompts, shared, form=form)
            if routing is not None:
                weights.append(routing.weights)
                soft.append(routing.soft)
        logits = self.head(self.main.finish(x, shared))  # (B, C)
        if not weights:
            return MoPEOutput(logits, None, None)
        return MoPEOutput(logits, torch.stack(weights, dim=1), torch.stack(soft, dim=1))

    def encode_complementary(self, inputs: Mapping[str, Tensor], *, form: Form = "prefix") -> dict[str, Tensor]:
        """Pooled features of the complementary encoders, {modality: (B, D_y)}; ``form`` as for :meth:`forward`."""
        return {name: encoder(inputs, form=form) for name, encoder in self.complementary_encoders().items()}

    def _or_stand_in(self, name: str, y: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """y (B, D_y), with the learned stand-in in the rows of samples that lack modality ``name``."""
        if name not in self.stand_ins:
            return y
        return torch.where(inputs[present_name(name)].unsqueeze(1) > 0, y, self.stand_ins[name])

    def fit_statistics(self, y: Mapping[str, Tensor]) -> None:
        """Standardise y from now on by the statistics of these training features, {modality: (samples, D_y)}.

        The features must come from this model before the call, that is, not yet standardised. Only for
        ``y_norm="standardise"``.
        """
        for name, encoder in self.complementary_encoders().items():
            encoder.fit_statistics(y[name])

    def train(self, mode: bool = True) -> MoPE:
        """Training mode for what trains; the frozen encoders never leave evaluation mode."""
        super().train(mode)
        self.main.eval()
        for encoder in self.complementary_encoders().values():
            encoder.backbone.eval()
        return self

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter by name; what an optimiser gets."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the trained parameters, and the statistics of y where they were fitted."""
        state: dict[str, Tensor] = {name: value.detach() for name, value in self.trained_parameters().items()}
        for modality, encoder in self.complementary_encoders().items():
            if encoder.standardise:
                state[f"complementary.{modality}.y_mean"] = encoder.y_mean
                state[f"complementary.{modality}.y_std"] = encoder.y_std
        return state

    @torch.no_grad()
    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint's tensors into the model.

        Raises:
            CheckpointError: naming the first few differences, if names, shapes or types are not exactly those of
                :meth:`trained_state`, or a value is NaN or infinite; then nothing was copied.
        """
        into = self.trained_state()
        check_tensors(state, into)
        for name, target in into.items():
            target.copy_(state[name])
