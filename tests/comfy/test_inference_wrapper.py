"""``wrap_model_for_inference`` with the real ComfyUI: the same picture, no graph, and training still works."""

from __future__ import annotations

import copy
import importlib
import sys
from contextlib import contextmanager

import pytest

from luna_daemon.inference_wrapper import InferenceModeWrapper, wrap_model_for_inference


@contextmanager
def saved_bytes(torch):
    """``[n]``: bytes that autograd keeps for a backward pass."""
    count = [0]

    def pack(tensor):
        count[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def modes_seen(model):
    """A list that gets inference mode's state at each forward of the diffusion model, and the handle to end it."""
    import torch

    seen = []
    network = model.model.diffusion_model
    return seen, network.register_forward_pre_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))


@pytest.mark.parametrize("family", ["sd3", "unet"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "uni_pc"])
def test_stock_samplers_give_the_same_bits_outside_inference_mode(tiny, family, sampler):
    """The picture equals the unwrapped one, every forward ran in inference mode, and the result is an ordinary one."""
    model = tiny(family)
    torch = model.comfy.torch
    plain = model.sample(steps=3, sampler=sampler)
    wrapped = wrap_model_for_inference(model.model)
    seen, handle = modes_seen(wrapped)
    result = model.sample(wrapped, steps=3, sampler=sampler)
    handle.remove()
    assert torch.equal(plain, result)
    assert seen and all(seen)
    assert not result.is_inference() and not result.requires_grad
    result += 1  # an inference tensor would refuse


def test_common_ksampler_in_inference_mode_as_comfyui_runs_it(tiny, monkeypatch):
    """Inside ComfyUI's own inference mode KSampler's function gives the same bits with and without the wrapper."""
    model = tiny("unet")
    torch = model.comfy.torch
    nodes = stock_nodes(monkeypatch)
    with torch.inference_mode():
        latent = {"samples": model.latent}
        arguments = (7, 3, 4.0, "euler", "normal", model.positive, model.negative, latent)
        plain = nodes.common_ksampler(model.model, *arguments)[0]["samples"]
        result = nodes.common_ksampler(wrap_model_for_inference(model.model), *arguments)[0]["samples"]
    assert torch.equal(plain, result)


def stock_nodes(monkeypatch):
    """ComfyUI's ``nodes`` module, with the web server's packages left out where they are not installed."""
    monkeypatch.setattr(sys, "argv", ["main.py", "--cpu"])
    try:
        return importlib.import_module("nodes")
    except ModuleNotFoundError as error:
        pytest.skip(f"this interpreter cannot import ComfyUI's nodes: {error}")


def test_an_evaluation_outside_inference_mode_keeps_no_graph(tiny):
    """A forward with gradients on, torch's default: autograd keeps tensors without the wrapper, nothing with it."""
    model = tiny("sd3")
    torch = model.comfy.torch
    wrapped = wrap_model_for_inference(model.model)
    with saved_bytes(torch) as without:
        plain = model.apply(model.model)
    with saved_bytes(torch) as with_wrapper:
        result = model.apply(wrapped)
    assert plain.grad_fn is not None and without[0] > 1_000_000
    assert result.grad_fn is None and not result.requires_grad and with_wrapper[0] == 0
    assert torch.equal(plain, result)
    result.mul_(2.0).requires_grad_().sum().backward()  # an ordinary tensor, for samplers that guide by gradients


def test_it_is_still_a_model_patcher(tiny):
    """Type, clone, weights and options are those of any MODEL; wrapping twice is once; the input is untouched."""
    model = tiny("sd3").model
    before = copy.deepcopy(model.wrappers)
    wrapped = wrap_model_for_inference(model)
    again = wrap_model_for_inference(wrapped)
    clone = wrap_model_for_inference(wrapped.clone())
    assert type(wrapped) is type(model) and wrapped is not model
    assert again is wrapped
    assert model.wrappers == before
    assert wrapped.is_clone(model) and wrapped.clone_has_same_weights(wrapped.clone())
    assert [len(entries) for entries in clone.wrappers["apply_model"].values()] == [1]
    assert copy.deepcopy(wrapped.model_options).keys() == model.model_options.keys()
    assert type(InferenceModeWrapper(model)) is type(model)


def a_lora(model, torch, rank=2):
    """A LoRA for one attention matrix, with ComfyUI's generic key names."""
    name = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    rows, columns = model.model.state_dict()[name].shape
    generator = torch.Generator().manual_seed(3)
    key = name.removesuffix(".weight")
    return {
        f"{key}.lora_up.weight": torch.randn(rows, rank, generator=generator),
        f"{key}.lora_down.weight": torch.randn(rank, columns, generator=generator),
    }


def test_loras_apply_before_and_after_wrapping(tiny):
    """``load_lora_for_models`` works on the wrapped MODEL, keeps it wrapped, and gives the stock picture's bits."""
    model = tiny("sd3")
    comfy, torch = model.comfy, model.comfy.torch
    lora = a_lora(model.model, torch)
    base = model.sample(steps=2)
    stock, _ = comfy.sd.load_lora_for_models(model.model, None, lora, 0.8, 0.0)
    expected = model.sample(stock, steps=2)
    after, _ = comfy.sd.load_lora_for_models(wrap_model_for_inference(model.model), None, lora, 0.8, 0.0)
    seen, handle = modes_seen(after)
    result = model.sample(after, steps=2)
    handle.remove()
    assert all(seen) and torch.equal(result, expected)
    assert torch.equal(model.sample(wrap_model_for_inference(stock), steps=2), expected)
    assert not torch.equal(expected, base)
    assert torch.equal(model.sample(steps=2), base)


def test_stock_model_patches_stack(tiny):
    """A model function wrapper, a CFG function and ModelSamplingSD3 on the wrapped MODEL act as on the plain one."""
    model = tiny("sd3")
    torch = model.comfy.torch
    called = []

    def patched(patcher):
        patcher = patcher.clone()

        def function(apply, call):
            called.append(1)
            return apply(call["input"], call["timestep"], **call["c"])

        patcher.set_model_unet_function_wrapper(function)
        patcher.set_model_sampler_cfg_function(lambda args: args["uncond"] + (args["cond"] - args["uncond"]) * 2.0)
        return patcher

    plain = model.sample(patched(model.model), steps=2)
    assert torch.equal(model.sample(patched(wrap_model_for_inference(model.model)), steps=2), plain)
    assert torch.equal(model.sample(wrap_model_for_inference(patched(model.model)), steps=2), plain)
    assert len(called) >= 6


def attach_adapter(patcher, torch):
    """What TrainLora does: a module that requires gradients as a weight wrapper of the frozen model."""
    name = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"

    class Adapter(torch.nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.difference = torch.nn.Parameter(torch.zeros(shape))

        def forward(self, weight):
            return weight + self.difference.to(weight)

        def passive_memory_usage(self):
            return 0

        def move_to(self, device):
            return 0

    with torch.inference_mode(False):
        adapter = Adapter(patcher.model.state_dict()[name].shape)
        patcher.add_weight_wrapper(name, adapter)
        patcher.model.requires_grad_(False)
    return adapter


@pytest.mark.parametrize("ambient", [True, False], ids=["in-comfyui", "in-a-script"])
def test_training_through_the_wrapped_model_works(tiny, ambient):
    """A sampler that trains an attached adapter as TrainLora does gets gradients, wherever the model was wrapped."""
    model = tiny("sd3")
    comfy, torch = model.comfy, model.comfy.torch
    with torch.inference_mode(ambient):
        wrapped = wrap_model_for_inference(model.model).clone()
    adapter = attach_adapter(wrapped, torch)

    class Train(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, *rest, **more):
            prediction = model_wrap(model.latent + 0.5, torch.tensor([0.5]), **extra_args)
            prediction.square().mean().backward()
            return torch.zeros_like(model.latent)

    with torch.inference_mode(ambient), torch.inference_mode(False):
        comfy.management.load_models_gpu([wrapped], force_full_load=True)
        guider = comfy.samplers.CFGGuider(wrapped)
        guider.set_conds(copied(model.positive), copied(model.negative))
        guider.sample(model.latent, model.latent, Train(), torch.tensor([0.5, 0.0]))
    assert adapter.difference.grad is not None and adapter.difference.grad.abs().sum() > 0


def copied(conditioning):
    """Conditioning with tensors of its own."""
    return [[cond.clone(), dict(options)] for cond, options in conditioning]


def test_comfyuis_train_lora_node_trains_the_wrapped_model(tiny, monkeypatch):
    """The real TrainLora node, run as ComfyUI runs it, returns the same LoRA for the wrapped and the plain MODEL."""
    pytest.importorskip("torchvision")
    model = tiny("sd3", depth=2)
    torch = model.comfy.torch
    stock_nodes(monkeypatch)
    train = importlib.import_module("comfy_extras.nodes_train")
    monkeypatch.setattr(train.comfy.utils, "PROGRESS_BAR_ENABLED", False)

    def trained(patcher):
        torch.manual_seed(0)
        with torch.inference_mode():
            return train.TrainLoraNode().train(
                patcher, {"samples": model.latent + 0.1}, model.positive, 1, 2, 1, 0.01, 2, "SGD", "MSE", 5, "fp32",
                "fp32", "LoRA", False, "[None]",
            )  # fmt: skip

    _, expected, losses, _ = trained(model.model)
    with torch.inference_mode():
        wrapped = wrap_model_for_inference(model.model)
    _, result, wrapped_losses, _ = trained(wrapped)
    assert losses == wrapped_losses and len(losses["loss"]) == 2
    assert any(value.abs().sum() > 0 for name, value in result.items() if "lora_up" in name or "diff" in name)
    assert all(torch.equal(result[name], value) for name, value in expected.items())


def test_an_input_that_requires_gradients_gets_them(tiny):
    """Guidance by gradient (inputs that require one) goes through the wrapped model as through the plain one."""
    model = tiny("sd3")
    torch = model.comfy.torch
    gradients = []
    for patcher in (model.model, wrap_model_for_inference(model.model)):
        x = (model.latent + 0.5).requires_grad_()
        model.apply(patcher, x=x).square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0].abs().sum() > 0 and torch.equal(*gradients)


def test_switching_inference_mode_off_wins(tiny):
    """Wrapped in inference mode and run outside of it, as whoever wants gradients does: nothing is changed."""
    model = tiny("sd3")
    torch = model.comfy.torch
    with torch.inference_mode():
        wrapped = wrap_model_for_inference(model.model)
    assert model.apply(wrapped).grad_fn is not None
    with torch.inference_mode(), torch.inference_mode(False):
        assert model.apply(wrapped).grad_fn is not None
