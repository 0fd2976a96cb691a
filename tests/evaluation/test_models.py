"""What a folder or hub id is, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from axolotl_skd.evaluation.models import (
    EvalModel,
    ModelNotFoundError,
    saved_model,
    vllm_lora_rank,
)


def folder(path: Path, **files: dict) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_a_full_model(tmp_path: Path) -> None:
    path = str(folder(tmp_path / "lr=0.1, full", config={}))
    assert saved_model(path, "cpu") == EvalModel(base_model=path, device="cpu")


def test_softcapped_scores_need_eager_attention(tmp_path: Path) -> None:
    capped = str(folder(tmp_path / "gemma2", config={"attn_logit_softcapping": 50.0}))
    plain = str(folder(tmp_path / "gemma3", config={"attn_logit_softcapping": None}))
    assert saved_model(capped, "cpu").attn_implementation == "eager"
    assert saved_model(plain, "cpu").attn_implementation is None
    adapter = folder(tmp_path / "adapter", adapter_config={"base_model_name_or_path": capped})
    assert saved_model(str(adapter), "cpu").attn_implementation == "eager"


def test_an_adapter_is_put_on_its_base_model(tmp_path: Path) -> None:
    base = str(folder(tmp_path / "base", config={}))
    config = {"base_model_name_or_path": base, "r": 4, "revision": None}
    # Axolotl leaves the base model's config.json beside the adapter.
    path = str(folder(tmp_path / "adapter", adapter_config=config, config={}))
    expected = EvalModel(base_model=base, adapter=path, device="cuda:1", trust_remote_code=True)
    assert saved_model(path, "cuda:1", trust_remote_code=True) == expected
    folder(tmp_path / "adapter", tokenizer_config={})
    assert saved_model(path, "cpu").tokenizer == path


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "", "name with spaces"])
def test_what_is_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a folder here .* nor a hub id"):
        saved_model(name, "cpu")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="neither config.json .* nor adapter_config.json"):
        saved_model(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "out/gone/base"}, "It is the base model of the adapter"),
    ],
)
def test_an_adapter_without_its_base(tmp_path: Path, config: dict, message: str) -> None:
    path = folder(tmp_path / "adapter", adapter_config=config)
    with pytest.raises(ModelNotFoundError, match=message):
        saved_model(str(path), "cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub of `owner/name` folders, as `hf_hub_download` sees it."""

    def download(repo: str, file: str) -> str:
        if repo == "owner/gone":
            response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
            raise RepositoryNotFoundError("404", response=response)
        if repo == "owner/offline":
            raise LocalEntryNotFoundError("no network")
        if not (tmp_path / repo / file).is_file():
            raise EntryNotFoundError("404")
        return str(tmp_path / repo / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path


def test_models_of_the_hub(hub: Path) -> None:
    folder(hub / "owner" / "full", config={})
    folder(
        hub / "owner" / "adapter",
        adapter_config={"base_model_name_or_path": "owner/full", "revision": "v1"},
        tokenizer_config={},
    )
    assert saved_model("owner/full", "cpu") == EvalModel(base_model="owner/full", device="cpu")
    assert saved_model("owner/adapter", "cpu") == EvalModel(
        base_model="owner/full",
        revision="v1",
        adapter="owner/adapter",
        tokenizer="owner/adapter",
        device="cpu",
    )
    with pytest.raises(ModelNotFoundError, match="no model on the hub"):
        saved_model("owner/gone", "cpu")
    with pytest.raises(
        ModelNotFoundError, match="there is no folder owner/offline here .* the hub"
    ):
        saved_model("owner/offline", "cpu")


@pytest.mark.parametrize(
    ("config", "rank"),
    [({"r": 1}, 8), ({"r": 8}, 8), ({"r": 9}, 16), ({"r": 8, "rank_pattern": {"q": 100}}, 128)],
)
def test_ranks_of_vllm(config: dict, rank: int) -> None:
    assert vllm_lora_rank(config) == rank


def test_a_rank_beyond_vllm() -> None:
    with pytest.raises(ValueError, match="rank 513.*at most 512"):
        vllm_lora_rank({"r": 513})
