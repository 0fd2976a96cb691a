"""What COMET refuses: files that are missing, settings that it does not know, hostile contents."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from tokenizers import Tokenizer

from axolotl_skd.evaluation.comet import (
    CometCheckpointError,
    CometUnavailableError,
    comet_scores,
)
from tests.evaluation.comet_tiny import build_checkpoint, build_encoder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return build_encoder(tmp_path / "encoder")


@pytest.fixture
def checkpoint(tmp_path: Path, encoder: Path) -> Path:
    return build_checkpoint(tmp_path / "checkpoint", encoder, "published")


def score(**options: Any) -> float:
    return comet_scores(["rice"], ["the house"], ["a house"], **options)[0]


def change_checkpoint(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "checkpoints" / "model.ckpt"
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, path)


def change_settings(folder: Path, **settings: Any) -> None:
    """In both copies."""
    path = folder / "hparams.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **settings}))
    change_checkpoint(folder, lambda contents: contents["hyper_parameters"].update(settings))


def test_no_checkpoint_says_both_ways_to_get_one() -> None:
    with pytest.raises(CometUnavailableError) as caught:
        score()
    for part in (
        "cache holds no Unbabel/wmt22-comet-da",
        "hf download Unbabel/wmt22-comet-da hparams.yaml checkpoints/model.ckpt",
        "hf download xlm-roberta-large config.json tokenizer.json",
        "SKD_COMET_CHECKPOINT",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["hparams.yaml", "checkpoints/model.ckpt"])
def test_an_incomplete_checkpoint(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CometUnavailableError, match="checkpoint is no folder with hparams.yaml"):
        score(checkpoint=checkpoint)


def test_option_variable_and_file_name_the_same_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(checkpoint=checkpoint)
    assert score(checkpoint=checkpoint / "checkpoints" / "model.ckpt") == expected
    monkeypatch.setenv("SKD_COMET_CHECKPOINT", str(checkpoint))
    assert score() == expected
    with pytest.raises(CometUnavailableError, match="elsewhere is no folder"):
        score(checkpoint="elsewhere")  # the option comes first


def save_in_cache(cache: Path, repo: str, source: Path) -> None:
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    source.rename(folder / "snapshots" / ("0" * 40))


def test_both_are_found_in_the_cache(cache: Path, encoder: Path, checkpoint: Path) -> None:
    expected = score(checkpoint=checkpoint)
    change_settings(checkpoint, pretrained_model="xlm-roberta-large")
    save_in_cache(cache, "Unbabel/wmt22-comet-da", checkpoint)
    with pytest.raises(CometUnavailableError, match="hf download xlm-roberta-large config.json"):
        score()
    save_in_cache(cache, "xlm-roberta-large", encoder)
    assert score() == expected


def test_an_encoder_in_another_place(
    tmp_path: Path, encoder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(checkpoint=checkpoint)
    moved = encoder.rename(tmp_path / "moved")
    with pytest.raises(CometUnavailableError, match="no folder(?s:.*)SKD_COMET_ENCODER"):
        score(checkpoint=checkpoint)
    assert score(checkpoint=checkpoint, encoder=moved) == expected
    monkeypatch.setenv("SKD_COMET_ENCODER", str(moved))
    assert score(checkpoint=checkpoint) == expected
    (moved / "tokenizer.json").unlink()
    with pytest.raises(CometUnavailableError, match="has not both of config.json and tokenizer"):
        score(checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_identifier": "unified_metric"}, "'unified_metric'.*SKD_COMET_PYTHON"),
        ({"class_identifier": "os.system"}, "class_identifier is 'os.system'"),
        ({"class_identifier": None}, "class_identifier is None"),
        ({"encoder_model": "BERT"}, "encoder_model.*got 'BERT'"),
        ({"activations": "Module"}, "activations.*got 'Module'"),
        ({"activations": "ReLU"}, "activations.*got 'Relu'"),  # the package fails here too
        ({"final_activation": "__import__"}, "final_activation"),
        ({"pool": "median"}, "pool.*'avg'.*got 'median'"),
        ({"layer_transformation": "entmax"}, "layer_transformation.*got 'entmax'"),
        ({"layer_norm": "false"}, "layer_norm.*got 'false'"),
        ({"layer": -1}, "layer: .*got -1"),
        ({"layer": True}, "layer: .*got True"),
        ({"layer": 4}, "layer is 4, but the encoder has layers 0 to 3"),
        ({"hidden_sizes": []}, "hidden_sizes"),
        ({"hidden_sizes": "24"}, "hidden_sizes"),
        ({"hidden_sizes": [24, 9]}, "do not fit(?s:.*)estimator.ff"),
        ({"layer": 1}, "do not fit(?s:.*)layerwise_attention"),  # weights that would go unused
    ],
)
def test_unknown_settings(checkpoint: Path, settings: dict[str, Any], message: str) -> None:
    change_settings(checkpoint, **settings)
    with pytest.raises(CometCheckpointError, match=message):
        score(checkpoint=checkpoint)


def test_settings_in_the_file_alone(checkpoint: Path) -> None:
    expected = score(checkpoint=checkpoint)
    change_checkpoint(checkpoint, lambda contents: contents.pop("hyper_parameters"))
    assert score(checkpoint=checkpoint) == expected


@pytest.mark.parametrize("content", ["- a list", "", "!!python/object/apply:os.getcwd []", "a: [b"])
def test_settings_that_are_no_plain_mapping(checkpoint: Path, content: str) -> None:
    (checkpoint / "hparams.yaml").write_text(content)
    with pytest.raises(CometCheckpointError, match="hparams.yaml"):
        score(checkpoint=checkpoint)


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_code_in_a_checkpoint_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hostile = Hostile(f"touch {mark}")
    change_checkpoint(checkpoint, lambda contents: contents.update(callbacks=hostile))
    with pytest.raises(CometCheckpointError, match="could run code(?s:.*)system"):
        score(checkpoint=checkpoint)
    assert not mark.exists()


def test_a_download_that_broke_off(checkpoint: Path) -> None:
    path = checkpoint / "checkpoints" / "model.ckpt"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CometCheckpointError, match="is it complete"):
        score(checkpoint=checkpoint)


def test_a_file_that_is_no_checkpoint(checkpoint: Path) -> None:
    torch.save([1, 2], checkpoint / "checkpoints" / "model.ckpt")
    with pytest.raises(CometCheckpointError, match="no state_dict"):
        score(checkpoint=checkpoint)


@pytest.mark.parametrize(
    "name", ["estimator.ff.0.bias", "layerwise_attention.gamma", "encoder.model.embeddings.x"]
)
def test_weights_that_lack_or_are_too_many(checkpoint: Path, name: str) -> None:
    def change(contents: dict[str, Any]) -> None:
        if contents["state_dict"].pop(name, None) is None:
            contents["state_dict"][name] = torch.zeros(1)

    change_checkpoint(checkpoint, change)
    with pytest.raises(CometCheckpointError, match=name):
        score(checkpoint=checkpoint)


def test_what_scoring_has_no_use_for(checkpoint: Path) -> None:
    expected = score(checkpoint=checkpoint)
    unused = {
        "encoder.model.embeddings.position_ids": torch.arange(34)[None],
        "encoder.model.pooler.dense.weight": torch.ones(16, 16),
        "train_metrics.preds": torch.ones(3),
    }
    change_checkpoint(checkpoint, lambda contents: contents["state_dict"].update(unused))
    assert score(checkpoint=checkpoint) == expected


def test_an_encoder_of_another_type(checkpoint: Path, encoder: Path) -> None:
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(CometCheckpointError, match="type 'bert'; needed is xlm-roberta"):
        score(checkpoint=checkpoint)


def test_a_tokenizer_of_another_encoder(checkpoint: Path, encoder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.add_tokens(["one more"])
    tokenizer.save(str(encoder / "tokenizer.json"))
    with pytest.raises(CometCheckpointError, match="do not belong together"):
        score(checkpoint=checkpoint)


def test_hyper_parameters_that_are_no_mapping(checkpoint: Path) -> None:
    change_checkpoint(checkpoint, lambda contents: contents.update(hyper_parameters=["pool"]))
    with pytest.raises(CometCheckpointError, match="hyper_parameters is no mapping"):
        score(checkpoint=checkpoint)


def test_devices(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="device is 'gpu'; needed is auto, cpu, cuda"):
        score(checkpoint=checkpoint, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda:1', but torch finds no CUDA device"):
            score(checkpoint=checkpoint, device="cuda:1")


def test_arguments() -> None:
    with pytest.raises(ValueError, match="2 sources, 1 translations, 3 references"):
        comet_scores(["a", "b"], ["a"], ["a", "b", "c"])
    with pytest.raises(TypeError, match="references is one string"):
        comet_scores(["a"], ["a"], "a")
    with pytest.raises(ValueError, match="batch_size is 0"):
        score(batch_size=0)
    with pytest.raises(ValueError, match="leave out one of them"):
        score(python="python", encoder="encoder")


def test_nothing_to_score(checkpoint: Path) -> None:
    assert comet_scores([], [], [], checkpoint=checkpoint) == []
