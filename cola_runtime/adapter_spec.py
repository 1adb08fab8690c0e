"""What an adapter is: which kind of small module at which sites. One schema from YAML to the checkpoint.

h = f(x) + s * a_w(x) at every site. A kind's fields are its hyper-parameters; its mathematics is in
`cola_runtime.adapters`, its batched form in `cola_runtime.base_model.stacks`. Imports pydantic only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cola_runtime.errors import InvalidInput
from cola_runtime.types import Membership, Replay, Site, SiteKind
from cola_runtime.update_chain import RecordedLink

MAX_RANK = 256
MAX_HIDDEN = 8192
MAX_OPTIONS = 32
MAX_LABELS = 1024
HEAD_NAME = "score"


class Frozen(BaseModel):
    """A value: unknown fields are refused, nothing can be changed, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a valid number")
    return value


Number = Annotated[float, BeforeValidator(_no_truth_value)]
"""A text that spells one is one, as YAML reads 2e-4 as a text; true is not 1."""
Rank = Annotated[int, Field(ge=1, le=MAX_RANK, strict=True)]
Alpha = Annotated[Number, Field(gt=0, le=65536)]
Scaling = Annotated[Number, Field(gt=0, le=65536)]


def _factor_scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    return alpha / rank**0.5 if use_rslora else alpha / rank


class LoraKind(Frozen):
    """a(x) = B A x with A [rank, in], B [out, rank] (arXiv:2106.09685), in PEFT's words."""

    kind: Literal["lora"] = "lora"
    rank: Rank = 8
    alpha: Alpha = 16.0
    use_rslora: bool = False
    """s = alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732)."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """PEFT's lora_dropout: in training, the share of x's entries that each site's A does not see."""

    @property
    def scaling(self) -> float:
        return _factor_scaling(self.rank, self.alpha, self.use_rslora)


class LinearKind(Frozen):
    """a(x) = W x (+ b), of full rank: W [out, in] and b [out] start at zero."""

    kind: Literal["linear"] = "linear"
    bias: bool = False
    scaling: Scaling = 1.0


class MlpKind(Frozen):
    """a(x) = W2 act(W1 x + b1) + b2; W2 and b2 start at zero. Not linear in x, so never merged."""

    kind: Literal["mlp"] = "mlp"
    hidden: Annotated[int, Field(ge=1, le=MAX_HIDDEN, strict=True)] = 128
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"] = "relu"
    scaling: Scaling = 1.0


class LinearizedLoraKind(Frozen):
    """L-LoRA (partial linearization, ICLR 2024): a(x) = (dB A0 + B0 dA) x, trained as deltas from zero.

    A0 and B0 come from `base_seed` and the site's name alone, so that adapters of one base_seed add exactly.
    With `initial_b` zero dA never moves, as in the paper's code; with random both factors train.
    """

    kind: Literal["linearized_lora"] = "linearized_lora"
    rank: Rank = 8
    alpha: Alpha = 16.0
    use_rslora: bool = False
    initial_b: Literal["zero", "random"] = "random"
    base_seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0

    @property
    def scaling(self) -> float:
        return _factor_scaling(self.rank, self.alpha, self.use_rslora)


OptionValue = bool | int | float | Annotated[str, StringConstraints(max_length=200)]


class ModuleKind(Frozen):
    """A user's own `nn.Module`, registered under `name` (docs/adapter_kinds.md): any a_w(x), never merged."""

    kind: Literal["module"] = "module"
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,60}$")]
    options: tuple[tuple[Annotated[str, StringConstraints(max_length=60)], OptionValue], ...] = ()
    scaling: Scaling = 1.0

    @model_validator(mode="before")
    @classmethod
    def _options_of_mapping(cls, fields: Any) -> Any:
        """YAML and JSON write options as a mapping; a value must be hashable, so they are kept as pairs."""
        if isinstance(fields, Mapping) and isinstance(fields.get("options"), Mapping):
            return {**fields, "options": tuple(sorted(fields["options"].items()))}
        return fields

    @model_validator(mode="after")
    def _few_options(self) -> ModuleKind:
        if len(self.options) > MAX_OPTIONS:
            raise ValueError(f"at most {MAX_OPTIONS} options, got {len(self.options)}")
        return self


class HeadKind(Frozen):
    """A task's head: logits = W p + b over the pooled hidden state p, W [labels, hidden] and b [labels].

    Trained, clipped, stepped and stored with the other parts; no module of the base model is adapted by it.
    """

    kind: Literal["head"] = "head"
    labels: Annotated[int, Field(ge=1, le=MAX_LABELS, strict=True)]
    problem: Literal["classification", "regression"] = "classification"

    @property
    def scaling(self) -> float:
        return 1.0


AdapterKind = LoraKind | LinearKind | MlpKind | LinearizedLoraKind | ModuleKind | HeadKind


def input_dropout(kind: AdapterKind) -> float:
    """p of a kind that drops inputs in training, else 0. With it no two sites share an x."""
    return kind.dropout if isinstance(kind, LoraKind) else 0.0


class AdapterPart(Frozen):
    """One kind and the sites that it is attached to, in catalogue order."""

    kind: Annotated[AdapterKind, Field(discriminator="kind")]
    sites: Annotated[tuple[Site, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _head_at_its_site(self) -> AdapterPart:
        labels = [site.out_features for site in self.sites if site.kind is SiteKind.HEAD]
        if labels != ([self.kind.labels] if isinstance(self.kind, HeadKind) else []):
            raise ValueError("a head has one site of its own, with an output per label")
        return self


class AdapterSpec(Frozen):
    """All small modules of one tenant: every site is in one part only."""

    parts: Annotated[tuple[AdapterPart, ...], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    dtype: Literal["float32", "float64"] = "float32"
    """Of the weights on the device and of their gradients on the wire."""

    @model_validator(mode="after")
    def _each_site_once(self) -> AdapterSpec:
        indices = [site.index for part in self.parts for site in part.sites]
        if len(set(indices)) != len(indices):
            raise ValueError("a site is in two parts")
        return self

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every adapted site, in catalogue order."""
        sites = (site for part in self.parts for site in part.sites)
        return tuple(sorted(sites, key=lambda site: site.index))

    @cached_property
    def head(self) -> tuple[HeadKind, Site] | None:
        """The task's head and its site; None where the adapter has no head."""
        heads = ((part.kind, part.sites[0]) for part in self.parts if isinstance(part.kind, HeadKind))
        return next(heads, None)

    @cached_property
    def body(self) -> AdapterSpec | None:
        """The same without its head; None where it is a head alone."""
        parts = tuple(part for part in self.parts if not isinstance(part.kind, HeadKind))
        return AdapterSpec(parts=parts, seed=self.seed, dtype=self.dtype) if parts else None

    @cached_property
    def kinds(self) -> dict[int, AdapterKind]:
        """Site index -> kind, in catalogue order."""
        kinds = {site.index: part.kind for part in self.parts for site in part.sites}
        return {site.index: kinds[site.index] for site in self.sites}


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """What the base model must know of an adapter while a lease of it lasts."""

    spec: AdapterSpec
    membership: Membership | None = None  # its gang, if it is merged into the base weights
    max_staleness: int = 0  # 1: the version before the current one can be asked for, too
    origins: tuple[RecordedLink, ...] = ()  # by shard: what the lease begins with; none: with the seed
    replay: Replay | None = None  # what is sent under it, and compared; then nothing reaches the bank


def lora_spec(
    sites: tuple[Site, ...],
    *,
    rank: int,
    alpha: float,
    use_rslora: bool = False,
    seed: int = 0,
    dtype: Literal["float32", "float64"] = "float32",
) -> AdapterSpec:
    """The plain case: one LoRA at all of `sites`."""
    kind = LoraKind(rank=rank, alpha=alpha, use_rslora=use_rslora)
    return AdapterSpec(parts=(AdapterPart(kind=kind, sites=sites),), seed=seed, dtype=dtype)


def head_part(kind: HeadKind, catalogue: Sequence[Site], *, hidden_size: int) -> AdapterPart:
    """The head at its virtual site, behind all sites of the base model."""
    site = Site(
        index=len(catalogue),
        name=HEAD_NAME,
        kind=SiteKind.HEAD,
        in_features=hidden_size,
        out_features=kind.labels,
        input_group=1 + max((site.input_group for site in catalogue), default=-1),
    )
    return AdapterPart(kind=kind, sites=(site,))


def adapter_spec_from_fields(fields: Any) -> AdapterSpec:
    """Inverse of `model_dump(mode="json")`. Raises InvalidInput ADAPTER_INVALID for anything else."""
    try:
        return _ADAPTER_SPEC.validate_python(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInput(
            "ADAPTER_INVALID", f"not an adapter: {where}: {first['msg']}", where=where
        ) from error


_ADAPTER_SPEC = TypeAdapter(AdapterSpec)
