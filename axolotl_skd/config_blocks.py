"""The blocks inside `distillation:`, each typed, bounded, and complete in itself.

What depends on the method is checked where they come together (`config.Distillation`).
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

PAPER_TOP_K = 25


class Block(BaseModel):
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


class TeacherConfig(Block):
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
    gather: Literal["whole", "layers"] = Field(
        "whole",
        description="Where ZeRO-3 or FSDP2 spreads the teacher: each rank gathers it `whole` once a "
        "rollout, or by `layers` in every forward, which all ranks then make together. For a teacher "
        "that fits no device.",
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
    def _four_bit_settings_of_four_bits(self) -> TeacherConfig:
        settings = [
            key
            for key, field in type(self).model_fields.items()
            if key.startswith("bnb_4bit_") and getattr(self, key) != field.default
        ]
        if settings and not self.load_in_4bit:
            raise ValueError(
                f"{settings[0]} says how to quantise to 4 bit, but load_in_4bit is not set, so "
                "the teacher would not be. Set load_in_4bit: true, or remove it."
            )
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


class TopKSchedule(Block):
    """`distillation.rollout.teacher_top_k: {start, end, schedule}`"""

    start: int = Field(..., ge=1, description="K of the first step.")
    end: int = Field(..., ge=1, description="K that the last steps approach.")
    schedule: Literal["linear", "cosine"] = Field(
        "linear", description="Along which curve, over the share of steps done."
    )

    @property
    def largest(self) -> int:
        return max(self.start, self.end)


class TopKTarget(Block):
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
    Annotated[int, Field(ge=1, strict=True), Tag("constant")]
    | Annotated[TopKSchedule, Tag("schedule")]
    | Annotated[TopKTarget, Tag("target")],
    Discriminator(_kind_of_top_k),
]


class RolloutConfig(Block):
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


class LossConfig(Block):
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


class SeqKdConfig(Block):
    """`distillation.seqkd`, of methods that train on the teacher's own completions."""

    decoding: Literal["sampled", "greedy"] = Field(
        "sampled",
        description="How the teacher writes them, once before training; `rollout.num_rollouts` of "
        "them per prompt.",
    )


class GateConfig(Block):
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


class EvalConfig(Block):
    """`distillation.eval`"""

    tasks: tuple[str, ...] = Field(..., min_length=1, description="Bundled lm-eval tasks to run.")
    limit: int | None = Field(None, ge=1, description="Only the first so many documents per task.")
    batch_size: int = Field(
        8, ge=1, description="Documents generated at a time (`hf`; vLLM batches by itself)."
    )
    apply_chat_template: bool = Field(
        True, description="Ask in the student's chat template, as one user turn."
    )
    backend: Literal["hf", "vllm"] = Field(
        "hf", description="What lm-eval generates with: transformers, or vLLM (unmeasured)."
    )
    at: tuple[Literal["start", "end"], ...] = Field(
        ("start", "end"), description="Before training, after it, or both."
    )
