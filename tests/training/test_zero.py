"""DeepSpeed ZeRO-3 on two CPU ranks, through Axolotl: losses and weights as on one rank without it.

Its stages 1 and 2 fail on CPUs inside deepspeed 0.18.9, after the first step.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.training.harness import (
    SGD,
    base_config,
    largest_difference,
    save_model,
    save_rows,
    saved_weights,
    validation_set,
)
from tests.training.test_ranks import assert_same_rollouts, logged, results, succeed
from tests.training.two_ranks import trained

ZERO_3: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # or weights as small as these would stay whole
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,  # SGD
}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "gradient_checkpointing": True,
}


@pytest.mark.ranks
@pytest.mark.deepspeed
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero_3_equals_one_rank(pair: Path, tmp_path: Path) -> None:
    save_rows(tmp_path / "train.jsonl", 12)  # repeats none, as in test_ranks.py
    untied = str(save_model(tmp_path / "untied", seed=0))
    teacher = {"base_model": str(pair / "teacher")}
    rows = base_config(pair)["datasets"][0] | {"path": str(tmp_path / "train.jsonl")}
    common = {**SGD, "max_steps": 2, "micro_batch_size": 2, "datasets": [rows]}
    configs = {
        "tied": base_config(pair, **common, **validation_set(pair)),
        # Rows with and without stored states: a rank may have to ask the teacher for the other.
        "untied": base_config(pair, **common, base_model=untied, method="mixed_skd"),
        "lora": base_config(pair, **common, **LORA, base_model=untied, method="seqkd"),
        "by_layer": base_config(pair, **common, base_model=untied, method="mixed_skd"),
        "by_layer_seqkd": base_config(
            pair, **common, method="seqkd", rollout={"teacher_temperature": 0.7}
        ),
        "quantised": base_config(pair, **common, teacher={**teacher, "load_in_8bit": True}),
    }
    # Either makes the teacher's sequences itself.
    prepared = {ranks: str(tmp_path / "prepared" / ranks) for ranks in ("one", "two")}
    spread = {
        name: {**config, "deepspeed": ZERO_3, "dataset_prepared_path": prepared["two"]}
        for name, config in configs.items()
    }
    for name in ("by_layer", "by_layer_seqkd"):
        block = spread[name]["distillation"]
        layers = {**block["teacher"], "gather": "layers"}
        spread[name]["distillation"] = {**block, "teacher": layers}
    succeed(2, spread, tmp_path / "two")

    for name, config in configs.items():
        alone = {"gradient_accumulation_steps": 2, "dataset_prepared_path": prepared["one"]}
        one = trained({**config, **alone}, tmp_path / "one" / name)
        two = results(tmp_path / "two", name, ranks=2)
        assert [rank["processes"] for rank in two] == [2, 2]
        assert [rank["stored"] for rank in two] == [0, 0], "weights are whole outside of gathering"
        assert_same_rollouts(one, two)
        if name == "by_layer":
            assert [rank["whole_layers"] for rank in two] == [1, 1] != [one["whole_layers"]] * 2
        assert logged(two[0], "loss")[0] == pytest.approx(logged(one, "loss")[0], rel=1e-6)
        assert logged(two[0], "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
        assert logged(two[0], "eval_loss") == pytest.approx(logged(one, "eval_loss"), rel=1e-5)
        assert largest_difference(one["weights"], two[0]["weights"]) < 1e-5
    # Folders are named by the teacher's weights, also where these are in parts, and its settings.
    made = [
        {folder.name for folder in Path(path, "teacher_sequences").iterdir()}
        for path in prepared.values()
    ]
    assert made[0] == made[1]
    assert len(made[0]) == 2
    saved = saved_weights(tmp_path / "two" / "untied" / "model")
    assert largest_difference(saved, results(tmp_path / "two", "untied", 1)[0]["weights"]) == 0
