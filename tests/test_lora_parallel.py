"""LoRA on layers of which each rank holds a part: Megatron-Core's, and models that transformers has spread."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.testing import assert_close
from versions import needs

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.model import LoraModel, add_lora_tp_hooks_dtensor, get_tp_plan_and_mesh
from peft.tuners.lora.tensor_parallel import placement_for, split_factor
from peft.tuners.lora.tp_layer import LoraParallelLinear, dispatch_megatron, get_default_module_allowlist

# ---------------------------------------------------------------------------------------------------------------- Megatron

RANKS = 2


class _Parallel(nn.Module):
    """What the parallel linear layers of Megatron-Core have in common, as one of two ranks sees them."""

    def __init__(self, input_size, output_size, *, config, init_method, bias=True, skip_bias_add=False):
        super().__init__()
        self.input_size, self.output_size, self.config, self.skip_bias_add = (
            input_size,
            output_size,
            config,
            skip_bias_add,
        )
        self.weight = nn.Parameter(torch.empty(self.part()))
        init_method(self.weight)
        self.bias = nn.Parameter(torch.ones(self.part()[0])) if bias else None

    def forward(self, x):
        added = None if self.skip_bias_add else self.bias
        return nn.functional.linear(x, self.weight, added), self.bias if self.skip_bias_add else None


class ColumnParallelLinear(_Parallel):
    def __init__(self, *args, gather_output=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.gather_output = gather_output

    def part(self):
        return self.output_size // RANKS, self.input_size


class RowParallelLinear(_Parallel):
    def __init__(self, *args, input_is_parallel=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.input_is_parallel = input_is_parallel

    def part(self):
        return self.output_size, self.input_size // RANKS


@dataclass
class TransformerConfig:
    num_layers: int = 1


@pytest.fixture
def megatron(monkeypatch):
    """A package with the interface of Megatron-Core."""
    parts = {
        "megatron": {},
        "megatron.core": {},
        "megatron.core.tensor_parallel": {
            "ColumnParallelLinear": ColumnParallelLinear,
            "RowParallelLinear": RowParallelLinear,
        },
        "megatron.core.transformer": {},
        "megatron.core.transformer.transformer_config": {"TransformerConfig": TransformerConfig},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


class Mlp(nn.Module):
    """A column-parallel and a row-parallel layer, as in Megatron's transformer layers."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        torch.manual_seed(0)
        common = {"config": TransformerConfig(), "init_method": nn.init.xavier_normal_}
        self.up = ColumnParallelLinear(6, 8, **common)
        self.down = RowParallelLinear(8, 6, input_is_parallel=True, skip_bias_add=True, **common)
        self.plain = nn.Linear(6, 6)
        self.to(dtype)

    def forward(self, x):
        hidden, _ = self.up(x)
        output, bias = self.down(hidden)
        return self.plain(output + bias)


def config(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["up", "down"], "megatron_config": {"num_layers": 3}, **options})


@torch.no_grad()
def filled(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.5)
    return model.eval()


def test_where_megatron_is_missing_the_error_says_what_needs_it():
    base = nn.ModuleDict({"up": nn.Linear(4, 4)})
    with pytest.raises(
        ImportError, match="megatron_config is set, which needs megatron.core.tensor_parallel: No module"
    ):
        inject_adapter_in_model(config(target_modules=["up"]), base)
    assert type(base["up"]) is nn.Linear


def test_the_factor_on_the_split_side_is_parallel(megatron):
    tuner = LoraModel(Mlp(), config(), "default")
    up, down = tuner.model.up, tuner.model.down
    assert type(up) is type(down) is LoraParallelLinear and repr(up).startswith("lora.LoraParallelLinear(")
    assert type(up.lora_A["default"]) is nn.Linear and type(up.lora_B["default"]) is ColumnParallelLinear
    assert type(down.lora_A["default"]) is RowParallelLinear and type(down.lora_B["default"]) is nn.Linear
    shapes = {name: tuple(value.shape) for name, value in tuner.named_parameters() if "lora_" in name}
    assert shapes == {
        "model.up.lora_A.default.weight": (2, 6),
        "model.up.lora_B.default.weight": (4, 2),
        "model.down.lora_A.default.weight": (2, 4),
        "model.down.lora_B.default.weight": (6, 2),
    }
    assert up.lora_B["default"].config == TransformerConfig(3)
    assert down.lora_A["default"].input_is_parallel and down.lora_A["default"].skip_bias_add
    assert not up.lora_B["default"].gather_output


def test_it_starts_as_the_base_layer_and_gives_output_and_bias(megatron):
    base, x = Mlp(), torch.randn(2, 3, 4)
    tuner = LoraModel(Mlp(), config(init_lora_weights="gaussian"), "default").eval()
    for name, inputs in (("up", torch.randn(2, 3, 6)), ("down", x)):
        output, bias = getattr(tuner.model, name)(inputs)
        expected, expected_bias = getattr(base, name)(inputs)
        assert_close(output, expected)
        assert bias is None if expected_bias is None else torch.equal(bias, expected_bias)
    assert tuner.model.up.lora_A["default"].weight.ne(0).any()


def test_forward_merging_and_unmerging(megatron):
    model, x = filled(get_peft_model(Mlp(), config(lora_alpha=3))), torch.randn(2, 3, 6)
    base, up = Mlp(), model.base_model.model.up
    hidden = nn.functional.linear(x, base.up.weight + up.get_delta_weight("default"), base.up.bias)
    assert_close(up(x)[0], hidden)
    assert_close(up.get_delta_weight("default"), 1.5 * up.lora_B["default"].weight @ up.lora_A["default"].weight)
    output = model(x)
    assert not torch.allclose(output, base(x))
    assert torch.equal(up.delta_weight("default"), up.get_delta_weight("default"))
    model.merge_adapter(safe_merge=True)
    assert up.merged and isinstance(up(x), tuple)
    assert_close(model(x), output)
    model.unmerge_adapter()
    assert torch.equal(up.get_base_layer().weight, base.up.weight)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    plain = model.merge_and_unload()
    assert type(plain.up) is ColumnParallelLinear
    assert_close(plain(x), output)


def test_a_second_adapter_is_made_like_the_first(megatron):
    tuner = LoraModel(Mlp(), config(), "default")
    tuner.peft_config["other"] = config(r=4)
    tuner.inject_adapter(tuner.model, "other")
    B = tuner.model.up.lora_B["other"]
    assert type(B) is ColumnParallelLinear and B.weight.shape == (4, 4) and B.config == TransformerConfig(3)
    filled(tuner)
    tuner.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "cat")
    down = tuner.model.down
    expected = down.get_delta_weight("default") + down.get_delta_weight("other")
    assert_close(down.get_delta_weight("both"), expected)
    with pytest.raises(ValueError, match="'svd' needs whole updates, but each rank has a part of those of 'up'"):
        tuner.add_weighted_adapter(["default", "other"], [1.0, 1.0], "w", "svd")


def test_half_precision_saving_and_loading(megatron, tmp_path):
    model, x = filled(get_peft_model(Mlp(torch.bfloat16), config())), torch.randn(2, 6).bfloat16()
    assert model.base_model.model.up.lora_B["default"].weight.dtype == torch.float32
    output = model(x)
    assert output.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Mlp(torch.bfloat16), tmp_path)
    assert type(again.base_model.model.up) is LoraParallelLinear
    assert torch.equal(again(x), output)


def test_gains_of_the_hidden_features(megatron):
    up, x = filled(LoraModel(Mlp(), config(), "default")).model.up, torch.randn(3, 6)
    assert_close(up.term(x, "default", gains=torch.tensor([2.0, 2.0])), 2 * up.term(x, "default"))


def test_other_layers_are_adapted_as_usual(megatron):
    model = LoraModel(Mlp(), config(target_modules=["up", "plain"]), "default").model
    assert type(model.plain).__module__ == "peft.tuners.lora.layer"
    assert dispatch_megatron(nn.Linear(2, 2), "default", config()) is None


def test_without_a_megatron_configuration_they_are_not_known(megatron):
    assert dispatch_megatron(Mlp().up, "default", config(megatron_config=None)) is None
    with pytest.raises(ValueError, match="cannot adapt up: it is a ColumnParallelLinear"):
        LoraModel(Mlp(), config(megatron_config=None), "default")


def test_only_modules_of_megatron_are_imported():
    assert get_default_module_allowlist() == ["megatron"]
    for core in ("os", "megatron", "megatronx.core"):
        with pytest.raises(ValueError, match=f"such as 'megatron.core', got '{core}'"):
            dispatch_megatron(nn.Linear(2, 2), "default", config(megatron_core=core))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lora_bias": True}, "up: lora_bias is not supported on a parallel layer"),
        (
            {"init_lora_weights": "pissa"},
            "up: init_lora_weights='pissa' of the adapter 'default' is not supported on a parallel",
        ),
        ({"init_lora_weights": "mica"}, "does not support mica"),
    ],
)
def test_options_that_parallel_layers_do_not_have(megatron, options, match):
    base = Mlp()
    with pytest.raises(ValueError, match=match):
        LoraModel(base, config(**options), "default")
    assert type(base.up) is ColumnParallelLinear


def test_mixed_batches_are_refused(megatron):
    model = filled(get_peft_model(Mlp(), config()))
    with pytest.raises(ValueError, match="up: a parallel layer does not support mixed batches"):
        model(torch.randn(2, 6), adapter_names=["default", "__base__"])


# ------------------------------------------------------------------------------------------------------------ transformers

with_spread_models = needs("transformers", "5.17", "does not spread a model over devices as DTensors")


@pytest.fixture(scope="module")
def mesh():
    """A mesh of this one process."""
    if dist.is_initialized():
        pytest.skip("torch.distributed is in use")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


TARGETS = ["q_proj", "o_proj", "embed_tokens", "down_proj", "lm_head"]
IDS = torch.tensor([[1, 2, 3, 4, 5]])


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)).eval()


def spread_over(model, mesh):
    """Spread a transformers model over a mesh, as loading it with a `DistributedConfig` does."""
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = {}
    for name, _ in [*model.named_modules(), *model.named_parameters()]:
        generic = replace_layer_number_by_wildcard(name)
        style = model._tp_plan.get(generic, model._tp_plan.get(generic.rpartition(".")[0]))
        if style is not None and (generic in model._tp_plan or name.endswith(("weight", "bias"))):
            plan[name] = style
    model._device_mesh, model._tp_size = mesh, mesh.size()
    return apply_tensor_parallelism(model, mesh, plan)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_against_whole_model(mesh):
    """Everything that a model that is spread must do like one that is not; also run by several processes."""
    settings = {"target_modules": TARGETS, "r": 3, "lora_alpha": 5}
    torch.manual_seed(1)
    plain = get_peft_model(llama(), LoraConfig(init_lora_weights=False, **settings))
    torch.manual_seed(5 + dist.get_rank())  # ranks that do not agree by themselves
    model = get_peft_model(spread_over(llama(), mesh), LoraConfig(init_lora_weights=False, **settings))
    started = {name: whole(value) for name, value in model.named_parameters() if "lora_" in name}
    for name, value in started.items():
        everywhere = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, value.detach().contiguous())
        assert all(torch.equal(other, value) for other in everywhere), name
    state = get_peft_model_state_dict(plain, save_embedding_layers=False)
    assert set_peft_model_state_dict(model, state).unexpected_keys == []
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        assert_close(model(input_ids=IDS).logits, expected)
    for each in (plain, model):
        each.train()
        each(input_ids=IDS, labels=IDS).loss.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters()):
        if theirs.grad is not None:
            assert_close(whole(ours.grad), theirs.grad, msg=name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for each, optimizer in ((plain, torch.optim.AdamW(plain.parameters())), (model, torch.optim.AdamW(trained))):
        optimizer.step()
        each.eval()
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
        base = whole(model.base_model.model.model.layers[0].self_attn.q_proj.get_base_weight()).clone()
        model.merge_adapter()
        assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(whole(model.base_model.model.model.layers[0].self_attn.q_proj.get_base_weight()), base)
    return model


@pytest.mark.compat
@with_spread_models
@pytest.mark.filterwarnings("ignore")
def test_a_spread_model_does_what_a_whole_one_does(mesh):
    model = check_against_whole_model(mesh)
    layers = model.base_model.model.model
    attention = layers.layers[0].self_attn

    def placements(*tensors):
        return [tensor.placements[0] for tensor in tensors]

    q, o, table = attention.q_proj, attention.o_proj, layers.embed_tokens
    assert placements(q.lora_A["default"].weight, q.lora_B["default"].weight) == [Replicate(), Shard(0)]
    assert placements(o.lora_A["default"].weight, o.lora_B["default"].weight) == [Shard(1), Replicate()]
    assert placements(*table.factors("default")) == [Shard(1), Replicate()]


@pytest.mark.compat
@with_spread_models
@pytest.mark.filterwarnings("ignore")
def test_loading_and_a_second_adapter(mesh, tmp_path):
    plain = filled(get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"], lora_dropout=0.1)))
    plain.save_pretrained(tmp_path, save_embedding_layers=False)
    model = PeftModel.from_pretrained(spread_over(llama(), mesh), tmp_path)
    model.load_adapter(tmp_path, "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", "cat")
    model.set_adapter("both")
    assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    with pytest.raises(ValueError, match="'svd' needs whole updates"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "w", "svd")


def test_the_styles_and_the_factor_that_they_split():
    found = {
        style: split_factor(style)
        for style in ("colwise", "colwise_gather_output", "rowwise", "rowwise_rep", "replicate")
    }
    assert found == {
        "colwise": "lora_B",
        "colwise_gather_output": "lora_B",
        "rowwise": "lora_A",
        "rowwise_rep": "lora_A",
        "replicate": None,
    }


@pytest.mark.compat
@with_spread_models
def test_plan_and_mesh_of_a_module(mesh):
    model = SimpleNamespace(_device_mesh=mesh, _tp_plan={"layers.*.q": "colwise", "head": "rowwise"})
    assert get_tp_plan_and_mesh(model, "layers.11.q") == ("colwise", mesh)
    assert get_tp_plan_and_mesh(model, "head") == ("rowwise", mesh)
    assert get_tp_plan_and_mesh(model, "layers.11.k") == (None, None)
    assert get_tp_plan_and_mesh(nn.Linear(2, 2), "layers.11.q") == (None, None)
    several = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "tp"))
    model._device_mesh = several
    assert get_tp_plan_and_mesh(model, "head") == ("rowwise", several["tp"])
    model._device_mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("pp", "fsdp"))
    assert get_tp_plan_and_mesh(model, "head") == (None, None)


@pytest.mark.compat
def test_older_transformers_are_refused(mesh, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.16.1")
    model = SimpleNamespace(_device_mesh=mesh, _tp_plan={"q": "colwise"})
    with pytest.raises(RuntimeError, match="need transformers 5.17 or newer, this is 5.16.1"):
        get_tp_plan_and_mesh(model, "q")


@pytest.mark.compat
@with_spread_models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"use_dora": True},
            r"'model.layers.0.self_attn.q_proj' is spread over 1 devices \(colwise\), where use_dora cannot",
        ),
        ({"init_lora_weights": "pissa"}, "where init_lora_weights='pissa' cannot be used"),
    ],
)
def test_what_reads_the_whole_base_weight_is_refused(mesh, options, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(spread_over(llama(), mesh), LoraConfig(target_modules=["q_proj"], **options))


@pytest.mark.compat
@with_spread_models
def test_unknown_styles_leave_the_factors_whole(mesh):
    factor = nn.Linear(3, 2, bias=False)
    with pytest.warns(UserWarning, match="lora_B of the adapter of a Linear is left whole.*style 'packed_colwise'"):
        add_lora_tp_hooks_dtensor(factor, "packed_colwise", mesh, base_layer=nn.Linear(2, 2), module_name="lora_B")
    assert type(factor.weight) is nn.Parameter
    model = llama()
    model._tp_plan = {**model._tp_plan, "model.embed_tokens": "embedding_colwise"}
    with pytest.warns(UserWarning, match="lora_embedding_A of the adapter of a Embedding is left whole"):
        tuner = LoraModel(spread_over(model, mesh), LoraConfig(target_modules=["embed_tokens"]), "default")
    assert type(tuner.model.model.embed_tokens.lora_embedding_A["default"]) is nn.Parameter


@pytest.mark.compat
@with_spread_models
def test_whole_modules_of_a_spread_model_are_adapted_as_usual(mesh):
    model = SimpleNamespace(_device_mesh=mesh, _tp_plan={"q": "colwise"})
    assert placement_for(model, "q", nn.Linear(2, 2), LoraConfig(use_dora=True)) is None
    spread = spread_over(llama(), mesh)
    spread._tp_plan = {}
    assert placement_for(spread, "lm_head", spread.lm_head, LoraConfig()) is None


@torch.no_grad()
def check_loading(folder):
    """A base model that transformers spreads while loading it takes an adapter by either of two doors."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    plain = PeftModel.from_pretrained(llama(), folder / "adapter")
    expected = plain(input_ids=IDS).logits
    for load in (PeftModel.from_pretrained, _load_by_transformers):
        base = LlamaForCausalLM.from_pretrained(
            folder / "base", distributed_config=DistributedConfig(tp_size=dist.get_world_size())
        )
        model = load(base.eval(), folder / "adapter")
        assert any("lora_B" in name and whole(p) is not p for name, p in model.named_parameters())
        assert_close(model(input_ids=IDS).logits, expected)


def _load_by_transformers(base, folder):
    base.load_adapter(str(folder))
    return base


def run_as_rank(folder):
    """One of the processes of the test below."""
    dist.init_process_group("gloo")
    world = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    check_against_whole_model(world)
    check_loading(folder)
    dist.destroy_process_group()


@pytest.mark.compat
@with_spread_models
@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    settings = LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], r=3, task_type="CAUSAL_LM")
    filled(get_peft_model(llama(), settings)).save_pretrained(tmp_path / "adapter")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        __file__,
        str(tmp_path),
    ]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root / "src"), *sys.path])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


if __name__ == "__main__":
    run_as_rank(Path(sys.argv[1]))
