"""A ComfyUI network without weights, whose methods are replaced until weights are loaded into it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from ..core import ModelError


class Skeleton:
    """Replace the methods of a weightless network; ``adopt`` restores them and puts weights in.

    Args:
        network: torch module on ``meta`` tensors.
        replaced: new methods by dotted name (``decode``, ``clip_l.encode_token_weights``), set on the instances.
        needs_weights: called with the reason before a layer runs by itself; must call ``adopt``. Held weakly, so that
            an unused network with weights is freed at once.
    """

    def __init__(
        self, network: Any, replaced: dict[str, Callable[..., Any]], needs_weights: Callable[[str], None]
    ) -> None:
        self._network = weakref.ref(network)
        self._replaced = list(replaced)
        for name, method in replaced.items():
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, method)
        self._needs_weights = weakref.WeakMethod(needs_weights)
        # A node may run a layer by itself, so each layer loads the weights just before it runs.
        self._hooks = [module.register_forward_pre_hook(self._before_layer) for module in network.modules()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Skeleton:
        return self

    @property
    def network(self) -> Any:
        """The torch module; ``None`` once it has been freed."""
        return self._network()

    def _before_layer(self, module: Any, inputs: Any) -> None:
        needs_weights = self._needs_weights()
        if needs_weights is not None:
            needs_weights(f"{type(module).__name__} runs")
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise ModelError(
                f"{type(module).__name__} was copied before its weights were loaded",
                "Call materialize() on the DaemonVAE or DaemonCLIP first, or load it with ComfyUI's own loader",
            )

    def adopt(self, real: Any) -> None:
        """Restore the replaced methods and use the tensors of ``real``; the modules stay the same objects.

        Args:
            real: a network of the same structure, with weights.

        Raises:
            ModelError: ``real`` lacks a layer of this network.
        """
        for hook in self._hooks:
            hook.remove()
        network = self.network
        for name in self._replaced:
            owner, _, attribute = name.rpartition(".")
            network.get_submodule(owner).__dict__.pop(attribute, None)
        sources = dict(real.named_modules())
        for name, module in network.named_modules():
            if name not in sources:
                raise ModelError(
                    f"the local model has no layer {name!r}: it is of another family",
                    "Load the same model locally as in the daemon",
                )
            source = sources[name]
            module._parameters.update(source._parameters)
            module._buffers.update(source._buffers)
            for attribute, value in source.__dict__.items():
                own = module.__dict__.get(attribute)
                if hasattr(own, "untyped_storage") and own.is_meta:
                    module.__dict__[attribute] = value
