"""LoRA in whole diffusers pipelines, where one call goes to several models and not all of them have every adapter."""

import copy
import logging
import pickle

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline  # noqa: E402
from diffusers.loaders import StableDiffusionLoraLoaderMixin  # noqa: E402
from diffusion import unet  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

pytestmark = pytest.mark.compat

TARGETS = {"unet": ["to_k", "to_q", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}


class Pipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Just the models that LoRA is loaded into."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder)


def text_encoder():
    config = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=20,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval()


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    return Pipeline(unet().eval(), text_encoder())


def weights(pipe, seed, parts=("unet", "text_encoder"), **options):
    """An adapter for some of the models, by the names that pipelines save it under."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for part in parts:
        config = LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": TARGETS[part], **options})
        fresh = {"unet": unet, "text_encoder": text_encoder}[part]()
        inject_adapter_in_model(config, fresh)
        for name, value in get_peft_model_state_dict(fresh).items():
            found[f"{part}.{name}"] = 0.3 * torch.randn(value.shape, generator=generator)
    return found


@torch.no_grad()
def outputs(pipe):
    text = pipe.text_encoder(torch.arange(8)[None])[0]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    states = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2))
    image = pipe.unet(noise, torch.tensor([5]), encoder_hidden_states=states).sample
    return {"unet": image, "text_encoder": text}


def assert_same(found, **expected):
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, atol=1e-5, rtol=1e-5, msg=lambda text, at=part: f"{at}: {text}")


class TestPartialAdapters:
    """One adapter for both models, one for the denoiser, one for the text encoder."""

    @pytest.fixture
    def loaded(self, pipe):
        base = outputs(pipe)
        alone = {}
        for seed, (name, parts) in enumerate(
            {"both": ("unet", "text_encoder"), "image": ("unet",), "text": ("text_encoder",)}.items()
        ):
            pipe.load_lora_weights(weights(pipe, seed, parts), adapter_name=name)
        for name in ("both", "image", "text"):
            pipe.set_adapters(name)
            alone[name] = outputs(pipe)
        return pipe, base, alone

    def test_a_model_without_the_active_adapter_gives_its_base_output(self, loaded):
        pipe, base, alone = loaded
        assert_same(alone["image"], text_encoder=base["text_encoder"])
        assert_same(alone["text"], unet=base["unet"])
        for part in ("unet", "text_encoder"):
            assert not torch.allclose(alone["both"][part], base[part], atol=1e-3)
        assert pipe.get_list_adapters() == {"unet": ["both", "image"], "text_encoder": ["both", "text"]}

    @pytest.mark.parametrize("names", [["image", "text"], ["text", "image"]])
    def test_each_model_uses_its_own(self, loaded, names):
        pipe, _, alone = loaded
        pipe.set_adapters(names)
        assert_same(outputs(pipe), unet=alone["image"]["unet"], text_encoder=alone["text"]["text_encoder"])
        assert pipe.get_active_adapters() == names

    def test_weights_of_single_models(self, loaded):
        pipe, base, alone = loaded
        pipe.set_adapters(["both", "image"], [{"unet": 0.0, "text_encoder": 1.0}, {"unet": 1.0, "text_encoder": 0.5}])
        assert_same(outputs(pipe), unet=alone["image"]["unet"], text_encoder=alone["both"]["text_encoder"])

    def test_fusing_one_that_only_one_model_has(self, loaded):
        pipe, base, alone = loaded
        pipe.set_adapters(["image"])
        pipe.fuse_lora(components=["unet", "text_encoder"])
        assert pipe.fused_loras == {"image"}
        assert_same(outputs(pipe), unet=alone["image"]["unet"], text_encoder=base["text_encoder"])
        pipe.unfuse_lora(components=["unet", "text_encoder"])
        assert pipe.num_fused_loras == 0
        pipe.set_adapters(["both"])
        assert all(torch.equal(value, alone["both"][part]) for part, value in outputs(pipe).items())

    def test_nothing_of_it_trains_where_it_is_not(self, loaded):
        pipe, _, _ = loaded
        pipe.set_adapters(["image"])
        assert {n.split(".")[-2] for n, p in pipe.unet.named_parameters() if p.requires_grad and "lora" in n} == {
            "image"
        }
        assert not any(p.requires_grad for n, p in pipe.text_encoder.named_parameters() if "lora" in n)

    def test_deleting_goes_through_both(self, loaded):
        pipe, base, alone = loaded
        pipe.set_adapters(["both", "image"])
        pipe.delete_adapters("both")
        assert_same(outputs(pipe), unet=alone["image"]["unet"], text_encoder=base["text_encoder"])
        assert pipe.get_list_adapters() == {"unet": ["image"], "text_encoder": ["text"]}

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
    def test_in_a_copy_of_the_models(self, loaded, twin):
        pipe, _, alone = loaded
        other = Pipeline(twin(pipe.unet), twin(pipe.text_encoder))
        del pipe.unet, pipe.text_encoder
        other.set_adapters(["image", "text"])
        assert_same(outputs(other), unet=alone["image"]["unet"], text_encoder=alone["text"]["text_encoder"])

    def test_a_name_that_no_model_has_is_refused(self, loaded):
        pipe, _, _ = loaded
        pipe.set_adapters(["both"])
        before = outputs(pipe)
        with pytest.raises(ValueError, match="imaeg"):
            pipe.set_adapters(["both", "imaeg"])
        with pytest.raises(ValueError, match="imaeg"):
            pipe.unet.set_adapters(["both", "imaeg"])
        layer = next(module for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer))
        with pytest.raises(ValueError, match="text"):
            layer.set_adapter("text")  # by itself it is no adapter of this model
        assert all(torch.equal(value, before[part]) for part, value in outputs(pipe).items())


class TestFormats:
    def kohya(self, state, alpha):
        found = {}
        for key, value in state.items():
            part, rest = key.split(".", 1)
            module, factor = rest.rsplit(".lora_", 1)
            if part == "text_encoder" and not module.startswith("text_model."):
                module = f"text_model.{module}"
            name = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + module.replace(".", "_")
            found[f"{name}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"] = value
            found[f"{name}.alpha"] = torch.tensor(alpha)
        return found

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_kohya_with_alphas(self, pipe, low_cpu_mem_usage):
        state = weights(pipe, 1)
        pipe.load_lora_weights(dict(state), adapter_name="plain")
        pipe.set_adapters("plain", 0.5)
        expected = outputs(pipe)
        pipe.load_lora_weights(
            self.kohya(state, 2.0), adapter_name="kohya", low_cpu_mem_usage=low_cpu_mem_usage
        )  # 2 / 4 is what a weight of 0.5 gives
        pipe.set_adapters("kohya")
        assert_same(outputs(pipe), **expected)
        for part in (pipe.unet, pipe.text_encoder):
            assert not any(p.is_meta for p in part.parameters())
            scalings = {m.scaling["kohya"] for m in part.modules() if isinstance(m, LoraLayer)}
            assert scalings == {0.5}

    def test_ranks_of_single_modules_survive_saving(self, pipe, tmp_path):
        names = {key.split(".", 1)[1].rsplit(".lora_", 1)[0] for key in weights(pipe, 1, ("unet",))}
        ranks = {f"^{name}": 1 + index % 3 for index, name in enumerate(sorted(names))}
        state = weights(pipe, 1, ("unet",), rank_pattern=ranks, alpha_pattern=dict.fromkeys(ranks, 6))
        pipe.load_lora_weights(dict(state), adapter_name="a")
        found = {f"^{n}": m.r["a"] for n, m in pipe.unet.named_modules() if isinstance(m, LoraLayer)}
        assert found == ranks
        before = outputs(pipe)
        pipe.unet.save_lora_adapter(tmp_path, adapter_name="a")
        pipe.unload_lora_weights()
        pipe.unet.load_lora_adapter(
            tmp_path, prefix=None, use_safetensors=True, weight_name="pytorch_lora_weights.safetensors"
        )
        assert torch.equal(outputs(pipe)["unet"], before["unet"])


class TestMessages:
    """What diffusers logs follows from what loading reports back to it."""

    KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_A"

    @pytest.fixture
    def logged(self, caplog):
        logger = logging.getLogger("diffusers")
        logger.addHandler(caplog.handler)
        yield caplog
        logger.removeHandler(caplog.handler)

    def test_missing_keys_have_the_name_that_the_model_gives_them(self, pipe, logged):
        state = weights(pipe, 1, ("unet",))
        del state[f"unet.{self.KEY}.weight"]
        pipe.load_lora_weights(state)
        assert f"led to missing keys in the model: {self.KEY}.default_0.weight." in logged.text

    def test_keys_of_other_adapters_are_not_missing(self, pipe, logged):
        pipe.load_lora_weights(weights(pipe, 1, ("unet",)), adapter_name="a")
        pipe.load_lora_weights(weights(pipe, 2, ("unet",)), adapter_name="b")  # a name found in "down_blocks"
        assert "missing keys" not in logged.text

    def test_unexpected_keys(self, pipe, logged):
        state = weights(pipe, 1, ("unet",))
        state[f"unet.{self.KEY}.weight.diffusers_cat"] = torch.tensor(1.0)
        pipe.load_lora_weights(state, adapter_name="attn1")  # older diffusers shows keys with the adapter's name only
        assert "unexpected keys found in the model" in logged.text
        assert ".diffusers_cat" in logged.text


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_fusing_looks_at_the_live_weights(pipe, part, value):
    pipe.load_lora_weights(weights(pipe, 1), adapter_name="a")
    layer = next(module for module in getattr(pipe, part).modules() if isinstance(module, LoraLayer))
    with torch.no_grad():
        layer.lora_A["a"].weight.add_(value)
    base = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="'a'"):
        pipe.fuse_lora(components=[part], safe_fusing=True)
    assert torch.equal(layer.base_layer.weight, base)
    pipe.fuse_lora(components=[part], safe_fusing=False)
    assert layer.base_layer.weight.isnan().any()  # not the output's: some attention kernels give 0 for NaN
