"""Every file of example_configs/ is valid through Axolotl's own loading, offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import axolotl.utils.trainer
import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer, GemmaConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from axolotl_skd import rank_checks
from axolotl_skd.config import Distillation, read_distillation
from axolotl_skd.methods import METHODS
from axolotl_skd.preflight import check_models, check_settings
from axolotl_skd.rank_checks import check_ranks
from axolotl_skd.resources import resource_path
from axolotl_skd.sharding import Engine

FOLDER = resource_path("example_configs")
EXAMPLES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yml"))
TINY = FOLDER / "tiny" / "teacher"

# Architectures of the models that the examples train, too small to train but with their limits.
SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 520,  # a few more than the tiny tokenizer: end-of-turn tokens are added
}
GEMMA = GemmaConfig(**SMALL, max_position_embeddings=8192)
QWEN2 = Qwen2Config(**SMALL, max_position_embeddings=32768)
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "google/gemma-2b-it": GEMMA,
    "google/gemma-7b-it": GEMMA,
    "Qwen/Qwen2-0.5B-Instruct": QWEN2,
    "Qwen/Qwen2-7B-Instruct": QWEN2,
    "example_configs/tiny/student": LlamaConfig(**SMALL, max_position_embeddings=2048),
}


ENGINES = {"zero3": Engine.ZERO_3, "fsdp2": Engine.FSDP_2}
ENVIRONMENT = {"torch_version": "2.13.0"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A folder with configuration and tokenizer in place of a model that an example names."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> str:
        model = folder / name
        if not model.exists():
            ARCHITECTURES[name].save_pretrained(model)
            AutoTokenizer.from_pretrained(TINY).save_pretrained(model)
        return str(model)

    return path


def test_the_folder_has_the_promised_examples() -> None:
    assert {"skd_tiny.yml", "skd_gemma2b.yml", "skd_qwen0.5b.yml"} <= set(EXAMPLES)
    assert {f"{method}_tiny.yml" for method in METHODS} <= set(EXAMPLES)
    assert sum(name.startswith("ranks/") for name in EXAMPLES) == 4 * 2
    assert sum(name.startswith("paper/") for name in EXAMPLES) == 4 * 2 * 3 - 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_valid(
    name: str, stand_in: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hub ids are replaced by local models of the same architecture; all else is as written."""
    raw = read(name)
    student = stand_in(raw["base_model"])
    PluginManager.get_instance().plugins.clear()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for start in ("setup_deepspeed_env", "setup_fsdp_envs"):  # would prepare this process for them
        monkeypatch.setattr(axolotl.utils.trainer, start, lambda *_, **__: None)
    monkeypatch.setattr(rank_checks, "find_spec", lambda _name: "deepspeed is not needed for this")
    cfg = load_cfg(str(FOLDER / name), base_model=student, output_dir=str(tmp_path / "out"))
    distillation = read_distillation(cfg)
    assert distillation == Distillation.model_validate(raw["distillation"])
    check_settings(cfg, distillation)
    engine = check_ranks(cfg, distillation)
    assert engine is ENGINES.get(name.removeprefix("ranks/").split("_")[0], Engine.WHOLE)
    if cfg.use_ray:  # whose workers validate a second time what the driver has validated
        again = validate_config(
            DictDefault(cfg.to_dict()), capabilities={}, env_capabilities=ENVIRONMENT
        )
        assert read_distillation(again) == distillation

    # Axolotl drops top-level keys that it does not know without a word.
    unknown = raw.keys() - cfg.keys() - {"model_config"}
    assert not unknown
    assert cfg.overrides_of_model_config == raw.get("model_config")

    teacher = distillation.teacher.model_copy(update={"base_model": student})
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(list(cfg.eot_tokens or []))
    check_models(cfg, distillation.model_copy(update={"teacher": teacher}), tokenizer)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_begins_with_its_launch_command(name: str) -> None:
    first = (FOLDER / name).read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# axolotl train example_configs/{name}"


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "skd_" in name or "_skd" in name])
@pytest.mark.parametrize("method", METHODS)
def test_the_method_is_one_key(name: str, method: str) -> None:
    """A config with all that SKD needs serves every other method too."""
    block = {**read(name)["distillation"], "method": method}
    assert Distillation.model_validate(block).method == method
