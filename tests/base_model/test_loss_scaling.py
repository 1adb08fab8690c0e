"""Loss scaling beside a float16 base: exact where nothing is lost, job by job, repeated on overflow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cola_runtime.base_model.loss_scales import GROWTH_INTERVAL, LossScales
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.errors import InvalidInput
from cola_runtime.gradients.taps import Tap
from cola_runtime.testing.architectures import save_encoder_decoder
from cola_runtime.types import BaseStep, Lease, LossScaling, Membership, Segment
from tests.base_model.conftest import TinyFolder
from tests.base_model.kind_samples import mixed_kinds
from tests.base_model.merged_samples import SUM
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    four_tenants,
    gradients_of,
    install_all,
    run_segments,
)
from tests.base_model.test_activation_checkpointing import fitting

DYNAMIC = LossScaling(scale=2.0**16, dynamic=True)
TINY_SHARE = 2e5  # of rows: each gradient is that much smaller than alone, far below what float16 holds


def loaded(tiny_folder: TinyFolder, kind: str, dtype: str) -> TappedModel:
    return TappedModel.load(tiny_folder(kind, "float16"), dtype=dtype, attention="eager")


def scaled(segment: Segment, scaling: LossScaling, *, denominator: float | None = None) -> Segment:
    return replace(segment, loss_scaling=scaling, loss_denominator=denominator or segment.loss_denominator)


def same(found: list[Tap], expected: list[Tap]) -> bool:
    return [(tap.segment, list(tap.tensors)) for tap in found] == [
        (tap.segment, list(tap.tensors)) for tap in expected
    ] and all(
        torch.equal(mine.tensors[key], tensor)
        for mine, theirs in zip(found, expected, strict=True)
        for key, tensor in theirs.tensors.items()
    )


def of_segment(taps: list[Tap], position: int) -> list[Tap]:
    return [tap for tap in taps if tap.segment == position]


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_power_of_two_leaves_no_trace_where_the_base_has_room(
    tiny_folder: TinyFolder, kind: str, encoding: Encoding
) -> None:
    """In float32, every kind in one batch, a head too: bit for bit the taps without scaling."""
    model = loaded(tiny_folder, kind, "float32")
    members, encodings = mixed_kinds(model.sites, encoding, "float32")
    members = [fitting(model, member) for member in members]
    install_all(model, members)
    plain = [member.segment(each) for member, each in zip(members, encodings, strict=True)]
    scales = [LossScaling(), DYNAMIC, LossScaling(scale=2.0**10)]
    mixed = [scaled(segment, scales[number % 3]) for number, segment in enumerate(plain)]
    (_, expected), (_, found) = run_segments(model, plain), run_segments(model, mixed)
    for position in range(len(members)):
        assert same(of_segment(found, position), of_segment(expected, position))


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_saves_the_gradients_that_float16_would_lose(
    tiny_folder: TinyFolder, kind: str, encoding: Encoding
) -> None:
    half, wide = (loaded(tiny_folder, kind, dtype) for dtype in ("float16", "float32"))
    members = four_tenants(half.sites, "float32")

    def gradients(model: TappedModel, scaling: LossScaling) -> list[Weights]:
        install_all(model, members)
        segments = [scaled(m.segment(encoding), scaling, denominator=TINY_SHARE) for m in members]
        _, taps = run_segments(model, segments)
        return [gradients_of(taps, position, member) for position, member in enumerate(members)]

    exact = gradients(wide, LossScaling())
    for member, lost, saved in zip(
        exact, gradients(half, LossScaling()), gradients(half, DYNAMIC), strict=True
    ):
        assert _distance(lost, member) > 0.1
        assert _distance(saved, member) < 0.01


def _distance(found: Weights, exact: Weights) -> float:
    return float(
        torch.stack([(found[key].double() - exact[key].double()).norm() for key in exact]).norm()
        / torch.stack([grad.double().norm() for grad in exact.values()]).norm()
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_overflow_is_computed_again_and_touches_no_neighbour(
    tiny_folder: TinyFolder, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Segment 1 overflows; its neighbours' taps stay bit for bit what they are beside a tame one."""
    members = four_tenants(loaded(tiny_folder, kind, "float16").sites, "float32")
    steep = LossScaling(scale=2.0**24, dynamic=True)

    def run(second: LossScaling) -> list[Tap]:
        model = loaded(tiny_folder, kind, "float16")
        install_all(model, members)
        scalings = [DYNAMIC, second, DYNAMIC, LossScaling(scale=128.0), LossScaling()]
        # Sums of losses, not means: with 2^16 of them, 2^24 is too much.
        segments = [scaled(m.segment(), s, denominator=1.0) for m, s in zip(members, scalings, strict=True)]
        segments[0] = scaled(segments[0], DYNAMIC, denominator=float(TINY_SHARE))
        segments[2] = scaled(segments[2], DYNAMIC, denominator=float(TINY_SHARE))
        return run_segments(model, segments)[1]

    tame = run(LossScaling(scale=1.0, dynamic=True))
    caplog.set_level("INFO")
    found = run(steep)
    lowered = [record.job_id for record in caplog.records if record.event == "loss_scale.lowered"]
    assert lowered and set(lowered) == {"job-1"}
    for position in (0, 2, 3, 4):
        assert same(of_segment(found, position), of_segment(tame, position))
    mine = [key for tap in of_segment(found, 1) for key in tap.tensors]
    assert sorted(map(str, mine)) == sorted(map(str, (k for tap in of_segment(tame, 1) for k in tap.tensors)))
    assert all(bool(t.isfinite().all()) for tap in found for t in tap.tensors.values())
    assert _distance(gradients_of(found, 1, members[1]), gradients_of(tame, 1, members[1])) < 0.01


def test_what_no_scale_can_mend_is_handed_on_as_it_is(tiny_folder: TinyFolder) -> None:
    """A gradient above float16's largest number at the lowest scale, and a loss that is not finite itself."""
    model = loaded(tiny_folder, "gpt2", "float16")
    members = four_tenants(model.sites, "float32")[:2]
    members[1] = replace(
        members[1], weights={key: torch.full_like(w, torch.nan) for key, w in members[1].weights.items()}
    )
    install_all(model, members)
    too_large = LossScaling(scale=8.0, dynamic=True)
    segments = [scaled(m.segment(), too_large, denominator=1e-9) for m in members]
    result, taps = run_segments(model, segments)
    for position in (0, 1):
        keys = [key for tap in of_segment(taps, position) for key in tap.tensors]
        assert len(keys) == len(set(keys)) == 2 * len(members[position].spec.sites)
        tensors = [t for tap in of_segment(taps, position) for t in tap.tensors.values()]
        assert not all(bool(tensor.isfinite().all()) for tensor in tensors)
    padded = max(len(row.tokens) for member in members for row in member.rows)
    alone = max(len(row.tokens) for row in members[0].rows) * len(members[0].rows)
    rows = sum(len(member.rows) for member in members)
    assert result.computed_tokens == rows * padded + 3 * alone  # 8, then the first alone at 4, 2 and 1


def segment_of(job_id: str, *, epoch: int = 1, last: bool = True, scaling: LossScaling = DYNAMIC) -> Segment:
    lease = Lease(job_id=job_id, epoch=epoch, device_id="device")
    return Segment(
        lease=lease, version=0, rows=(), loss_denominator=1.0, last_microbatch=last, loss_scaling=scaling
    )


def test_a_scale_moves_as_gradscalers_does() -> None:
    """Up after 2000 steps in a row, down at once; microbatches that end no step do not count."""
    ours, theirs = LossScales(), torch.amp.GradScaler(device="cpu")
    theirs._lazy_init_scale_growth_tracker(torch.device("cpu"))
    segment = segment_of("job-a")
    overflows = {0, 1, 500, 2600, 2601}
    for step in range(2 * GROWTH_INTERVAL + 700):
        if step in overflows:
            ours.lower(segment)
        else:
            ours.stepped(replace(segment, last_microbatch=False))
            ours.stepped(segment)
        found_inf = torch.tensor(float(step in overflows))
        torch._amp_update_scale_(theirs._scale, theirs._growth_tracker, found_inf, 2.0, 0.5, GROWTH_INTERVAL)
        assert ours.of(segment) == float(theirs._scale)


def test_a_scale_belongs_to_one_lease_of_one_job() -> None:
    scales = LossScales()
    assert scales.lower(segment_of("job-a"))
    assert scales.of(segment_of("job-a")) == 2.0**15
    assert scales.of(segment_of("job-b")) == 2.0**16
    assert scales.of(segment_of("job-a", epoch=2)) == 2.0**16
    fixed = segment_of("job-c", scaling=LossScaling(scale=64.0))
    assert not scales.lower(fixed) and scales.of(fixed) == 64.0


def test_a_float16_base_merges_nothing_and_t5_is_not_served_in_it(tiny_folder: TinyFolder, tmp_path) -> None:
    model = loaded(tiny_folder, "llama", "float16")
    (member, *_) = four_tenants(model.sites, "float32")
    with pytest.raises(InvalidInput) as caught:
        model.install(member.lease, member.spec, 0, member.weights, membership=Membership(gang=SUM))
    assert caught.value.reason == "MERGED_DTYPE"
    with pytest.raises(InvalidInput) as caught:
        TappedModel.load(save_encoder_decoder("t5", tmp_path, dtype="float32"), dtype="float16")
    assert (caught.value.reason, caught.value.where) == ("BASE_MODEL_UNSUPPORTED", "base_models.dtype")


def test_forward_only_steps_have_no_scale(tiny_folder: TinyFolder) -> None:
    model = loaded(tiny_folder, "llama", "float16")
    members: list[Tenant] = four_tenants(model.sites, "float32")[:1]
    install_all(model, members)
    segment = scaled(members[0].segment(), LossScaling(scale=2.0**24, dynamic=True))
    taps: list[Tap] = []
    result = model.run(BaseStep(number=1, segments=(segment,), train=False), taps.append)
    assert result.losses[0].reason is None and not taps
