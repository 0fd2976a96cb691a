"""Chunked token losses equal the plain ones, and never hold all positions by the whole vocabulary.

The reference is `token_loss(head(hidden)).sum()` under plain autograd, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from axolotl_skd.losses import fused
from axolotl_skd.losses.divergences import cross_entropy, forward_kl
from axolotl_skd.losses.fused import TeacherTargets, chunk_size, fused_token_loss
from axolotl_skd.rollout.lm import Head
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


def kl_to_random_teacher(num_tokens: int = N, vocab_size: int = V) -> fused.TokenLoss:
    teacher_logits = random(num_tokens, vocab_size, seed=50)
    return lambda logits, part: forward_kl(logits, teacher_logits[part])


@dataclass
class Recorder:
    """A token loss and a head around others that note what they are given."""

    head: Callable[[Tensor], Tensor]
    token_loss: fused.TokenLoss
    parts: list[slice] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    with_gradient: list[bool] = field(default_factory=list)

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return self.head(hidden)

    def losses(self, logits: Tensor, part: slice) -> Tensor:
        self.parts.append(part)
        self.with_gradient.append(torch.is_grad_enabled() or logits.requires_grad)
        return self.token_loss(logits, part)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("grad_output", [1.0, -2.5])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("loss", ["forward_kl", "cross_entropy"])
def test_values_and_gradients_are_the_unchunked_ones(
    loss: str, chunk: int, grad_output: float
) -> None:
    tokens = torch.randint(V, (N,), generator=rng(9))
    token_loss = {
        "forward_kl": kl_to_random_teacher(),
        "cross_entropy": lambda logits, part: cross_entropy(logits, tokens[part]),
    }[loss]
    head, plain_head = linear_head(), linear_head()
    hidden = random(N, H, seed=7).requires_grad_()
    plain_hidden = hidden.detach().clone().requires_grad_()

    total, losses = fused_token_loss(hidden, head, head, token_loss, chunk)
    (grad_output * total).backward()
    plain_losses = token_loss(plain_head(plain_hidden), slice(None))
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
    token_loss = kl_to_random_teacher()
    inputs, plain_inputs = (random(N, H, seed=8).requires_grad_() for _ in range(2))
    for _ in range(2):
        total, _ = fused_token_loss(inputs.tanh(), head, head, token_loss, chunk=4)
        (total / 3 + inputs.square().sum()).backward()
        plain = token_loss(plain_head(plain_inputs.tanh()), slice(None)).sum()
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
    token_loss = kl_to_random_teacher()
    fused_token_loss(hidden, head, head, token_loss, chunk=3)[0].backward()
    token_loss(plain_head(plain_hidden), slice(None)).sum().backward()

    torch.testing.assert_close(hidden.grad, plain_hidden.grad, rtol=1e-12, atol=1e-13)
    for name in ("weight", "bias"):
        got, expected = getattr(head, name).grad, getattr(plain_head, name).grad
        if name in frozen:
            assert got is None
        else:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_a_frozen_body_still_trains_the_head() -> None:
    head, plain_head = linear_head(), linear_head()
    hidden, token_loss = random(N, H, seed=7), kl_to_random_teacher()
    fused_token_loss(hidden, head, head, token_loss, chunk=3)[0].backward()
    token_loss(plain_head(hidden), slice(None)).sum().backward()
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
        hidden, head, head.module, lambda got, part: forward_kl(got, teacher_logits[part]), chunk=5
    )
    total.backward()
    plain_losses = forward_kl(plain(input_ids=ids).logits.flatten(0, 1), teacher_logits)
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
        hidden, head, head.module, lambda got, part: forward_kl(got, teacher_logits[part]), chunk=3
    )
    total.backward()
    cut = (hidden @ head.module.weight.detach().T)[:, :290]
    torch.testing.assert_close(losses, forward_kl(cut, teacher_logits))
    gradient = head.module.weight.grad
    assert gradient.shape == (300, 32)
    assert (gradient[290:] == 0).all()
    assert (gradient[:290] != 0).any(dim=1).all()


def test_no_positions_give_a_zero_with_a_gradient_path() -> None:
    head = linear_head()
    hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    total, losses = fused_token_loss(hidden, head, head, kl_to_random_teacher(), chunk=3)
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
    recorder = Recorder(head, kl_to_random_teacher())
    hidden = random(N, H, seed=7).requires_grad_()
    with torch.no_grad():
        total, losses = fused_token_loss(hidden, recorder.logits, head, recorder.losses, chunk=3)
    assert recorder.with_gradient == [False] * 4
    assert not total.requires_grad and not losses.requires_grad
    plain = kl_to_random_teacher()(head(hidden), slice(None)).detach()
    torch.testing.assert_close(losses, plain, rtol=1e-12, atol=1e-13)


def test_the_losses_by_token_carry_no_gradient() -> None:
    head = linear_head()
    hidden = random(N, H, seed=7).requires_grad_()
    total, losses = fused_token_loss(hidden, head, head, kl_to_random_teacher(), chunk=3)
    assert total.requires_grad
    assert not losses.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        losses.sum().backward()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_position_is_seen_once_and_never_more_than_a_chunk(chunk: int) -> None:
    head = linear_head()
    recorder = Recorder(head, kl_to_random_teacher())
    hidden = random(N, H, seed=7).requires_grad_()
    fused_token_loss(hidden, recorder.logits, head, recorder.losses, chunk)[0].backward()
    seen = [position for part in recorder.parts for position in range(N)[part]]
    assert seen == list(range(N))
    assert max(recorder.rows) <= chunk
    assert recorder.rows == [part.stop - part.start for part in recorder.parts]


def test_no_matrix_of_all_positions_by_the_vocabulary_ever_exists() -> None:
    num_tokens, vocab_size, chunk = 60, 40, 4
    head = nn.Linear(H, vocab_size)
    teacher = TeacherTargets(random(num_tokens, H, seed=3, dtype=torch.float32), head)
    hidden = random(num_tokens, H, seed=7, dtype=torch.float32).requires_grad_()
    with LargestTensor() as largest:
        total, _ = fused_token_loss(
            hidden,
            head,
            head,
            lambda logits, part: forward_kl(logits, teacher.logits(part)),
            chunk,
        )
        total.backward()
    assert hidden.grad is not None
    assert largest.elements <= max(chunk * vocab_size, num_tokens * H, vocab_size * H)


def test_sums_over_half_precision_chunks_are_kept_in_float32() -> None:
    num_tokens = 400
    head = linear_head(torch.bfloat16, bias=False)
    hidden = random(num_tokens, H, seed=7, dtype=torch.bfloat16).requires_grad_()
    targets = random(num_tokens, V, seed=50)
    total, losses = fused_token_loss(
        hidden, head, head, lambda got, part: forward_kl(got, targets[part].float()), chunk=1
    )
    total.backward()

    # The truth starts from the same rounded numbers; the naive path adds up chunks in bf16.
    exact = nn.Linear(H, V, bias=False, dtype=torch.float64)
    exact.load_state_dict({"weight": head.weight.detach().double()})
    exact_hidden = hidden.detach().double().requires_grad_()
    truth = forward_kl(exact(exact_hidden), targets)
    truth.sum().backward()
    naive = torch.zeros_like(head.weight)
    for i in range(num_tokens):
        part = forward_kl(head(hidden[i : i + 1].detach()), targets[i : i + 1].float())
        naive += torch.autograd.grad(part.sum(), head.weight)[0]

    def error(gradient: Tensor) -> float:
        difference = gradient.double() - exact.weight.grad
        return float(difference.norm() / exact.weight.grad.norm())

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
            hidden, head, head, lambda got, part: forward_kl(got, targets[part]), chunk=50
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
    targets = random(N, V, seed=50, dtype=torch.float32)

    def loss(logits: Tensor, part: slice) -> Tensor:
        return forward_kl(logits, targets[part])

    gradients = []
    for chunk in (3, N):
        head.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, losses = fused_token_loss(hidden, head, head, loss, chunk)
        total.backward()
        assert losses.dtype == torch.float32
        gradients.append(head.weight.grad.clone())
    exact = torch.autograd.grad(loss(head(hidden), slice(None)).sum(), head.weight)[0]
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
