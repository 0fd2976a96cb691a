from __future__ import annotations

import ast
import importlib.util
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from axolotl_skd.evaluation import runner
from axolotl_skd.evaluation.models import EvalModel, EvalSettings
from axolotl_skd.evaluation.runner import (
    EvaluationError,
    child_environment,
    lm_eval_command,
    run_tasks,
)
from axolotl_skd.resources import resource_path

TASK = "skd_tiny_arithmetic"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_of_a_full_model(tmp_path: Path) -> None:
    command = lm_eval_command(
        EvalModel(base_model="org/model", device="cuda:1"),
        EvalSettings(),
        tasks=[TASK, "b"],
        output_dir=tmp_path,
    )
    assert command[:4] == [sys.executable, "-m", "lm_eval", "run"]
    assert json.loads(option(command, "--model_args")) == {
        "pretrained": "org/model",
        "dtype": "auto",
    }
    assert option(command, "--model") == "hf"
    assert option(command, "--tasks") == f"{TASK},b"
    assert option(command, "--include_path") == str(resource_path("evals"))
    assert option(command, "--device") == "cuda:1"
    assert Path(option(command, "--output_path")).parent == tmp_path
    assert command[-1] == "--apply_chat_template"
    assert "--limit" not in command and "--log_samples" not in command


def test_the_command_of_an_adapter_with_awkward_paths(tmp_path: Path) -> None:
    model = EvalModel(
        base_model="/a,b=c/{1}",
        device="cpu",
        revision="v2",
        adapter="/lr=1e-4, run 2",
        tokenizer="7",
        trust_remote_code=True,
        attn_implementation="eager",
    )
    settings = EvalSettings(
        limit=0.5, batch_size="auto", apply_chat_template=False, log_samples=tmp_path
    )
    command = lm_eval_command(model, settings, tasks=[TASK], output_dir=tmp_path)
    assert json.loads(option(command, "--model_args")) == {
        "pretrained": "/a,b=c/{1}",
        "revision": "v2",
        "peft": "/lr=1e-4, run 2",
        "tokenizer": "7",
        "dtype": "auto",
        "trust_remote_code": True,
        "attn_implementation": "eager",
    }
    assert option(command, "--limit") == "0.5"
    assert option(command, "--batch_size") == "auto"
    assert "--apply_chat_template" not in command
    assert command[-1] == "--log_samples"


def constructor_arguments(module: str, name: str) -> set[str]:
    """Of a class of lm-eval, from its source: vLLM's wrapper cannot be imported without vLLM."""
    package = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    tree = ast.parse(Path(package, "models", module).read_text(encoding="utf-8"))
    (cls,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name]
    (init,) = [n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    return {argument.arg for argument in init.args.args}


def save_adapter_config(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_command_of_vllm(tmp_path: Path) -> None:
    adapter = save_adapter_config(tmp_path / "adapter", r=24)
    model = EvalModel(
        base_model="org/base",
        device="cuda:0",
        revision="v2",
        adapter=str(adapter),
        tokenizer="tok",
        trust_remote_code=True,
    )
    command = lm_eval_command(
        model, EvalSettings(backend="vllm"), tasks=[TASK], output_dir=tmp_path
    )
    args = json.loads(option(command, "--model_args"))
    assert option(command, "--model") == "vllm"
    assert option(command, "--batch_size") == "auto"
    assert "--device" not in command
    assert args == {
        "pretrained": "org/base",
        "revision": "v2",
        "tokenizer": "tok",
        "dtype": "auto",
        "trust_remote_code": True,
        "gpu_memory_utilization": 0.8,
        "lora_local_path": str(adapter),
        "max_lora_rank": 32,
    }
    # vLLM's own argument, which lm-eval 0.4.13 hands through without naming it.
    named = set(args) - {"gpu_memory_utilization"}
    assert named <= constructor_arguments("vllm_causallms.py", "VLLM")


def test_vllm_without_an_adapter_has_no_lora(tmp_path: Path) -> None:
    model = EvalModel(base_model="m", device="cuda:0")
    settings = EvalSettings(backend="vllm")
    command = lm_eval_command(model, settings, tasks=[TASK], output_dir=tmp_path)
    assert set(json.loads(option(command, "--model_args"))) == {
        "pretrained",
        "dtype",
        "gpu_memory_utilization",
    }


def test_all_arguments_of_the_hugging_face_backend_exist(tmp_path: Path) -> None:
    model = EvalModel(
        base_model="b",
        device="cpu",
        revision="r",
        adapter="a",
        tokenizer="t",
        trust_remote_code=True,
    )
    command = lm_eval_command(model, EvalSettings(), tasks=[TASK], output_dir=tmp_path)
    args = json.loads(option(command, "--model_args"))
    assert len(args) == 6
    assert set(args) <= constructor_arguments("huggingface.py", "HFLM")


def test_the_child_does_not_see_the_launcher() -> None:
    launcher = [
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"),
        *("FSDP_VERSION", "OMPI_COMM_WORLD_SIZE", "PMI_RANK"),
    ]
    kept = {"HF_HOME": "/hf", "HF_HUB_OFFLINE": "1", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3"}
    environ = dict.fromkeys(launcher, "1") | kept
    assert child_environment(environ) == kept
    assert "RANK" in environ


def test_only_plain_numbers_are_taken_from_the_results() -> None:
    results = {TASK: {"alias": TASK, "sample_len": 3, "acc,none": 1, "acc_stderr,none": "N/A"}}
    assert runner._plain_metrics(results) == {TASK: {"acc": 1.0}}


def test_what_was_not_measured_is_left_out_and_named() -> None:
    results = {
        "skd_math": {"acc,boxed": 0.5, "acc_geometry,boxed": math.nan, "acc_algebra,boxed": 0.5},
        "skd_flores_asm_eng": {"comet,none": math.nan, "chrf,none": 40.0},
        "skd_paper": {"alias": "skd_paper", " ": " "},
    }
    assert runner._plain_metrics(results) == {
        "skd_math": {"acc": 0.5, "acc_algebra": 0.5},
        "skd_flores_asm_eng": {"chrf": 40.0},
    }
    assert runner._unmeasured(results) == ["skd_flores_asm_eng: comet"]


def test_importing_the_runner_is_light() -> None:
    script = (
        "import sys, axolotl_skd.evaluation.runner, axolotl_skd.evaluation.results\n"
        "import axolotl_skd.evaluation.extraction, axolotl_skd.evaluation.grading\n"
        "import axolotl_skd.evaluation.scoring\n"
        "print(*{'axolotl', 'trl', 'torch', 'transformers', 'lm_eval'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_an_unknown_task_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="did you mean"):
        run_tasks(
            EvalModel(base_model="x", device="cpu"), EvalSettings(), tasks=["skd_tiny_aritmetic"]
        )


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("pass", "no results were written"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
    ],
)
def test_a_failing_child_is_reported_with_its_tail_and_command(
    monkeypatch: pytest.MonkeyPatch, end: str, cause: str
) -> None:
    script = f"for i in range(100): print(f'line {{i}}.', flush=True)\n{end}"
    command = [sys.executable, "-c", script]
    monkeypatch.setattr(runner, "lm_eval_command", lambda *_, **__: command)
    with pytest.raises(EvaluationError, match=cause) as caught:
        run_tasks(EvalModel(base_model="x", device="cpu"), EvalSettings(), tasks=[TASK])
    message = str(caught.value)
    assert "line 99." in message and "line 80." in message and "line 79." not in message
    assert shlex.join(command) in message


def make_tiny_model(folder: Path) -> None:
    """A random one-layer Llama over bytes, with the ChatML template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_tiny_model_is_evaluated_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # A second OpenMP thread makes so small a model slower, many times so beside other work.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Fails a child that sees it at once; the launcher's RANK would have it wait for ever.
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "none")
    folder = tmp_path / "lr=0.1,tiny"
    make_tiny_model(folder)

    samples = tmp_path / "new" / "samples"
    results = run_tasks(
        EvalModel(base_model=str(folder), device="cpu"),
        EvalSettings(limit=3, batch_size=2, log_samples=samples),
        tasks=[TASK],
    )

    assert set(results) == {TASK}
    assert set(results[TASK]) == {"acc", "acc_stderr", "has_answer", "has_answer_stderr"}
    assert all(0 <= value <= 1 for value in results[TASK].values())
    (file,) = samples.iterdir()
    assert file.name.startswith(f"samples_{TASK}_")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
