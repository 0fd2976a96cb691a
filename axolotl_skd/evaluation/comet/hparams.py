"""What a checkpoint says about its model: the part of its settings that a score depends on.

Settings stand twice in a published checkpoint, and as in unbabel-comet (2.2.7) the copy inside
`model.ckpt` counts. From `hparams.yaml` come only the kind of model, and one correction: where its
`layer_transformation` is `sparsemax_patch` the layers are mixed by softmax, whatever the other copy
says. (The package does so for models that were trained by softmax in spite of their settings.)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from axolotl_skd.evaluation.comet.errors import CometCheckpointError
from axolotl_skd.evaluation.comet.files import DEFAULT_ENCODER

LOG = logging.getLogger(__name__)

_KIND = "regression_metric"
_PATCH = "sparsemax_patch"

# Classes of torch.nn by name. unbabel-comet title-cases what it is given, so `tanh` is `Tanh`, and
# `ReLU` (then `Relu`) is unknown to it too.
Activation = Annotated[
    Literal[
        "Hardsigmoid", "Hardswish", "Hardtanh", "Mish", "Sigmoid", "Softplus", "Softsign", "Tanh"
    ],
    BeforeValidator(lambda value: value.title() if isinstance(value, str) else value),
]


class EstimatorHparams(BaseModel):
    """Settings of a COMET estimator, with the defaults of unbabel-comet 2.2.7.

    What only training needs is left out. An unknown value is refused, a score by another formula
    would look just as good.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    encoder_model: Literal["XLM-RoBERTa"] = "XLM-RoBERTa"
    pretrained_model: str = DEFAULT_ENCODER
    pool: Literal["avg", "max", "cls", "default"] = "avg"
    layer: Literal["mix"] | Annotated[int, Field(ge=0)] = "mix"
    layer_transformation: Literal["softmax", "sparsemax", "sparsemax_patch"] = "softmax"
    layer_norm: bool = True
    hidden_sizes: list[Annotated[int, Field(ge=1)]] = Field([3072, 1024], min_length=1)
    activations: Activation = "Tanh"
    final_activation: Activation | None = None


def read_hparams_file(path: Path) -> dict[str, Any]:
    """The settings in `hparams.yaml`, of a kind of model that the estimator knows.

    Raises:
        CometCheckpointError: it is no plain YAML mapping, or the model is of another kind.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CometCheckpointError(f"{path} is not plain YAML: {error}") from error
    kind = settings.get("class_identifier") if isinstance(settings, dict) else None
    if kind != _KIND:
        raise CometCheckpointError(
            f"{path}: class_identifier is {kind!r}, but the built-in estimator knows {_KIND!r} only. "
            "Score with unbabel-comet instead: name its Python by SKD_COMET_PYTHON"
        )
    return settings


def estimator_hparams(
    hparams_file: Mapping[str, Any], hyper_parameters: Mapping[str, Any] | None
) -> EstimatorHparams:
    """The settings that count.

    Args:
        hparams_file: what `read_hparams_file` returns.
        hyper_parameters: the copy inside the checkpoint; None = there is none, the file counts.

    Raises:
        CometCheckpointError: naming each setting whose value is unknown.
    """
    settings = dict(hparams_file if hyper_parameters is None else hyper_parameters)
    for name in EstimatorHparams.model_fields:
        filed, counted = hparams_file.get(name), settings.get(name)
        if name in hparams_file and filed != counted and filed != _PATCH:
            LOG.warning(
                "hparams.yaml says %s: %r, the checkpoint itself %r; the checkpoint counts",
                name,
                filed,
                counted,
            )
    if _PATCH in (hparams_file.get("layer_transformation"), settings.get("layer_transformation")):
        settings["layer_transformation"] = "softmax"
    try:
        return EstimatorHparams.model_validate(settings)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'][:1]))}: {problem['msg']}, got {problem['input']!r}"
            for problem in error.errors()
        )
        raise CometCheckpointError(
            f"the checkpoint has settings that the built-in estimator does not know: {problems}. "
            "Score with unbabel-comet instead: name its Python by SKD_COMET_PYTHON"
        ) from error
