"""A mixed batch's taps give every tenant the gradient that peft's autograd gives it alone."""

from __future__ import annotations

import pytest

from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.testing.peft_reference import relative_difference
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import (
    four_tenants,
    gradients_of,
    install_all,
    peft_gradients,
    run_segments,
)

# transformers' RMSNorm computes in float32 whatever the model's dtype.
TOLERANCES = {
    ("gpt2", "float64"): 1e-10,
    ("llama", "float64"): 1e-6,
    ("gpt2", "float32"): 1e-5,
    ("llama", "float32"): 1e-5,
}


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize(("kind", "dtype"), list(TOLERANCES))
def test_every_tenant_gets_the_gradient_and_loss_it_gets_alone(
    tiny_folder: TinyFolder, kind: str, dtype: str, encoding: Encoding
) -> None:
    path = tiny_folder(kind, dtype)
    model = TappedModel.load(path, dtype=dtype, attention="sdpa", threads=1)
    tenants = four_tenants(model.sites, dtype)
    install_all(model, tenants)
    # Both encodings in one batch: the last tenant always differs from the others.
    encodings = [encoding] * 4 + [next(other for other in Encoding if other is not encoding)]
    segments = [member.segment(choice) for member, choice in zip(tenants, encodings, strict=True)]
    result, taps = run_segments(model, segments)
    for position, member in enumerate(tenants):
        reference, loss = peft_gradients(path, member, dtype)
        worst = max(relative_difference(gradients_of(taps, position, member), reference).values())
        assert worst < TOLERANCES[kind, dtype], (position, worst)
        outcome = result.losses[position]
        assert outcome.loss_sum / outcome.weight_sum == pytest.approx(loss, rel=TOLERANCES[kind, dtype])
