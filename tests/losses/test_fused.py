"""Chunked token losses equal the plain ones, and never hold all positions by the whole vocabulary.

The reference is the definition of the loss at `head(hidden)` under plain autograd, in float64.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from axolotl_skd.losses import fused
from axolotl_skd.losses.divergences import (
    DIVERGENCES,
    Divergence,
    ValueAndGradient,
    cross_entropy,
    forward_kl,
    get_divergence,
)
from axolotl_skd.losses.fused import TeacherTargets, chunk_size, fused_token_loss
from axolotl_skd.rollout.lm import Head
from tests.losses.reference import ALPHA, BETA, plain_cross_entropy, plain_divergence
from tests.rollout.tiny import tiny_model

N, H, V = 10, 6, 23
CHUNKS = [1, 3, N, N + 5]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def linear_head(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Linear:
    head = nn.Linear(H, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(head.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return head


TEACHER = random(N, V, seed=50)


def teacher_rows(part: slice) -> tuple[Tensor]:
    """The targets of most tests."""
    return (TEACHER[part],)


def plain_kl(student_logits: Tensor, teacher_logits: Tensor = TEACHER) -> Tensor:
    return plain_divergence("forward_kl", student_logits, teacher_logits)


def named(divergence: str) -> Divergence:
    return get_divergence(divergence, beta=BETA, alpha=ALPHA, temperature=1.0)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, so that chunks consist of blocks and not of whole ones only."""
    monkeypatch.setitem(fused.BLOCK_ELEMENTS, "cpu", 2 * V)


@pytest.fixture(params=[1, 2, 100])
def block_rows(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _small_blocks: None
) -> int:
    """Most rows of a block: each row alone, blocks that do not divide a chunk, chunks whole."""
    monkeypatch.setitem(fused.BLOCK_ELEMENTS, "cpu", request.param * V)
    return request.param


@dataclass
class Recorder:
    """A head, a forward KL and its targets that note what they are asked for."""

    head: Callable[[Tensor], Tensor]
    parts: list[slice] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    block_rows: list[int] = field(default_factory=list)
    gradients: int = 0
    earlier: weakref.ref[Tensor] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        assert self.earlier is None or self.earlier() is None, "the chunk before is still there"
        logits = self.head(hidden)
        self.rows.append(len(hidden))
        self.earlier = weakref.ref(logits)
        return logits

    def targets(self, part: slice) -> tuple[Tensor]:
        self.parts.append(part)
        return teacher_rows(part)

    def loss(self, logits: Tensor, teacher: Tensor) -> ValueAndGradient:
        assert len(logits) == len(teacher)
        assert not logits.requires_grad
        self.block_rows.append(len(logits))
        result = forward_kl(logits, teacher)

        def gradient() -> Tensor:
            self.gradients += 1
            return result.gradient()

        return ValueAndGradient(result.values, gradient)


class NewTensors(TorchDispatchMode):
    """Notes the most elements of the tensors that operations make, views left out, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in known:
                most = max(self.largest.get(tensor.dtype, 0), tensor.numel())
                self.largest[tensor.dtype] = most
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("grad_output", [1.0, -2.5])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("loss", ["forward_kl", "cross_entropy"])
def test_values_and_gradients_are_the_unchunked_ones(
    loss: str, chunk: int, grad_output: float, block_rows: int
) -> None:
    tokens = torch.randint(V, (N,), generator=rng(9))
    token_loss, targets, plain_loss = {
        "forward_kl": (forward_kl, teacher_rows, plain_kl),
        "cross_entropy": (
            cross_entropy,
            lambda part: (tokens[part],),
            lambda logits: plain_cross_entropy(logits, tokens),
        ),
    }[loss]
    head, plain_head = linear_head(), linear_head()
    hidden = random(N, H, seed=7).requires_grad_()
    plain_hidden = hidden.detach().clone().requires_grad_()

    total, losses = fused_token_loss(hidden, head, head, token_loss, targets, chunk)
    (grad_output * total).backward()
    plain_losses = plain_loss(plain_head(plain_hidden))
    (grad_output * plain_losses.sum()).backward()

    close = dict(rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(total, plain_losses.sum().detach(), **close)
    torch.testing.assert_close(losses, plain_losses.detach(), **close)
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, **close)
    torch.testing.assert_close(head.weight.grad, plain_head.weight.grad, **close)
    torch.testing.assert_close(head.bias.grad, plain_head.bias.grad, **close)


def test_the_loss_fits_into_a_larger_graph() -> None:
    # Hidden states that are computed, a loss that is scaled and added to, gradients that accumulate.
    head, plain_head = linear_head(), linear_head()
    inputs, plain_inputs = (random(N, H, seed=8).requires_grad_() for _ in range(2))
    for _ in range(2):
        total, _ = fused_token_loss(inputs.tanh(), head, head, forward_kl, teacher_rows, chunk=4)
        (total / 3 + inputs.square().sum()).backward()
        plain = plain_kl(plain_head(plain_inputs.tanh())).sum()
        (plain / 3 + plain_inputs.square().sum()).backward()
    torch.testing.assert_close(inputs.grad, plain_inputs.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(head.weight.grad, plain_head.weight.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]])
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(frozen: list[str]) -> None:
    head, plain_head = linear_head(), linear_head()
    for name in frozen:
        getattr(head, name).requires_grad_(False)
    hidden = random(N, H, seed=7).requires_grad_()
    plain_hidden = hidden.detach().clone().requires_grad_()
    fused_token_loss(hidden, head, head, forward_kl, teacher_rows, chunk=3)[0].backward()
    plain_kl(plain_head(plain_hidden)).sum().backward()

    torch.testing.assert_close(hidden.grad, plain_hidden.grad, rtol=1e-12, atol=1e-13)
    for name in ("weight", "bias"):
        got, expected = getattr(head, name).grad, getattr(plain_head, name).grad
        if name in frozen:
            assert got is None
        else:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_a_frozen_body_still_trains_the_head() -> None:
    head, plain_head = linear_head(), linear_head()
    hidden = random(N, H, seed=7)
    fused_token_loss(hidden, head, head, forward_kl, teacher_rows, chunk=3)[0].backward()
    plain_kl(plain_head(hidden)).sum().backward()
    torch.testing.assert_close(head.weight.grad, plain_head.weight.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "llama"])
def test_real_heads_with_softcap_and_scale(family: str, tied: bool) -> None:
    # The reference is the model's own forward; every parameter of the model is compared.
    models = [tiny_model(family, seed=3, tie_word_embeddings=tied).double() for _ in range(2)]
    model, plain = models
    ids = torch.randint(300, (2, 6), generator=rng(1))
    teacher_logits = random(12, 300, seed=60)
    head = Head(model)
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state.flatten(0, 1)
    total, losses = fused_token_loss(
        hidden, head, head.module, forward_kl, lambda part: (teacher_logits[part],), chunk=5
    )
    total.backward()
    plain_losses = plain_kl(plain(input_ids=ids).logits.flatten(0, 1), teacher_logits)
    plain_losses.sum().backward()

    torch.testing.assert_close(losses, plain_losses.detach(), rtol=1e-10, atol=1e-12)
    names = dict(plain.named_parameters())
    assert ("lm_head.weight" in names) is not tied
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, names[name].grad, rtol=1e-9, atol=1e-11)


def test_rows_of_the_head_beyond_the_shared_vocabulary_are_left_alone() -> None:
    model = tiny_model("llama", seed=3).double()
    head = Head(model, vocab_size=290)
    hidden, teacher_logits = random(4, 32, seed=1), random(4, 290, seed=2)
    total, losses = fused_token_loss(
        hidden, head, head.module, forward_kl, lambda part: (teacher_logits[part],), chunk=3
    )
    total.backward()
    cut = (hidden @ head.module.weight.detach().T)[:, :290]
    torch.testing.assert_close(losses, plain_kl(cut, teacher_logits))
    gradient = head.module.weight.grad
    assert gradient.shape == (300, 32)
    assert (gradient[290:] == 0).all()
    assert (gradient[:290] != 0).any(dim=1).all()


def test_no_positions_give_a_zero_with_a_gradient_path() -> None:
    head = linear_head()
    hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    total, losses = fused_token_loss(hidden, head, head, forward_kl, teacher_rows, chunk=3)
    assert total.item() == 0.0
    assert total.requires_grad
    assert losses.shape == (0,)
    total.backward()
    assert hidden.grad.shape == (0, H)
    assert (head.weight.grad == 0).all() and (head.bias.grad == 0).all()


def test_nothing_is_differentiated_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient was taken under no_grad")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    head = linear_head()
    recorder = Recorder(head)
    hidden = random(N, H, seed=7).requires_grad_()
    with torch.no_grad():
        total, losses = fused_token_loss(
            hidden, recorder.logits, head, recorder.loss, recorder.targets, chunk=3
        )
    assert recorder.gradients == 0 and recorder.rows == [3, 3, 3, 1]
    assert not total.requires_grad and not losses.requires_grad
    torch.testing.assert_close(losses, plain_kl(head(hidden)).detach(), rtol=1e-12, atol=1e-13)


def test_nothing_is_differentiated_where_nothing_learns() -> None:
    head = linear_head().requires_grad_(False)
    recorder = Recorder(head)
    hidden = random(N, H, seed=7)
    total, _ = fused_token_loss(
        hidden, recorder.logits, head, recorder.loss, recorder.targets, chunk=3
    )
    assert recorder.gradients == 0
    assert not total.requires_grad


def test_the_losses_by_token_carry_no_gradient() -> None:
    head = linear_head()
    hidden = random(N, H, seed=7).requires_grad_()
    total, losses = fused_token_loss(hidden, head, head, forward_kl, teacher_rows, chunk=3)
    assert total.requires_grad
    assert not losses.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        losses.sum().backward()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_position_is_seen_once_and_never_more_than_a_chunk(
    chunk: int, block_rows: int
) -> None:
    head = linear_head()
    recorder = Recorder(head)
    hidden = random(N, H, seed=7).requires_grad_()
    fused_token_loss(hidden, recorder.logits, head, recorder.loss, recorder.targets, chunk)[
        0
    ].backward()
    seen = [position for part in recorder.parts for position in range(N)[part]]
    assert seen == list(range(N))
    assert max(recorder.rows) <= chunk
    assert recorder.rows == [part.stop - part.start for part in recorder.parts]
    assert sum(recorder.block_rows) == N
    assert max(recorder.block_rows) <= block_rows
    assert recorder.gradients == len(recorder.block_rows)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_no_matrix_of_all_positions_by_the_vocabulary_ever_exists(name: str) -> None:
    num_tokens, vocab_size, chunk = 60, 40, 4
    head = nn.Linear(H, vocab_size)
    teacher = TeacherTargets(random(num_tokens, H, seed=3, dtype=torch.float32), head)
    hidden = random(num_tokens, H, seed=7, dtype=torch.float32).requires_grad_()
    with NewTensors() as new:
        total, _ = fused_token_loss(
            hidden, head, head, named(name), lambda part: (teacher.logits(part),), chunk
        )
        total.backward()
    assert hidden.grad is not None
    assert max(new.largest.values()) <= max(chunk * vocab_size, num_tokens * H, vocab_size * H)


def test_a_frozen_head_costs_no_gradient_of_its_size() -> None:
    num_tokens, vocab_size, chunk = 8, 40, 2
    head = nn.Linear(H, vocab_size).requires_grad_(False)
    targets = random(num_tokens, vocab_size, seed=3, dtype=torch.float32)
    hidden = random(num_tokens, H, seed=7, dtype=torch.float32).requires_grad_()
    with NewTensors() as new:
        total, _ = fused_token_loss(
            hidden, head, head, forward_kl, lambda part: (targets[part],), chunk
        )
        total.backward()
    assert hidden.grad is not None and head.weight.grad is None
    assert max(new.largest.values()) <= max(chunk * vocab_size, num_tokens * H)
    assert chunk * vocab_size < vocab_size * H


def test_logits_in_half_precision_are_raised_block_by_block(block_rows: int) -> None:
    chunk = 8
    head = linear_head(torch.bfloat16).requires_grad_(False)
    hidden = random(N, H, seed=7, dtype=torch.bfloat16).requires_grad_()
    targets = TEACHER.bfloat16()
    with NewTensors() as new:
        fused_token_loss(hidden, head, head, forward_kl, lambda part: (targets[part],), chunk)
    assert new.largest[torch.bfloat16] == chunk * V
    assert new.largest[torch.float32] == min(block_rows, chunk) * V


def test_lora_on_a_tied_pair_leaves_the_frozen_head_alone() -> None:
    from peft import LoraConfig, get_peft_model

    ids, teacher_logits = torch.randint(300, (2, 6), generator=rng(1)), random(12, 300, seed=60)
    gradients = []
    for fuse in (True, False):
        torch.manual_seed(0)
        model = tiny_model("gemma2", seed=3, tie_word_embeddings=True).double()
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=2)
        wrapped = get_peft_model(model, lora).double()
        if fuse:
            head = Head(model)
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state.flatten(0, 1)
            fused_token_loss(
                hidden, head, head.module, forward_kl, lambda part: (teacher_logits[part],), 5
            )[0].backward()
            assert head.module.weight is model.get_input_embeddings().weight
            assert head.module.weight.grad is None
        else:
            logits = wrapped(input_ids=ids).logits.flatten(0, 1)
            plain_kl(logits, teacher_logits).sum().backward()
        gradients.append({k: v.grad for k, v in wrapped.named_parameters() if v.requires_grad})
    got, expected = gradients
    assert len(got) > 0 and got.keys() == expected.keys()
    for name in got:
        assert "lora_" in name
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-11)


def test_full_logits_may_stand_for_hidden_states() -> None:
    # What is left where a head is not known: the model's own logits, and nothing behind them.
    nothing = nn.Identity()
    logits = random(N, V, seed=7).requires_grad_()
    before = logits.detach().clone()
    teacher = TeacherTargets(TEACHER, nothing)
    total, losses = fused_token_loss(
        logits, nothing, nothing, forward_kl, lambda part: (teacher.logits(part),), chunk=3
    )
    total.backward()
    plain = before.clone().requires_grad_()
    plain_kl(plain).sum().backward()
    assert torch.equal(logits.detach(), before)
    torch.testing.assert_close(losses, plain_kl(before))
    torch.testing.assert_close(logits.grad, plain.grad, rtol=1e-12, atol=1e-13)


def _relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_half_precision_errs_no_more_than_the_plain_path(name: str) -> None:
    """Against the truth from the same rounded numbers; the plain path stays in bfloat16."""
    num_tokens, vocab_size = 200, 150
    teacher = random(num_tokens, vocab_size, seed=50, dtype=torch.bfloat16)
    results = {}
    for path in ("truth", "plain", "fused"):
        dtype = torch.float64 if path == "truth" else torch.bfloat16
        hidden = random(num_tokens, H, seed=7, dtype=torch.bfloat16).to(dtype).requires_grad_()
        head = nn.Linear(H, vocab_size, bias=False, dtype=dtype)
        with torch.no_grad():
            head.weight.copy_(random(vocab_size, H, seed=8, dtype=torch.bfloat16))
        if path == "fused":
            total, losses = fused_token_loss(
                hidden, head, head, named(name), lambda part: (teacher[part],), chunk=7
            )
        else:
            losses = plain_divergence(name, head(hidden), teacher.to(dtype))
            total = losses.sum()
        total.backward()
        results[path] = (losses.detach(), hidden.grad, head.weight.grad)
    for got, plain, truth in zip(*(results[k] for k in ("fused", "plain", "truth")), strict=True):
        error, allowed = _relative_error(got, truth), _relative_error(plain, truth)
        assert error <= allowed + torch.finfo(torch.bfloat16).eps, (error, allowed)


def test_sums_over_half_precision_chunks_are_kept_in_float32() -> None:
    num_tokens = 400
    head = linear_head(torch.bfloat16, bias=False)
    hidden = random(num_tokens, H, seed=7, dtype=torch.bfloat16).requires_grad_()
    targets = random(num_tokens, V, seed=50)
    total, losses = fused_token_loss(
        hidden, head, head, forward_kl, lambda part: (targets[part].float(),), chunk=1
    )
    total.backward()

    # The truth starts from the same rounded numbers; the naive path adds up chunks in bf16.
    exact = nn.Linear(H, V, bias=False, dtype=torch.float64)
    exact.load_state_dict({"weight": head.weight.detach().double()})
    truth = plain_kl(exact(hidden.detach().double()), targets)
    truth.sum().backward()
    naive = torch.zeros_like(head.weight)
    for i in range(num_tokens):
        part = plain_kl(head(hidden[i : i + 1].detach()).float(), targets[i : i + 1].float())
        naive += torch.autograd.grad(part.sum(), head.weight)[0]

    def error(gradient: Tensor) -> float:
        return _relative_error(gradient, exact.weight.grad)

    assert total.dtype == losses.dtype == torch.float32
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.bfloat16
    assert total.item() == pytest.approx(truth.sum().item(), rel=1e-3)
    assert error(head.weight.grad) < torch.finfo(torch.bfloat16).eps
    assert error(head.weight.grad) < error(naive) / 3, (error(head.weight.grad), error(naive))


def test_half_precision_gradients_are_rounded_after_scaling() -> None:
    head = linear_head(torch.bfloat16, bias=False)
    targets = random(400, V, seed=50, dtype=torch.float32)
    gradients = []
    for factor in (1.0, 1 / 3):
        hidden = random(400, H, seed=7, dtype=torch.bfloat16).requires_grad_()
        total, _ = fused_token_loss(
            hidden, head, head, forward_kl, lambda part: (targets[part],), chunk=50
        )
        (factor * total).backward()
        gradients.append(hidden.grad.double())
    whole, third = gradients
    scale = float((third * whole).sum() / whole.square().sum())
    assert scale == pytest.approx(1 / 3, rel=3e-4)


def test_autocast_keeps_the_gradient_of_float32_parameters() -> None:
    # As in a bf16 run: fp32 weights, products in bf16. Chunks must not lose the weight's gradient to
    # autocast's cache of cast weights.
    head, hidden = linear_head(torch.float32), random(N, H, seed=7, dtype=torch.float32)
    hidden.requires_grad_()
    targets = TEACHER.float()
    gradients = []
    for chunk in (3, N):
        head.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, losses = fused_token_loss(
                hidden, head, head, forward_kl, lambda part: (targets[part],), chunk
            )
        total.backward()
        assert losses.dtype == torch.float32
        gradients.append(head.weight.grad.clone())
    exact = torch.autograd.grad(plain_kl(head(hidden), targets).sum(), head.weight)[0]
    scale = exact.abs().max()
    for gradient in gradients:
        assert gradient.dtype == torch.float32
        assert (gradient - exact).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * scale


def test_teacher_targets_give_logits_without_a_graph() -> None:
    head = linear_head()
    targets = TeacherTargets(random(N, H, seed=3).requires_grad_(), head)
    logits = targets.logits(slice(2, 5))
    assert not logits.requires_grad
    torch.testing.assert_close(logits, head(targets.hidden)[2:5].detach())


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(512, 65_536), (256_000, 131), (2**25, 1), (2**26, 1)]
)
def test_chunks_bound_the_logits_that_exist_at_one_time(vocab_size: int, expected: int) -> None:
    assert chunk_size(vocab_size) == expected
