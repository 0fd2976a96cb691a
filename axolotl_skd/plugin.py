"""The Axolotl hooks of `plugins: [axolotl_skd.SKDPlugin]`, in the order in which they are called.

Without a `distillation:` block every hook leaves the run as it is.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.common.datasets import TrainDatasetMeta, load_datasets
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import load_tokenizer
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from torch import nn

from axolotl_skd.assembly import assemble
from axolotl_skd.before_after import evaluate_end, evaluate_start, start_scores
from axolotl_skd.callbacks import StartLineCallback
from axolotl_skd.checkpoints import check_ranks_agree, choose_checkpoint
from axolotl_skd.config import read_distillation
from axolotl_skd.cpu import fit_to_cpu, keep_differentiable, on_cpu
from axolotl_skd.data import DistillationCollator
from axolotl_skd.data_checks import checked_datasets, restating_dropped_rows
from axolotl_skd.evaluation_checks import check_evaluation, check_evaluation_inputs
from axolotl_skd.full_disk import survive_full_disk
from axolotl_skd.interruption import Interruption, say_how_to_go_on
from axolotl_skd.precision import raise_to_float32, warn_of_lost_updates
from axolotl_skd.preflight import (
    check_block_is_there,
    check_models,
    check_settings,
    stop_set,
)
from axolotl_skd.rank_checks import (
    check_engine_can_start,
    check_engine_is_there,
    check_ranks,
    warn_of_untested,
)
from axolotl_skd.rollout.stop_strings import StopStrings
from axolotl_skd.trackers import TrackedScores
from axolotl_skd.trainer import DistillationTrainer, trainer_type

LOG = get_logger(__name__)


class SKDPlugin(BasePlugin):
    """Speculative Knowledge Distillation and its baselines as Axolotl trainer types."""

    _scores: TrackedScores | None = None
    _interruption: Interruption | None = None

    def register(self, cfg: dict[str, Any]) -> None:
        check_block_is_there(cfg)
        if cfg.get("distillation") is not None:
            check_engine_is_there(cfg)
        if cfg.get("distillation") is not None and on_cpu() and not cfg.get("deepspeed"):
            # Without it accelerate lets several CPU ranks train independently of each other.
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")

    def get_input_args(self) -> str:
        return "axolotl_skd.config.DistillationArgs"

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> TrainDatasetMeta | None:
        distillation = read_distillation(cfg)
        if distillation is None:
            return None
        check_settings(cfg, distillation)
        engine = check_ranks(cfg, distillation)
        warn_of_untested(cfg, engine)
        if distillation.eval is not None:
            check_evaluation(cfg, distillation.eval)
        if preprocess:
            return None
        check_engine_can_start(engine)
        choose_checkpoint(cfg)
        tokenizer = load_tokenizer(cfg)
        preflight = check_models(cfg, distillation, tokenizer)
        if distillation.eval is not None:
            check_evaluation_inputs(distillation.eval, tokenizer)
        if on_cpu():
            fit_to_cpu(cfg)
        with restating_dropped_rows(cfg.sequence_len):
            meta = load_datasets(cfg=cfg)
        stop_strings = StopStrings.of(distillation.rollout.stop_strings, tokenizer)
        meta = checked_datasets(cfg, meta, distillation, preflight.stop_token_ids, stop_strings)
        if distillation.eval is not None:
            evaluate_start(cfg, distillation.eval, tokenizer)
        return meta

    def post_model_load(self, cfg: DictDefault, model: nn.Module) -> None:
        distillation = read_distillation(cfg)
        if distillation is None:
            return
        if on_cpu():
            keep_differentiable(model)
        if distillation.fp32_master_weights:
            raised = raise_to_float32(model)
            LOG.info(
                "distillation.fp32_master_weights: %s numbers raised to float32", f"{raised:,}"
            )
        elif not cfg.deepspeed:  # which holds float32 masters of its own
            warn_of_lost_updates(model, float(cfg.learning_rate))

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any] | None:
        if read_distillation(cfg) is None:
            return None
        # The loss is normalised by the tokens of all ranks (trainer.compute_loss).
        arguments: dict[str, Any] = {"average_tokens_across_devices": True}
        if on_cpu():
            arguments["use_cpu"] = True
        return arguments

    def get_trainer_cls(self, cfg: DictDefault) -> type[DistillationTrainer] | None:
        distillation = read_distillation(cfg)
        return None if distillation is None else trainer_type(distillation.method)

    def get_collator_cls_and_kwargs(
        self, cfg: DictDefault, is_eval: bool = False
    ) -> tuple[type[DistillationCollator], dict[str, Any]] | None:
        distillation = read_distillation(cfg)
        if distillation is None:
            return None
        stops = stop_set(cfg, distillation, load_tokenizer(cfg))
        return DistillationCollator, {"stop_ids": stops}

    def post_trainer_create(self, cfg: DictDefault, trainer: DistillationTrainer) -> None:
        distillation = read_distillation(cfg)
        if distillation is None:
            return
        check_ranks_agree(cfg, trainer.accelerator)
        preflight = check_models(cfg, distillation, trainer.processing_class)
        description = assemble(
            trainer,
            distillation,
            preflight,
            check_ranks(cfg, distillation),
            seed=cfg.seed or 0,
            sequence_len=cfg.sequence_len,
            prepared_path=Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH),
        )
        trainer.add_callback(StartLineCallback(description))
        survive_full_disk(trainer)
        self._interruption = Interruption(trainer.on_any_rank)
        trainer.add_callback(self._interruption)
        if distillation.eval is not None:
            callbacks = trainer.callback_handler.callbacks
            self._scores = TrackedScores(callbacks, partial(start_scores, cfg, distillation.eval))
            trainer.add_callback(self._scores)

    def post_train_unload(self, cfg: DictDefault) -> None:
        distillation = read_distillation(cfg)
        stopped_at = self._interruption and self._interruption.stopped_at
        if stopped_at is not None:
            only_model = bool(cfg.save_only_model)
            say_how_to_go_on(stopped_at, cfg.output_dir, cfg.axolotl_config_path, only_model)
        elif distillation is not None and distillation.eval is not None:
            scores = evaluate_end(cfg, distillation.eval)
            if scores and self._scores is not None:
                self._scores.log_end(scores)
