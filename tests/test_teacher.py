"""The teacher is loaded as asked for, frozen, quantised only on request, and its faults are named.

bitsandbytes runs on the CPU, so the quantised teachers here are real ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from axolotl_skd.config_blocks import TeacherConfig
from axolotl_skd.held_weights import held_bytes, stored_bytes
from axolotl_skd.resources import resource_path
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.lm import CausalLM, UnsupportedModelError, probe, rollout_mode
from axolotl_skd.rollout.sampling import row_streams
from axolotl_skd.rollout.types import Prompts, SamplingParams
from axolotl_skd.teacher import (
    TeacherError,
    check_quantised_checkpoint,
    load_teacher,
    quantization_config,
    read_teacher_config,
    read_teacher_tokenizer,
)
from axolotl_skd.teacher_size import bytes_to_load
from tests.helpers import VOCAB_SIZE, save_model, save_tokenizer, word_vocab
from tests.rollout.tiny import tiny_model

CPU = torch.device("cpu")
TINY_TEACHER = resource_path("example_configs") / "tiny" / "teacher"
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    save_tokenizer(path)
    # bitsandbytes' CPU kernels want 32 rows in every weight; small weights keep activations free of the
    # outliers by which int8 products would depend on the batch.
    save_model(
        path,
        seed=2,
        dtype=torch.bfloat16,
        hidden_size=64,
        intermediate_size=128,
        initializer_range=0.05,
    )
    return path


def teacher_config(folder: Path, **keys: Any) -> TeacherConfig:
    return TeacherConfig(base_model=str(folder), **keys)


def linear_types(model: PreTrainedModel) -> set[type[nn.Module]]:
    """Of the layers, the head aside."""
    return {type(module) for module in model.model.modules() if isinstance(module, nn.Linear)}


def test_the_teacher_is_frozen_and_in_evaluation_mode(folder: Path) -> None:
    teacher = load_teacher(teacher_config(folder), CPU)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.bfloat16),  # the checkpoint's own
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_weights_are_in_the_dtype_asked_for(folder: Path, name: str, dtype: torch.dtype) -> None:
    teacher = load_teacher(teacher_config(folder, dtype=name), CPU)
    assert {parameter.dtype for parameter in teacher.parameters()} == {dtype}


def test_the_weights_are_those_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path, seed=5)
    teacher = load_teacher(teacher_config(tmp_path), CPU)
    assert torch.equal(teacher(IDS).logits, model(IDS).logits)
    other = load_teacher(teacher_config(folder, dtype="float32"), CPU)
    assert not torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_attention_is_the_one_asked_for(folder: Path, implementation: str) -> None:
    teacher = load_teacher(teacher_config(folder, attn_implementation=implementation), CPU)
    assert teacher.config._attn_implementation == implementation


def test_the_configs_device_wins(folder: Path) -> None:
    teacher = load_teacher(teacher_config(folder, device="meta"), CPU)
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}


# Quantisation


def test_the_teacher_is_never_quantised_unasked(folder: Path) -> None:
    config = teacher_config(folder)
    assert quantization_config(config) is None
    for keys in ({"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": False}):
        with pytest.raises(ValueError, match="bnb_4bit.*but load_in_4bit is not set"):
            teacher_config(folder, **keys)
    teacher = load_teacher(config, CPU)
    assert linear_types(teacher) == {nn.Linear}
    assert getattr(teacher.config, "quantization_config", None) is None


def test_4_bit_settings_are_handed_on(folder: Path) -> None:
    got = quantization_config(
        teacher_config(
            folder,
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4",
            bnb_4bit_use_double_quant=False,
            bnb_4bit_compute_dtype="float16",
        )
    )
    assert isinstance(got, BitsAndBytesConfig)
    assert got.load_in_4bit and not got.load_in_8bit
    assert got.bnb_4bit_quant_type == "fp4"
    assert got.bnb_4bit_use_double_quant is False
    assert got.bnb_4bit_compute_dtype == torch.float16


def test_4_bit_defaults_are_nf4_with_double_quantisation(folder: Path) -> None:
    got = quantization_config(teacher_config(folder, load_in_4bit=True))
    assert got.bnb_4bit_quant_type == "nf4"
    assert got.bnb_4bit_use_double_quant is True


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, torch.bfloat16),  # the checkpoint's
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "float32", "bnb_4bit_compute_dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_4_bit_products_are_in_the_dtype_that_the_weights_would_have(
    folder: Path, keys: dict[str, str], dtype: torch.dtype
) -> None:
    got = quantization_config(teacher_config(folder, load_in_4bit=True, **keys))
    assert got.bnb_4bit_compute_dtype == dtype


def test_8_bit_settings(folder: Path) -> None:
    got = quantization_config(teacher_config(folder, load_in_8bit=True))
    assert got.load_in_8bit and not got.load_in_4bit


@pytest.mark.parametrize(
    ("keys", "layer", "tolerance"),
    [
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, Linear4bit, 0.5),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": False}, Linear4bit, 0.5),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, Linear4bit, 0.5),
        ({"load_in_8bit": True}, Linear8bitLt, 0.1),
    ],
)
def test_quantised_teachers_stay_near_the_original(
    folder: Path, keys: dict[str, Any], layer: type[nn.Module], tolerance: float
) -> None:
    plain = load_teacher(teacher_config(folder, dtype="float32"), CPU)
    teacher = load_teacher(teacher_config(folder, dtype="float32", **keys), CPU)
    assert linear_types(teacher) == {layer}
    if layer is Linear4bit:
        state = teacher.model.layers[0].mlp.up_proj.weight.quant_state
        assert state.quant_type == keys.get("bnb_4bit_quant_type", "nf4")
        assert state.nested is keys.get("bnb_4bit_use_double_quant", True)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    logits, expected = teacher(IDS).logits.float(), plain(IDS).logits
    assert logits.isfinite().all()
    error = float((logits - expected).norm() / expected.norm())
    assert 0 < error < tolerance


@pytest.mark.parametrize(
    "keys",
    [
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
        {"torchao": "int8"},
    ],
)
def test_a_quantised_teacher_verifies_a_rollout(
    folder: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    student = CausalLM(save_model(tmp_path, seed=1))
    model = load_teacher(teacher_config(folder, dtype="float32", **keys), CPU)
    teacher = CausalLM(model)
    top_k, lengths = 12, [3, 5]
    prompts = Prompts(
        ids=tuple(torch.arange(3, 3 + length) for length in lengths),
        streams=row_streams(0, 0, torch.tensor([10, 11])),
        max_new_tokens=torch.full((2,), 9),
    )
    params = SamplingParams(
        num_draft_tokens=3,
        teacher_top_k=top_k,
        student_temperature=1.0,
        student_top_p=1.0,
        teacher_temperature=0.5,
        teacher_top_p=1.0,
        stop_token_ids=(0,),
    )
    with rollout_mode(student.model):
        rollout = RolloutEngine(student, teacher).interleave(prompts, params)
        # The verdicts are the quantised teacher's own, by a plain forward on what came out.
        for row, prompt in enumerate(prompts.ids):
            completion = rollout.unpadded()[row]
            whole = torch.cat([prompt, completion])[None]
            logits = model(whole).logits[0, len(prompt) - 1 : -1].float()
            stored = teacher.logits(rollout.teacher_hidden[row, : len(completion)]).float()
            torch.testing.assert_close(stored, logits, rtol=1e-3, atol=1e-3)
            proposed = rollout.proposed_ids[row, : len(completion)]
            rank = (stored > stored.gather(1, proposed[:, None])).sum(1)
            accepted = rollout.accepted_mask[row, : len(completion)]
            assert torch.equal(rank < top_k, accepted)
    assert rollout.accepted_mask.any() and not rollout.accepted_mask.all()


# Faults


def error_of(action: Any, *arguments: Any) -> str:
    with pytest.raises(TeacherError) as refusal:
        action(*arguments)
    message = str(refusal.value)
    assert message.startswith("distillation.teacher.base_model: the ")
    assert "could not be read" in message
    assert "Give a folder that holds a saved Hugging Face model" in message
    return message


@pytest.mark.parametrize(
    ("action", "what"),
    [
        (read_teacher_config, "configuration"),
        (read_teacher_tokenizer, "tokenizer"),
        (lambda config: load_teacher(config, CPU), "configuration"),
    ],
)
@pytest.mark.parametrize("name", ["no/such-folder", "./no-such-folder", "{empty}"])
def test_a_missing_teacher(name: str, action: Any, what: str, tmp_path: Path) -> None:
    name = name.format(empty=tmp_path)
    assert f"the {what} of {name!r}" in error_of(action, TeacherConfig(base_model=name))


def test_an_unreadable_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{ not json")
    assert "the configuration of" in error_of(read_teacher_config, teacher_config(tmp_path))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    message = error_of(load_teacher, teacher_config(tmp_path), CPU)
    assert "the weights of" in message and "model.safetensors" in message


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b""])
def test_weights_that_are_no_weights(content: bytes, tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "the weights of" in error_of(load_teacher, teacher_config(tmp_path), CPU)


def test_a_checkpoint_cut_short(tmp_path: Path) -> None:
    save_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "the weights of" in error_of(load_teacher, teacher_config(tmp_path), CPU)


def test_a_checkpoint_that_lacks_weights_is_no_teacher(tmp_path: Path) -> None:
    # transformers would fill the gaps with random numbers and only warn.
    save_model(tmp_path).model.save_pretrained(tmp_path)  # the body without its head
    message = error_of(load_teacher, teacher_config(tmp_path), CPU)
    assert "lm_head.weight" in message


def test_a_checkpoint_of_another_shape_is_no_teacher(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB_SIZE + 8}))
    assert "the weights of" in error_of(load_teacher, teacher_config(tmp_path), CPU)


def test_a_tokenizer_that_cannot_be_parsed(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    assert "the tokenizer of" in error_of(read_teacher_tokenizer, teacher_config(tmp_path))


def test_what_can_be_read_is_read(folder: Path) -> None:
    assert read_teacher_config(teacher_config(folder)).vocab_size == VOCAB_SIZE
    assert read_teacher_tokenizer(teacher_config(folder)).get_vocab() == word_vocab()


def test_the_probe_allows_for_int8_outliers() -> None:
    """LLM.int8 picks its outlier columns per batch, so a cached forward differs by some 1e-3."""
    teacher = load_teacher(
        TeacherConfig(base_model=str(TINY_TEACHER), load_in_8bit=True, dtype="float32"), CPU
    )
    probe(CausalLM(teacher), "distillation.teacher.base_model")


# Other teachers


def save_adapter(base: PreTrainedModel, folder: Path, **settings: Any) -> PeftModel:
    """A random LoRA adapter over `base`, saved in `folder`."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings})
    adapted = get_peft_model(base, config)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_is_in_the_teachers_layers(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_model(tmp_path / "base", seed=5)
    adapted = save_adapter(save_model(tmp_path / "base", seed=5), tmp_path / "adapter", **settings)
    config = teacher_config(tmp_path / "base", adapter=str(tmp_path / "adapter"))
    teacher = load_teacher(config, CPU)
    assert torch.equal(teacher(IDS).logits, adapted(IDS).logits)
    plain = load_teacher(teacher_config(tmp_path / "base"), CPU)
    assert not torch.equal(teacher(IDS).logits, plain(IDS).logits)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    probe(CausalLM(teacher), "distillation.teacher.base_model")


@pytest.mark.parametrize("what", ["nothing", "shape", "kind"])
def test_an_adapter_that_does_not_fit_is_named(tmp_path: Path, what: str) -> None:
    save_model(tmp_path / "base")
    if what == "shape":
        save_adapter(save_model(tmp_path / "other", hidden_size=32), tmp_path / "adapter")
    if what == "kind":
        prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        get_peft_model(save_model(tmp_path / "other"), prompt).save_pretrained(tmp_path / "adapter")
    config = teacher_config(tmp_path / "base", adapter=str(tmp_path / "adapter"))
    with pytest.raises(TeacherError, match=r"^distillation\.teacher\.adapter: "):
        load_teacher(config, CPU)


def test_a_torchao_teacher_stays_near_the_original(folder: Path) -> None:
    plain = load_teacher(teacher_config(folder), CPU)
    teacher = load_teacher(teacher_config(folder, torchao="int8"), CPU)
    weight = teacher.model.layers[0].mlp.up_proj.weight
    assert stored_bytes(weight) < weight.numel() * 2
    error = (teacher(IDS).logits - plain(IDS).logits).float().norm() / plain(
        IDS
    ).logits.float().norm()
    assert 0 < float(error) < 0.05
    probe(CausalLM(teacher), "distillation.teacher.base_model")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_quantised_checkpoint_without_its_kernels_is_refused(tmp_path: Path, method: str) -> None:
    """At the configuration, before any weight is read."""
    model = save_model(tmp_path)
    settings = {"quant_method": method, "bits": 4, "group_size": 128}
    config = {**model.config.to_dict(), "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = teacher_config(tmp_path)
    with pytest.raises(TeacherError, match=f"quantised by {method}.*pip install gptqmodel"):
        check_quantised_checkpoint(teacher, read_teacher_config(teacher), "cpu")
    twice = teacher_config(tmp_path, load_in_8bit=True)
    with pytest.raises(TeacherError, match=f"load_in_8bit is set.*quantised already .{method}"):
        check_quantised_checkpoint(twice, read_teacher_config(twice), "cpu")
    moved = teacher_config(tmp_path, offload=True)
    with pytest.raises(TeacherError, match=f"offload: true moves.*quantised .{method}"):
        check_quantised_checkpoint(moved, read_teacher_config(moved), "cpu")


def test_a_quantised_checkpoint_whose_kernels_are_there_is_loaded_as_it_is(
    folder: Path, tmp_path: Path
) -> None:
    """bitsandbytes' own, which transformers treats as it treats GPTQ and AWQ."""
    made = load_teacher(teacher_config(folder, load_in_4bit=True, dtype="float32"), CPU)
    made.save_pretrained(tmp_path)
    config = teacher_config(tmp_path)
    check_quantised_checkpoint(config, read_teacher_config(config), "cpu")
    teacher = load_teacher(config, CPU)
    assert linear_types(teacher) == {Linear4bit}
    assert torch.equal(teacher(IDS).logits, made(IDS).logits)
    plain = teacher_config(folder)
    check_quantised_checkpoint(plain, read_teacher_config(plain), "cpu")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"device_map": "balanced"}, "balanced"),
        ({"device": "cpu:0"}, {"": "cpu:0"}),
        ({}, {"": CPU}),
    ],
)
def test_the_place_is_handed_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str], expected: Any
) -> None:
    places = []
    load = AutoModelForCausalLM.from_pretrained

    def watched(name: str, **arguments: Any) -> Any:
        places.append(arguments["device_map"])
        return load(name, **arguments)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    teacher = load_teacher(teacher_config(folder, **keys), CPU)
    assert places == [expected]
    probe(CausalLM(teacher), "distillation.teacher.base_model")


def test_a_softcapped_teacher_keeps_its_softcap(tmp_path: Path) -> None:
    model = tiny_model("gemma2", seed=1, attn_logit_softcapping=1.0)
    model.save_pretrained(tmp_path)
    teacher = load_teacher(teacher_config(tmp_path), CPU)
    assert torch.equal(teacher(IDS).logits, model(IDS).logits)
    probe(CausalLM(teacher), "distillation.teacher.base_model")
    without = load_teacher(teacher_config(tmp_path, attn_implementation="sdpa"), CPU)
    assert not torch.allclose(without(IDS).logits, model(IDS).logits, atol=1e-3)
    with pytest.raises(UnsupportedModelError, match="leaves out the softcap"):
        CausalLM(without)


def test_a_teacher_that_does_not_fit_says_what_helps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(TeacherError, match="tried to allocate 2 GiB.*load_in_4bit: true; device:"):
        load_teacher(teacher_config(folder), CPU)


def test_a_teacher_that_spills_from_its_devices_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate leaves the weights of what it has put on the disk empty."""
    load = AutoModelForCausalLM.from_pretrained

    def spilled(*arguments: Any, **keys: Any) -> Any:
        model, info = load(*arguments, **keys)
        model.lm_head.to("meta")
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spilled)
    with pytest.raises(TeacherError, match="device_map: auto leaves a part of it.*load_in_4bit"):
        load_teacher(teacher_config(folder, device_map="auto"), CPU)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"dtype": "bfloat16"},
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
    ],
    ids=str,
)
def test_the_room_of_a_teacher_is_known_before_it_is_loaded(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    save_model(tmp_path, hidden_size=64, intermediate_size=256)
    config = teacher_config(tmp_path, **{"dtype": "float32", **keys})
    expected = bytes_to_load(config, read_teacher_config(config))
    teacher = load_teacher(config, CPU)
    assert expected == pytest.approx(held_bytes(teacher), rel=0.02)


def test_an_adapter_is_no_teacher(tmp_path: Path) -> None:
    adapted = save_adapter(save_model(tmp_path / "base"), tmp_path / "adapter")
    adapted.base_model.config.save_pretrained(tmp_path / "adapter")  # as Axolotl leaves it beside
    message = error_of(lambda: load_teacher(teacher_config(tmp_path / "adapter"), CPU))
    assert "it holds an adapter: name it by distillation.teacher.adapter" in message


def test_a_package_that_a_setting_needs_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("flash_attn seems to be not installed")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lacking)
    config = teacher_config(folder, attn_implementation="flash_attention_2")
    with pytest.raises(TeacherError, match="teacher.attn_implementation: .*flash_attn seems to be"):
        load_teacher(config, CPU)


def test_a_quantisation_that_fails_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("conversion failed")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", failing)
    with pytest.raises(
        TeacherError, match="teacher.torchao: int4 could not be applied.*conversion"
    ):
        load_teacher(teacher_config(folder, torchao="int4"), CPU)


def test_weights_that_are_no_numbers_are_said_to_be(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match="the teacher: .* gives NaN or infinite logits"):
        probe(CausalLM(model), "the teacher")


def test_a_multimodal_checkpoint_teaches_by_its_text_part(tmp_path: Path) -> None:
    """Gemma 3 from 4B on comes with a vision tower, of which text needs nothing."""
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    text |= dict(num_key_value_heads=1, intermediate_size=64, vocab_size=VOCAB_SIZE)
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    vision |= dict(image_size=28, patch_size=14)
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    teacher = load_teacher(teacher_config(tmp_path), CPU)
    assert type(teacher).__name__ == "Gemma3ForConditionalGeneration"
    lm = CausalLM(teacher)
    with rollout_mode(teacher):
        probe(lm, "distillation.teacher.base_model")
    assert torch.allclose(lm.logits(lm.hidden_states(IDS)), teacher(IDS).logits, atol=1e-5)
