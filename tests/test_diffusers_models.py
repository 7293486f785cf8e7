"""The life of an adapter inside diffusers models, through diffusers' own calls.

`TestReport` is the report that began it: a copy asked for by `modules_to_save` came out frozen. The rest runs the table
of steps in `life` over small models of every family.
"""

import json

import pytest
import torch
from parameterized import parameterized

diffusers = pytest.importorskip("diffusers")

import life  # noqa: E402
from diffusers import (  # noqa: E402
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusion import unet  # noqa: E402
from life import Door  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from peft import LoraConfig, get_peft_model_state_dict  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils import ModulesToSaveWrapper  # noqa: E402

pytestmark = pytest.mark.compat

IN_FOLDER = {"use_safetensors": True, "weight_name": "pytorch_lora_weights.safetensors"}
"""What older diffusers is told offline: it does not look for the file by itself."""

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


def cogvideox(rotary=False):
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=rotary,
    )


def noise(*shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def cogvideox_inputs(dtype):
    return {
        "hidden_states": noise(1, 2, 4, 8, 8, dtype=dtype),
        "encoder_hidden_states": noise(1, 8, 8, dtype=dtype),
        "timestep": torch.tensor([3]),
    }


def cogvideox_rotary_inputs(dtype):
    angles = noise(2 * 4 * 4, 8, dtype=torch.float32)
    return cogvideox_inputs(dtype) | {"image_rotary_emb": (angles.cos(), angles.sin())}


def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs(dtype):
    return {
        "hidden_states": noise(1, 16, 4, dtype=dtype),
        "encoder_hidden_states": noise(1, 8, 32, dtype=dtype),
        "pooled_projections": noise(1, 32, dtype=dtype),
        "img_ids": torch.zeros(16, 3, dtype=dtype),
        "txt_ids": torch.zeros(8, 3, dtype=dtype),
        "timestep": torch.tensor([1.0], dtype=dtype),
    }


def sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )


def sd3_inputs(dtype):
    return {
        "hidden_states": noise(1, 4, 8, 8, dtype=dtype),
        "encoder_hidden_states": noise(1, 6, 16, dtype=dtype),
        "pooled_projections": noise(1, 16, dtype=dtype),
        "timestep": torch.tensor([1.0], dtype=dtype),
    }


def unet_inputs(dtype):
    return {
        "sample": noise(1, 4, 8, 8, dtype=dtype),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": noise(1, 4, 8, dtype=dtype),
    }


MODELS = {
    "cogvideox": (cogvideox, cogvideox_inputs, ATTENTION, ["proj_out"]),
    "cogvideox_rotary": (lambda: cogvideox(rotary=True), cogvideox_rotary_inputs, ATTENTION, ["proj_out"]),
    "flux": (flux, flux_inputs, ATTENTION, ["proj_out", "x_embedder"]),
    "sd3": (sd3, sd3_inputs, ATTENTION, ["proj_out", "time_text_embed"]),
    "unet": (unet, unet_inputs, ATTENTION, ["conv_out", "conv_in"]),
}


class DiffusersDoor(Door):
    """The calls of diffusers' adapter mixin."""

    def fresh(self):
        return type(self)(self.make, self.make_inputs, self.targets, self.saved, dtype=self.dtype)

    def add(self, name, copies=True, **options):
        self.model.add_adapter(self.config(copies, **options), adapter_name=name)

    def set(self, name):
        self.model.set_adapter(name)

    def set_list(self, names):
        self.model.set_adapter(names)

    def active(self):
        return self.model.active_adapters()

    def disable(self):
        self.model.disable_adapters()

    def enable(self):
        self.model.enable_adapters()

    def delete(self, name):
        self.model.delete_adapters(name)

    def merge(self):
        self.model.fuse_lora()

    def unmerge(self):
        self.model.unfuse_lora()

    def merge_and_unload(self):
        self.model.fuse_lora()
        self.model.unload_lora()
        return self.model

    def unload(self):
        self.model.unload_lora()
        return self.model

    def save(self, name, folder):
        self.model.save_lora_adapter(folder, adapter_name=name)

    def load(self, folder, name, trainable=False):
        self.model.load_lora_adapter(folder, prefix=None, adapter_name=name, **IN_FOLDER)


class OtherNamesDoor(DiffusersDoor):
    """The same by `set_adapters`, `disable_lora` and `enable_lora`, diffusers' second set of calls."""

    def set(self, name):
        self.model.set_adapters(name)

    def set_list(self, names):
        self.model.set_adapters(names)

    def disable(self):
        self.model.disable_lora()

    def enable(self):
        self.model.enable_lora()


def cases():
    for model in MODELS:
        for name in life.STEPS:
            for frozen in (False, True):
                for dtype in (torch.float32, torch.bfloat16):
                    yield model, name, frozen, dtype


def case_name(function, _, parameters):
    model, name, frozen, dtype = parameters.args
    return f"{function.__name__}_{model}_{name}_{'frozen' if frozen else 'trainable'}_{str(dtype).split('.')[-1]}"


class TestReport:
    """As it was reported: bfloat16, a base that trains, `modules_to_save=["proj_out"]`."""

    def config(self):
        return LoraConfig(
            r=4, lora_alpha=4, init_lora_weights=True, target_modules=ATTENTION, modules_to_save=["proj_out"]
        )

    def test_the_copies_train(self):
        model = cogvideox().to(torch.bfloat16)
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.add_adapter(self.config())
        copies = {name: p for name, p in model.named_parameters() if ".modules_to_save." in name}
        assert set(copies) == {"proj_out.modules_to_save.default.weight", "proj_out.modules_to_save.default.bias"}
        assert all(parameter.requires_grad for parameter in copies.values())

    def test_exactly_the_adapter_trains(self):
        model = cogvideox().to(torch.bfloat16)
        model.add_adapter(self.config())
        attention = "transformer_blocks.0.attn1"
        expected = {f"{attention}.{target}.lora_{f}.default.weight" for target in ATTENTION for f in "AB"}
        expected |= {"proj_out.modules_to_save.default.weight", "proj_out.modules_to_save.default.bias"}
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected

    def test_a_step_moves_the_copies(self):
        model = cogvideox().to(torch.bfloat16)
        model.add_adapter(self.config())
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(**cogvideox_inputs(torch.bfloat16)).sample.float().square().mean().backward()
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
        # A is multiplied by a zero B, so that its first gradient is zero.
        assert {name for name in moved if "modules_to_save" in name} == {
            "proj_out.modules_to_save.default.weight",
            "proj_out.modules_to_save.default.bias",
        }
        assert not any("original_module" in name or "base_layer" in name for name in moved)


class TestLife:
    @parameterized.expand(list(cases()), name_func=case_name)
    def test_step(self, model, name, frozen, dtype):
        run(DiffusersDoor, model, name, frozen, dtype)

    @parameterized.expand(
        [(model, name) for model in ("cogvideox", "unet") for name in life.STEPS if "set" in name or "able" in name]
    )
    def test_step_by_other_names(self, model, name):
        run(OtherNamesDoor, model, name, False, torch.float32)


def run(door_cls, model, name, frozen, dtype):
    import pathlib
    import tempfile

    door = door_cls(*MODELS[model], frozen=frozen, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        life.run(name, door, pathlib.Path(folder))


@pytest.fixture
def door():
    return DiffusersDoor(*MODELS["cogvideox"])


class TestFiles:
    def test_saved_keys(self, door, tmp_path):
        door.two()
        door.set("b")
        door.save("a", tmp_path)
        path = tmp_path / "pytorch_lora_weights.safetensors"
        attention = "transformer_blocks.0.attn1"
        expected = {f"{attention}.{target}.lora_{f}.weight" for target in ATTENTION for f in "AB"}
        assert set(load_file(path)) == expected | {"proj_out.weight", "proj_out.bias"}
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert metadata["modules_to_save"] == ["proj_out"]
        assert sorted(metadata["target_modules"]) == sorted(ATTENTION)

    def test_a_file_without_metadata_loads_its_copies_into_the_model(self, door, tmp_path):
        """Pipelines save without the configuration: there the output layer's values are the model's own."""
        door.add("a")
        door.perturb("a", 1)
        output = door.out()
        state = get_peft_model_state_dict(door.model, adapter_name="a")
        fresh = door.fresh()
        fresh.model.load_lora_adapter(dict(state), prefix=None, adapter_name="a")
        assert not any(isinstance(module, ModulesToSaveWrapper) for module in fresh.model.modules())
        assert torch.equal(fresh.out(), output)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_low_cpu_mem_usage(self, door, tmp_path, low_cpu_mem_usage):
        door.add("a")
        door.perturb("a", 1)
        door.save("a", tmp_path)
        fresh = door.fresh()
        fresh.model.load_lora_adapter(
            tmp_path, prefix=None, adapter_name="a", low_cpu_mem_usage=low_cpu_mem_usage, **IN_FOLDER
        )
        assert not any(tensor.is_meta for tensor in [*fresh.model.parameters(), *fresh.model.buffers()])
        assert torch.equal(fresh.out(), door.out())
        assert fresh.trainable() == fresh.names("a")

    def test_a_free_name(self, door, tmp_path):
        door.add("a")
        door.save("a", tmp_path)
        door.model.load_lora_adapter(tmp_path, prefix=None, **IN_FOLDER)
        assert list(door.model.peft_config) == ["a", "default_1"]

    @pytest.mark.parametrize("copies", [False, True])
    def test_a_free_name_after_others_were_deleted(self, door, tmp_path, copies):
        for name in "abc":
            door.add(name, copies=copies)
        door.save("a", tmp_path)
        door.model.delete_adapters(["b", "a"])
        for module in door.model.modules():
            if isinstance(module, BaseTunerLayer):
                assert list(module.r) == ["c"]
        door.model.load_lora_adapter(tmp_path, prefix=None, **IN_FOLDER)
        assert list(door.model.peft_config) == ["c", "default_1"]
        door.model.delete_adapters(["c", "default_1"])
        door.model.load_lora_adapter(tmp_path, prefix=None, **IN_FOLDER)
        assert list(door.model.peft_config) == ["default_0"]

    @pytest.mark.parametrize("problem", ["shape", "nan"])
    def test_a_file_that_does_not_fit_changes_nothing(self, door, problem):
        door.add("a")
        door.perturb("a", 1)
        output, flags = door.out(), door.flags()
        state = {
            name: value.clone() for name, value in get_peft_model_state_dict(door.model, adapter_name="a").items()
        }
        key = "transformer_blocks.0.attn1.to_k.lora_A.weight"
        state[key] = torch.zeros(4, 3) if problem == "shape" else torch.full_like(state[key], float("nan"))
        with pytest.raises((RuntimeError, ValueError), match="to_k"):
            door.model.load_lora_adapter(state, prefix=None, adapter_name="b")
        assert list(door.model.peft_config) == ["a"]
        assert not any(".b." in name for name in door.model.state_dict())
        assert door.flags() == flags
        assert torch.equal(door.out(), output)


class TestScale:
    def test_weights_of_set_adapters(self, door):
        door.add("a")
        door.perturb("a", 1)
        full = door.out()
        door.model.set_adapters(["a"], [0.0])
        copy_only = door.out()
        door.model.set_adapters(["a"], [1.0])
        assert torch.equal(door.out(), full)
        for module in door.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])
        assert torch.allclose(copy_only, door.out(), atol=1e-6)  # the copy in full, the tuner part gone

    def test_attention_kwargs(self, door):
        door.add("a")
        door.perturb("a", 1)
        full = door.out()
        with torch.no_grad():
            half = door.model(**door.make_inputs(torch.float32), attention_kwargs={"scale": 0.5}).sample
        assert not torch.equal(half, full)
        assert torch.allclose(door.out(), full, atol=1e-6)
        door.model.set_adapters(["a"], [0.5])
        assert torch.allclose(door.out(), half, atol=1e-5)

    def test_fuse_with_a_scale(self, door):
        door.add("a")
        door.perturb("a", 1)
        before = door.weights()
        door.model.set_adapters(["a"], [0.5])
        half = door.out()
        door.model.set_adapters(["a"], [1.0])
        door.model.fuse_lora(lora_scale=0.5)
        assert torch.allclose(door.out(), half, atol=1e-5)
        door.model.unfuse_lora()
        life.assert_weights_equal(before, door.weights())

    def test_fuse_one_of_two(self, door):
        door.two()
        output = door.out()
        door.model.fuse_lora(adapter_names=["a"])
        life.close(door.out(), output, torch.float32)
        door.model.unfuse_lora()
        assert torch.equal(door.out(), output)

    def test_safe_fusing_refuses_nan(self, door):
        door.add("a")
        base = {n: v.clone() for n, v in door.model.state_dict().items() if "original" in n or "base_layer" in n}
        with torch.no_grad():
            door.model.proj_out.modules_to_save["a"].bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="proj_out"):
            door.model.fuse_lora(safe_fusing=True)
        after = door.model.state_dict()
        assert all(torch.equal(after[name].nan_to_num(), value) for name, value in base.items() if "original" in name)


def test_cast_training_params_and_layerwise_casting():
    from diffusers.training_utils import cast_training_params

    door = DiffusersDoor(*MODELS["cogvideox"], dtype=torch.bfloat16)
    door.add("a")
    cast_training_params(door.model, dtype=torch.float32)
    dtypes = {name: p.dtype for name, p in door.model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == door.names("a")
    assert door.trainable() == door.names("a")
