"""The nested `distillation:` block of an Axolotl config: typed, bounded, unknown keys refused.

Axolotl merges `DistillationArgs` into its own schema and hands back plain dictionaries;
`read_distillation` turns them into the typed block once, and that is passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from axolotl_skd.config_blocks import (
    Block,
    EvalConfig,
    GateConfig,
    LossConfig,
    RolloutConfig,
    SeqKdConfig,
    TeacherConfig,
)
from axolotl_skd.methods import LossRecipe, Method, Share, get_method
from axolotl_skd.rollout.types import Source

# Keys of `loss` that belong to some divergences only.
_KEYS_OF_DIVERGENCES = {"jsd_beta": ("jsd",), "skew_alpha": ("skew_kl", "skew_reverse_kl")}


class Distillation(Block):
    """The whole `distillation:` block."""

    method: str = Field("skd", description="A row of the method table.")
    lmbda: float = Field(
        0.5, ge=0, le=1, description="`gkd`, `mixed_skd`: share of prompts rolled out."
    )
    switch_at: float = Field(
        0.5,
        ge=0,
        le=1,
        description="`two_stage`: share of the steps on the data set's completions.",
    )
    teacher: TeacherConfig = Field(default_factory=TeacherConfig, description="The frozen teacher.")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="How to sample.")
    loss: LossConfig = Field(default_factory=LossConfig, description="What is learned.")
    seqkd: SeqKdConfig = Field(
        default_factory=SeqKdConfig, description="The teacher's own completions."
    )
    gate: GateConfig | None = Field(
        None, description="Gate on tokens' losses, with any divergence; `speckd` always has one."
    )
    eval: EvalConfig | None = Field(None, description="Bundled evaluation before and after.")
    fp32_master_weights: bool = Field(
        False,
        description="Hold trainable weights in float32 under `bf16: true` or `fp16: true`, which then "
        "is the precision of the arithmetic alone; they are saved in float32.",
    )
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="A training row for which the teacher (while rolling out, either model) gives NaN "
        "or infinity stops training, or is skipped: named, counted as `loss/skipped_rows`, and no part "
        "of the mean. A step of such rows alone on all ranks, or a student that gives them in the "
        "loss, always stops it.",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of the rollouts; default Axolotl's `seed`."
    )

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        get_method(name)
        return name

    @model_validator(mode="after")
    def _teacher_is_named(self) -> Distillation:
        named = self.teacher.base_model or self.teacher.student_base
        if self.method_row.needs_teacher and not named:
            raise ValueError(
                f"method {self.method!r} needs a teacher, but distillation.teacher.base_model is not "
                "set. Give a local path or a hub id (or student_base: true under a LoRA student)."
            )
        if self.teacher.adapter and not self.teacher.base_model:
            raise ValueError(
                f"distillation.teacher.adapter: {self.teacher.adapter!r} lies over a model, but "
                "distillation.teacher.base_model is not set. Give the model it was trained on."
            )
        return self

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Distillation:
        if self.gate is not None and self.method_row.loss is LossRecipe.CROSS_ENTROPY:
            raise ValueError(
                f"distillation.gate compares the student with the teacher, but method {self.method!r} "
                "learns from tokens alone. Remove the gate, or use a method whose loss is a divergence."
            )
        self._check_loss_shape()
        self._check_weights()
        if self.lmbda != 0.5 and self.method_row.share is Share.HALF:
            raise ValueError(
                f"distillation.lmbda is {self.lmbda:g}, but method {self.method!r} tosses a fair coin. "
                "Remove it, or use method: gkd (with loss.divergence: forward_kl for the same loss)."
            )
        rollout = self.rollout
        greedy = self.seqkd.decoding == "greedy"
        if greedy and self.method_row.source is not Source.TEACHER:
            raise ValueError(
                "distillation.seqkd.decoding is greedy, but method "
                f"{self.method!r} does not train on the teacher's completions. Remove it."
            )
        if greedy and rollout.num_rollouts > 1:
            raise ValueError(
                f"distillation.rollout.num_rollouts is {rollout.num_rollouts}, but greedy completions "
                "of a prompt are all the same. Set seqkd.decoding: sampled, or num_rollouts: 1."
            )
        if not self.method_row.rolls_out and (rollout.num_rollouts > 1 or rollout.mask_truncated):
            raise ValueError(
                "distillation.rollout.num_rollouts and mask_truncated are about sampled completions, "
                f"but method {self.method!r} samples none. Remove them."
            )
        return self

    def _check_loss_shape(self) -> None:
        """Refuse what would look as if it shaped the loss.

        At its default a key may stay, so that a config changes its method by `method:` alone.
        """
        loss = self.loss
        if self.method_row.loss is LossRecipe.CROSS_ENTROPY:
            set_keys = [
                key
                for key in ("divergence", "jsd_beta", "skew_alpha", "loss_temperature")
                if getattr(loss, key) != LossConfig.model_fields[key].default
            ]
            if set_keys:
                raise ValueError(
                    f"distillation.loss.{set_keys[0]} is {getattr(loss, set_keys[0])}, but method "
                    f"{self.method!r} has no divergence: it learns from tokens by cross-entropy. "
                    f"Remove {', '.join(set_keys)}, or use a method whose loss is a divergence."
                )
        for key, users in _KEYS_OF_DIVERGENCES.items():
            value = getattr(loss, key)
            if value != LossConfig.model_fields[key].default and self.divergence not in users:
                raise ValueError(
                    f"distillation.loss.{key} is {value:g}, but the divergence is {self.divergence} "
                    f"(method {self.method!r}), which does not read it. Remove it, or set "
                    f"loss.divergence: {' or '.join(users)}."
                )

    def _check_weights(self) -> None:
        loss, method = self.loss, self.method_row
        if method.loss is LossRecipe.CROSS_ENTROPY and (loss.kd_weight, loss.ce_weight) != (1, 0):
            raise ValueError(
                "distillation.loss.kd_weight and ce_weight mix two losses, but method "
                f"{self.method!r} has cross-entropy alone. Remove them."
            )
        if loss.ce_weight and not method.needs_completions:
            raise ValueError(
                f"distillation.loss.ce_weight is {loss.ce_weight:g}, but method {self.method!r} never "
                "trains on the data set's completions, and what models wrote is no ground truth. "
                "Remove it, or use a method that mixes both (mixed_skd, gkd, imitkd, two_stage)."
            )
        key, limit = {Share.LMBDA: ("lmbda", 1), Share.LATE: ("switch_at", 0)}.get(
            method.share, (None, None)
        )
        if loss.ce_weight and key is not None and getattr(self, key) == limit:
            raise ValueError(
                f"distillation.loss.ce_weight is {loss.ce_weight:g}, but with {key}: {limit} "
                "nothing is trained on the data set's completions, so there is no ground truth. Remove "
                "one of them."
            )

    @property
    def method_row(self) -> Method:
        return get_method(self.method)

    @property
    def divergence(self) -> str:
        """As set, else the method's."""
        return self.loss.divergence or self.method_row.divergence

    @property
    def active_gate(self) -> GateConfig | None:
        """As set, else the defaults for a method that has one."""
        return self.gate or (GateConfig() if self.method_row.gated else None)


class DistillationArgs(BaseModel):
    """What the plugin adds to Axolotl's schema."""

    distillation: Distillation | None = Field(
        None, description="Distil from a frozen teacher (axolotl_skd)."
    )


def read_distillation(cfg: Mapping[str, Any]) -> Distillation | None:
    """The typed block of an Axolotl config, None where the config has none.

    Axolotl's dictionaries answer None for keys they lack and drop keys that are None, so the block
    is validated again rather than read key by key.
    """
    block = cfg.get("distillation")
    if block is None:
        return None
    return Distillation.model_validate(_plain(block))


def _plain(value: Any) -> Any:
    """Axolotl's dictionary class as plain dictionaries."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
