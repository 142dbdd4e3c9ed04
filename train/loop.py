"""The training loop: epochs, steps, validations, resume states. accelerate sees to devices, precision and processes.

Letters: B batch · C classes.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from mope_deploy.console import err
from mope_deploy.errors import MopeError
from mope_deploy.metrics import report
from train.config import Recipe
from train.data import Batches, EpochOrder, made_by_workers
from train.interruption import Interruption
from train.machine import Machine
from train.objective import Objective
from train.optim import learning_rate_factor, optimiser
from train.record import Metrics, ProgressLines
from train.resume import Progress, ResumeState
from train.run_folder import Run

__all__ = ["SCORES", "Loop", "best_metric_name", "buckets"]

SCORES = ("accuracy", "f1_macro", "f1_micro")


class Loop:
    """Trains an objective until its last step, until validation stops improving, or until it is interrupted.

    After every epoch the model is validated and kept in ``RUN/last``, the best one in ``RUN/best``.

    Args:
        objective: model and loss.
        recipe, machine, run: how and where to train, and where to write.
        train, validation: the batches.
        interruption: asked after every step.
        state: the resume state to go on from, whose weights the model has already.

    Attributes:
        progress: how far training has come.
        steps: optimiser steps of a whole training.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        recipe: Recipe,
        machine: Machine,
        run: Run,
        train: Batches,
        validation: Batches,
        interruption: Interruption,
        state: ResumeState | None,
    ) -> None:
        section = recipe.train
        self.recipe, self.machine, self.run, self.interruption = recipe, machine, run, interruption
        self.model, self.metric = objective.model, best_metric_name(recipe)
        self.trained = list(self.model.trained_parameters().values())
        self.progress = Progress() if state is None else state.progress()
        self.steps_per_epoch = math.ceil(len(train) / section.batch_size)
        self.steps = section.max_steps or section.epochs * self.steps_per_epoch
        self.epochs = math.ceil(self.steps / self.steps_per_epoch)
        lengths = train.text_lengths().tolist() if buckets(recipe) and train.encodes_text else None
        self.order = EpochOrder(len(train), batch_size=section.batch_size, seed=recipe.seed, lengths=lengths)

        torch.manual_seed(recipe.seed)  # dropout and routing noise
        self.accelerator = Accelerator(
            cpu=machine.cpu, mixed_precision={"fp32": "no"}.get(section.precision, section.precision)
        )
        adamw = optimiser(self.model.trained_parameters(), recipe.optim)
        factor = learning_rate_factor(recipe.optim, steps=self.steps, steps_per_epoch=self.steps_per_epoch)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(adamw, factor)
        size = section.batch_size // (machine.processes * section.accumulation)
        self.objective, self.optimiser, self.batches, self.validation = self.accelerator.prepare(
            objective,
            adamw,
            self._loader(train, size, sampler=self.order),
            self._loader(validation.select(validation.longest_first()), section.eval_batch_size),
        )
        self._resumed = state
        if state is not None:
            saved = state.training()
            for name, part in self._stateful().items():
                part.load_state_dict(saved[name])
        # What is logged is summed as tensors: reading them in each step would wait for the GPU.
        self._zero = torch.zeros((), device=machine.device)
        self._logged, self._loss, self._importance = self.progress.step, self._zero, self._zero

    def train(self) -> bool:
        """Train to the end; False if an interruption came first, after a resume state was written."""
        step, tensorboard = self.progress.step, self.recipe.train.tensorboard
        self.lines = ProgressLines(self.metric, step=step, steps=self.steps, epochs=self.epochs)
        self.metrics = Metrics(self.run, step=step, tensorboard=tensorboard) if self.machine.writes else None
        with self.interruption.postponed(), self.lines, self.metrics or nullcontext():
            while not self._done() and not self.interruption.received:
                self._epoch(self.progress.step // self.steps_per_epoch)
        return self._done()

    def step(self, batches: list[dict[str, Any]]) -> None:
        """One optimiser step on batches that are accumulated; each counts by its samples: the last may have fewer."""
        rows = [len(batch["labels"]) for batch in batches]
        for number, batch in enumerate(batches):
            last, parts = number == len(batches) - 1, sum(rows) / rows[number]
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                out = self.objective(**batch)
                loss = out["loss"] / parts
                self.accelerator.backward(loss)
            self._loss = self._loss + loss.detach()
            self._importance = self._importance + out["importance"] / parts
        # Of the trained parameters alone: looking through the frozen ones costs more than the clipping.
        self._norm = self.accelerator.clip_grad_norm_(self.trained, self.recipe.optim.clip or math.inf)
        self.optimiser.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimiser.zero_grad()
        self.progress.step += 1

    def _epoch(self, epoch: int) -> None:
        """What is left of an epoch, and its validation; or less if an interruption comes."""
        section, done = self.recipe.train, self.progress.step % self.steps_per_epoch
        self.order.epoch = epoch
        batches = self.batches
        if done:
            batches = self.accelerator.skip_first_batches(batches, done * section.accumulation)
        else:
            self._restore_random()
        batches = made_by_workers(batches, workers=self.recipe.data.workers)
        self.objective.train()
        while True:
            window = list(islice(batches, section.accumulation))
            self._restore_random()  # only now: beginning an epoch draws a number
            self.step(window)
            step = self.progress.step
            self.lines.step(step, epoch=epoch)
            interrupted = self.interruption.anywhere(self.machine.device)
            # At an epoch's end validation and saving follow in any case: a resumed run starts with the next epoch.
            if step % self.steps_per_epoch == 0 or step == self.steps:
                break
            if step % section.log_every == 0:
                self._log()
            if interrupted or (section.save_every is not None and step % section.save_every == 0):
                self._save()
            if interrupted:
                return
        batches.close()  # ends its workers before those of validation begin
        self._log()
        self._validate()
        self._save()

    def _done(self) -> bool:
        patience = self.recipe.train.early_stopping
        return self.progress.step >= self.steps or (patience is not None and self.progress.since_best >= patience)

    def _log(self) -> None:
        """Record what has been trained since the last time."""
        steps = self.progress.step - self._logged
        loss = self.accelerator.gather(self._loss).mean().item() / steps
        if not math.isfinite(loss):
            raise MopeError(
                f"training diverged before step {self.progress.step}: the loss is {loss}",
                todo="lower optim.lr_main and optim.lr_complementary, lengthen optim.warmup_steps, "
                "or use train.precision=fp32",
            )
        values = {"loss": loss, "grad_norm": float(self._norm), "importance_loss": float(self._importance) / steps}
        for group, rate in zip(self.optimiser.param_groups, self.schedule.get_last_lr(), strict=True):
            if "no decay" not in group["name"]:
                values[f"lr_{group['name']}"] = float(rate)
        self.lines.loss(loss)
        self._write("train", values)
        self._logged, self._loss, self._importance = self.progress.step, self._zero, self._zero

    @torch.no_grad()
    def _validate(self) -> None:
        """Score every validation row, keep the model, and the best one."""
        started = time.monotonic()
        self.objective.eval()
        found: list[tuple[Tensor, ...]] = []
        for batch in made_by_workers(self.validation, workers=self.recipe.data.workers):
            out = self.objective(**batch)
            losses = out["loss"].repeat(len(out["logits"]))
            found.append(self.accelerator.gather_for_metrics((losses, out["logits"], batch["labels"])))
        losses, logits, targets = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        task, progress = self.model.task, self.progress
        scores = report(targets, task.decide(logits), task.labels)
        values = {"loss": float(losses.mean())} | {name: scores[name] for name in SCORES}
        self._write("validation", values | {"runtime": round(time.monotonic() - started, 4)})
        epoch = progress.step / self.steps_per_epoch
        progress.scores.append(values[self.metric])
        progress.epochs.append(round(epoch))
        if not self.machine.writes:
            return
        self.model.save_pretrained(self.run.last)
        if progress.since_best == 0:
            self.model.save_pretrained(self.run.best)
        self.lines.validation(epoch, values, progress.best)
        if progress.step < self.steps and self._done():
            message = f"stopping early: {progress.since_best} epochs without a better validation {self.metric}"
            err.print(message, markup=False)

    def _write(self, kind: str, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write(kind, self.progress.step, values | {"epoch": self.progress.step / self.steps_per_epoch})

    def _save(self) -> None:
        state = ResumeState(self.run.checkpoints / f"checkpoint-{self.progress.step}")
        if self.machine.writes:
            state.begin()
            training = {name: part.state_dict() for name, part in self._stateful().items()}
            state.write(self.model.trained_state(), training, self.progress)
        self.accelerator.wait_for_everyone()
        state.write_random(self.machine.state.process_index)
        self.accelerator.wait_for_everyone()
        if self.machine.writes:
            state.seal(self.run)

    def _stateful(self) -> dict[str, Any]:
        """What a resume state must hold beside weights; the scaler exists under fp16 only."""
        parts = {"optimiser": self.optimiser, "schedule": self.schedule, "scaler": self.accelerator.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def _restore_random(self) -> None:
        if self._resumed is not None:
            self._resumed.restore_random(self.machine.state.process_index)
            self._resumed = None

    def _loader(self, batches: Batches, size: int, *, sampler: EpochOrder | None = None) -> Any:
        workers = self.recipe.data.workers
        return DataLoader(
            batches,
            batch_size=size,
            sampler=sampler,
            collate_fn=Batches.ready,  # type: ignore[arg-type]
            num_workers=workers,  # new ones in every epoch: then each begins by drawing a number, as without any
            pin_memory=not self.machine.cpu,
        )


def buckets(recipe: Recipe) -> bool:
    """Whether training puts texts of similar lengths into a batch; what is cached must not change their order."""
    if recipe.train.bucket_by_length != "auto":
        return recipe.train.bucket_by_length
    if recipe.model.main.modality == "text":
        return True
    return any(spec.modality == "text" and spec.prompts for spec in recipe.model.complementary)


def best_metric_name(recipe: Recipe) -> str:
    """The validation metric that decides which checkpoint is best."""
    return recipe.model.make_task().metric if recipe.train.metric == "auto" else recipe.train.metric
