"""The plugin: loud when it cannot be imported, silent without its block, the right types with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from transformers import Trainer

import axolotl_skd
from axolotl_skd import plugin
from axolotl_skd.data import DistillationCollator
from axolotl_skd.methods import METHODS
from axolotl_skd.plugin import SKDPlugin
from axolotl_skd.preflight import ConfigConflictError
from axolotl_skd.trainer import DistillationCore, DistillationTrainer, trainer_type
from tests.helpers import save_pair

ROOT = Path(__file__).parents[1]


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


# Import

# `axolotl_skd.trainer` cannot be imported, as with a broken installation; then Axolotl is told to load
# the plugin by name. A plugin that raises a plain ImportError is tried first, to show the danger.
SABOTAGED = """
import sys
from importlib.abc import MetaPathFinder

class Sabotage(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "axolotl_skd.trainer":
            raise {error}("sabotaged on purpose")

sys.meta_path.insert(0, Sabotage())
from axolotl.integrations.base import PluginManager

manager = PluginManager.get_instance()
manager.register("there_is_no_such_package.Plugin")
print("SWALLOWED", flush=True)
try:
    manager.register("axolotl_skd.SKDPlugin")
except BaseException as error:
    print("RAISED", isinstance(error, ImportError), type(error).__module__, repr(error))
else:
    print("REGISTERED", sorted(manager.plugins))
"""


def test_an_import_error_inside_the_package_is_not_swallowed_by_axolotl() -> None:
    done = run_python(SABOTAGED.format(error="ModuleNotFoundError"))
    assert done.returncode == 0, done.stderr
    assert "SWALLOWED" in done.stdout, "Axolotl no longer swallows import errors of plugins"
    assert "REGISTERED" not in done.stdout
    (raised,) = [line for line in done.stdout.splitlines() if line.startswith("RAISED")]
    assert raised.startswith("RAISED False axolotl_skd PluginImportError(")
    assert "sabotaged on purpose" in raised
    assert "Training would go on without distillation" in raised


def test_the_error_of_a_failed_import_is_no_import_error() -> None:
    assert not issubclass(axolotl_skd.PluginImportError, ImportError)


def test_the_plugin_is_found_where_configs_name_it() -> None:
    assert axolotl_skd.SKDPlugin is SKDPlugin
    assert issubclass(SKDPlugin, BasePlugin)
    assert SKDPlugin().get_input_args() == "axolotl_skd.config.DistillationArgs"
    with pytest.raises(AttributeError, match="no attribute 'SkdPlugin'"):
        _ = axolotl_skd.SkdPlugin


def test_the_package_itself_is_light() -> None:
    heavy = "{'torch', 'axolotl', 'transformers', 'pydantic', 'numpy'}"
    script = f"import sys, axolotl_skd; print(sorted({heavy} & set(sys.modules)))"
    done = run_python(script)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# Without a block


def axolotl_cfg(**keys: Any) -> DictDefault:
    return DictDefault({"base_model": "some/student", "sequence_len": 64, "seed": 7, **keys})


def with_block(method: str = "skd", **keys: Any) -> DictDefault:
    block = {"method": method, "teacher": {"base_model": "some/teacher"}}
    return axolotl_cfg(distillation=block, **keys)


def test_without_a_block_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    cfg, trainer, model = axolotl_cfg(sample_packing=True), object(), object()
    before = dict(cfg)
    environment = dict(os.environ)
    hooks = SKDPlugin()
    answers = [
        hooks.register(cfg),
        hooks.on_config_validation_error(cfg),
        hooks.load_datasets(cfg),
        hooks.load_datasets(cfg, preprocess=True),
        hooks.pre_model_load(cfg),
        hooks.post_model_build(cfg, model),
        hooks.pre_lora_load(cfg, model),
        hooks.post_lora_load(cfg, model),
        hooks.post_model_load(cfg, model),
        hooks.get_training_args_mixin(),
        hooks.get_training_args(cfg),
        hooks.get_trainer_cls(cfg),
        hooks.get_collator_cls_and_kwargs(cfg, is_eval=True),
        hooks.get_collator_cls_and_kwargs(cfg, is_eval=False),
        hooks.post_trainer_create(cfg, trainer),
        hooks.create_lr_scheduler(cfg, trainer, None, 10),
        hooks.post_train(cfg, model),
        hooks.post_train_unload(cfg),
    ]
    assert answers == [None] * len(answers)
    assert not hooks.add_callbacks_pre_trainer(cfg, model)
    assert not hooks.add_callbacks_post_trainer(cfg, trainer)
    assert dict(cfg) == before
    assert dict(os.environ) == environment


# With a block


def test_cpu_ranks_are_told_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "on_cpu", lambda: True)
    monkeypatch.setattr(plugin, "check_engine_is_there", lambda _cfg: None)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    SKDPlugin().register(with_block(deepspeed="zero3.json"))
    assert "ACCELERATE_USE_CPU" not in os.environ
    SKDPlugin().register(dict(with_block()))  # raw, before validation
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    SKDPlugin().register(with_block())
    assert os.environ["ACCELERATE_USE_CPU"] == "false", "the user's own word counts"


@pytest.mark.parametrize("on_cpu", [True, False])
def test_training_arguments(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "on_cpu", lambda: on_cpu)
    expected = {"average_tokens_across_devices": True}
    if on_cpu:
        expected["use_cpu"] = True
    assert SKDPlugin().get_training_args(with_block()) == expected


@pytest.mark.parametrize("is_eval", [True, False])
def test_the_collator_is_ours_for_both_sets(is_eval: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "load_tokenizer", lambda _cfg: object())
    monkeypatch.setattr(plugin, "stop_set", lambda *_: (3, 7))
    answer = SKDPlugin().get_collator_cls_and_kwargs(with_block(), is_eval)
    assert answer == (DistillationCollator, {"stop_ids": (3, 7)})


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("skd", "SkdTrainer"),
        ("on_policy_kd", "OnPolicyKdTrainer"),
        ("supervised_kd", "SupervisedKdTrainer"),
        ("seqkd", "SeqkdTrainer"),
        ("sft", "SftTrainer"),
    ],
)
def test_the_method_decides_on_the_trainer_type(method: str, name: str) -> None:
    chosen = SKDPlugin().get_trainer_cls(with_block(method))
    assert chosen is trainer_type(method)
    assert chosen.__name__ == name
    assert chosen.method is METHODS[method]
    assert issubclass(chosen, DistillationTrainer)


def test_every_method_has_a_type_of_its_own() -> None:
    assert len({trainer_type(name).__name__ for name in METHODS}) == len(METHODS)


def test_distillation_sits_between_axolotls_trainer_and_hugging_faces() -> None:
    order = trainer_type("skd").__mro__
    places = [order.index(cls) for cls in (AxolotlTrainer, DistillationCore, Trainer)]
    assert places == sorted(places)
    assert places[2] == places[1] + 1


# Loading of data sets


def test_bad_settings_stop_before_anything_is_read() -> None:
    # The models named here do not exist.
    with pytest.raises(ConfigConflictError, match="sample_packing: true"):
        SKDPlugin().load_datasets(with_block(sample_packing=True))


def test_unknown_evaluation_tasks_stop_before_anything_is_read() -> None:
    cfg = with_block()
    cfg.distillation["eval"] = {"tasks": ["no_such_task"]}
    with pytest.raises(ValueError, match="no_such_task"):
        SKDPlugin().load_datasets(cfg)


@pytest.fixture
def pair_cfg(tmp_path: Path) -> DictDefault:
    student, teacher = save_pair(tmp_path)
    block = {
        "teacher": {"base_model": str(teacher)},
        "rollout": {"max_prompt_tokens": 3, "max_new_tokens": 8, "teacher_top_k": 4},
    }
    return axolotl_cfg(
        base_model=str(student),
        base_model_config=str(student),
        tokenizer_config=str(student),
        distillation=block,
        batch_size=1,
        num_epochs=1,
    )


def test_preprocessing_only_checks(pair_cfg: DictDefault, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("data sets were loaded twice")

    monkeypatch.setattr(plugin, "load_datasets", refuse)
    assert SKDPlugin().load_datasets(pair_cfg, preprocess=True) is None
    pair_cfg.sample_packing = True
    with pytest.raises(ConfigConflictError, match="sample_packing"):
        SKDPlugin().load_datasets(pair_cfg, preprocess=True)


def test_models_are_checked_before_data_sets_are_loaded(
    pair_cfg: DictDefault, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("data sets were loaded first")

    monkeypatch.setattr(plugin, "load_datasets", refuse)
    pair_cfg.distillation.rollout.teacher_top_k = 1000
    with pytest.raises(ConfigConflictError, match="teacher_top_k is 1000"):
        SKDPlugin().load_datasets(pair_cfg)


def test_data_sets_are_loaded_by_axolotl_and_checked_by_us(
    pair_cfg: DictDefault, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    train = Dataset.from_dict(
        {"input_ids": [[3, 4, 0], [3, 4, 5, 6, 0]], "labels": [[-100, 4, 0], [-100] * 4 + [0]]}
    )
    monkeypatch.setattr(plugin, "load_datasets", lambda cfg: TrainDatasetMeta(train, None, 2))
    monkeypatch.setattr(plugin, "on_cpu", lambda: True)
    meta = SKDPlugin().load_datasets(pair_cfg)
    assert meta.train_dataset["input_ids"] == [[3, 4, 0]]  # the other prompt has 4 tokens
    assert meta.total_num_steps == 1
    assert pair_cfg.device_map == {"": "cpu"}


def test_an_evaluation_that_cannot_be_made_stops_before_data_sets_are_loaded(
    pair_cfg: DictDefault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("data sets were loaded first")

    monkeypatch.setattr(plugin, "load_datasets", refuse)
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    pair_cfg.distillation["eval"] = {"tasks": ["skd_svamp"], "at": ["end"]}
    for preprocess in (True, False):
        with pytest.raises(ConfigConflictError, match="eval.tasks: skd_svamp: SKD_DATA_DIR is"):
            SKDPlugin().load_datasets(pair_cfg, preprocess=preprocess)
    pair_cfg.distillation["eval"] = {"tasks": ["skd_tiny_arithmetic"]}
    with pytest.raises(ConfigConflictError, match="apply_chat_template: true, but .* no chat temp"):
        SKDPlugin().load_datasets(pair_cfg)


def test_the_scores_of_the_end_go_to_the_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, handed, scores = with_block(), [], {"task": {"acc": 0.5}}
    cfg.distillation["eval"] = {"tasks": ["skd_tiny_arithmetic"]}
    monkeypatch.setattr(plugin, "assemble", lambda *_, **__: "description")
    monkeypatch.setattr(plugin, "check_models", lambda *_: None)
    monkeypatch.setattr(plugin, "evaluate_end", lambda *_: scores)
    monkeypatch.setattr(plugin.TrackedScores, "log_end", lambda _, scores: handed.append(scores))
    added: list[Any] = []
    trainer = SimpleNamespace(
        processing_class=None,
        callback_handler=SimpleNamespace(callbacks=added),
        add_callback=added.append,
        accelerator=SimpleNamespace(device="cpu", gather=lambda steps: steps),
        on_any_rank=lambda here: here,
    )
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # put back what is wrapped
    hooks = SKDPlugin()
    hooks.post_train_unload(cfg)  # without a trainer there are no trackers
    hooks.post_trainer_create(cfg, trainer)
    names = ["StartLineCallback", "Interruption", "TrackedScores"]
    assert [type(callback).__name__ for callback in added] == names
    hooks.post_train_unload(cfg)
    assert handed == [scores]
