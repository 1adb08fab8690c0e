"""Any adapter as the two files of a cola folder, and back: for the kinds that PEFT does not have. Torch-free.

adapter_config.json says `format: cola_adapter` (and no peft_type), `version`, the AdapterSpec under `adapter`
and the base model's name; adapter_model.safetensors names its tensors `<site name>/mlp_in` and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from pydantic import ValidationError

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, adapter_spec_from_fields
from cola_runtime.adapters.folder_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    TensorFile,
    base_model_name,
    folder_files,
    invalid,
    read_config,
)
from cola_runtime.adapters.shapes import weight_names, weight_shapes
from cola_runtime.adapters.site_kinds import unfit
from cola_runtime.errors import InvalidInput
from cola_runtime.types import Site, SiteKind, TensorKey

FORMAT = "cola_adapter"
VERSION = 1


def cola_folder(
    spec: AdapterSpec, weights: Mapping[TensorKey, NDArray[Any]], base_model: str
) -> dict[str, bytes]:
    """File name -> content of a folder that `cola_runtime.adapters.attach` puts on a stock model."""
    config = {
        "format": FORMAT,
        "version": VERSION,
        "base_model_name_or_path": base_model,
        "adapter": spec.model_dump(mode="json"),
    }
    return folder_files(config, {name: weights[key] for key, name in weight_names(spec).items()})


def read_cola_folder(files: Mapping[str, bytes], catalogue: Sequence[Site]) -> AdapterFolder:
    """The adapter in a cola folder, checked against the base model's sites, which are found by their names.

    Raises InvalidInput `ADAPTER_FILE_INVALID`, with file and tensor, for sites, names, shapes or values that
    do not fit; `ADAPTER_MODULE_UNKNOWN` for a module that is not registered in this process.
    """
    config = read_config(files)
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise invalid(CONFIG_FILE, f"does not say format {FORMAT} of version {VERSION}")
    spec = _at_sites_of(_spec(config), catalogue)
    return AdapterFolder(
        spec=spec, weights=_weights(TensorFile(files), spec), base_model=base_model_name(config)
    )


def _spec(config: Mapping[str, Any]) -> AdapterSpec:
    try:
        return adapter_spec_from_fields(config.get("adapter"))
    except InvalidInput as error:
        raise invalid(CONFIG_FILE, f"describes no adapter: {error.message}") from error


def _at_sites_of(spec: AdapterSpec, catalogue: Sequence[Site]) -> AdapterSpec:
    """The same adapter at the catalogue's own sites: how they are numbered is the base model's affair."""
    by_name = {site.name: site for site in catalogue}
    try:
        return AdapterSpec(parts=tuple(_parts(spec, by_name)), seed=spec.seed, dtype=spec.dtype)
    except ValidationError as error:
        raise invalid(CONFIG_FILE, "names a site twice") from error


def _parts(spec: AdapterSpec, by_name: Mapping[str, Site]) -> Iterator[AdapterPart]:
    for part in spec.parts:
        for site in part.sites:
            found = by_name.get(site.name)
            if found is None:
                raise invalid(CONFIG_FILE, f"names site {site.name!r}, which the base model does not have")
            if _geometry(found) != _geometry(site):
                raise invalid(
                    CONFIG_FILE,
                    f"expects site {site.name!r} to be {_geometry(site)}, the base model's is "
                    f"{_geometry(found)}",
                )
        reasons = [unfit(part.kind, site) for site in part.sites if site.kind is not SiteKind.HEAD]
        if any(reasons):
            raise invalid(
                CONFIG_FILE, f"has a {part.kind.kind} where none can be: {next(filter(None, reasons))}"
            )
        yield AdapterPart(kind=part.kind, sites=tuple(by_name[site.name] for site in part.sites))


def _geometry(site: Site) -> str:
    patch = "" if site.patch is None else f", {site.patch}"
    return f"{site.kind} {site.in_features} -> {site.out_features}{patch}"


def _weights(tensors: TensorFile, spec: AdapterSpec) -> dict[TensorKey, NDArray[Any]]:
    names = weight_names(spec)
    odd = sorted(set(names.values()) ^ set(tensors.names))
    if odd:
        problem = "belongs to no weight of the adapter" if odd[0] in tensors.names else "is missing"
        raise invalid(WEIGHTS_FILE, f"tensor {odd[0]!r} {problem}")
    return {key: tensors.array(names[key], shape, spec.dtype) for key, shape in weight_shapes(spec).items()}
