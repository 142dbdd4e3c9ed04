"""Static, export-friendly routing: from a trained model to one that traces into a fixed graph.

In the trained model a router may select experts, add noise and pass gradients straight through. Here every layer
computes scores → softmax (→ TopK → renormalise → Gather from a dense expert table) → weighted sum: no shape depends on
data, no control flow, and all K experts are in the graph whichever the example input would choose. Token form, as
trained: layer i runs on [x ; P_s ; P_d ; P_m] (arXiv 2403.10568, section 3).

The result shares its tensors with the trained model and changes nothing of it: that model stays the reference.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mope_deploy.model import MoPE
from mope_deploy.model.backbones import Backbone
from mope_deploy.model.experts import PromptExperts
from mope_deploy.model.fusion import ComplementaryEncoder
from mope_deploy.model.prompts import LayerPrompts, StaticPrompt
from mope_deploy.model.router import Router
from mope_deploy.preprocess import present_name

__all__ = ["StaticMoPE", "to_static"]

M = TypeVar("M", bound=nn.Module)


def to_static(model: MoPE, *, routing_output: bool = True) -> StaticMoPE:
    """Rewrite a trained model for tracing.

    Args:
        model: stays as it is, training mode included; the result shares its tensors.
        routing_output: whether ``routing`` (B, layers, K) leaves as a second output, where the model routes at all.

    Returns:
        A module in evaluation mode, from the same dict of inputs to a tuple in the order of its ``output_names``.
    """
    twin = _twin(model)
    _fold_parametrisations(twin)
    static = StaticMoPE(
        input_names=model.input_names,
        main=twin.main,
        complementary={name: StaticEncoder(encoder) for name, encoder in twin.complementary.items()},  # type: ignore[arg-type]
        layers=[StaticLayer(layer) for layer in twin.layers],  # type: ignore[arg-type]
        mappers=dict(twin.mappers.items()),
        head=twin.head,
        stand_ins=dict(twin.stand_ins.items()),
        routing_output=routing_output and model.config.dynamic,
    )
    return static.eval()


class StaticMoPE(nn.Module):
    """The whole model with static routing.

    Attributes:
        input_names: what ``forward`` reads from its dict.
        output_names: names of the tuple it returns: ``logits`` and, if asked for, ``routing``.
    """

    def __init__(
        self,
        *,
        input_names: tuple[str, ...],
        main: Backbone,
        complementary: Mapping[str, StaticEncoder],
        layers: list[StaticLayer],
        mappers: Mapping[str, nn.Module],
        head: nn.Module,
        stand_ins: Mapping[str, Tensor],
        routing_output: bool,
    ) -> None:
        super().__init__()
        self.input_names = input_names
        self.output_names = ("logits", "routing") if routing_output else ("logits",)
        self.main = main
        self.complementary = nn.ModuleDict(complementary)
        self.layers = nn.ModuleList(layers)
        self.mappers = nn.ModuleDict(mappers)
        self.head = head
        self.stand_ins = nn.ParameterDict(stand_ins)

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Inputs by name → ``logits`` (B, C) and, if asked for, ``routing`` (B, layers, K)."""
        y = {name: encoder(inputs) for name, encoder in self.complementary.items()}  # each (B, D_y)
        for name, stand_in in self.stand_ins.items():
            y[name] = torch.where(inputs[present_name(name)].unsqueeze(1) > 0, y[name], stand_in)
        mapped = [mapper(y[name]) for name, mapper in self.mappers.items()]  # each {D: (B, D)}
        x, mask = self.main.embed(inputs)  # (B, N, D)
        routing: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            prompts, weights = layer(
                self.main.pool(x, mask), y, [tokens[self.main.widths[i]].unsqueeze(1) for tokens in mapped]
            )
            x = self.main.layer(i, x, prompts, mask)
            if weights is not None:
                routing.append(weights)
        logits = self.head(self.main.finish(x, mask))  # (B, C)
        return (logits, torch.stack(routing, dim=1)) if "routing" in self.output_names else (logits,)


class StaticEncoder(nn.Module):
    """A complementary encoder and its static prompts, without dropout.

    Args:
        trained: the encoder as trained; this module takes over its parts.
    """

    y_mean: Tensor
    y_std: Tensor

    def __init__(self, trained: ComplementaryEncoder) -> None:
        super().__init__()
        self.backbone = trained.backbone
        self.prompts = trained.prompts
        self.standardise = trained.standardise
        if trained.standardise:
            self.register_buffer("y_mean", trained.y_mean)
            self.register_buffer("y_std", trained.y_std)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The pooled feature y (B, D_y)."""
        x, mask = self.backbone.embed(inputs)
        for i in range(self.backbone.depth):
            prompts = self.prompts[i](x.shape[0]) if len(self.prompts) else None
            x = self.backbone.layer(i, x, prompts, mask)
        y = self.backbone.finish(x, mask)
        return (y - self.y_mean) / self.y_std if self.standardise else y


class StaticLayer(nn.Module):
    """The prompts of one layer: a constant P_s, a routed P_d, and mapped tokens P_m.

    Args:
        trained: the layer's prompts as trained; this module takes over their parts.
    """

    def __init__(self, trained: LayerPrompts) -> None:
        super().__init__()
        self.static: StaticPrompt | None = trained.static
        self.dynamic: StaticDynamicPrompt | None = None
        if trained.router is not None and trained.experts is not None:
            self.dynamic = StaticDynamicPrompt(trained.router, trained.experts)
        self.mappers = trained.mappers

    def forward(
        self, pooled_x: Tensor, y: Mapping[str, Tensor], mapped: list[Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """pooled_x (B, D), y, tokens of shared mappers → prompts (B, P, D) and routing (B, K), each None if off."""
        parts: list[Tensor] = []
        weights = None
        if self.static is not None:
            parts.append(self.static(pooled_x.shape[0]))
        if self.dynamic is not None:
            prompt, weights = self.dynamic(pooled_x, y)
            parts.append(prompt)
        parts += mapped
        parts += [mapper(y[name])[pooled_x.shape[1]].unsqueeze(1) for name, mapper in self.mappers.items()]
        return (torch.cat(parts, dim=1) if parts else None), weights


class StaticDynamicPrompt(nn.Module):
    """Router and experts of one layer as one lookup: P_d = Σ_k r_k E_k from the expert table (K, L·D).

    Args:
        router: as trained; this module takes over its projections and embeddings.
        experts: as trained; this module shares its table.
    """

    keys: Tensor
    table: Tensor
    numbers: Tensor

    def __init__(self, router: Router, experts: PromptExperts) -> None:
        super().__init__()
        self.project_x, self.project_y = router.project_x, router.project_y
        self.temperature, self.top_k, self.cosine = router.temperature, router.top_k, router.cosine
        U = router.embeddings.detach()  # (K, d)
        self.register_buffer("keys", nn.functional.normalize(U, dim=-1) if router.cosine else U)
        E = experts.prompts.detach()
        K, self.length, self.width = E.shape
        self.register_buffer("table", E.reshape(K, self.length * self.width))
        self.register_buffer("numbers", torch.arange(K, device=E.device))

    def forward(self, pooled_x: Tensor, y: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """pooled_x (B, D), y {modality: (B, D_y)} → dynamic prompt (B, L, D) and the weights that mixed it (B, K)."""
        parts = [] if self.project_x is None else [self.project_x(pooled_x)]
        parts += [project(y[name]) for name, project in self.project_y.items()]
        q = torch.cat(parts, dim=-1)  # (B, d)
        if self.cosine:
            q = nn.functional.normalize(q, dim=-1)
        soft = torch.softmax(q @ self.keys.T / self.temperature, dim=-1)  # (B, K)
        if not self.top_k:
            return (soft @ self.table).view(-1, self.length, self.width), soft
        values, index = torch.topk(soft, self.top_k, dim=-1)  # (B, k)
        values = (values / values.sum(dim=-1, keepdim=True)).unsqueeze(-1)  # (B, k, 1)
        chosen = nn.functional.embedding(index, self.table)  # (B, k, L·D)
        prompt = (values * chosen).sum(dim=1).view(-1, self.length, self.width)
        # One-hot by comparison: a scatter would be a harder operator for the same numbers.
        hot = (index.unsqueeze(-1) == self.numbers).to(values.dtype)  # (B, k, K)
        return prompt, (values * hot).sum(dim=1)


def _twin(model: M) -> M:
    """A copy of the modules around the same tensors: it costs no memory, and its modes can change on their own."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _fold_parametrisations(model: nn.Module) -> None:
    """Replace weights that are computed anew in every call (a weight norm) by their values, in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
            # torch's own remove_parametrizations changes the class, which a copy shares with what it is a copy of.
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
