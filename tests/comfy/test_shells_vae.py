"""DaemonVAE inside ComfyUI: a comfy.sd.VAE without weights, for nodes and for ComfyUI's memory management."""

from __future__ import annotations

import copy
import logging
import time

import psutil
import pytest

from luna_daemon.core import (
    Busy,
    DaemonConnectionError,
    ModelError,
    ModelLoadError,
    ModelNotFound,
    OutOfMemory,
    PoisonRequest,
    RequestCancelled,
)
from luna_daemon.shells.build import make_vae
from luna_daemon.wire import messages as m
from tests.comfy.shell_helpers import DEMO_VAE, InProcess, empty_file
from tests.waiting import within

pytest_plugins = ["tests.comfy.shell_fixtures"]

SCALARS = (
    "latent_channels", "latent_dim", "downscale_ratio", "upscale_ratio", "output_channels", "downscale_index_formula",
    "upscale_index_formula", "extra_1d_channel", "crop_input", "not_video", "disable_offload", "vae_dtype", "device",
    "output_device", "working_dtypes",
)  # fmt: skip


@pytest.fixture
def daemon(stock, local_vae):
    """Stands in for the daemon."""
    return InProcess(stock, vae=local_vae)


@pytest.fixture
def vae(stock, daemon, inference):
    """The shell, used as ComfyUI uses a VAE: under inference_mode."""
    return make_vae([DEMO_VAE], client=daemon)


def pixels(stock, *shape, seed=0):
    return stock.torch.rand(*shape, generator=stock.torch.Generator().manual_seed(seed))


def latents(stock, *shape, seed=0):
    return stock.torch.randn(*shape, generator=stock.torch.Generator().manual_seed(seed))


# --- what it is --------------------------------------------------------------------------------------------------


def test_it_is_a_vae_without_weights(stock, vae, local_vae):
    """A subclass of ComfyUI's class, its network of the same class, everything on meta."""
    assert isinstance(vae, stock.sd.VAE) and type(vae).__name__ == "DaemonVAE"
    assert type(vae.first_stage_model) is type(local_vae.first_stage_model)
    assert all(tensor.is_meta for tensor in vae.first_stage_model.state_dict().values())
    assert vae.first_stage_model.state_dict().keys() == local_vae.first_stage_model.state_dict().keys()
    assert vae.patcher.model_size() == vae.patcher.loaded_size() == vae.get_ram_usage() == vae.model_size() == 0


def test_its_facts_are_the_real_ones(vae, local_vae):
    assert {name: getattr(vae, name) for name in SCALARS} == {name: getattr(local_vae, name) for name in SCALARS}
    shape = (1, 3, 512, 512)
    assert vae.memory_used_encode(shape, vae.vae_dtype) == local_vae.memory_used_encode(shape, vae.vae_dtype)
    assert vae.memory_used_decode(shape, vae.vae_dtype) == local_vae.memory_used_decode(shape, vae.vae_dtype)
    assert vae.spacial_compression_encode() == local_vae.spacial_compression_encode()
    assert vae.spacial_compression_decode() == local_vae.spacial_compression_decode()
    assert vae.temporal_compression_decode() == local_vae.temporal_compression_decode()
    assert vae.throw_exception_if_invalid() is None


def family(stock, keys):
    """The empty VAE of a family that ComfyUI detects by these keys."""
    torch = stock.torch
    # These two compute with values in their constructors.
    device = "cpu" if {"decoder.mid.block_1.mix_factor", "decoder.unpatcher3d.wavelets"} & keys.keys() else "meta"
    with pytest.MonkeyPatch.context() as patch, torch.device(device):
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state, strict=True: ((), ()))
        return stock.sd.VAE(sd={name: torch.empty(shape, device="meta") for name, shape in keys.items()})


FAMILIES = {
    "SDXL": {
        "decoder.conv_in.weight": (512, 4, 3, 3), "encoder.down.2.downsample.conv.weight": (1,),
        "post_quant_conv.weight": (4, 4, 1, 1),
    },
    "Flux": {"decoder.conv_in.weight": (512, 16, 3, 3), "encoder.down.2.downsample.conv.weight": (1,)},
    "x4 upscaler": {"decoder.conv_in.weight": (512, 4, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1)},
    "Cascade A": {"vquantizer.codebook.weight": (1,)},
    "Stable Audio": {"decoder.layers.1.layers.0.beta": (1,)},
    "Mochi": {"decoder.blocks.2.blocks.3.stack.5.weight": (1,)},
    "LTXV": {"decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": (512, 1)},
    "HunyuanVideo": {"decoder.conv_in.conv.weight": (512, 16, 3, 3, 3), "post_quant_conv.weight": (16, 16, 1, 1, 1)},
    "HunyuanImage": {"decoder.conv_in.weight": (1024, 64, 3, 3)},
    # 0.8 reads its sizes, where 0.3.64 has them in its code.
    "Wan 2.1": {
        "decoder.middle.0.residual.0.gamma": (1,), "decoder.head.0.gamma": (96, 1, 1, 1),
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
    },
    "Wan 2.2": {"decoder.middle.0.residual.0.gamma": (1,), "decoder.upsamples.0.upsamples.0.residual.2.weight": (1,)},
    "SVD": {"decoder.mid.block_1.mix_factor": (1,)},
    "Cosmos": {"decoder.unpatcher3d.wavelets": (1,)},
    "Hunyuan3D": {"geo_decoder.cross_attn_decoder.ln_1.bias": (1,)},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_built_from_their_headers(stock, daemon, tmp_path, name):
    """About as fast as ComfyUI builds it empty, on meta, with its scalars; zeros instead of weights."""
    start = time.perf_counter()
    real = family(stock, FAMILIES[name])
    usual = time.perf_counter() - start
    # Keys that tell the family apart need not be in the network's own state dict.
    told_by = {key: stock.torch.empty(shape, device="meta") for key, shape in FAMILIES[name].items()}
    path = empty_file(tmp_path / "vae.safetensors", told_by | real.first_stage_model.state_dict())
    before, start = psutil.Process().memory_full_info().uss, time.perf_counter()
    shell = make_vae([path], client=daemon)
    seconds, grown = time.perf_counter() - start, psutil.Process().memory_full_info().uss - before
    assert all(value.is_meta or value.numel() <= 256 for value in shell.first_stage_model.state_dict().values())
    # Some are built with weights, and emptied.
    assert seconds < 20 * usual + 0.5 and grown < (60e6 if name != "Cosmos" else 400e6), (seconds, usual, grown)
    for fact in ("latent_channels", "latent_dim", "vae_dtype", "output_channels"):
        assert getattr(shell, fact) == getattr(real, fact)
    assert shell.spacial_compression_decode() == real.spacial_compression_decode()
    stock.management.load_models_gpu([shell.patcher], memory_required=1 << 30)


def test_ltx_statistics_are_real(stock, daemon, tmp_path):
    """Nodes compute with them."""
    state = family(stock, FAMILIES["LTXV"]).first_stage_model.state_dict()
    shell = make_vae([empty_file(tmp_path / "ltx.safetensors", state)], client=daemon)
    statistics = shell.first_stage_model.per_channel_statistics
    assert not any(buffer.is_meta for buffer in statistics.buffers()) and len(list(statistics.buffers())) > 0


def test_two_files_of_a_taesd(stock, daemon, local_vae, tmp_path, inference):
    """The halves are told apart, and scale and shift are those that ComfyUI's loader knows by the name."""
    torch = stock.torch
    state = local_vae.first_stage_model.state_dict()
    paths = []
    for half in ("encoder", "decoder"):
        prefix = f"taesd_{half}."
        part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        paths.append(tmp_path / f"taesd3_{half}.safetensors")
        stock.utils.save_torch_file(part, str(paths[-1]))
    shell = make_vae(paths, client=daemon)
    assert shell.latent_channels == 16
    daemon.error = DaemonConnectionError("away")
    shell.decode(latents(stock, 1, 16, 8, 8))
    real = shell.first_stage_model.luna.fallback.local_model()
    assert torch.isclose(real.first_stage_model.vae_scale, torch.tensor(1.5305).to(real.vae_dtype))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"not a model file at all, really"])
def test_a_broken_file_says_so(stock, daemon, tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"broken\.safetensors"):
        make_vae([path], client=daemon)
    with pytest.raises(ModelNotFound, match=r"absent\.safetensors"):
        make_vae([tmp_path / "absent.safetensors"], client=daemon)


def test_other_formats_and_other_models(stock, daemon, local_vae, tmp_path):
    """A ``.pt`` file is read once for its shapes; a file without a VAE is refused."""
    torch = stock.torch
    torch.save(dict(local_vae.get_sd()), tmp_path / "vae.pt")
    shell = make_vae([tmp_path / "vae.pt"], client=daemon)
    assert shell.latent_channels == 16 and next(shell.first_stage_model.parameters()).is_meta
    (tmp_path / "none.pt").write_bytes(b"junk")
    with pytest.raises(ModelLoadError):
        make_vae([tmp_path / "none.pt"], client=daemon)
    with pytest.raises(ModelLoadError, match="not a VAE"):
        make_vae([empty_file(tmp_path / "other.safetensors", {"a": torch.zeros(100)})], client=daemon)


# --- copies and memory management --------------------------------------------------------------------------------


def test_copies(stock, vae):
    """A copy is independent in its attributes; a deep copy is the shell itself, alone or in model options."""
    other = copy.copy(vae)
    other.disable_offload = True
    assert type(other) is type(vae) and other.first_stage_model is vae.first_stage_model and not vae.disable_offload
    assert copy.deepcopy(vae) is vae
    assert copy.deepcopy({"patches": [vae]})["patches"][0] is vae
    patcher = vae.patcher.clone()
    assert type(patcher) is type(vae.patcher) and patcher.model_size() == 0


def test_memory_management_takes_it_for_a_model(stock, vae, daemon):
    """Every way of loading and unloading that ComfyUI has; nothing is loaded, nobody else is sent away."""
    memory = stock.management
    other = vae.patcher.clone()
    for flags in ({}, {"force_full_load": True}, {"memory_required": 1 << 40}, {"minimum_memory_required": 1}):
        memory.load_models_gpu([vae.patcher, other], **flags)
    assert any(entry.model is other for entry in memory.current_loaded_models)
    memory.free_memory(1 << 60, vae.patcher.load_device)
    memory.load_models_gpu([vae.patcher])
    memory.unload_all_models()
    memory.cleanup_models()
    vae.patcher.detach()
    vae.patcher.cleanup()
    assert next(vae.first_stage_model.parameters()).is_meta and daemon.materialised == 0 and not daemon.calls


# --- compute -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (3, 64, 96, 3), (1, 71, 90, 3)], ids=["one", "batch", "odd"])
def test_encode_is_the_local_result(stock, vae, local_vae, daemon, shape):
    given = pixels(stock, *shape)
    expected = stock.torch.cat([local_vae.encode(given[i : i + 1]) for i in range(shape[0])])
    assert stock.torch.equal(vae.encode(given), expected)
    assert len(daemon.asked(m.VaeEncode)) == 1 and daemon.fallbacks == daemon.materialised == 0


def test_decode_is_the_local_result_and_private(stock, vae, local_vae, daemon):
    """float32, channels last, writable: audio nodes divide it in place."""
    given = latents(stock, 1, 16, 8, 12)
    found = vae.decode(given)
    assert stock.torch.equal(found, local_vae.decode(given)) and found.dtype == stock.torch.float32
    found /= 2
    assert stock.torch.equal(vae.decode(given, vae_options={}), local_vae.decode(given))


def test_tiled_is_the_local_result(stock, vae, local_vae, daemon):
    image, latent = pixels(stock, 1, 96, 128, 3), latents(stock, 1, 16, 24, 32)
    assert stock.torch.equal(
        vae.encode_tiled(image, tile_x=64, tile_y=64, overlap=16),
        local_vae.encode_tiled(image, tile_x=64, tile_y=64, overlap=16),
    )
    assert stock.torch.equal(
        vae.decode_tiled(latent, tile_x=16, tile_y=16, overlap=4),
        local_vae.decode_tiled(latent, tile_x=16, tile_y=16, overlap=4),
    )
    assert daemon.asked(m.VaeDecode)[0].tiling == m.Tiling(16, 16, 4)


def test_the_raw_network(stock, vae, local_vae, daemon):
    """Nodes that slice by themselves call the network: its dtype, beside its input."""
    latent = latents(stock, 1, 16, 8, 8).to(vae.vae_dtype)
    found = vae.first_stage_model.decode(latent)
    assert stock.torch.equal(found, local_vae.first_stage_model.decode(latent)) and found.dtype == vae.vae_dtype
    image = vae.process_input(pixels(stock, 1, 3, 64, 64)).to(vae.vae_dtype)
    assert stock.torch.equal(vae.first_stage_model.encode(image), local_vae.first_stage_model.encode(image))
    assert [call.raw for call in daemon.calls] == [True, True]
    assert vae.first_stage_model.to("cpu") is vae.first_stage_model and daemon.materialised == 0


def test_results_end_on_comfyuis_intermediate_device(stock, vae, monkeypatch):
    """Whatever that is: here one that cannot be mistaken for the CPU."""
    monkeypatch.setattr(stock.management, "intermediate_device", lambda: stock.torch.device("meta"))
    assert vae.decode(latents(stock, 1, 16, 8, 8)).is_meta
    assert vae.encode(pixels(stock, 1, 64, 64, 3)).is_meta


def test_tiles_move_comfyuis_progress_bar(stock, vae, daemon, monkeypatch):
    seen = []
    hook = lambda value, total, *rest, **more: seen.append((value, total))  # noqa: E731
    monkeypatch.setattr(stock.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(stock.utils, "PROGRESS_BAR_ENABLED", True)
    daemon.progress = [m.Progress(1, "loading"), m.Progress(1, "tile", 1, 4), m.Progress(1, "tile", 4, 4)]
    vae.first_stage_model.luna.send(m.VaeDecode(m.ModelRef("vae", "x")), [latents(stock, 1, 16, 8, 8)])
    assert (1, 4) in seen and (4, 4) in seen


# --- when the daemon does not answer -----------------------------------------------------------------------------


def test_the_local_model_steps_in_and_goes_again(stock, vae, local_vae, daemon, caplog):
    """Same result, one warning for many calls, counted; the daemon is used as soon as it is back."""
    given = latents(stock, 1, 16, 8, 8)
    daemon.error = DaemonConnectionError("no daemon")
    for _ in range(3):
        assert stock.torch.equal(vae.decode(given), local_vae.decode(given))
    image = pixels(stock, 1, 64, 64, 3)
    assert stock.torch.equal(vae.encode(image), local_vae.encode(image))
    assert [r.message for r in caplog.records if "steps in" in r.message] == [
        "DaemonVAE: the local model steps in: no daemon"
    ]
    assert daemon.fallbacks == 4
    daemon.error = None
    assert stock.torch.equal(vae.decode(given), local_vae.decode(given))
    assert daemon.told_fallbacks == 4 and daemon.materialised == 0 and "is back" in caplog.text


def test_busy_is_waited_for(stock, vae, daemon, monkeypatch):
    """A local copy would make a full device fuller; ComfyUI's interrupt ends the waiting."""
    attempts = []
    answer = InProcess.call

    def call(self, *args, **options):
        attempts.append(args)
        if len(attempts) < 3:
            raise Busy("full", retry_after_s=0.01)
        return answer(self, *args, **options)

    monkeypatch.setattr(InProcess, "call", call)
    vae.decode(latents(stock, 1, 16, 8, 8))
    assert len(attempts) == 3 and daemon.fallbacks == 0
    daemon.error = Busy("full", retry_after_s=60)
    stock.management.interrupt_current_processing()
    with within(5), pytest.raises(stock.management.InterruptProcessingException):  # far from the 60 s it was told
        vae.decode(latents(stock, 1, 16, 8, 8))
    assert not stock.management.processing_interrupted()


def test_errors_reach_the_node(stock, vae, daemon):
    """Poison is never tried locally; no room is ComfyUI's own exception; an interrupt is ComfyUI's own."""
    given = latents(stock, 1, 16, 8, 8)
    daemon.error = PoisonRequest("crashed two workers")
    with pytest.raises(PoisonRequest):
        vae.decode(given)
    daemon.error = OutOfMemory("no room")
    with pytest.raises(stock.management.OOM_EXCEPTION, match="no room"):
        vae.decode(given)
    daemon.error = RequestCancelled("cancelled")
    with pytest.raises(RequestCancelled):
        vae.decode(given)
    stock.management.interrupt_current_processing()
    with pytest.raises(stock.management.InterruptProcessingException):
        vae.decode(given)
    assert daemon.fallbacks == 0


def test_a_given_local_model_steps_in(stock, daemon, local_vae, inference):
    """Loaded, or a callable that is asked once."""
    daemon.error = DaemonConnectionError("away")
    loads = []
    given = latents(stock, 1, 16, 8, 8)
    shells = [
        make_vae([DEMO_VAE], daemon, local_vae),
        make_vae([DEMO_VAE], daemon, lambda: loads.append(1) or local_vae),
    ]
    for shell in shells * 2:
        assert stock.torch.equal(shell.decode(given), local_vae.decode(given))
    assert loads == [1]


# --- when true weights are needed --------------------------------------------------------------------------------


def test_the_state_dict_is_real(stock, vae, local_vae, daemon, caplog):
    """Loaded once, with a warning that names the caller, and counted."""
    for _ in range(2):
        found, expected = vae.get_sd(), local_vae.get_sd()
        assert found.keys() == expected.keys()
        assert all(stock.torch.equal(found[name], expected[name]) for name in expected)
    warnings = [record.message for record in caplog.records if "weights are loaded here" in record.message]
    assert len(warnings) == 1 and f"{__name__}:" in warnings[0] and daemon.materialised == 1


def test_afterwards_everything_is_local(stock, vae, local_vae, daemon):
    """Copies too, since they share the network; ComfyUI's memory management sees a model of its size."""
    other, network = copy.copy(vae), vae.first_stage_model
    vae.materialize()
    assert other.first_stage_model is network and vae.patcher.model_size() > 0
    given = latents(stock, 1, 16, 8, 8)
    for shell in (vae, other):
        assert stock.torch.equal(shell.decode(given), local_vae.decode(given))
        assert stock.torch.equal(shell.first_stage_model.decode(given.to(vae.vae_dtype)).float(),
                                 local_vae.first_stage_model.decode(given.to(vae.vae_dtype)).float())  # fmt: skip
    assert not daemon.calls and daemon.materialised == 1
    stock.management.unload_all_models()
    assert stock.torch.equal(vae.decode(given), local_vae.decode(given))


def test_running_a_layer(stock, vae, local_vae, daemon):
    """Nodes that walk through the network find weights in the very modules that they hold."""
    layer = vae.first_stage_model.taesd_decoder[1]
    given = latents(stock, 1, 16, 8, 8).to(vae.vae_dtype)
    assert stock.torch.equal(layer(given), local_vae.first_stage_model.taesd_decoder[1](given))
    assert daemon.materialised == 1 and not daemon.calls


def test_a_changed_network_computes_locally(stock, vae, local_vae, daemon, caplog):
    """Another forward: only here does it show."""
    decoder = vae.first_stage_model.taesd_decoder
    forward = decoder.forward
    decoder.forward = lambda given: forward(given) * 0
    assert vae.decode(latents(stock, 1, 16, 8, 8)).std() == 0
    assert daemon.materialised == 1 and "a node changed taesd_decoder.forward (" in caplog.text


def _swap(torch, network):
    network.taesd_decoder[1] = torch.nn.Identity()


CHANGES = {
    "a deep layer's function": lambda torch, network: setattr(network.taesd_decoder[1], "_conv_forward", print),
    "another deep layer": _swap,
    "a layer's hook": lambda torch, network: network.taesd_decoder[1].register_forward_hook(lambda *_: None),
    "a tensor on the network": lambda torch, network: setattr(network, "offset", torch.ones(1)),
    "code on the network": lambda torch, network: setattr(network, "decode", lambda latent: latent),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["vae", "network"])
def test_no_change_is_left_out(stock, vae, daemon, caplog, change, way):
    """What cannot travel gives true weights, and says so; whether the VAE is asked or its network."""
    if change == "code on the network" and way == "network":
        pytest.skip("it is the node's own code that is called")
    CHANGES[change](stock.torch, vae.first_stage_model)
    given = latents(stock, 1, 16, 8, 8)
    try:
        vae.decode(given) if way == "vae" else vae.first_stage_model.decode(given.to(vae.vae_dtype))
    except (TypeError, RuntimeError, AttributeError):
        pass  # these changes are not meant to compute
    assert daemon.materialised == 1 and "a node changed" in caplog.text and not daemon.calls


def test_plain_attributes_travel(stock, vae, local_vae, daemon, caplog):
    """Circular padding, as nodes set it: the daemon computes with it, and without it once it is set back."""
    given, network = latents(stock, 1, 16, 8, 8), local_vae.first_stage_model
    layers = [module for module in vae.first_stage_model.modules() if isinstance(module, stock.torch.nn.Conv2d)]
    theirs = [module for module in network.modules() if isinstance(module, stock.torch.nn.Conv2d)]
    plain = local_vae.decode(given)
    for module in (*layers, *theirs):
        module.padding_mode = "circular"
    circular = local_vae.decode(given)
    for module in theirs:
        module.padding_mode = "zeros"
    assert stock.torch.equal(vae.decode(given), circular) and not stock.torch.equal(plain, circular)
    daemon.error = DaemonConnectionError("away")
    assert stock.torch.equal(vae.decode(given), circular), "the local model too"
    daemon.error = None
    for module in layers:
        module.padding_mode = "zeros"
    assert stock.torch.equal(vae.decode(given), plain) and not daemon.calls[-1].attributes
    assert daemon.materialised == 0 and "a node changed" not in caplog.text


def test_looking_for_attributes_is_cheap(stock, tmp_path, daemon):
    """A KL VAE has some 250 layers: looking costs little more than a walk over them, which is nothing beside a call."""
    real = family(stock, FAMILIES["SDXL"])
    shell = make_vae([empty_file(tmp_path / "vae.safetensors", real.first_stage_model.state_dict())], client=daemon)
    watch, times, walks = shell.first_stage_model.luna.watch, [], []
    for _ in range(9):
        start = time.perf_counter()
        walked = [dict(vars(module)) for module in shell.first_stage_model.modules()]
        walks.append(time.perf_counter() - start)
        start = time.perf_counter()
        assert watch.changes() == ({}, []) and walked
        times.append(time.perf_counter() - start)
    assert min(times) < 10 * min(walks), (times, walks)


def test_a_copied_layer_without_weights_says_what_to_do(stock, vae):
    copied = copy.deepcopy(vae.first_stage_model.taesd_decoder[1])
    with pytest.raises(ModelError, match="materialize"):
        copied(latents(stock, 1, 16, 8, 8))


def test_the_count_is_told_when_the_daemon_answers_again(stock, vae, daemon):
    daemon.error = DaemonConnectionError("away")
    vae.get_sd()
    assert daemon.materialised == 0
    daemon.error = None
    other = make_vae([DEMO_VAE], client=daemon)
    other.decode(latents(stock, 1, 16, 8, 8))
    assert daemon.materialised == 1


def test_nothing_is_logged_while_all_is_well(stock, vae, caplog):
    with caplog.at_level(logging.WARNING, "luna_daemon"):
        vae.decode(latents(stock, 1, 16, 8, 8))
    assert not [record for record in caplog.records if record.name == "luna_daemon"]
