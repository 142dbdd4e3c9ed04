"""The model as users have it: with checkpoint folders, and with the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelHubMixin, snapshot_download

from mope_deploy.errors import CheckpointError
from mope_deploy.model import mope, network
from mope_deploy.model.build import assemble, load_encoders
from mope_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from mope_deploy.model.config import MoPEConfig

__all__ = ["MoPE", "build_model"]

_MODEL_CARD = """---
{{ card_data }}
---

# MoPE model

A mixture of prompt experts on frozen encoders, made with mope-deploy. It holds the trained tensors only; `config.json`
names the encoders and the fingerprints of their weights. Load it with `mope_deploy.model.MoPE.from_pretrained`.
"""


def build_model(config: MoPEConfig, *, seed: int = 0) -> MoPE:
    """Load the frozen encoders that ``config`` names and put freshly initialised prompts around them.

    Args:
        config: what to build.
        seed: of the initial values; the global random state is left as it was.

    Raises:
        ConfigError: if an encoder cannot be loaded or is of the wrong kind, or there are too few labels.
    """
    return assemble(MoPE, config, load_encoders(config), seed=seed)


class MoPE(
    mope.MoPE,
    ModelHubMixin,
    library_name="mope-deploy",
    tags=["mope", "multimodal", "prompt-tuning"],
    model_card_template=_MODEL_CARD,
):
    """A mixture of prompt experts over frozen encoders. Make it by :func:`build_model` or :meth:`from_pretrained`.

    The mixin brings the model card. Its own ways to save, push and load are not used: they take the old
    ``config.json`` away before anything new is written, leave the encoders out, and read before anything is checked.
    """

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
            CheckpointError: if the folder holds something else than a checkpoint, or cannot be written.
        """
        card = str(self.generate_model_card(**(model_card_kwargs or {})))
        save_checkpoint(self, Path(save_directory), standalone=standalone, card=card)
        if push_to_hub:
            return self.push_to_hub(
                repo_id or Path(save_directory).name,
                standalone=standalone,
                model_card_kwargs=model_card_kwargs,
                **push_to_hub_kwargs,
            )
        return None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        standalone: bool = False,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "Push model using huggingface_hub.",
        model_card_kwargs: dict[str, Any] | None = None,
        config: Any = None,
        **upload: Any,
    ) -> str:
        """Upload a checkpoint to a hub repository, which is made if there is none, in one commit.

        Args:
            repo_id: for instance ``"someone/model"``.
            standalone: with the frozen encoders. (The mixin's own way would leave them out.)
            private, token: of the repository; ``branch``, ``commit_message`` of the commit.
            model_card_kwargs: values for the model card.
            config: ignored; part of the hub mixin's signature.
            upload: ``create_pr``, ``allow_patterns``, ``ignore_patterns``, ``delete_patterns``.

        Returns:
            The URL of the commit.
        """
        api = HfApi(token=token)
        repository = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            saved = Path(folder) / "checkpoint"
            self.save_pretrained(saved, standalone=standalone, model_card_kwargs=model_card_kwargs)
            url: str = api.upload_folder(
                repo_id=repository,
                repo_type="model",
                folder_path=saved,
                commit_message=commit_message,
                revision=branch,
                **upload,
            )
        return url

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
        return load_checkpoint(cls, _fetched(str(pretrained_model_name_or_path), **hub), encoders=encoders or {})


def _fetched(name: str, **hub: Any) -> Path:
    """The local folder of a checkpoint: ``name`` itself if it is one, else downloaded from the hub.

    Raises:
        CheckpointError: if there is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") > 1 or name.startswith((".", "/", "~")):  # no hub id
        raise CheckpointError(f"no checkpoint folder at {name}")
    try:
        with network.hub():
            return Path(snapshot_download(name, **hub))
    except Exception as error:  # network, authorisation, an id that does not exist: many classes, one meaning
        raise CheckpointError(
            f"{name} is neither a folder nor a hub repository that can be fetched: "
            f"{network.offline_reason(error) or type(error).__name__}"
        ) from error
