"""Hugging Face's Trainer around the objective: what it saves, what it resumes from, how it stops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EvalPrediction, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from mope_deploy.errors import CheckpointError, MopeError
from mope_deploy.metrics import report
from mope_deploy.model import MoPE
from train.config import Recipe
from train.data import Batches, LengthBuckets
from train.evaluation import decide
from train.objective import Objective
from train.optim import learning_rate_factor, optimiser
from train.run_folder import Run, seal

__all__ = ["MopeTrainer", "best_metric_name", "training_arguments"]

WEIGHTS = "model.safetensors"


class MopeTrainer(Trainer):
    """Trains an :class:`Objective`; resume states hold the trained tensors only, and are read with weights_only=True.

    Args:
        objective: model and loss.
        recipe: how to train.
        args: what :func:`training_arguments` made of the recipe.
        train, validation: the batches.
        callbacks: reporting, stopping and saving of the best model.
    """

    objective: Objective
    _importance: Any
    recipe: Recipe

    def __init__(
        self,
        objective: Objective,
        *,
        recipe: Recipe,
        args: TrainingArguments,
        train: Batches,
        validation: Batches,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.objective, self.recipe = objective, recipe
        self._importance = 0.0  # a tensor from the first step on: reading it each step would wait for the GPU
        self._importance_steps = 0
        self._buckets: LengthBuckets | None = None
        if buckets(recipe) and train.encodes_text:
            self._buckets = LengthBuckets(
                train.text_lengths().tolist(), batch_size=recipe.train.batch_size, seed=recipe.seed
            )
            callbacks = [*callbacks, _Epochs(self._buckets)]
        super().__init__(
            model=objective,
            args=args,
            data_collator=Batches.ready,  # type: ignore[arg-type]
            train_dataset=train,
            eval_dataset=validation,
            compute_metrics=_compute_metrics(objective.model),
            callbacks=callbacks,
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self._buckets is None else self._buckets

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = optimiser(self.objective.model.trained_parameters(), self.recipe.optim)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            assert isinstance(self.train_dataset, Batches)
            factor = learning_rate_factor(
                self.recipe.optim,
                steps=num_training_steps,
                steps_per_epoch=math.ceil(len(self.train_dataset) / self.recipe.train.batch_size),
            )
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        if model.training:
            self._importance = self._importance + outputs["importance"]
            self._importance_steps += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _clip_grad_norm(self, model: Any) -> Any:
        # Of the trained parameters alone: looking through the frozen ones costs more than the clipping.
        return self.accelerator.clip_grad_norm_(self.objective.trained, self.args.max_grad_norm)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            outputs = model(**inputs)
        return outputs["loss"].detach(), outputs["logits"], inputs["labels"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise MopeError(
                    f"training diverged before step {self.state.global_step}: the loss is {logs['loss']}",
                    todo="lower optim.lr_main and optim.lr_complementary, lengthen optim.warmup_steps, "
                    "or use train.precision=fp32",
                )
            logs["importance_loss"] = float(self._importance) / max(1, self._importance_steps)
            self._importance = 0.0
            self._importance_steps = 0
            assert self.lr_scheduler is not None
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):  # type: ignore[union-attr]
                if "no decay" not in group["name"]:
                    logs[f"lr_{group['name']}"] = float(rate)
            logs.pop("learning_rate", None)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            state = self.objective.model.trained_state()
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / WEIGHTS)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Every process has written its random state before the first one seals the folder.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the model came with these weights, because features of y are computed with its fitted statistics."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
            raise CheckpointError(f"the optimiser's state in {checkpoint} cannot be read: {error}") from error


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained tensors of a resume state.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        return load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint / WEIGHTS} cannot be read: {error}") from error


def training_arguments(recipe: Recipe, run: Run, *, processes: int, cpu: bool) -> TrainingArguments:
    """The recipe in the Trainer's words."""
    section = recipe.train
    args = TrainingArguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=section.epochs,
        max_steps=section.max_steps or -1,
        per_device_train_batch_size=section.batch_size // (processes * section.accumulation),
        per_device_eval_batch_size=section.eval_batch_size,
        gradient_accumulation_steps=section.accumulation,
        max_grad_norm=recipe.optim.clip,
        bf16=section.precision == "bf16",
        fp16=section.precision == "fp16",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=section.log_every,
        logging_nan_inf_filter=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=cpu,
        dataloader_num_workers=recipe.data.workers,
        dataloader_persistent_workers=recipe.data.workers > 0,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,
    )
    args._n_gpu = min(1, args.n_gpu)  # more GPUs are used by one process each, never by torch's DataParallel
    return args


def buckets(recipe: Recipe) -> bool:
    """Whether training puts texts of similar lengths into a batch; what is cached must not change their order."""
    if recipe.train.bucket_by_length != "auto":
        return recipe.train.bucket_by_length
    if recipe.model.main.modality == "text":
        return True
    return any(spec.modality == "text" and spec.prompts for spec in recipe.model.complementary)


class _Epochs(TrainerCallback):
    """Tells the buckets which epoch begins: accelerate does not, where several processes resume within one."""

    def __init__(self, buckets: LengthBuckets) -> None:
        self.buckets = buckets

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.buckets.set_epoch(int((state.epoch or 0.0) + 1e-6))


def best_metric_name(recipe: Recipe) -> str:
    """The validation metric that decides which checkpoint is best."""
    if recipe.train.metric != "auto":
        return recipe.train.metric
    return "f1_micro" if recipe.model.multi_label else "accuracy"


def _compute_metrics(model: MoPE) -> Any:
    multi_label, labels = model.config.multi_label, model.config.labels

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, true = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        found = report(true.astype(bool) if multi_label else true, decide(logits, multi_label=multi_label), labels)
        return {name: found[name] for name in ("accuracy", "f1_macro", "f1_micro")}

    return compute
