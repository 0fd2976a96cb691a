"""The training loss: what it is a mean of, where its targets come from, how it is normalised.

References are computed from the batches that were trained on, in float64, by full logits of fresh
forwards: other algebra than the trainer's hidden states and chunks.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from axolotl_skd.methods import METHODS
from axolotl_skd.rollout.sampling import NonFiniteLogitsError
from axolotl_skd.trainer import DistillationTrainer, NonFiniteLossError
from tests.training.harness import (
    SGD,
    base_config,
    largest_difference,
    run_training,
    save_model,
    save_rows,
    validation_set,
    weights,
)

# float32 forwards of a few layers differ between batch shapes by some 1e-6 in the logits.
TOLERANCE = 2e-5


def completion_logprobs(model: Any, ids: Tensor, prompt_length: int) -> Tensor:
    """float64 log-probabilities [T, V] that predict the tokens behind the prompt."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    return logits[prompt_length - 1 : -1].log_softmax(-1)


def row_ids(batch: dict[str, Any], row: int) -> Tensor:
    return batch["input_ids"][row, : int(batch["attention_mask"][row].sum())]


class LossWatch:
    """Keeps, per micro-batch, the batch, the loss and what an independent reference says."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.records: list[tuple[float, float, int]] = []
        inner = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batch = dict(inputs)
            student = copy.deepcopy(trainer.accelerator.unwrap_model(model)).eval()
            loss = inner(model, inputs, *args, **kwargs)
            with torch.no_grad():
                reference = self.sums(trainer, student, batch)
            total = int(kwargs["num_items_in_batch"])
            self.records.append((float(loss.detach()) * total, sum(s for s, _ in reference), total))
            assert sum(n for _, n in reference) == int((batch["labels"][:, 1:] != -100).sum())
            return loss

        trainer.compute_loss = compute_loss

    def sums(
        self, trainer: DistillationTrainer, student: Any, batch: dict[str, Any]
    ) -> list[tuple[float, int]]:
        """(sum, tokens) per row."""
        result = []
        for row in range(len(batch["input_ids"])):
            ids, length = row_ids(batch, row), int(batch["prompt_lengths"][row])
            mine = completion_logprobs(student, ids, length)
            if trainer.distiller.teacher is None or trainer.method.loss == "cross_entropy":
                value = -mine[torch.arange(len(mine)), ids[length:]].sum()
            else:
                theirs = completion_logprobs(trainer.distiller.teacher.model, ids, length)
                value = torch.nn.functional.kl_div(mine, theirs, log_target=True, reduction="sum")
            result.append((float(value), len(mine)))
        return result


@pytest.mark.parametrize("method", METHODS)
def test_loss_is_the_token_mean_of_the_reference(pair: Path, tmp_path: Path, method: str) -> None:
    watches: list[LossWatch] = []
    config = base_config(pair, method=method, max_steps=2)
    if method == "gkd":  # whose own default is another
        config["distillation"]["loss"] = {"divergence": "forward_kl"}
    if METHODS[method].gated:
        config["distillation"]["gate"] = {"reject_weight": 1.0}
    trainer = run_training(
        config,
        tmp_path,
        lambda trainer: watches.append(LossWatch(trainer)),
    )
    assert len(watches[0].records) == 2
    for got, expected, tokens in watches[0].records:
        assert got == pytest.approx(expected, abs=TOLERANCE * tokens)
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    means = [expected / tokens for _, expected, tokens in watches[0].records]
    assert logged == pytest.approx(means, abs=1e-4)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"])
def test_a_step_with_every_divergence(pair: Path, tmp_path: Path, divergence: str) -> None:
    """Trains, with a loss and gradient of its own (forward KL is the default elsewhere)."""
    config = base_config(pair, max_steps=2)
    config["distillation"]["loss"] = {"divergence": divergence, "loss_temperature": 2.0}
    trainer = run_training(config, tmp_path)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(0 < line["loss"] < 20 and 0 < line["grad_norm"] < 1e3 for line in lines)
    default = run_training(base_config(pair, max_steps=1), tmp_path / "default")
    assert default.state.log_history[0]["loss"] != pytest.approx(lines[0]["loss"], rel=1e-3)


def test_skd_makes_no_teacher_forward_beyond_its_rollout(pair: Path, tmp_path: Path) -> None:
    """One prefill and one verification per round, nothing in the training forward."""
    forwards, expected = [0], [0]

    def watch(trainer: DistillationTrainer) -> None:
        def count(*_: Any) -> None:
            forwards[0] += 1

        trainer.distiller.teacher.decoder.register_forward_hook(count)
        source = trainer.distiller.source
        sample = source._sample

        def counted(*args: Any) -> Any:
            rollout = sample(*args)
            expected[0] += 1 + rollout.num_rounds
            return rollout

        source._sample = counted

    run_training(base_config(pair, max_steps=3), tmp_path, watch)
    assert expected[0] > 3
    assert forwards[0] == expected[0]


def test_accumulation_split_does_not_change_the_training(pair: Path, tmp_path: Path) -> None:
    """4 x 1 rows accumulated equal 1 x 4 rows, with completions of unequal length."""
    runs = [
        weights(
            run_training(
                base_config(
                    pair,
                    micro_batch_size=size,
                    gradient_accumulation_steps=4 // size,
                    max_steps=3,
                    **SGD,
                ),
                tmp_path / str(size),
            )
        )
        for size in (4, 1)
    ]
    assert largest_difference(*runs) < 2e-6


def test_validation_loss_is_the_token_mean_over_the_whole_set(pair: Path, tmp_path: Path) -> None:
    """6 rows in batches of 4 and 2, of unequal length: neither a mean of means nor cut."""
    watches: list[LossWatch] = []
    losses: list[float] = []
    batches: list[dict[str, Any]] = []

    def watch(trainer: DistillationTrainer) -> None:
        watches.append(LossWatch(trainer))
        step = trainer.prediction_step

        def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(dict(inputs))
            return step(model, inputs, *args, **kwargs)

        trainer.prediction_step = prediction_step

    trainer = run_training(
        base_config(pair, max_steps=2, eval_on_start=False, **validation_set(pair)),
        tmp_path,
        watch,
    )
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    student = trainer.accelerator.unwrap_model(trainer.model).eval()
    with torch.no_grad():
        sums = [row for batch in batches[-2:] for row in watches[0].sums(trainer, student, batch)]
    assert len(sums) == 6
    mean = sum(value for value, _ in sums) / sum(tokens for _, tokens in sums)
    assert losses[-1] == pytest.approx(mean, abs=TOLERANCE)
    by_row = sum(value / tokens for value, tokens in sums) / 6
    assert abs(mean - by_row) > 10 * TOLERANCE  # the test can tell the two apart


def test_non_finite_loss_stops_and_names_the_samples(pair: Path, tmp_path: Path) -> None:
    before: dict[str, Tensor] = {}
    trainers: list[DistillationTrainer] = []

    def poison(trainer: DistillationTrainer) -> None:
        trainers.append(trainer)
        before.update(weights(trainer))
        head = trainer.distiller.teacher.head
        trainer.distiller.teacher.model.lm_head.weight[3] = float("nan")
        assert head.module is trainer.distiller.teacher.model.lm_head

    with pytest.raises(NonFiniteLossError, match=r"sample\(s\) -?\d+ \('.*user") as error:
        run_training(base_config(pair, method="supervised_kd"), tmp_path, poison)
    assert "learning_rate" in str(error.value)
    assert largest_difference(before, weights(trainers[0])) == 0


@pytest.mark.parametrize("method", ["skd", "on_policy_kd"])
def test_a_diverged_student_stops_with_the_samples_named(
    pair: Path, tmp_path: Path, method: str
) -> None:
    """Weights that are not numbers meet the sampler first, before any loss."""
    samples: list[int] = []

    def poison(trainer: DistillationTrainer) -> None:
        source = trainer.distiller.source
        complete = source.complete

        def poisoned(batches: Any, *args: Any) -> Any:
            samples.extend(batches[0]["sample_ids"].tolist())
            with torch.no_grad():
                trainer.model.model.norm.weight.fill_(float("nan"))
            return complete(batches, *args)

        source.complete = poisoned

    with pytest.raises(NonFiniteLogitsError, match="the student's logits of.*it diverged") as error:
        run_training(base_config(pair, method=method), tmp_path, poison)
    assert set(error.value.rows) == set(range(len(samples)))
    assert all(str(sample) in str(error.value) for sample in samples)


def test_the_teacher_computes_in_its_own_precision(pair: Path, tmp_path: Path) -> None:
    """A bf16 student's autocast does not reach a float32 teacher, nor its targets."""
    seen: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}

    def watch(trainer: DistillationTrainer) -> None:
        for name in seen:
            model = getattr(trainer.distiller, name).model
            for layer in (model.model.layers[0].self_attn.q_proj, model.lm_head):
                layer.register_forward_hook(lambda _m, _i, out, n=name: seen[n].add(out.dtype))

    config = base_config(pair, max_steps=2, bf16=True, teacher={"dtype": "float32"})
    trainer = run_training(config, tmp_path, watch)
    assert seen == {"student": {torch.bfloat16}, "teacher": {torch.float32}}
    reference = run_training(base_config(pair, max_steps=1), tmp_path / "float32")
    got, expected = (t.state.log_history[0]["loss"] for t in (trainer, reference))
    assert got == pytest.approx(expected, rel=0.1)  # other roundings, so partly other tokens


def test_an_untied_student_learns_the_same_way(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("teacher", "train.jsonl"):
        (tmp_path / "folder" / name).symlink_to(pair / name)
    save_model(tmp_path / "folder" / "student", seed=3)
    watches: list[LossWatch] = []
    trainer = run_training(
        base_config(tmp_path / "folder", max_steps=2),
        tmp_path / "out",
        lambda trainer: watches.append(LossWatch(trainer)),
    )
    assert not trainer.model.config.tie_word_embeddings
    for got, expected, tokens in watches[0].records:
        assert got == pytest.approx(expected, abs=TOLERANCE * tokens)


def test_lora_student_trains_only_its_adapter(pair: Path, tmp_path: Path) -> None:
    """Axolotl switches its Triton kernels on by itself; the plugin keeps them off the CPU."""
    start: dict[str, Tensor] = {}
    trainer = run_training(
        base_config(
            pair,
            adapter="lora",
            lora_r=4,
            lora_alpha=8,
            lora_target_linear=True,
            lora_mlp_kernel=True,
            lora_qkv_kernel=True,
            lora_o_kernel=True,
            max_steps=2,
        ),
        tmp_path,
        lambda trainer: start.update(weights(trainer)),
    )
    end = weights(trainer)
    changed = {name for name in end if not torch.equal(end[name], start[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_padding_cannot_matter(pair: Path, tmp_path: Path) -> None:
    """The same run padded to 64 and to 8, with rows of unequal length."""
    runs = [
        weights(run_training(base_config(pair, pad_to_multiple_of=n, **SGD), tmp_path / str(n)))
        for n in (8, 64)
    ]
    assert largest_difference(*runs) < 2e-6


def test_gradient_checkpointing_changes_nothing(pair: Path, tmp_path: Path) -> None:
    """The rollout keeps its cache, the training forward is recomputed: the same numbers."""
    runs = [
        run_training(base_config(pair, gradient_checkpointing=on), tmp_path / str(on))
        for on in (False, True)
    ]
    assert [trainer.model.is_gradient_checkpointing for trainer in runs] == [False, True]
    assert largest_difference(*map(weights, runs)) == 0


def test_a_window_of_one_row_trains(pair: Path, tmp_path: Path) -> None:
    """The smallest window there is, of the only row of the data set."""
    save_rows(tmp_path / "one.jsonl", 1)
    config = base_config(pair, max_steps=2, micro_batch_size=1)
    config["datasets"][0]["path"] = str(tmp_path / "one.jsonl")
    trainer = run_training(config, tmp_path / "out")
    assert trainer.state.global_step == 2
