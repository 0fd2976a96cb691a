"""The nested `distillation:` block of an Axolotl config: typed, bounded, unknown keys refused.

Axolotl merges `DistillationArgs` into its own schema and hands back plain dictionaries;
`read_distillation` turns them into the typed block once, and that is passed on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from axolotl_skd.methods import Method, get_method


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
    device: str | None = Field(
        None, description="Where the teacher lives, e.g. `cuda:1`; default beside the student."
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

    @model_validator(mode="after")
    def _one_quantisation(self) -> TeacherConfig:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true: set one of them.")
        return self


class RolloutConfig(_Block):
    """`distillation.rollout`"""

    max_prompt_tokens: int = Field(
        256, ge=1, description="Rows whose prompt alone is longer are dropped (and counted)."
    )
    max_new_tokens: int = Field(512, ge=1, description="Longest completion that is rolled out.")
    num_draft_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="G, tokens that the student proposes per teacher verification; `auto` measures "
        "which is fastest. It never changes a token.",
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
    teacher_top_k: int = Field(
        25, ge=1, description="K: a proposal among the teacher's top K raw logits is accepted."
    )
    student_temperature: float = Field(0.5, gt=0, description="Divides the student's logits.")
    student_top_p: float = Field(0.5, gt=0, le=1, description="Nucleus of the student's proposals.")
    teacher_temperature: float = Field(0.2, gt=0, description="Divides the teacher's logits.")
    teacher_top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of the teacher's samples.")
    stop_token_ids: tuple[int, ...] = Field(
        (), description="End a completion, beside the EOS and Axolotl's `eot_tokens`."
    )


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

    @field_validator("jsd_beta")
    @classmethod
    def _inside(cls, beta: float) -> float:
        if not 0 < beta < 1:
            # TRL and others mean the KLs by these; here the limit of the JSD would be zero.
            limit = {0: "divergence: forward_kl", 1: "divergence: reverse_kl"}.get(beta)
            hint = f" What others call beta = {beta:g} is {limit}." if limit else ""
            raise ValueError(f"jsd_beta must lie inside (0, 1), got {beta:g}.{hint}")
        return beta


class EvalConfig(_Block):
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
    eval: EvalConfig | None = Field(None, description="Bundled evaluation before and after.")
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
        if self.method_row.needs_teacher and not self.teacher.base_model:
            raise ValueError(
                f"method {self.method!r} needs a teacher, but distillation.teacher.base_model is not "
                "set. Give a local path or a hub id."
            )
        return self

    @property
    def method_row(self) -> Method:
        return get_method(self.method)

    @property
    def divergence(self) -> str:
        """As set, else the method's."""
        return self.loss.divergence or self.method_row.divergence


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
