"""Make the tiny teacher/student pair and its data, from nothing, seeded.

What: writes ``data/``, ``teacher/`` and ``student/`` beside this file and the held-out problems of
``evals/skd_tiny_arithmetic/``: a 512-token byte-level BPE tokenizer, a Llama of about 1M
parameters that solves the word problems of problems.py, and one several times smaller whose
supervised training was stopped while it still fails most of them.
Why: knowledge distillation needs a teacher that knows more than its student. This pair is real
(trained, with several valid solutions to each problem), a few megabytes, and runs on a CPU.

How to run, from anywhere (17 minutes on 2 cores of an AMD EPYC, fp32, no GPU):

    python example_configs/tiny/make_pair.py --threads 1

This made the committed files, and a second run gave the same bytes. ``--stages data tokenizer
teacher student measure`` runs some of the stages; each reads from disk what the ones before it
wrote. ``--out`` writes elsewhere (``OUT/tiny``, ``OUT/evals``). All figures are printed, none is
stored. Another CPU or torch version gives slightly different weights; the student is stopped on a
steep part of its curve, so look at the accuracy that is printed for it.

Tensor legend: B batch, T tokens, V vocabulary.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from problems import Problem, draw_distinct, draw_drill, draw_problem, final_answer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
STAGES = ("data", "tokenizer", "teacher", "student", "measure")
SEED = 20260
ROWS = {"train": 3500, "validation": 200, "test": 500}

VOCAB_SIZE = 512
MAX_LENGTH = 2048
IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IGNORED = -100

TEACHER = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
STUDENT = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
STUDENT_STOPS_AT = 0.15  # greedy accuracy on validation
HEADROOM_STEPS, HEADROOM_LR = 200, 4e-3
TOP_KS = (1, 2, 3, 5, 8, 12)


@dataclass(frozen=True, slots=True)
class Phase:
    """A training: ``stories`` word problems and ``drills`` chains of sums a step."""

    name: str
    num_steps: int
    learning_rate: float
    stories: int
    drills: int
    check_every: int = 500  # steps between looks at the validation accuracy
    first_check: int = 0


TEACHER_PHASE = Phase("teacher", num_steps=2400, learning_rate=3e-3, stories=32, drills=0)
# Half of a step is drills: the arithmetic is what a small model learns last.
# Its accuracy leaps from a seventh to nearly a half within 100 steps, hence the close watch.
STUDENT_PHASE = Phase(
    "student",
    num_steps=8000,
    learning_rate=3e-3,
    stories=16,
    drills=16,
    check_every=10,
    first_check=1300,
)

Example = tuple[list[int], list[int]]  # prompt ids, completion ids (with the end-of-turn token)


# ---------------------------------------------------------------------------------------- data


def write_data(tiny: Path, evals: Path, seed: int) -> None:
    """Three files whose problems share no arithmetic: chat rows to train, GSM8K rows to test."""
    splits = {
        name: draw_distinct(random.Random(f"{seed}/{name}"), name, count)
        for name, count in ROWS.items()
    }
    assert_disjoint(splits)
    for name in ("train", "validation"):
        rows = [{"messages": problem.messages} for problem in splits[name]]
        write_jsonl(tiny / "data" / f"{name}.jsonl", rows)
    rows = [{"question": p.question, "answer": p.answer} for p in splits["test"]]
    write_jsonl(evals / "test.jsonl", rows)


def assert_disjoint(splits: dict[str, list[Problem]]) -> None:
    """No two problems of the same arithmetic, whatever their story, within or across splits."""
    keys = [problem.key for problems in splits.values() for problem in problems]
    if len(keys) != len(set(keys)):
        raise AssertionError("two problems share their arithmetic: see problems.split_of")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_chats(path: Path) -> list[tuple[str, str]]:
    """Rows of chat JSONL as (question, answer)."""
    return [tuple(turn["content"] for turn in row["messages"]) for row in read_jsonl(path)]


# ----------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over all 256 bytes; each digit is a token, never joined to a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # [0-9], not Digits(): other scripts' digits may merge, ASCII ones never do.
            pre_tokenizers.Split(Regex("[0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenizer_texts(problems: list[Problem]) -> list[str]:
    """Questions and answers, and the template's role words often enough to become tokens."""
    roles = ["system\n", "user\n", "assistant\n"] * len(problems)
    return [text for p in problems for text in (p.question, p.answer)] + roles


def encode_prompt(tokenizer, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_example(tokenizer, question: str, answer: str) -> Example:
    completion = tokenizer(answer + IM_END, add_special_tokens=False)["input_ids"]
    return encode_prompt(tokenizer, question), completion


# ------------------------------------------------------------------------------------ training


def new_model(tokenizer, seed: int, **size: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    special = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        **special,
        **size,
    )
    model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model


def collate(examples: list[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, T] and labels [B, T], where only completions count."""
    width = max(len(prompt) + len(completion) for prompt, completion in examples)
    input_ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORED)
    for row, (prompt, completion) in enumerate(examples):
        ids = torch.tensor(prompt + completion)
        input_ids[row, : len(ids)] = ids
        labels[row, len(prompt) : len(ids)] = ids[len(prompt) :]
    return input_ids, labels


def drill_batches(tokenizer, seed: str, batch_size: int) -> Iterator[list[Example]]:
    """Bare equations without end: three times the arithmetic a token that the stories have."""
    rng = random.Random(seed)
    while True:
        yield [encode_example(tokenizer, *draw_drill(rng)) for _ in range(batch_size)]


def story_batches(
    tokenizer, seed: str, batch_size: int, window: int = 8
) -> Iterator[list[Example]]:
    """Fresh training problems without end, sorted by length within a window to save padding."""
    rng = random.Random(seed)
    while True:
        problems = [draw_problem(rng, "train") for _ in range(batch_size * window)]
        examples = [encode_example(tokenizer, p.question, p.answer) for p in problems]
        examples.sort(key=lambda example: len(example[0]) + len(example[1]))
        batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        rng.shuffle(batches)
        yield from batches


def epoch_batches(examples: list[Example], seed: str, batch_size: int) -> Iterator[list[Example]]:
    """Shuffled passes over a fixed set, without end."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(examples, len(examples))
        yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def linear_decay(step: int, num_steps: int, warmup: int) -> float:
    """Factor of the learning rate: 0 -> 1 over ``warmup`` steps, then 1 -> 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (num_steps - step) / (num_steps - warmup)


def train(
    model: LlamaForCausalLM,
    batches: Iterator[list[Example]],
    *,
    num_steps: int,
    learning_rate: float,
    warmup: int,
    stop: Callable[[], bool] | None = None,
    check_every: int = 100,
    first_check: int = 0,
) -> None:
    """Cross-entropy on completion tokens; every ``check_every`` steps may end it by ``stop()``."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: linear_decay(step, num_steps, warmup)
    )
    began = time.monotonic()
    model.train()
    for step in range(1, num_steps + 1):
        input_ids, labels = collate(next(batches), model.config.pad_token_id)
        # Right padding under a causal mask: no token that counts can see a pad.
        logits = model(input_ids=input_ids).logits  # [B, T, V]
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step >= first_check and step % check_every == 0:
            print(f"  step {step}: loss {loss.item():.4f}, {time.monotonic() - began:.0f} s")
            if stop is not None and stop():
                return
            model.train()


def make_teacher(tokenizer, args: argparse.Namespace, validation) -> LlamaForCausalLM:
    model = new_model(tokenizer, args.seed, **TEACHER)
    train_phase(model, TEACHER_PHASE, tokenizer, args.seed, validation)
    return model


def train_phase(
    model, phase: Phase, tokenizer, seed: int, validation, stop_at: float = 1.0
) -> None:
    stories = story_batches(tokenizer, f"{seed}/{phase.name}", phase.stories)
    drills = drill_batches(tokenizer, f"{seed}/{phase.name}/drills", phase.drills)
    train(
        model,
        (story + drill for story, drill in zip(stories, drills, strict=True)),
        num_steps=phase.num_steps,
        learning_rate=phase.learning_rate,
        warmup=100,
        stop=lambda: print_accuracy(model, tokenizer, validation) >= stop_at,
        check_every=phase.check_every,
        first_check=phase.first_check,
    )


def make_student(tokenizer, args: argparse.Namespace, validation) -> LlamaForCausalLM:
    """Stopped the first time that validation accuracy reaches ``STUDENT_STOPS_AT``."""
    model = new_model(tokenizer, args.seed + 1, **STUDENT)
    train_phase(model, STUDENT_PHASE, tokenizer, args.seed, validation, STUDENT_STOPS_AT)
    return model


def print_accuracy(model, tokenizer, chats: list[tuple[str, str]]) -> float:
    accuracy = greedy_accuracy(model, tokenizer, chats)
    print(f"  validation accuracy {accuracy:.1%}")
    return accuracy


# ------------------------------------------------------------------------------------ measures


@torch.no_grad()
def generate_greedily(
    model, tokenizer, questions: list[str], batch_size: int = 100, max_new_tokens: int = 96
) -> list[str]:
    model.eval()
    tokenizer.padding_side = "left"
    texts = []
    for start in range(0, len(questions), batch_size):
        prompts = [encode_prompt(tokenizer, q) for q in questions[start : start + batch_size]]
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        completions = output[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(completions, skip_special_tokens=True)
    return texts


def greedy_accuracy(model, tokenizer, chats: list[tuple[str, str]]) -> float:
    """Share of (question, answer) whose number after ``####`` is generated exactly."""
    questions, answers = zip(*chats, strict=True)
    generated = generate_greedily(model, tokenizer, list(questions))
    correct = [final_answer(g) == final_answer(a) for g, a in zip(generated, answers, strict=True)]
    return sum(correct) / len(correct)


def nucleus_probs(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities [..., V] of top-p sampling: the smallest set of mass >= top_p, renormalised."""
    probs, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, order, probs)


@torch.no_grad()
def top_k_table(
    teacher, student, tokenizer, questions: list[str]
) -> list[tuple[int, float, float]]:
    """Rows (K, mean teacher mass in its top K, share of the student's proposals in that top K).

    Both models read the teacher's greedy outputs (teacher forcing). The share is exact, the
    probability of proposing a top-K token at temperature .5 and top-p .5, not sampled.
    """
    answers = generate_greedily(teacher, tokenizer, questions)
    examples = [encode_example(tokenizer, q, a) for q, a in zip(questions, answers, strict=True)]
    input_ids, labels = collate(examples, tokenizer.pad_token_id)
    counted = labels[:, 1:] != IGNORED
    teacher_logits, student_logits = (
        model(input_ids=input_ids).logits[:, :-1][counted] for model in (teacher, student)
    )
    teacher_probs = teacher_logits.softmax(-1)
    proposal_probs = nucleus_probs(student_logits, temperature=0.5, top_p=0.5)
    rows = []
    for k in TOP_KS:
        top_ids = teacher_logits.topk(k, dim=-1).indices
        mass, accepted = (p.gather(-1, top_ids).sum(-1) for p in (teacher_probs, proposal_probs))
        rows.append((k, mass.mean().item(), accepted.mean().item()))
    return rows


def print_measures(tiny: Path, evals: Path, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tiny / "teacher")
    student = AutoModelForCausalLM.from_pretrained(tiny / "student")
    chats = read_chats(tiny / "data" / "train.jsonl")
    test = [(row["question"], row["answer"]) for row in read_jsonl(evals / "test.jsonl")]
    examples = [encode_example(tokenizer, *chat) for chat in chats]

    for name, lengths in (
        ("prompt", [len(prompt) for prompt, _ in examples]),
        ("completion", [len(completion) for _, completion in examples]),
        ("whole", [len(prompt) + len(completion) for prompt, completion in examples]),
    ):
        print(f"{name} tokens: mean {sum(lengths) / len(lengths):.1f}, max {max(lengths)}")
    for name, model in (("teacher", teacher), ("student", student)):
        accuracy = greedy_accuracy(model, tokenizer, test)
        print(f"{name}: {model.num_parameters():,} parameters, test accuracy {accuracy:.1%}")

    print("K | teacher mass in its top K | student proposals in it (T .5, top-p .5)")
    for k, mass, accepted in top_k_table(teacher, student, tokenizer, [q for q, _ in test[:100]]):
        print(f"{k} | {mass:.4f} | {accepted:.4f}")

    train(
        student,
        epoch_batches(examples, f"{seed}/headroom", 32),
        num_steps=HEADROOM_STEPS,
        learning_rate=HEADROOM_LR,
        warmup=20,
    )
    accuracy = greedy_accuracy(student, tokenizer, test)
    print(f"student after {HEADROOM_STEPS} supervised steps (not saved): {accuracy:.1%}")


# ---------------------------------------------------------------------------------------- main


def save(model, tokenizer, folder: Path) -> None:
    tokenizer.padding_side = "right"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: this repository")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    tiny = args.out / "tiny" if args.out else HERE
    evals_root = args.out / "evals" if args.out else HERE.parents[1] / "evals"
    evals = evals_root / "skd_tiny_arithmetic"

    def run(stage: str, action: Callable[[], None]) -> None:
        if stage in args.stages:
            began = time.monotonic()
            action()
            print(f"{stage}: {time.monotonic() - began:.0f} s", flush=True)

    def tokenizer_stage() -> None:
        problems = draw_distinct(random.Random(f"{args.seed}/tokenizer"), "train", 5000)
        tokenizer = train_tokenizer(tokenizer_texts(problems))
        for role in ("teacher", "student"):
            tokenizer.save_pretrained(tiny / role)

    def model_stage(role: str, make: Callable) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny / role)
        validation = read_chats(tiny / "data" / "validation.jsonl")
        save(make(tokenizer, args, validation), tokenizer, tiny / role)

    run("data", lambda: write_data(tiny, evals, args.seed))
    run("tokenizer", tokenizer_stage)
    run("teacher", lambda: model_stage("teacher", make_teacher))
    run("student", lambda: model_stage("student", make_student))
    run("measure", lambda: print_measures(tiny, evals, args.seed))


if __name__ == "__main__":
    main()
