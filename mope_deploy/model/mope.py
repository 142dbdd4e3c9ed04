"""MoPE: complementary encoders run first, then y conditions every layer of the main encoder (2403.10568, figure 2).

Token form, which is the definition: layer i runs on [x ; P_s ; P_d ; P_m], the prompts' own outputs are dropped and
layer i + 1 gets prompts of its own. Prefix form, equal up to rounding and faster: they enter layer i as keys and values
alone. It is what a model computes unless the token form is asked for, where its encoders have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from mope_deploy.model.backbones import Backbone, FrozenEncoder, load_encoder
from mope_deploy.model.config import EncoderSpec, MoPEConfig
from mope_deploy.model.experts import PromptExperts
from mope_deploy.model.heads import ClassificationHead
from mope_deploy.model.mapper import Mapper
from mope_deploy.model.prompts import LayerPrompts, StaticPrompt
from mope_deploy.model.router import Router, routing_embeddings
from mope_deploy.preprocess import Preprocessing, present_name
from mope_deploy.task import MultiLabel, SingleLabel

__all__ = ["ComplementaryEncoder", "Form", "MoPE", "MoPEOutput", "build_model"]

Form = Literal["prefix", "token"]

_MODEL_CARD = """---
{{ card_data }}
---

# MoPE model

A mixture of prompt experts on frozen encoders, made with mope-deploy. It holds the trained tensors only; `config.json`
names the encoders and the fingerprints of their weights. Load it with `mope_deploy.model.MoPE.from_pretrained`.
"""


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


class ComplementaryEncoder(nn.Module):
    """A frozen encoder Y with static prompts of its own, giving its pooled feature y.

    Args:
        backbone: the frozen encoder.
        prompts: one static prompt per layer, or none at all.
        dropout: probability of the dropout on its prompts, in training only.
        standardise: whether y leaves as (y − mean) / deviation with statistics set by :meth:`fit_statistics`.
    """

    def __init__(self, backbone: Backbone, *, prompts: list[StaticPrompt], dropout: float, standardise: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.prompts = nn.ModuleList(prompts)
        self.dropout = nn.Dropout(dropout)
        self.standardise = standardise
        self.y_mean: Tensor
        self.y_std: Tensor
        if standardise:
            self.register_buffer("y_mean", torch.zeros(backbone.feature_width))
            self.register_buffer("y_std", torch.ones(backbone.feature_width))

    def forward(self, inputs: Mapping[str, Tensor], *, form: Form = "prefix") -> Tensor:
        """The pooled feature y of a batch, standardised if asked for: (B, D_y)."""
        x, mask = self.backbone.embed(inputs)
        for i in range(self.backbone.depth):
            prompts = self.dropout(self.prompts[i](x.shape[0])) if len(self.prompts) else None
            x = self.backbone.run_layer(i, x, prompts, mask, form=form)
        y = self.backbone.finish(x, mask)
        return (y - self.y_mean) / self.y_std if self.standardise else y

    @torch.no_grad()
    def fit_statistics(self, y: Tensor) -> None:
        """Set mean and deviation from features y (samples, D_y) that were *not* yet standardised."""
        assert self.standardise
        self.y_mean.copy_(y.mean(dim=0))
        # A constant feature carries nothing; dividing by its rounding noise would make it loud.
        self.y_std.copy_(y.std(dim=0, unbiased=False).clamp_min(1e-4))


class MoPE(
    nn.Module,
    ModelHubMixin,
    library_name="mope-deploy",
    tags=["mope", "multimodal", "prompt-tuning"],
    model_card_template=_MODEL_CARD,
):
    """A mixture of prompt experts over frozen encoders. Build it with :func:`build_model` or :meth:`from_pretrained`.

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
        main: Backbone,
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
        # Zero is the mean of a standardised y, and a feature like no other of one that is not.
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
        x, mask = self.main.embed(inputs)  # (B, N, D)
        tokens = [mapper(y[name]) for name, mapper in self.mappers.items()]
        # {D: (B, M, D)}
        mapped = {D: torch.stack([token[D] for token in tokens], dim=1) for D in tokens[0]} if tokens else {}
        weights, soft = [], []
        for i, layer in enumerate(self.layers):
            prompts, routing = layer(self.main.pool(x, mask), y, mapped.get(self.main.widths[i]))
            x = self.main.run_layer(i, x, prompts, mask, form=form)
            if routing is not None:
                weights.append(routing.weights)
                soft.append(routing.soft)
        logits = self.head(self.main.finish(x, mask))  # (B, C)
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

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint's tensors into the model.

        Raises:
            CheckpointError: if names or shapes are not exactly those of :meth:`trained_state`.
        """
        from mope_deploy.model.checkpoint import copy_state

        copy_state(state, into=self.trained_state())

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        standalone: bool = False,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        config: Any = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write a checkpoint folder, all or nothing; an earlier checkpoint there is replaced.

        Args:
            save_directory: the folder.
            standalone: also store the frozen encoders, for machines without network.
            repo_id: hub repository for ``push_to_hub``; default: the folder's name.
            push_to_hub: upload the folder afterwards.
            config: ignored; part of the hub mixin's signature.
            model_card_kwargs: values for the model card.
            push_to_hub_kwargs: further arguments of ``push_to_hub``.

        Raises:
            CheckpointError: if the folder holds something else than a checkpoint.
        """
        from mope_deploy.model.checkpoint import save_checkpoint

        card = str(self.generate_model_card(**(model_card_kwargs or {})))
        save_checkpoint(self, Path(save_directory), standalone=standalone, card=card)
        if push_to_hub:
            return self.push_to_hub(repo_id or Path(save_directory).name, **push_to_hub_kwargs)
        return None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, encoders: Mapping[str, str] | None = None, **hub: Any
    ) -> MoPE:
        """Load a checkpoint folder, or a hub repository that holds one.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            encoders: other sources for the encoders, by modality, for instance ``{"image": "dir:/models/vit"}``.
            hub: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

        Raises:
            CheckpointError: if it is damaged, incomplete, or belongs to encoders with other weights.
        """
        from mope_deploy.model.checkpoint import fetch_checkpoint, load_checkpoint

        return load_checkpoint(fetch_checkpoint(str(pretrained_model_name_or_path), **hub), encoders=encoders or {})


def build_model(config: MoPEConfig, *, seed: int = 0) -> MoPE:
    """Load the frozen encoders that ``config`` names and put freshly initialised prompts around them.

    Args:
        config: what to build.
        seed: of the initial values; the global random state is left as it was.

    Raises:
        ConfigError: if an encoder cannot be loaded or is of the wrong kind.
    """
    encoders = {config.main.modality: load_encoder(config.main, main=True)}
    encoders |= {spec.modality: load_encoder(spec) for spec in config.complementary}
    return assemble(config, encoders, seed=seed)


def assemble(
    config: MoPEConfig,
    encoders: Mapping[str, FrozenEncoder],
    *,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> MoPE:
    """:func:`build_model` on encoders that were loaded before, by modality.

    Args:
        config: what to build.
        encoders: the loaded encoders by modality.
        seed: of the initial values.
        preprocessing: what a checkpoint recorded; default: the encoders' own.

    Raises:
        ConfigError: if ``config`` names fewer labels than its task needs.
    """
    config.check_labels()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        main = encoders[config.main.modality].backbone
        complementary = {spec.modality: _complementary(config, spec, encoders) for spec in config.complementary}
        widths_y = {name: encoder.backbone.feature_width for name, encoder in complementary.items()}
        shared = {} if config.mapper_per_layer else _mappers(config, main.widths, widths_y)
        model = MoPE(
            config=config,
            main=main,
            complementary=complementary,
            layers=[_layer(config, i, width, widths_y) for i, width in enumerate(main.widths)],
            mappers=shared,
            head=ClassificationHead(width=main.feature_width, classes=len(config.labels)),
            preprocessing=preprocessing or _preprocessing(config, encoders),
        )
        _initialise_prompts(model)
    return model.eval()


def _complementary(
    config: MoPEConfig, spec: EncoderSpec, encoders: Mapping[str, FrozenEncoder]
) -> ComplementaryEncoder:
    backbone = encoders[spec.modality].backbone
    prompts = [StaticPrompt(prompt_length=spec.prompts, width=width) for width in backbone.widths]
    return ComplementaryEncoder(
        backbone,
        prompts=prompts if spec.prompts else [],
        dropout=config.prompt_dropout,
        standardise=config.y_norm == "standardise",
    )


def _layer(config: MoPEConfig, index: int, width: int, widths_y: Mapping[str, int]) -> LayerPrompts:
    router = experts = None
    if config.dynamic:
        U = routing_embeddings(
            experts=config.experts,
            width=config.d_x + config.d_y * len(widths_y),
            seed=config.routing_seed,
            layer=index,
        )
        router = Router(
            width_x=width,
            widths_y=widths_y,
            embeddings=U,
            d_x=config.d_x,
            d_y=config.d_y,
            temperature=config.temperature,
            sigma=config.sigma,
            top_k=config.top_k,
            cosine=config.similarity == "cosine",
            train_embeddings=config.train_embeddings,
        )
        experts = PromptExperts(experts=config.experts, prompt_length=config.prompt_length, width=width)
    return LayerPrompts(
        static=StaticPrompt(prompt_length=config.prompt_length, width=width) if config.static else None,
        experts=experts,
        router=router,
        mappers=_mappers(config, (width,), widths_y) if config.mapper_per_layer else {},
        dropout=config.prompt_dropout,
    )


def _mappers(config: MoPEConfig, widths: tuple[int, ...], widths_y: Mapping[str, int]) -> dict[str, Mapper]:
    if not config.mapped:
        return {}
    return {
        name: Mapper(width_y=width_y, bottleneck=config.mapper_width or max(1, width_y // 2), widths=widths)
        for name, width_y in widths_y.items()
    }


def _initialise_prompts(model: MoPE) -> None:
    """Initial values of static prompts and experts; linear layers keep PyTorch's own."""
    scale = model.config.prompt_init_scale
    for module in model.modules():
        tokens = None
        if isinstance(module, StaticPrompt):
            tokens = module.tokens
        elif isinstance(module, PromptExperts):
            tokens = module.prompts
        if tokens is None:
            continue
        if model.config.prompt_init == "normal":
            nn.init.normal_(tokens, std=scale)
        else:
            nn.init.uniform_(tokens, -scale, scale)


def _preprocessing(config: MoPEConfig, encoders: Mapping[str, FrozenEncoder]) -> Preprocessing:
    specs: dict[str, Any] = {name: encoder.preprocess for name, encoder in encoders.items()}
    tokenizer = encoders["text"].tokenizer if "text" in encoders else None
    return Preprocessing(**{"image": None, "text": None, **specs}, tokenizer=tokenizer, missing=config.missing)
