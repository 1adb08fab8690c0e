"""Adapters at convolutions of every geometry, mixed in one batch, against torch's own convolutions."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cola_runtime.adapter_spec import AdapterKind, AdapterPart, LinearKind, LoraKind
from cola_runtime.adapters.patches import folded, patches
from cola_runtime.adapters.site_kinds import unfit
from cola_runtime.adapters.site_modules import module_patch, module_site, site_kind
from cola_runtime.base_model.bank import AdapterBank
from cola_runtime.base_model.merge import MergedWeights
from cola_runtime.base_model.segments import Member, mixed_batch
from cola_runtime.base_model.site_groups import site_group
from cola_runtime.base_model.stacks.cohorts import GroupPlaces, group_stacks
from cola_runtime.base_model.tap_carrier import DirectCarrier, TapOutlet
from cola_runtime.base_model.tapped import TappedModules
from cola_runtime.base_model.workspace import Workspace
from cola_runtime.encodings import Encoding
from cola_runtime.errors import InvalidInput
from cola_runtime.gradients.taps import Tap
from cola_runtime.testing.ordinary_modules import add_adapter
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.types import Gang, Membership, Site
from tests.base_model.kind_samples import KINDS, NONLINEAR, tenant
from tests.base_model.mixed_samples import Tenant, Weights, gradients_of

CHANNELS = 4
CONVOLUTIONS: dict[str, nn.Conv2d] = {
    "patches": nn.Conv2d(CHANNELS, 6, 4, stride=4),
    "strided": nn.Conv2d(CHANNELS, 6, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(CHANNELS, 6, 3, padding=2, dilation=2, bias=False),
    "pointwise": nn.Conv2d(CHANNELS, 6, 1, stride=2),
    "oblong": nn.Conv2d(CHANNELS, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "same": nn.Conv2d(CHANNELS, 6, (2, 4), padding="same"),  # one zero more on the right and below
    "grouped": nn.Conv2d(CHANNELS, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(CHANNELS, 8, 3, stride=2, padding=1, groups=4),
}
TENANTS: dict[str, AdapterKind] = {**KINDS, "lora": LoraKind(rank=4, alpha=6.0)}
HEIGHT, WIDTH = 9, 8
BOUND = 1e-10


class Net(nn.Module):
    """The convolution behind another one, so that its dx is seen in the first one's gradients."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.second = copy.deepcopy(convolution)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))


def sites_of(net: Net) -> tuple[Site, ...]:
    return tuple(
        module_site(module, index=k, name=name, input_group=k)
        for k, (name, module) in enumerate((("first", net.first), ("second", net.second)))
    )


def members_at(sites: tuple[Site, ...]) -> dict[str, Tenant]:
    """A tenant per kind, at each of the sites that it can be at; 1 or 2 images each."""
    found = {}
    for number, (name, kind) in enumerate(TENANTS.items()):
        fitting = tuple(site for site in sites if unfit(kind, site) is None)
        found[name] = tenant(number, (AdapterPart(kind=kind, sites=fitting),), "float64")
    return found


def images_of(member: Tenant) -> Tensor:
    draw = torch.Generator().manual_seed(100 + member.spec.seed)
    return torch.randn(len(member.rows), 3, HEIGHT, WIDTH, generator=draw, dtype=torch.float64)


def coefficients(output: Tensor) -> Tensor:
    """The loss is their product with the output, the same for every row."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(output.shape[1:], generator=draw, dtype=torch.float64).expand(output.shape)


def expected_gradients(net: Net, member: Tenant) -> Weights:
    alone = copy.deepcopy(net)
    parameters = add_adapter(alone, member.spec, member.weights)
    output = alone(images_of(member))
    output.backward(coefficients(output))
    return {key.gradient: parameter.grad for key, parameter in parameters.items()}


def mixed_taps(
    net: Net, sites: tuple[Site, ...], members: list[Tenant], encodings: list[Encoding]
) -> list[Tap]:
    tapped_net = copy.deepcopy(net)
    groups = [site_group([site], [tapped_net.get_submodule(site.name)]) for site in sites]
    modules, bank = TappedModules(groups), AdapterBank(sites, torch.float64)
    for member in members:
        bank.install(member.lease, member.spec, 0, member.weights)
    segments = [member.segment(e) for member, e in zip(members, encodings, strict=True)]
    batch = mixed_batch(
        [
            Member(position=position, segment=segment, adapter=bank.adapter(segment.lease.job_id))
            for position, segment in enumerate(segments)
        ]
    )
    taps: list[Tap] = []
    places = GroupPlaces(positions={site.index: 0 for site in sites}, source_groups=frozenset())
    stacks = group_stacks(batch.cohorts, places, Workspace(), TapOutlet(taps.append, DirectCarrier()))
    x_BCHW = torch.cat([images_of(members[placed.position]) for placed in batch.members])
    with modules.active(stacks, rows=len(x_BCHW), training=True):
        output = tapped_net(x_BCHW)
    output.backward(coefficients(output))
    return taps


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("geometry", CONVOLUTIONS)
def test_all_kinds_at_a_convolution_mixed_in_one_batch_are_autograds(
    geometry: str, encoding: Encoding
) -> None:
    net = Net(CONVOLUTIONS[geometry])
    sites = sites_of(net)
    members = members_at(sites)
    linear_only = encoding is Encoding.WEIGHT_GRADIENT
    encodings = [Encoding.ACTIVATIONS if linear_only and n in NONLINEAR else encoding for n in members]
    taps = mixed_taps(net, sites, list(members.values()), encodings)
    for position, (name, member) in enumerate(members.items()):
        found, expected = gradients_of(taps, position, member), expected_gradients(net, member)
        assert {key.site for key in found} >= ({0, 1} if name in ("lora", "linear") else {0})
        assert {key: tuple(g.shape) for key, g in found.items()} == {
            key: tuple(g.shape) for key, g in expected.items()
        }
        differences = relative_difference(found, expected)
        worst = max(differences, key=lambda key: differences[key])
        assert differences[worst] < BOUND, (name, worst, differences[worst])


@pytest.mark.parametrize("geometry", CONVOLUTIONS)
def test_folding_is_the_transpose_of_taking_patches(geometry: str) -> None:
    patch = module_patch(CONVOLUTIONS[geometry])
    x = torch.randn(2, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    rows = patches(x, patch)
    grad = torch.randn_like(rows)
    torch.testing.assert_close((rows * grad).sum(), (x * folded(grad, patch, (HEIGHT, WIDTH))).sum())


@pytest.mark.parametrize("geometry", ["same", "grouped"])
def test_a_merged_adapter_is_in_the_convolutions_own_weight(geometry: str) -> None:
    net = Net(CONVOLUTIONS[geometry])
    site = sites_of(net)[1]
    kind = LinearKind(scaling=0.5) if site.groups > 1 else LoraKind(rank=4, alpha=6.0)
    member = tenant(0, (AdapterPart(kind=kind, sites=(site,)),), "float64")
    ordinary = copy.deepcopy(net)
    add_adapter(ordinary, member.spec, member.weights)
    pristine = net.second.weight.clone()
    bank, merged = (
        AdapterBank(sites_of(net), torch.float64),
        MergedWeights([site_group([site], [net.second])]),
    )
    gang = Gang(name="job/job-0", combine="sum")
    bank.install(member.lease, member.spec, 0, member.weights, membership=Membership(gang=gang))
    merged.put(bank.gang(gang))
    images = images_of(member)
    torch.testing.assert_close(net(images), ordinary(images), rtol=BOUND, atol=BOUND)
    merged.put(())
    assert torch.equal(net.second.weight, pristine)


def test_a_lora_at_a_convolution_in_groups_is_not_merged() -> None:
    sites = sites_of(Net(CONVOLUTIONS["grouped"]))
    member = members_at(sites)["lora"]
    gang = Gang(name="job/job-0", combine="sum")
    with pytest.raises(InvalidInput) as caught:
        AdapterBank(sites, torch.float64).install(
            member.lease, member.spec, 0, member.weights, membership=Membership(gang=gang)
        )
    assert caught.value.reason == "MERGED_GROUPED_LORA"


def test_a_convolution_that_pads_with_other_values_than_zeros_is_no_site() -> None:
    assert site_kind(nn.Conv2d(3, 4, 3, padding=1)) is not None
    assert site_kind(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")) is None


def test_patches_that_do_not_overlap_take_the_images_memory_once() -> None:
    patch = module_patch(CONVOLUTIONS["patches"])
    x = torch.randn(2, CHANNELS, HEIGHT - 1, WIDTH)
    assert patches(x, patch).numel() == x.numel()
    assert patches(x, replace(patch, stride=(2, 2))).numel() > x.numel()
