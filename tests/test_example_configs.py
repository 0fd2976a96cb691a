"""Every file of example_configs/ is valid through Axolotl's own loading, offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from transformers import AutoTokenizer, GemmaConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from axolotl_skd.config import read_distillation
from axolotl_skd.preflight import check_models, check_settings
from axolotl_skd.resources import resource_path

EXAMPLES = sorted(resource_path("example_configs").glob("*.yml"))
TINY = resource_path("example_configs") / "tiny" / "teacher"

# Architectures of the students that the examples name, too small to train but with their limits.
SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 520,  # a few more than the tiny tokenizer: end-of-turn tokens are added
}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "google/gemma-2b-it": GemmaConfig(**SMALL, max_position_embeddings=8192),
    "Qwen/Qwen2-0.5B-Instruct": Qwen2Config(**SMALL, max_position_embeddings=32768),
    "example_configs/tiny/student": LlamaConfig(**SMALL, max_position_embeddings=2048),
}


def local_model(folder: Path, config: PreTrainedConfig) -> str:
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


def test_the_folder_has_the_promised_examples() -> None:
    names = {path.name for path in EXAMPLES}
    assert {"skd_tiny.yml", "skd_gemma2b.yml", "skd_qwen0.5b.yml"} <= names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub ids are replaced by local models of the same architecture; all else is as written."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    student = local_model(tmp_path / "student", ARCHITECTURES[raw["base_model"]])
    PluginManager.get_instance().plugins.clear()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cfg = load_cfg(str(path), base_model=student, output_dir=str(tmp_path / "out"))
    distillation = read_distillation(cfg)
    assert distillation.method == raw["distillation"]["method"]
    assert distillation.rollout.teacher_top_k == raw["distillation"]["rollout"]["teacher_top_k"]
    check_settings(cfg, distillation)

    teacher = distillation.teacher.model_copy(update={"base_model": student})
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(list(cfg.eot_tokens or []))
    check_models(cfg, distillation.model_copy(update={"teacher": teacher}), tokenizer)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_begins_with_its_launch_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# axolotl train example_configs/{path.name}"


@pytest.mark.parametrize("name", ["skd_gemma2b.yml", "skd_qwen0.5b.yml"])
def test_paper_settings(name: str) -> None:
    """SKD paper, section 4 and appendix C, for GSM8K."""
    raw = yaml.safe_load((resource_path("example_configs") / name).read_text(encoding="utf-8"))
    rollout = raw["distillation"]["rollout"]
    assert (rollout["max_prompt_tokens"], rollout["max_new_tokens"]) == (256, 512)
    assert rollout["teacher_top_k"] == 25
    assert rollout["num_draft_tokens"] == "auto"  # which changes no token of the paper's 5
    assert (rollout["student_temperature"], rollout["student_top_p"]) == (0.5, 0.5)
    assert (rollout["teacher_temperature"], rollout["teacher_top_p"]) == (0.2, 1.0)
    assert (raw["micro_batch_size"], raw["gradient_accumulation_steps"]) == (8, 1)
    assert (raw["max_steps"], raw["learning_rate"], raw["warmup_ratio"]) == (375, 1e-5, 0.1)
    assert raw["lr_scheduler"] == "linear"
