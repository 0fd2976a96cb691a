"""The nested `distillation:` block of an Axolotl config: typed, bounded, unknown keys refused.

Axolotl merges `DistillationArgs` into its own schema and hands back plain dictionaries;
`read_distillation` turns them into the typed block once, and that is passed on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from axolotl_skd.methods import LossRecipe, Method, get_method
from axolotl_skd.rollout.types import Source

PAPER_TOP_K = 25


class _Block(BaseModel):
    """A block whose unknown keys are errors that name the nearest valid one."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if values is None:
            raise ValueError("the block is empty: remove it or give it keys.")
        if not isinstance(values, Mapping):
            raise ValueError(f"expected a block of keys, got {values!r}.")
        for key in values:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"unknown key {key!r}.{hint} Known keys here: {', '.join(cls.model_fields)}."
                )
        return values


class TeacherConfig(_Block):
    """`distillation.teacher`"""

    base_model: str | None = Field(
        None, description="Path or hub id of the frozen teacher. Needed by all methods but `sft`."
    )
    revision: str | None = Field(None, description="Revision of the teacher on the hub.")
    trust_remote_code: bool = Field(
        False, description="Run model code that comes with the teacher."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Teacher weights; `auto` keeps the checkpoint's own."
    )
    adapter: str | None = Field(
        None, description="Path or hub id of a LoRA checkpoint over `base_model`."
    )
    student_base: bool = Field(
        False,
        description="The teacher is the student's own base with its LoRA adapter switched off: no "
        "second model in memory.",
    )
    device: str | None = Field(
        None, description="Where the teacher lives, e.g. `cuda:1`; default beside the student."
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        None, description="Spread the teacher over this process's devices (accelerate's maps)."
    )
    offload: bool = Field(
        False,
        description="The teacher waits in the CPU's memory while it is not asked; its output head "
        "stays.",
    )
    attn_implementation: (
        Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = Field(
        None,
        description="Attention of the teacher outside rollouts; default what transformers chooses.",
    )
    load_in_8bit: bool = Field(False, description="Quantise the teacher to int8 (bitsandbytes).")
    load_in_4bit: bool = Field(False, description="Quantise the teacher to 4 bit (bitsandbytes).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit number format.")
    bnb_4bit_use_double_quant: bool = Field(
        True, description="Quantise the 4-bit scales themselves too."
    )
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Dtype of 4-bit matrix products; default the teacher's `dtype`."
    )
    torchao: Literal["int8", "int4", "float8"] | None = Field(
        None, description="Quantise the teacher's weights with torchao."
    )

    @property
    def quantised(self) -> str | None:
        """The key that quantises, None if none does."""
        keys = ("load_in_4bit", "load_in_8bit", "torchao")
        return next((key for key in keys if getattr(self, key)), None)

    @property
    def quantisation(self) -> str | None:
        """To what it is quantised, None if not."""
        if self.load_in_8bit:
            return "int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit else self.torchao

    @model_validator(mode="after")
    def _one_quantisation(self) -> TeacherConfig:
        asked = [key for key in ("load_in_4bit", "load_in_8bit", "torchao") if getattr(self, key)]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} are set together: set one of them.")
        return self

    @model_validator(mode="after")
    def _one_model(self) -> TeacherConfig:
        if not self.student_base:
            return self
        given = [
            key
            for key, field in type(self).model_fields.items()
            if key != "student_base" and getattr(self, key) != field.default
        ]
        if given:
            raise ValueError(
                f"student_base: true is the student's own base, as the student holds it, so {given} "
                "cannot be honoured. Remove them, or student_base."
            )
        return self

    @model_validator(mode="after")
    def _one_place(self) -> TeacherConfig:
        if self.device_map and self.device:
            raise ValueError(
                f"device_map: {self.device_map} spreads the teacher over devices, device: "
                f"{self.device} puts it on one. Set one of them."
            )
        if self.offload:
            for key in ("device", "device_map", self.quantised):
                if key and getattr(self, key):
                    raise ValueError(
                        f"offload: true moves the teacher to and fro, which {key} does not allow. Set "
                        "one of them."
                    )
        return self


class TopKSchedule(_Block):
    """`distillation.rollout.teacher_top_k: {start, end, schedule}`"""

    start: int = Field(..., ge=1, description="K of the first step.")
    end: int = Field(..., ge=1, description="K that the last steps approach.")
    schedule: Literal["linear", "cosine"] = Field(
        "linear", description="Along which curve, over the share of steps done."
    )

    @property
    def largest(self) -> int:
        return max(self.start, self.end)


class TopKTarget(_Block):
    """`distillation.rollout.teacher_top_k: {target_acceptance}`"""

    target_acceptance: float = Field(
        ..., ge=0, le=1, description="Acceptance rate at which K is held."
    )
    start: int = Field(PAPER_TOP_K, ge=1, description="K of the first step.")

    @property
    def largest(self) -> int:
        return self.start


def _kind_of_top_k(value: Any) -> str:
    """Which member of the union is meant, so that errors speak of that one alone."""
    if isinstance(value, (TopKSchedule, TopKTarget)):
        return "schedule" if isinstance(value, TopKSchedule) else "target"
    if not isinstance(value, Mapping):
        return "constant"
    scheduled = "target_acceptance" not in value and any(
        key in value for key in TopKSchedule.model_fields
    )
    return "schedule" if scheduled else "target"


TopK = Annotated[
    Annotated[int, Field(ge=1), Tag("constant")]
    | Annotated[TopKSchedule, Tag("schedule")]
    | Annotated[TopKTarget, Tag("target")],
    Discriminator(_kind_of_top_k),
]


class RolloutConfig(_Block):
    """`distillation.rollout`"""

    max_prompt_tokens: int = Field(
        256, ge=1, description="Rows whose prompt alone is longer are dropped (and counted)."
    )
    max_new_tokens: int = Field(512, ge=1, description="Longest completion that is rolled out.")
    num_draft_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="G, tokens that the student proposes per teacher verification; `auto` measures "
        "which is fastest. It never changes a token (but see `bonus_token`).",
    )
    rollout_batch_size: int | None = Field(
        None,
        ge=1,
        description="Most rows in flight, which bounds the memory of their KV caches; rows that wait "
        "take the place of finished ones. Default the whole accumulation window.",
    )
    cuda_graphs: bool = Field(
        False, description="Replay decoding forwards as CUDA graphs (unmeasured; falls back)."
    )
    acceptance: Literal["top_k", "top_p", "min_p", "speculative"] = Field(
        "top_k",
        description="Which proposals the teacher keeps; `top_k` is SKD, `speculative` the ratio test "
        "that samples as the teacher alone would.",
    )
    teacher_top_k: TopK = Field(
        PAPER_TOP_K,
        description="K: a proposal among the teacher's top K raw logits is accepted. Over the run "
        "`{start, end}` goes from one K to another, `{target_acceptance}` holds that acceptance rate.",
    )
    acceptance_top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="`acceptance: top_p`: a proposal in the teacher's nucleus of this mass, at "
        "temperature 1, is accepted.",
    )
    acceptance_min_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="`acceptance: min_p`: a proposal of at least this share of the teacher's largest "
        "probability, at temperature 1, is accepted.",
    )
    replacement: Literal["sample", "argmax"] = Field(
        "sample", description="What takes the place of a rejected proposal, from the teacher."
    )
    bonus_token: bool = Field(
        False,
        description="After a wholly accepted proposal one token more, from the teacher (not in the "
        "paper; needs a fixed `num_draft_tokens`, which then changes tokens).",
    )
    student_temperature: float = Field(0.5, gt=0, description="Divides the student's logits.")
    student_top_p: float = Field(0.5, gt=0, le=1, description="Nucleus of the student's proposals.")
    teacher_temperature: float = Field(0.2, gt=0, description="Divides the teacher's logits.")
    teacher_top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of the teacher's samples.")
    num_rollouts: int = Field(
        1,
        ge=1,
        description="Completions sampled per prompt and step. A micro-batch holds so many rows of "
        "each prompt that is rolled out: count them in `micro_batch_size`.",
    )
    mask_truncated: bool = Field(
        False, description="Leave rollouts that ran to `max_new_tokens` out of the loss."
    )
    stop_token_ids: tuple[int, ...] = Field(
        (), description="End a completion, beside the EOS and Axolotl's `eot_tokens`."
    )
    stop_strings: tuple[str, ...] = Field(
        (), description="Texts that end a completion at the token that completes one of them."
    )

    @field_validator("stop_strings")
    @classmethod
    def _texts_that_can_be_found(cls, strings: tuple[str, ...]) -> tuple[str, ...]:
        for string in strings:
            if not string or "\ufffd" in string:
                raise ValueError(
                    f"stop_strings: {string!r} cannot be looked for in decoded text (it is empty, or "
                    "holds the character that stands for half a character). Remove it."
                )
        return strings

    @model_validator(mode="after")
    def _acceptance_is_complete(self) -> RolloutConfig:
        for rule, key in (("top_p", "acceptance_top_p"), ("min_p", "acceptance_min_p")):
            value = getattr(self, key)
            if self.acceptance == rule and value is None:
                raise ValueError(f"acceptance: {rule} needs {key}, which is not set.")
            if self.acceptance != rule and value is not None:
                raise ValueError(
                    f"{key}: {value:g} has no effect with acceptance: {self.acceptance}. Remove it, or "
                    f"set acceptance: {rule}."
                )
        if self.acceptance != "top_k" and self.teacher_top_k != PAPER_TOP_K:
            raise ValueError(
                f"teacher_top_k has no effect with acceptance: {self.acceptance}. Remove it, or set "
                "acceptance: top_k."
            )
        if self.acceptance == "speculative" and self.replacement == "argmax":
            raise ValueError(
                "replacement: argmax with acceptance: speculative would no longer sample as the "
                "teacher does, which is all that the ratio test is for. Set replacement: sample, or "
                "another acceptance."
            )
        if self.bonus_token and self.num_draft_tokens == "auto":
            raise ValueError(
                "bonus_token: true puts a token of the teacher's behind every wholly accepted "
                "proposal, so the tokens depend on the draft length, and num_draft_tokens: auto "
                "chooses that by the clock. Set num_draft_tokens to a number (the paper's is 5)."
            )
        return self


class LossConfig(_Block):
    """`distillation.loss`, of the methods whose loss is a divergence."""

    divergence: (
        Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"] | None
    ) = Field(None, description="Default the method's: `jsd` for `gkd`, else `forward_kl`.")
    jsd_beta: float = Field(0.5, description="Weight of the teacher in `jsd`, inside (0, 1).")
    skew_alpha: float = Field(
        0.1, gt=0, lt=1, description="Share of the first distribution in the second (`skew_*`)."
    )
    loss_temperature: float = Field(
        1.0, gt=0, description="Divides both models' logits in the loss; no factor of its square."
    )

    kd_weight: float = Field(1.0, gt=0, description="Weight of the divergence.")
    ce_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the cross-entropy of the data set's own completions, added to the "
        "divergence; rolled-out completions have none.",
    )

    normalize: Literal["token", "sequence"] = Field(
        "token",
        description="The loss is a mean over the tokens of an optimizer step, or over its sequences "
        "of their own token means.",
    )

    @field_validator("jsd_beta")
    @classmethod
    def _inside(cls, beta: float) -> float:
        if not 0 < beta < 1:
            # TRL and others mean the KLs by these; here the limit of the JSD would be zero.
            limit = {0: "divergence: forward_kl", 1: "divergence: reverse_kl"}.get(beta)
            hint = f" What others call beta = {beta:g} is {limit}." if limit else ""
            raise ValueError(f"jsd_beta must lie inside (0, 1), got {beta:g}.{hint}")
        return beta


class SeqKdConfig(_Block):
    """`distillation.seqkd`, of methods that train on the teacher's own completions."""

    decoding: Literal["sampled", "greedy"] = Field(
        "sampled",
        description="How the teacher writes them, once before training; `rollout.num_rollouts` of "
        "them per prompt.",
    )


class GateConfig(_Block):
    """`distillation.gate`: tokens that it rejects weigh less in the loss (SpecKD, SelecTKD)."""

    rule: Literal["top_k", "speculative"] = Field(
        "top_k",
        description="A token is accepted if the student's most likely one is among the teacher's "
        "`top_k`, or if any of `top_k` draws from the student passes the ratio test.",
    )
    top_k: int = Field(5, ge=1, description="k of the rule.")
    reject_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight of rejected tokens: 0 masks them (SpecKD), 1 is no gate (SelecTKD: 0.01).",
    )


class EvalConfig(_Block):
    """`distillation.eval`"""

    tasks: tuple[str, ...] = Field(..., min_length=1, description="Bundled lm-eval tasks to run.")
    limit: int | None = Field(None, ge=1, description="Only the first so many documents per task.")
    batch_size: int = Field(8, ge=1, description="Documents generated at a time.")
    at: tuple[Literal["start", "end"], ...] = Field(
        ("start", "end"), description="Before training, after it, or both."
    )


class Distillation(_Block):
    """The whole `distillation:` block."""

    method: str = Field("skd", description="A row of the method table.")
    lmbda: float = Field(
        0.5, ge=0, le=1, description="`gkd`, `mixed_skd`: share of sequences rolled out."
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
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="A training row for which the teacher (while rolling out, either model) gives NaN "
        "or infinity stops training, or is skipped: named, and counted as `loss/skipped_rows`. A "
        "step of such rows alone, or such states of the student in the loss, always stop it.",
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
        self._check_weights()
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
