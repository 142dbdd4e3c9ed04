"""Static, export-friendly routing: from a trained model to one that traces into a fixed graph.

In the trained model a router may select experts, add noise and pass gradients straight through. Here every layer
computes scores → softmax (→ TopK → renormalise → Gather from a dense expert table) → weighted sum: no shape depends on
data, no control flow, and all K experts are in the graph whichever the example input would choose.

Prompts enter layers in prefix form, as keys and values alone; those that are known beforehand are constants, and
mixtures of experts are mixed from constants where that is cheaper (export.graph.folding). What depends on y, the mapped
tokens, goes through the layer's own product beside x, so that no weight is needed twice. Encoders without a prefix form
run on [x ; P_s ; P_d ; P_m] (arXiv 2403.10568, section 3).

The result shares its tensors with the trained model and changes nothing of it: that model stays the reference.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from export.graph.folding import AppendedExperts, FoldedExperts, LayerSize, Mixture, choose, constants
from mope_deploy.manifest import y_name
from mope_deploy.model import MoPE
from mope_deploy.model.backbones import LayeredEncoder
from mope_deploy.model.backbones.prefix import PrefixKV, Projection
from mope_deploy.model.complementary import ComplementaryEncoder
from mope_deploy.model.prompts import LayerPrompts, StaticPrompt
from mope_deploy.model.router import Router
from mope_deploy.preprocess import present_name

__all__ = ["StaticMoPE", "folding_of", "to_static"]


def to_static(model: MoPE, *, routing_output: bool = True, fold: str = "auto") -> StaticMoPE:
    """Rewrite a trained model for tracing.

    Args:
        model: stays as it is, training mode included; the result shares its tensors, or holds what was folded of them.
        fold: how prompts enter the layers, one of :data:`export.limits.FOLDS`.
        routing_output: whether ``routing`` (B, layers, K) leaves as a second output, where the model routes at all.

    Returns:
        A module in evaluation mode, from the same dict of inputs to a tuple in the order of its ``output_names``.
    """
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # other modules around the same tensors
    _fold_parametrisations(twin)
    return StaticMoPE(twin, fold=fold, routing_output=routing_output).eval()


def folding_of(model: MoPE, fold: str) -> str:
    """How prompts enter the layers of the main encoder in :func:`to_static`, in words: ``"gram in 12 of 12 layers"``.

    ``token`` stands for the token form, ``append`` for prompts that go through the layer's own product, ``constants``
    for static prompts alone as constants; the others are the forms of a mixture of experts (export.graph.folding).
    """
    if fold == "token" or not model.main.has_prefix_form:
        return f"token in {model.main.depth} of {model.main.depth} layers"
    forms = Counter(
        _form(layer, _projection(model.main, i, fold), fold)  # type: ignore[arg-type]
        for i, layer in enumerate(model.layers)
    )
    return ", ".join(f"{form} in {count} of {model.main.depth} layers" for form, count in forms.items())


class StaticMoPE(nn.Module):
    """The whole model with static routing; see :func:`to_static`. Like all modules here it takes over a trained one's.

    Attributes:
        input_names: what ``forward`` reads from its dict.
        output_names: names of the tuple it returns: ``logits`` and, if asked for, ``routing``.
        shows_y: whether the pooled feature of each complementary modality follows behind them.
        prefix: whether prompts enter the layers of the main encoder as keys and values alone.
    """

    def __init__(self, trained: MoPE, *, fold: str, routing_output: bool) -> None:
        super().__init__()
        self.input_names = trained.input_names
        self.output_names = ("logits", "routing") if routing_output and trained.config.dynamic else ("logits",)
        self.shows_y = False
        self.main = trained.main
        self.complementary = nn.ModuleDict(
            {name: StaticEncoder(encoder, fold) for name, encoder in trained.complementary_encoders().items()}
        )
        self.layers = nn.ModuleList(
            StaticLayer(layer, _projection(self.main, i, fold), fold)  # type: ignore[arg-type]
            for i, layer in enumerate(trained.layers)
        )
        self.prefix = fold != "token" and self.main.has_prefix_form
        if self.prefix:
            _separate(self.main)
        self.mappers, self.head, self.stand_ins = trained.mappers, trained.head, trained.stand_ins

    @property
    def y_names(self) -> tuple[str, ...]:
        """Names of the pooled features, in the order of the complementary modalities."""
        return tuple(map(y_name, self.complementary))

    def showing_y(self) -> StaticMoPE:
        """The same modules; the outputs of the result also have y of each complementary modality, (B, D_y)."""
        shown = copy.copy(self)
        shown.shows_y = True
        shown.output_names = (*self.output_names, *self.y_names)
        return shown

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Inputs by name → ``logits`` (B, C) and, if asked for, ``routing`` (B, layers, K)."""
        y = {name: encoder(inputs) for name, encoder in self.complementary.items()}  # each (B, D_y)
        for name, stand_in in self.stand_ins.items():
            y[name] = torch.where(inputs[present_name(name)].unsqueeze(1) > 0, y[name], stand_in)
        mapped = [mapper(y[name]) for name, mapper in self.mappers.items()]  # each {D: (B, D)}
        x, mask = self.main.embed(inputs)  # (B, N, D)
        routing: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            prompts, kv, weights = layer(
                self.main.pool(x, mask), y, [tokens[self.main.widths[i]].unsqueeze(1) for tokens in mapped]
            )
            x = _run(self.main, i, x, prompts, kv, mask, self.prefix)
            if weights is not None:
                routing.append(weights)
        logits = self.head(self.main.finish(x, mask))  # (B, C)
        outputs = (logits, torch.stack(routing, dim=1)) if "routing" in self.output_names else (logits,)
        return (*outputs, *y.values()) if self.shows_y else outputs


class StaticEncoder(nn.Module):
    """A complementary encoder and its static prompts, without dropout."""

    y_mean: Tensor
    y_std: Tensor

    def __init__(self, trained: ComplementaryEncoder, fold: str) -> None:
        super().__init__()
        self.backbone = cast(LayeredEncoder, trained.backbone)  # layered wherever there are prompts
        self.prefix = fold != "token" and self.backbone.has_prefix_form
        self.prompts = nn.ModuleList(
            StaticTokens(prompt, _projection(self.backbone, i, fold))  # type: ignore[arg-type]
            for i, prompt in enumerate(trained.prompts)
        )
        if self.prefix and len(self.prompts):
            _separate(self.backbone)
        self.standardise = trained.standardise
        if trained.standardise:
            self.register_buffer("y_mean", trained.y_mean)
            self.register_buffer("y_std", trained.y_std)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The pooled feature y (B, D_y)."""
        x, mask = self.backbone.embed(inputs)
        for i in range(self.backbone.depth):
            prompts, kv = self.prompts[i](x.shape[0]) if len(self.prompts) else (None, None)
            x = _run(self.backbone, i, x, prompts, kv, mask, self.prefix)
        y = self.backbone.finish(x, mask)
        return (y - self.y_mean) / self.y_std if self.standardise else y


class StaticTokens(nn.Module):
    """A static prompt: keys and values as constants, or tokens where there is no projection to fold into."""

    tokens: Tensor
    keys: Tensor
    values: Tensor

    def __init__(self, trained: StaticPrompt, projection: Projection | None) -> None:
        super().__init__()
        self.folded = projection is not None
        tokens = trained.tokens.detach()  # (L, D)
        if projection is None:
            self.register_buffer("tokens", tokens)
        else:
            for name, constant in zip(("keys", "values"), constants(projection, tokens), strict=True):
                self.register_buffer(name, constant.unsqueeze(0).contiguous())  # (1, L, inner)

    def forward(self, batch: int) -> tuple[Tensor | None, PrefixKV | None]:
        """Tokens (B, L, D), or keys and values; the other is None."""
        if self.folded:
            return None, PrefixKV((self.keys.expand(batch, -1, -1),), (self.values.expand(batch, -1, -1),))
        return self.tokens.unsqueeze(0).expand(batch, -1, -1), None


class StaticLayer(nn.Module):
    """The prompts of one layer: a constant P_s, a routed P_d, and mapped tokens P_m.

    ``projection`` is how the layer makes keys and values, None to fold nothing; ``fold`` is how experts are folded.
    """

    def __init__(self, trained: LayerPrompts, projection: Projection | None, fold: str) -> None:
        super().__init__()
        self.static = None if trained.static is None else StaticTokens(trained.static, projection)
        self.router: StaticRouter | None = None
        self.dynamic: AppendedExperts | FoldedExperts | None = None
        if trained.router is not None and trained.experts is not None:
            self.router = StaticRouter(trained.router)
            E, form = trained.experts.prompts.detach(), _form(trained, projection, fold)
            if projection is None or form == "append":
                self.dynamic = AppendedExperts(E)
            else:
                self.dynamic = FoldedExperts(projection, E, form)
        self.mappers = trained.mappers

    def forward(
        self, pooled_x: Tensor, y: Mapping[str, Tensor], mapped: list[Tensor]
    ) -> tuple[Tensor | None, PrefixKV | None, Tensor | None]:
        """The prompts of a batch.

        Args:
            pooled_x: (B, D).
            y: by modality, (B, D_y).
            mapped: tokens of shared mappers, (B, 1, D) each.

        Returns:
            Tokens (B, P, D), keys and values of further prompts, routing (B, K); None where there are none.
        """
        tokens: list[Tensor] = []
        kv: list[PrefixKV] = []
        weights = None
        if self.static is not None:
            own, made = self.static(pooled_x.shape[0])
            tokens += [] if own is None else [own]
            kv += [] if made is None else [made]
        if self.router is not None and self.dynamic is not None:
            mixture = self.router(pooled_x, y)
            weights = mixture.weights
            if isinstance(self.dynamic, FoldedExperts):
                kv.append(self.dynamic(mixture))
            else:
                tokens.append(self.dynamic(mixture))
        tokens += mapped
        tokens += [mapper(y[name])[pooled_x.shape[1]].unsqueeze(1) for name, mapper in self.mappers.items()]
        made = PrefixKV(*(tuple(itertools.chain(*parts)) for parts in zip(*kv, strict=True))) if kv else None
        return (torch.cat(tokens, dim=1) if tokens else None), made, weights


class StaticRouter(nn.Module):
    """The router of one layer without noise: scores, softmax and, under top-k routing, a choice."""

    keys: Tensor
    numbers: Tensor

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.project_x, self.project_y = router.project_x, router.project_y
        self.temperature, self.top_k, self.cosine = router.temperature, router.top_k, router.cosine
        U = router.embeddings.detach()  # (K, d)
        self.register_buffer("keys", nn.functional.normalize(U, dim=-1) if router.cosine else U)
        self.register_buffer("numbers", torch.arange(len(U), device=U.device))

    def forward(self, pooled_x: Tensor, y: Mapping[str, Tensor]) -> Mixture:
        """pooled_x (B, D), y {modality: (B, D_y)} → how the experts are mixed."""
        parts = [] if self.project_x is None else [self.project_x(pooled_x)]
        parts += [project(y[name]) for name, project in self.project_y.items()]
        q = torch.cat(parts, dim=-1)  # (B, d)
        if self.cosine:
            q = nn.functional.normalize(q, dim=-1)
        soft = torch.softmax(q @ self.keys.T / self.temperature, dim=-1)  # (B, K)
        if not self.top_k:
            return Mixture(soft, None, None)
        values, index = torch.topk(soft, self.top_k, dim=-1)  # (B, k)
        values = (values / values.sum(dim=-1, keepdim=True)).unsqueeze(-1)  # (B, k, 1)
        # One-hot by comparison: a scatter would be a harder operator for the same numbers.
        hot = (index.unsqueeze(-1) == self.numbers).to(values.dtype)  # (B, k, K)
        return Mixture((values * hot).sum(dim=1), values, index)


def _separate(backbone: LayeredEncoder) -> None:
    """A weight each for queries, keys and values in every layer, which all run in prefix form."""
    for index in range(backbone.depth):
        backbone.separate(index)


def _projection(backbone: LayeredEncoder, index: int, fold: str) -> Projection | None:
    """How a layer makes keys and values, if anything is to be folded into it."""
    return backbone.projection(index) if backbone.has_prefix_form and fold not in ("token", "none") else None


def _form(layer: LayerPrompts, projection: Projection | None, fold: str) -> str:
    """In which form the prompts enter a layer that has a prefix form: that of its experts, or else of its tokens."""
    if projection is None:
        return "append"
    if layer.experts is not None and layer.router is not None:
        return choose(fold, LayerSize.of(projection, layer.experts.prompts.detach(), layer.router.top_k))
    return "append" if layer.static is None else "constants"


def _run(
    backbone: LayeredEncoder,
    i: int,
    x: Tensor,
    prompts: Tensor | None,
    kv: PrefixKV | None,
    mask: Tensor | None,
    prefix: bool,
) -> Tensor:
    """Layer ``i`` with its prompts: as keys and values alone, or in token form."""
    if prefix and (prompts is not None or kv is not None):
        return backbone.prefix_layer(i, x, prompts, mask, kv)
    return backbone.layer(i, x, prompts, mask)


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
