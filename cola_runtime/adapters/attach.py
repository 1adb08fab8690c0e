"""An exported adapter on a stock transformers model, without the service.

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    attached = attach_adapter(model, "adapter/")    # what `cola adapters export` wrote
    model.generate(...)
    attached.detach()                               # the bare base model again

For inference: training is what the service is for. An adapter with a registered module needs it registered in
this process too: import the Python module that does so first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.adapter import site_adapters
from cola_runtime.adapters.adapter_files import read_adapter_folder
from cola_runtime.adapters.folder_files import CONFIG_FILE, WEIGHTS_FILE
from cola_runtime.adapters.patches import patches
from cola_runtime.adapters.site_adapter import SiteAdapter, Weights
from cola_runtime.adapters.site_modules import module_site, site_kind
from cola_runtime.types import Site


class AttachedAdapter:
    """The forward hooks of one adapter on one model."""

    def __init__(self, spec: AdapterSpec, hooks: list[RemovableHandle]) -> None:
        self.spec = spec
        self._hooks = hooks

    def detach(self) -> None:
        """Leave the model as it was before. Detaching again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def attach_adapter(model: nn.Module, folder: str | Path) -> AttachedAdapter:
    """Add the folder's adapter to the model's forward: h = f(x) + s a_w(x) at every site.

    The folder is a cola folder, or a PEFT folder of a plain LoRA. Weights are taken over in each site's dtype
    and on its device, so move or cast the model first. Raises InvalidInput `ADAPTER_FILE_INVALID` if the
    folder is damaged or made for another base model, `ADAPTER_MODULE_UNKNOWN`.
    """
    paths = [Path(folder) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    adapter = read_adapter_folder(files, tuple(_sites(model)))
    hooks = []
    for site in site_adapters(adapter.spec).values():
        module = model.get_submodule(site.site.name)
        like: Any = module.weight
        own = {
            key: torch.from_numpy(array).to(like)
            for key, array in adapter.weights.items()
            if key.site == site.site.index
        }
        hooks.append(module.register_forward_hook(_adding(site, own)))
    return AttachedAdapter(adapter.spec, hooks)


def _adding(adapter: SiteAdapter, weights: Weights) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        site = adapter.site
        if site.patch is not None:
            added_BLO = adapter.forward(patches(args[0], site.patch).flatten(0, 1), weights)
            images, outputs, *size = output.shape
            return output + added_BLO.view(images, *size, outputs).permute(0, 3, 1, 2)
        x_NI = args[0].reshape(-1, 1 if site.takes_ids else site.in_features)
        return output + adapter.forward(x_NI, weights).reshape(output.shape)

    return add


def _sites(model: nn.Module) -> Iterator[Site]:
    """Every module that can be a site; which of them share an x does not matter."""
    for index, (name, module) in enumerate(model.named_modules()):
        if site_kind(module) is not None:
            yield module_site(module, index=index, name=name, input_group=index)
