"""The COMET estimator: an encoder, a mixture of its layers, pooling and a feed-forward head.

Follows unbabel-comet 2.2.7 in every step that a score depends on, and reads the checkpoints that it
publishes. For the sentence embeddings h (translation), s (source) and r (reference),

    score = feed_forward([h; r; h * r; |h - r|; h * s; |h - s|])        (Rei et al., 2020, equation 6)

Shapes: B sentences, T tokens, H hidden size of the encoder, L its layers and the embeddings.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import XLMRobertaConfig, XLMRobertaModel

from axolotl_skd.evaluation.comet.errors import CometCheckpointError
from axolotl_skd.evaluation.comet.files import CheckpointFiles, find_encoder
from axolotl_skd.evaluation.comet.hparams import (
    EstimatorHparams,
    estimator_hparams,
    read_hparams_file,
)

# Parts of a checkpoint that scoring has no use for: what old transformers saved, and the dropout of
# layers in training.
_UNUSED = (
    "encoder.model.embeddings.position_ids",
    "encoder.model.pooler.",
    "layerwise_attention.dropout_",
)


def load_estimator(files: CheckpointFiles, encoder: str | None = None) -> CometEstimator:
    """The estimator of a checkpoint, on the CPU in float32 and evaluation mode.

    Nothing in the checkpoint is executed: it is unpickled as tensors and plain values only.

    Args:
        files: of the checkpoint.
        encoder: folder or cached hub id with the encoder's configuration and tokenizer; None = the
            one that the checkpoint names.

    Raises:
        CometUnavailableError: the encoder's files are missing.
        CometCheckpointError: the checkpoint is of an unknown kind, or its parts do not fit together.
    """
    hparams_file = read_hparams_file(files.hparams)
    checkpoint = _load_plain(files)
    hparams = estimator_hparams(hparams_file, checkpoint.get("hyper_parameters"))
    encoder_files = find_encoder(encoder or hparams.pretrained_model)
    config = XLMRobertaConfig.from_json_file(encoder_files.config)
    if config.model_type != "xlm-roberta":
        raise CometCheckpointError(
            f"{encoder_files.config} describes a model of type {config.model_type!r}; needed is "
            "xlm-roberta"
        )
    tokenizer = Tokenizer.from_file(str(encoder_files.tokenizer))
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CometCheckpointError(
            f"{encoder_files.tokenizer} has {tokenizer.get_vocab_size()} tokens, but the encoder "
            f"{config.vocab_size}: they do not belong together"
        )
    estimator = CometEstimator(hparams, config, tokenizer)
    try:
        estimator.load_state_dict(_scoring_weights(checkpoint["state_dict"]))
    except RuntimeError as error:
        raise CometCheckpointError(
            f"the weights in {files.weights} do not fit the settings in it and the encoder in "
            f"{encoder_files.config.parent}: {error}"
        ) from error
    return estimator.eval()


def _load_plain(files: CheckpointFiles) -> dict[str, Any]:
    try:
        checkpoint = torch.load(files.weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CometCheckpointError(
            f"{files.weights} holds more than tensors and plain values, and loading it could run "
            "code of whoever made it. If you trust it, score with unbabel-comet (name its Python by "
            "SKD_COMET_PYTHON), or load it once with torch.load(..., weights_only=False) and save "
            f"its state_dict and hyper_parameters alone. torch says: {error}"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise CometCheckpointError(
            f"{files.weights} cannot be read; is it complete? {error}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CometCheckpointError(f"{files.weights} is no Lightning checkpoint: no state_dict")
    if not isinstance(checkpoint.get("hyper_parameters", {}), dict):
        raise CometCheckpointError(f"{files.weights}: hyper_parameters is no mapping")
    return checkpoint


def _scoring_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of encoder, layer mixture and head; others (of training metrics) do not score."""
    scoring = ("encoder.", "layerwise_attention.", "estimator.")
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if name.startswith(scoring) and not name.startswith(_UNUSED)
    }


class CometEstimator(nn.Module):
    """Scores a translation against its source and a reference.

    The names of its parts are those of the checkpoint.

    Args:
        hparams: settings of the checkpoint.
        config: of the encoder.
        tokenizer: of the encoder; its padding and truncation are set here.
    """

    def __init__(
        self, hparams: EstimatorHparams, config: XLMRobertaConfig, tokenizer: Tokenizer
    ) -> None:
        super().__init__()
        num_layers = config.num_hidden_layers + 1
        if hparams.layer != "mix" and hparams.layer >= num_layers:
            raise CometCheckpointError(
                f"layer is {hparams.layer}, but the encoder has layers 0 to {num_layers - 1}"
            )
        self.hparams = hparams
        self.pad_id: int = config.pad_token_id
        self.tokenizer = tokenizer
        # The package's own bound: two less than what the positions allow.
        tokenizer.enable_truncation(max_length=config.max_position_embeddings - 4)
        tokenizer.enable_padding(pad_id=self.pad_id, pad_token=tokenizer.id_to_token(self.pad_id))
        self.encoder = nn.ModuleDict({"model": XLMRobertaModel(config, add_pooling_layer=False)})
        self.layerwise_attention = (
            LayerMix(num_layers, hparams.layer_transformation, hparams.layer_norm)
            if hparams.layer == "mix"
            else None
        )
        self.estimator = nn.ModuleDict({"ff": _feed_forward(6 * config.hidden_size, hparams)})

    @torch.inference_mode()
    def score(
        self,
        sources: Sequence[str],
        translations: Sequence[str],
        references: Sequence[str],
        batch_size: int,
    ) -> list[float]:
        """The score of each translation, mostly in [0, 1], in the order given.

        Args:
            sources: N texts.
            translations: N texts.
            references: N texts.
            batch_size: sentences of similar length are scored together, so many at a time.
        """
        samples = list(zip(sources, translations, references, strict=True))
        order = sorted(range(len(samples)), key=lambda row: sum(map(len, samples[row])))
        scores = [0.0] * len(samples)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            source, translation, reference = (
                self.sentence_embeddings(list(texts))
                for texts in zip(*(samples[row] for row in rows), strict=True)
            )
            for row, score in zip(rows, self(source, translation, reference).tolist(), strict=True):
                scores[row] = score
        return scores

    def sentence_embeddings(self, texts: list[str]) -> Tensor:
        """Texts, cut to what the encoder takes, as `[B, H]`."""
        device = self.encoder["model"].device
        encodings = self.tokenizer.encode_batch(texts)
        ids = torch.tensor([encoding.ids for encoding in encodings], device=device)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], device=device)
        layers = self.encoder["model"](
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states
        if self.hparams.pool == "default":
            return layers[-1][:, 0]
        hidden = (
            layers[self.hparams.layer]
            if self.layerwise_attention is None
            else self.layerwise_attention(layers, mask)
        )
        return _pool(self.hparams.pool, hidden, mask, is_pad=ids == self.pad_id)

    def forward(self, source: Tensor, translation: Tensor, reference: Tensor) -> Tensor:
        """Sentence embeddings `[B, H]` to scores `[B]`."""
        features = (
            translation,
            reference,
            translation * reference,
            (translation - reference).abs(),
            translation * source,
            (translation - source).abs(),
        )
        return self.estimator["ff"](torch.cat(features, dim=1)).squeeze(1)


class LayerMix(nn.Module):
    """gamma * sum_l weight_l * hidden_l, the weights being the transformed scalar parameters.

    Args:
        num_layers: L.
        transformation: of the scalar parameters; `"sparsemax"` or softmax.
        layer_norm: normalise each layer over all tokens and dimensions of a sentence.
    """

    def __init__(self, num_layers: int, transformation: str, layer_norm: bool) -> None:
        super().__init__()
        self.transform = sparsemax if transformation == "sparsemax" else _softmax
        self.layer_norm = layer_norm
        self.scalar_parameters = nn.ParameterList(torch.zeros(1) for _ in range(num_layers))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, layers: Sequence[Tensor], mask: Tensor) -> Tensor:
        """L layers `[B, T, H]` and the mask `[B, T]` of tokens to the mixture `[B, T, H]`."""
        weights = self.transform(torch.cat(list(self.scalar_parameters)))
        if self.layer_norm:
            layers = [_sentence_norm(layer, mask) for layer in layers]
        return self.gamma * sum(w * layer for w, layer in zip(weights, layers, strict=True))


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the probability simplex nearest to `scores` (Martins and Astudillo, 2016).

    max(scores - tau, 0), where tau makes the sum 1.

    Args:
        scores: `[N]`.
    """
    ordered = scores.sort(descending=True).values
    excess = ordered.cumsum(0) - 1
    ranks = torch.arange(1, len(scores) + 1, device=scores.device)
    support = (ranks * ordered > excess).sum()
    return (scores - excess[support - 1] / support).clamp(min=0)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(dim=0)


def _sentence_norm(hidden: Tensor, mask: Tensor) -> Tensor:
    """`hidden` `[B, T, H]` with mean 0 and variance 1 over the masked-in tokens of each sentence."""
    weights = mask.to(hidden.dtype)[:, :, None]
    count = weights.sum(dim=(1, 2), keepdim=True) * hidden.shape[2]
    centred = hidden - (hidden * weights).sum(dim=(1, 2), keepdim=True) / count
    variance = (centred * weights).square().sum(dim=(1, 2), keepdim=True) / count
    return centred / (variance + 1e-12).sqrt()


def _pool(pool: str, hidden: Tensor, mask: Tensor, is_pad: Tensor) -> Tensor:
    """Token vectors `[B, T, H]` to sentence vectors `[B, H]`.

    A padding token that stands in the text itself (`<pad>`) is masked in: like unbabel-comet, `avg`
    counts it in the length but not in the sum.
    """
    if pool == "cls":
        return hidden[:, 0]
    if pool == "max":
        return hidden.masked_fill(is_pad[:, :, None], float("-inf")).amax(dim=1)
    total = hidden.masked_fill(is_pad[:, :, None], 0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True)


def _feed_forward(input_size: int, hparams: EstimatorHparams) -> nn.Sequential:
    """The head. Its places of dropout stay, as the weights are named by their position."""
    modules: list[nn.Module] = []
    for size in hparams.hidden_sizes:
        modules += [nn.Linear(input_size, size), _activation(hparams.activations), nn.Identity()]
        input_size = size
    modules.append(nn.Linear(input_size, 1))
    if hparams.final_activation is not None:
        modules.append(_activation(hparams.final_activation))
    return nn.Sequential(*modules)


def _activation(name: str) -> nn.Module:
    return getattr(nn, name)()
