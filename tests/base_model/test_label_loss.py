"""The chunked loss equals torch's cross-entropy and its autograd, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cola_runtime.base_model import loss as loss_module
from cola_runtime.base_model.frozen_products import PlainProduct
from cola_runtime.base_model.loss import VocabularyProjection, label_loss, segment_loss_sums
from cola_runtime.base_model.segments import Labels
from cola_runtime.base_model.workspace import Workspace

N, D, V, K = 40, 12, 30, 23


def sample(dtype: torch.dtype) -> tuple[Tensor, VocabularyProjection, Labels]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weights_K = torch.rand(K, generator=generator, dtype=torch.float64) + 0.1
    labels = Labels(
        positions_K=torch.randperm(N, generator=generator)[:K].sort().values,
        targets_K=torch.randint(0, V, (K,), generator=generator),
        weights_K=weights_K,
        scales_K=weights_K / 3.0,
        counts=(10, 0, 13),
    )
    hidden_ND, weight_VD, bias_V = draw(N, D), draw(V, D), draw(V)
    product = PlainProduct(weight_VD, bias_V, [V])
    return hidden_ND, VocabularyProjection(weight_VD, bias_V, product), labels


def reference(hidden_ND: Tensor, head: VocabularyProjection, labels: Labels) -> tuple[Tensor, Tensor]:
    hidden_ND = hidden_ND.detach().requires_grad_(True)
    logits = functional.linear(hidden_ND[labels.positions_K], head.weight_VD, head.bias_V)
    losses_K = functional.cross_entropy(
        logits.float() if logits.dtype.itemsize < 4 else logits, labels.targets_K, reduction="none"
    )
    (grad_ND,) = torch.autograd.grad((losses_K * labels.scales_K.to(losses_K.dtype)).sum(), hidden_ND)
    return losses_K.detach(), grad_ND


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
def test_losses_and_gradient_equal_autograd_across_chunks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LABELS", 7)
    monkeypatch.setattr(loss_module, "BLOCK_LABELS", 3)
    hidden_ND, head, labels = sample(dtype)
    losses_K, grad_ND = label_loss(hidden_ND, head, labels, Workspace(), train=True)
    expected_K, expected_ND = reference(hidden_ND, head, labels)
    assert grad_ND is not None
    assert losses_K.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (losses_K - expected_K).norm() <= tolerance * expected_K.norm()
    assert (grad_ND - expected_ND).norm() <= tolerance * expected_ND.norm()


def test_unlabelled_positions_get_exactly_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_ND, head, labels = sample(torch.float32)
    space = Workspace()
    label_loss(torch.full_like(hidden_ND, torch.nan), head, labels, space, train=True)
    _, grad_ND = label_loss(hidden_ND, head, labels, space, train=True)
    assert grad_ND is not None
    silent = torch.ones(N, dtype=torch.bool)
    silent[labels.positions_K] = False
    assert not grad_ND[silent].any()


def test_a_target_whose_probability_underflows_keeps_its_loss() -> None:
    hidden_ND, head, labels = sample(torch.float32)
    losses_K, _ = label_loss(hidden_ND * 60, head, labels, Workspace(), train=False)
    expected_K, _ = reference(hidden_ND * 60, head, labels)
    assert expected_K.max() > 104  # exp(-104) is 0 in float32
    torch.testing.assert_close(losses_K, expected_K, rtol=1e-5, atol=1e-5)


def test_loss_sums_stay_within_each_segments_slice() -> None:
    _, _, labels = sample(torch.float32)
    losses_K = torch.arange(K, dtype=torch.float32)
    losses_K[3] = torch.nan
    sums = segment_loss_sums(losses_K, labels)
    weights_K = labels.weights_K
    assert sums[0][0] != sums[0][0]
    assert sums[1] == (0.0, 0.0)
    assert sums[2][0] == pytest.approx(float((losses_K[10:].double() * weights_K[10:]).sum()))
    assert sums[2][1] == pytest.approx(float(weights_K[10:].sum()))
