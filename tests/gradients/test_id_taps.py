"""An embedding's x is its ids: the same gradients as one-hot rows give, and nothing read beyond the table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterPart,
    AdapterSpec,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
)
from cola_runtime.adapters.adapter import initial_weights, site_adapters
from cola_runtime.encodings import Compression, Encoding
from cola_runtime.errors import ProtocolError
from cola_runtime.gradients.accumulate import GradientAccumulator
from cola_runtime.gradients.compression import Int8Blocks, TapCompressor
from cola_runtime.gradients.planner import Workload, group_effort
from cola_runtime.gradients.taps import activation_tensors, product_tensors, used_rows
from cola_runtime.types import Lease, Site, SiteKind, TensorKey, TensorKind

WORDS, OUTPUTS, PADDING = 11, 5, 2
EMBEDDING = Site(
    index=0,
    name="embedding",
    kind=SiteKind.EMBEDDING,
    in_features=WORDS,
    out_features=OUTPUTS,
    input_group=0,
    padding_index=PADDING,
)
DENSE = replace(EMBEDDING, kind=SiteKind.LINEAR, padding_index=None)
IDS = torch.tensor([[3], [0], [PADDING], [10], [3], [7]])
KINDS: list[AdapterKind] = [
    LoraKind(rank=3, alpha=4.0),
    LinearKind(bias=True, scaling=0.5),
    LinearizedLoraKind(rank=2),
]
INPUT, GRADIENT = TensorKey(0, TensorKind.INPUT), TensorKey(0, TensorKind.OUTPUT_GRADIENT)
OVER_IDS = (TensorKind.GRAD_LORA_A, TensorKind.GRAD_DELTA_A, TensorKind.GRAD_WEIGHT)


def spec_at(site: Site, kind: AdapterKind) -> AdapterSpec:
    return AdapterSpec(parts=(AdapterPart(kind=kind, sites=(site,)),), seed=1, dtype="float64")


def drawn_weights(kind: AdapterKind, seed: int) -> dict[TensorKey, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = initial_weights(spec_at(EMBEDDING, kind))
    return {key: torch.randn(w.shape, generator=draw, dtype=torch.float64) for key, w in shapes.items()}


def drawn_gradient() -> Tensor:
    grad_NO = torch.randn(len(IDS), OUTPUTS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    grad_NO[4] = 0.0
    return grad_NO


def rows_at(site: Site) -> Tensor:
    return IDS if site.takes_ids else one_hot(IDS[:, 0], WORDS).double()


def without_padding(gradients: dict[TensorKey, Tensor]) -> dict[TensorKey, Tensor]:
    """As nn.Embedding has it: the padding's own numbers get no gradient."""
    copies = {key: gradient.clone() for key, gradient in gradients.items()}
    for key, gradient in copies.items():
        if key.kind in OVER_IDS:
            gradient[:, PADDING] = 0.0
    return copies


def used(x: Tensor, grads: dict[int, Tensor]) -> dict[TensorKey, Tensor]:
    """The tap of one segment with these rows."""
    (rows,) = used_rows([grad[None] for grad in grads.values()])
    return activation_tensors(x, grads, rows)


@pytest.mark.parametrize("encoding", ["activations", "weight_gradient"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_ids_give_the_gradients_of_one_hot_rows(kind: AdapterKind, encoding: str) -> None:
    weights, found = drawn_weights(kind, 0), []
    for site in (EMBEDDING, DENSE):
        x, grads = rows_at(site), {0: drawn_gradient()}
        made = used(x, grads) if encoding == "activations" else product_tensors(x, grads, site, torch.float64)
        accumulator = GradientAccumulator(spec_at(site, kind))
        for key, tensor in made.items():
            accumulator.add(key, tensor, weights)
        found.append(accumulator.gradients())
    dense = without_padding(found[1])
    assert found[0].keys() == dense.keys()
    for key, gradient in dense.items():
        torch.testing.assert_close(found[0][key], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_inner_steps_keep_ids_and_train_the_same_surrogate(kind: AdapterKind) -> None:
    start, moved, found = drawn_weights(kind, 0), drawn_weights(kind, 1), []
    for site in (EMBEDDING, DENSE):
        accumulator = GradientAccumulator(spec_at(site, kind), keep_taps=True)
        for key, tensor in used(rows_at(site), {0: drawn_gradient()}).items():
            accumulator.add(key, tensor, start)
        found.append(accumulator.surrogate_gradients(moved, start))
    for key, gradient in without_padding(found[1]).items():
        torch.testing.assert_close(found[0][key], gradient, rtol=1e-12, atol=1e-12)


def test_an_embeddings_forward_is_that_of_one_hot_rows() -> None:
    for kind in KINDS:
        weights = drawn_weights(kind, 0)
        found = [
            site_adapters(spec_at(site, kind))[0].forward(rows_at(site), weights)
            for site in (EMBEDDING, DENSE)
        ]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (torch.tensor([[0], [WORDS]], dtype=torch.int32), "ids below 11"),
        (torch.tensor([[0], [-1]], dtype=torch.int32), "ids below 11"),
        (torch.tensor([[0.0], [1.0]]), "ids in int32"),
        (torch.tensor([[0], [1]]), "ids in int32"),
        (torch.tensor([[0, 1]], dtype=torch.int32), "shape"),
        (torch.tensor(3, dtype=torch.int32), "shape"),
    ],
)
def test_what_is_no_id_of_the_table_is_refused_and_changes_nothing(ids: Tensor, why: str) -> None:
    kind = LinearKind()
    accumulator = GradientAccumulator(spec_at(EMBEDDING, kind))
    with pytest.raises(ProtocolError, match=why) as caught:
        accumulator.add(INPUT, ids, drawn_weights(kind, 0))
    assert caught.value.reason == "TENSOR_INVALID"
    assert accumulator.complete


def test_ids_must_be_as_many_as_the_gradients_rows() -> None:
    accumulator = GradientAccumulator(spec_at(EMBEDDING, LinearKind()))
    accumulator.add(GRADIENT, drawn_gradient(), {})
    with pytest.raises(ProtocolError, match="shape"):
        accumulator.add(INPUT, IDS[:2].int(), {})


@pytest.mark.parametrize("compression", [Compression.BFLOAT16, Compression.INT8])
def test_compression_leaves_ids_alone(compression: Compression) -> None:
    tensors = used(IDS, {0: drawn_gradient()})
    lease = Lease(job_id="job-1", epoch=1, device_id="device")
    sent = TapCompressor().compress(lease, compression, tensors)
    assert torch.equal(sent[INPUT], tensors[INPUT])
    assert sent[INPUT].dtype is torch.int32
    assert isinstance(sent[GRADIENT], Int8Blocks) or sent[GRADIENT].dtype is torch.bfloat16


def test_a_tap_at_an_embedding_is_planned_as_an_id_and_a_gradient_a_token() -> None:
    workload = Workload(tokens=100, microbatches=2, base_dtype="bfloat16")
    efforts = {
        encoding: group_effort(
            [(LoraKind(rank=3), [EMBEDDING])],
            workload,
            encoding,
            dtype="float32",
            compression=Compression.NONE,
        )
        for encoding in Encoding
    }
    assert efforts[Encoding.ACTIVATIONS].bytes_up == 2 * 100 * (4 + 2 * OUTPUTS)
    assert efforts[Encoding.ADAPTER_GRADIENT].bytes_up == 2 * 4 * 3 * (WORDS + OUTPUTS)
    assert efforts[Encoding.ADAPTER_GRADIENT].base_flops == 2 * 2 * 100 * 3 * (1 + OUTPUTS)
    assert efforts[Encoding.WEIGHT_GRADIENT].bytes_up == 2 * 2 * OUTPUTS * (WORDS + 1)  # no scaling in it


def test_a_convolutions_taps_are_planned_by_its_own_positions() -> None:
    site = replace(DENSE, kind=SiteKind.CONV2D, positions=36)
    workload = Workload(tokens=34, rows=2, microbatches=1, base_dtype="float32")
    effort = group_effort(
        [(LinearKind(), [site])],
        workload,
        Encoding.ACTIVATIONS,
        dtype="float32",
        compression=Compression.NONE,
    )
    assert effort.bytes_up == 2 * 36 * 4 * (WORDS + OUTPUTS)
