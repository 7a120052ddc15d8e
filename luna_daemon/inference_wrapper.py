"""Runs a local UNet or transformer without keeping an autograd graph.

A ComfyUI MODEL stays a ``ModelPatcher``: a clone with one more ``APPLY_MODEL`` wrapper (ComfyUI's own extension point),
which LoRA, samplers, type checks and clones do not notice. Any other callable (a diffusers UNet or transformer, a
function) is wrapped in an object that otherwise behaves as the callable.

ComfyUI runs every node in inference mode already, so the wrapper matters elsewhere: in scripts, tests and servers that
call a model with gradients on, which is torch's default. A call runs unchanged

- in inference mode,
- where the model was wrapped in inference mode and is called outside of it: inference mode was switched off on purpose,
  as ComfyUI's TrainLora does,
- where gradients are on and an input or an attached adapter requires them, or ``train()`` was called on the wrapper.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from .core import BadRequest

__all__ = ["InferenceModeWrapper", "wrap_model_for_inference"]

_KEY = "luna_inference_mode"


def wrap_model_for_inference(model: Any) -> Any:
    """Make a model like ``model`` that runs in inference mode; a wrapped model is returned as it is.

    Args:
        model: a ComfyUI MODEL, a ``torch.nn.Module``, or any callable.

    Raises:
        BadRequest: ``model`` is not callable.
    """
    if type(model) is InferenceModeWrapper:
        return model
    if not _is_patcher(model):
        return InferenceModeWrapper(model)
    from comfy.patcher_extension import WrappersMP

    if model.get_wrappers(WrappersMP.APPLY_MODEL, _KEY):
        return model
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, functools.partial(_apply_model, _in_inference_mode()))
    return clone


class InferenceModeWrapper:
    """A module or callable whose calls run in inference mode, with the attributes of the wrapped object.

    ``isinstance`` sees the wrapped class, methods that return the module (``to``, ``eval``) return the wrapper, and
    results are ordinary tensors, which may be changed in place and used with autograd. A ComfyUI MODEL is wrapped as
    by ``wrap_model_for_inference``.
    """

    __slots__ = ("_luna_ambient", "_luna_model", "_luna_training")

    def __new__(cls, model: Any) -> Any:
        return wrap_model_for_inference(model) if _is_patcher(model) else super().__new__(cls)

    def __init__(self, model: Any) -> None:
        if not callable(model):
            raise BadRequest(f"cannot wrap a {type(model).__name__}", "A MODEL, a torch module or a callable is needed")
        object.__setattr__(self, "_luna_model", model)
        object.__setattr__(self, "_luna_ambient", _in_inference_mode())
        object.__setattr__(self, "_luna_training", False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._luna_run(self._luna_model, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Switch the module's training mode; while training, calls run as without this wrapper."""
        self._luna_model.train(mode)
        object.__setattr__(self, "_luna_training", mode)
        return self

    def eval(self) -> Any:
        """Switch training mode off."""
        return self.train(False)

    def _luna_run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        grad_wanted = self._luna_ambient or self._luna_training or _needs_grad((args, kwargs))
        return call(*args, **kwargs) if grad_wanted else _without_graph(call, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._luna_model, name)
        if not (inspect.ismethod(value) and value.__self__ is self._luna_model):
            return value
        run = functools.partial(self._luna_run, value) if name == "forward" else value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            return self if result is self._luna_model else result

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._luna_model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._luna_model, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._luna_model)

    def __dir__(self) -> Iterable[str]:
        return dir(self._luna_model)

    def __repr__(self) -> str:
        return f"InferenceModeWrapper({self._luna_model!r})"

    def __reduce__(self) -> tuple[Any, ...]:  # copying or saving the wrapper copies the wrapped object too
        return wrap_model_for_inference, (self._luna_model,)


def _is_patcher(model: Any) -> bool:
    return hasattr(model, "add_wrapper_with_key") and hasattr(model, "clone")


def _in_inference_mode() -> bool:
    import torch

    return torch.is_inference_mode_enabled()


def _apply_model(ambient: bool, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ComfyUI's ``apply_model``: (x [B, C, ...], t [B], ...) to the denoised x [B, C, ...]."""
    patcher = getattr(executor.class_obj, "current_patcher", None)
    adapters = getattr(patcher, "weight_wrapper_patches", {})  # TrainLora keeps the weights that it trains here
    if (ambient and not _in_inference_mode()) or _needs_grad((args, kwargs, adapters)):
        return executor(*args, **kwargs)
    return _without_graph(executor, *args, **kwargs)


def _needs_grad(value: Any) -> bool:
    """Return whether gradients are on and a tensor in these nested containers or modules requires them."""
    import torch

    if not torch.is_grad_enabled():
        return False
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, torch.nn.Module):
        return any(parameter.requires_grad for parameter in value.parameters())
    if isinstance(value, dict):
        return any(_needs_grad(item) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_needs_grad(item) for item in value)


def _without_graph(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    import torch

    if torch.is_inference_mode_enabled():
        return call(*args, **kwargs)
    with torch.inference_mode():
        result = call(*args, **kwargs)
    return _ordinary(result)


def _ordinary(value: Any) -> Any:
    """Replace tensors made in inference mode, which refuse in-place changes outside of it, by ordinary tensors."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):  # also diffusers' outputs, whose items are attributes as well
        for name, item in list(value.items()):
            value[name] = _ordinary(item)
        return value
    if isinstance(value, (list, tuple)):
        items = [_ordinary(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
