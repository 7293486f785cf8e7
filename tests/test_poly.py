"""Poly: each row of a batch says by its task how the low-rank skills of a layer are mixed for it."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import peft
from peft import PeftModel, PolyConfig, PolyModel, get_peft_model
from peft.tuners.poly import Linear, PolyLayer
from peft.tuners.poly.router import EPS, PolyRouter, Router, get_router


class Mlp(nn.Module):
    def __init__(self, first=None):
        super().__init__()
        self.first = nn.Linear(6, 8) if first is None else first
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.first(x).tanh())


X = torch.linspace(-1, 1, 90).view(5, 3, 6)
TASKS = torch.tensor([0, 2, 1, 1, 0])


def config(**options):
    defaults = {"target_modules": ["first", "last"], "r": 2, "n_tasks": 3, "n_skills": 3, "n_splits": 2}
    return PolyConfig(**{**defaults, **options})


def adapted(base=None, adapter_name="default", **options):
    torch.manual_seed(0)
    base = Mlp() if base is None else base
    return perturbed(get_peft_model(base, config(**options), adapter_name).eval())


def perturbed(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def output(model, x=X, **options):
    with torch.no_grad():
        return model(x, **options)


# ------------------------------------------------------------------------------------------------------- the mathematics


def test_worked_example():
    """One split, two skills, rank 1: task 0 takes both alike, task 1 takes nearly nothing but the second."""
    layer = Linear(nn.Linear(2, 1, bias=False), "default", config(r=1, n_tasks=2, n_skills=2, n_splits=1)).eval()
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[100.0, 1000.0]]))
        layer.poly_lora_A["default"].copy_(torch.tensor([[[[1.0], [0.0]], [[0.0], [2.0]]]]))
        layer.poly_lora_B["default"].copy_(torch.tensor([[[[4.0]], [[8.0]]]]))
        layer.poly_router["default"].module_logits.copy_(torch.tensor([[0.0, 0.0], [-40.0, 40.0]]))
    x = torch.tensor([[1.0, 3.0]])
    # Â = (½, 1), so that Âᵀ·x = 3.5, and B̂ = 6; then Âᵀ·x = 2·3 and B̂ = 8.
    assert_close(output(layer, x, task_ids=torch.tensor([0])), torch.tensor([[3100.0 + 21.0]]))
    assert_close(output(layer, x, task_ids=torch.tensor([1])), torch.tensor([[3100.0 + 48.0]]))


def test_each_split_of_the_features_has_a_mixture_of_its_own():
    layer = Linear(nn.Linear(6, 8), "default", config(init_weights=False)).eval()
    nn.init.normal_(layer.poly_router["default"].module_logits)
    weights = layer.poly_router["default"](TASKS, X)
    A, B = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
    found = output(layer, task_ids=TASKS)
    for row in range(5):
        mixed_A = torch.cat([sum(weights[row, q, k] * A[q, k] for k in range(3)) for q in range(2)])
        mixed_B = torch.cat([sum(weights[row, q, k] * B[q, k] for k in range(3)) for q in range(2)], dim=1)
        assert (mixed_A.shape, mixed_B.shape) == ((6, 2), (2, 8))
        assert_close(found[row], (layer.base_layer(X[row]) + X[row] @ mixed_A @ mixed_B / 2).detach())


def test_the_rank_divides_and_there_is_no_alpha():
    layer = Linear(nn.Linear(6, 8), "default", config(r=4, init_weights=False)).eval()
    term = layer.term(X, "default", TASKS)
    layer.r["default"] = 1
    assert_close(layer.term(X, "default", TASKS), 4 * term)


def test_weights_of_skills():
    router = PolyRouter(config())
    with torch.no_grad():
        router.module_logits.copy_(torch.arange(18.0).view(3, 6) / 10)
    router.eval()
    found = router(torch.tensor([1, 1, 2]), X)
    chosen = torch.tensor([[0.6, 0.7, 0.8], [0.9, 1.0, 1.1]]).sigmoid()
    assert_close(found[0], chosen / (chosen.sum(-1, keepdim=True) + EPS))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_in_training_skills_are_drawn():
    router = PolyRouter(config())
    router.reset()
    assert 0 < router.module_logits.abs().max() <= 1e-3
    router.train()
    tasks = torch.zeros(2000, dtype=torch.long)
    drawn = router(tasks, X)
    assert_close(drawn.sum(-1), torch.ones(2000, 2))
    assert_close(drawn.mean(0), torch.full((2, 3), 1 / 3), atol=0.02, rtol=0)
    assert drawn.std() > 0.1
    drawn[:, :, 0].sum().backward()
    assert router.module_logits.grad[0].abs().sum() > 0
    assert not router.module_logits.grad[1:].any()


@pytest.mark.parametrize("base", [nn.Linear(6, 8), nn.Linear(6, 8, bias=False), Conv1D(8, 6)], ids=repr)
def test_inputs_of_any_number_of_axes(base):
    layer = Linear(copy.deepcopy(base), "default", config(init_weights=False)).eval()
    expected = output(layer, task_ids=TASKS)
    assert expected.shape == (5, 3, 8)
    assert not torch.allclose(expected, base(X))
    assert_close(output(layer, X[:, 0], task_ids=TASKS), expected[:, 0])
    assert_close(output(layer, X.unsqueeze(1), task_ids=TASKS), expected.unsqueeze(1))
    # As experts get them: the tokens of a row follow each other.
    assert_close(output(layer, X.flatten(0, 1), task_ids=TASKS), expected.flatten(0, 1))


# ------------------------------------------------------------------------------------------------------------- adapters


def test_tensors_of_an_adapter():
    model = get_peft_model(Mlp(), config(modules_to_save=None))
    prefix = "base_model.model"
    shapes = {
        f"{prefix}.first.poly_lora_A": (2, 3, 3, 2),
        f"{prefix}.first.poly_lora_B": (2, 3, 2, 4),
        f"{prefix}.first.poly_router.module_logits": (3, 6),
        f"{prefix}.last.poly_lora_A": (2, 3, 4, 2),
        f"{prefix}.last.poly_lora_B": (2, 3, 2, 2),
        f"{prefix}.last.poly_router.module_logits": (3, 6),
    }
    saved = peft.get_peft_model_state_dict(model)
    assert {name: tuple(value.shape) for name, value in saved.items()} == shapes
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training == {
        name.replace("poly_router", "poly_router.default") + (".default" if "lora" in name else "") for name in shapes
    }
    layer = model.get_base_model().first
    assert isinstance(layer, PolyLayer)
    assert repr(layer).startswith("poly.Linear(")
    values = {name: getattr(layer, name)["default"] for name in PolyLayer.other_param_names}
    assert values == {"r": 2, "n_tasks": 3, "n_skills": 3, "n_splits": 2, "poly_type": "poly"}


def test_it_starts_as_the_base_model():
    base = Mlp()
    model = get_peft_model(copy.deepcopy(base), config())
    for _ in range(2):  # in training too, whatever is drawn
        assert torch.equal(output(model, task_ids=TASKS), base(X))
    layer = model.get_base_model().first
    A = layer.poly_lora_A["default"]
    assert 0 < A.abs().max() <= 3**-0.5
    assert not layer.poly_lora_B["default"].any()
    B = Linear(nn.Linear(6, 8), "default", config(init_weights=False)).poly_lora_B["default"]
    assert 0.5 < B.abs().max() <= 2**-0.5


def test_training():
    model = adapted().train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    targets = torch.stack([X[..., :4], -X[..., :4], X[..., :4].abs()])[TASKS, torch.arange(5)]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(X, task_ids=TASKS) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_disabled_no_tasks_are_needed():
    model = adapted()
    with model.disable_adapter():
        assert torch.equal(output(model), output(model, task_ids=TASKS))
        assert torch.equal(output(model), output(model.get_base_model()))


def test_two_adapters_and_a_mixed_batch():
    model = adapted(adapter_name="a")
    model.add_adapter("b", config(n_tasks=5, r=3))
    perturbed(model)
    tasks = torch.tensor([0, 2, 1, 4, 2])
    names = ["a", "a", "__base__", "b", "b"]
    found = output(model, task_ids=TASKS, adapter_names=["a", "b", "__base__", "b", "a"])
    expected = []
    for name in ("a", "b", "__base__", "b", "a"):
        if name == "__base__":
            with model.disable_adapter():
                expected.append(output(model))
        else:
            model.set_adapter(name)
            expected.append(output(model, task_ids=TASKS))
    assert_close(found, torch.stack([each[row] for row, each in enumerate(expected)]))
    model.set_adapter("b")
    output(model, task_ids=tasks)
    model.base_model.set_adapter(["a", "b"])
    both = output(model, task_ids=TASKS)
    first = model.get_base_model().first
    terms = [first.term(X, name, TASKS) for name in ("a", "b")]
    assert_close(first(X, task_ids=TASKS), first.base_layer(X) + sum(terms))
    assert not torch.allclose(both, expected[0])
    with pytest.raises(ValueError, match="'a' has n_tasks=3"):
        output(model, task_ids=tasks, adapter_names=names)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(tmp_path, low_cpu_mem_usage):
    model = adapted()
    expected = output(model, task_ids=TASKS)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(loaded, task_ids=TASKS), expected)
    assert loaded.peft_config["default"].n_tasks == 3


# ----------------------------------------------------------------------------------------------------- the way of task_ids


def test_every_door_hands_on_the_tasks():
    model = adapted()
    expected = output(model, task_ids=TASKS)
    assert not torch.allclose(expected, output(model, task_ids=TASKS.flip(0)))
    assert torch.equal(output(model.base_model, task_ids=TASKS), expected)
    assert torch.equal(output(model, task_ids=TASKS.tolist()), expected)
    first = model.get_base_model().first
    with model.base_model.call_inputs(task_ids=TASKS):
        assert torch.equal(output(model.get_base_model()), expected)
        hidden = output(first)
    assert torch.equal(output(first, task_ids=TASKS), hidden)
    assert first.call_input("task_ids") is None


def tiny_llama(**options):
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, pad_token_id=0, **size, **options)).eval()


def llama(**options):
    return adapted(tiny_llama(), target_modules=["q_proj", "v_proj"], **options)


IDS = torch.arange(1, 13).view(3, 4)
TASKS_OF_TEXTS = torch.tensor([2, 0, 1])


@pytest.mark.compat
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_generation_follows_the_tasks(task_type):
    model = llama(task_type=task_type)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = model.generate(input_ids=IDS, task_ids=TASKS_OF_TEXTS, **options)
    ids = IDS
    for _ in range(6):
        logits = model(input_ids=ids, task_ids=TASKS_OF_TEXTS).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, ids)
    assert torch.equal(model.base_model.generate(input_ids=IDS, task_ids=TASKS_OF_TEXTS, **options), found)
    others = [model.generate(input_ids=IDS, task_ids=torch.full((3,), task), **options) for task in range(3)]
    assert not all(torch.equal(other, found) for other in others)
    # Each row is what it is alone, with the beams of a row each of its task.
    beams = model.generate(input_ids=IDS, task_ids=TASKS_OF_TEXTS, num_beams=3, **options)
    for row in range(3):
        task = TASKS_OF_TEXTS[row : row + 1]
        alone = model.generate(input_ids=IDS[row : row + 1], task_ids=task, num_beams=3, **options)
        assert torch.equal(beams[row], alone[0])


@pytest.mark.compat
def test_an_encoder_and_its_decoder_see_the_same_tasks():
    torch.manual_seed(0)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **size)).eval()
    model = adapted(base, target_modules=None, task_type="SEQ_2_SEQ_LM")
    assert {name.rsplit(".", 1)[-1] for name in model.targeted_module_names} == {"q", "v"}
    labels = IDS[:, :2].contiguous()
    loss = model(input_ids=IDS, labels=labels, task_ids=TASKS_OF_TEXTS).loss
    assert loss.isfinite()
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    found = model.generate(input_ids=IDS, task_ids=TASKS_OF_TEXTS, **options)
    for row in range(3):
        task = TASKS_OF_TEXTS[row : row + 1]
        alone = model.generate(input_ids=IDS[row : row + 1], task_ids=task, **options)[0]
        assert torch.equal(found[row, : len(alone)], alone)


@pytest.mark.compat
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_changes_nothing(training, use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = llama(task_type="CAUSAL_LM")
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.train()
        if not training:
            for module in model.modules():
                if isinstance(module, PolyRouter):
                    module.eval()
        torch.manual_seed(2)
        model(input_ids=IDS, labels=IDS, task_ids=TASKS_OF_TEXTS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        assert_close(gradient, gradients[1][name], msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------- errors


def test_tasks_that_are_missing_or_unknown():
    model = adapted()
    with pytest.raises(ValueError, match="first needs task_ids.*n_tasks=3"):
        model(X)
    for tasks in ([0, 1, 2, 3, 0], [0, -1, 0, 0, 0]):
        with pytest.raises(ValueError, match=rf"adapter 'default' has n_tasks=3.*from 0 to 2.*{tasks[1]}"):
            model(X, task_ids=torch.tensor(tasks))
        with pytest.raises(ValueError, match="first has n_tasks=3"):
            model.get_base_model().first(X, task_ids=torch.tensor(tasks))
    with pytest.raises(ValueError, match="first: task_ids must name one task per row, got 3 for 5 rows"):
        model(X, task_ids=TASKS[:3])
    router = PolyRouter(config())
    with pytest.raises(ValueError, match="task_ids"):
        router(None, X)
    with pytest.raises(ValueError, match="n_tasks=3"):
        router(torch.tensor([3]), X)
    assert output(model, X[:0], task_ids=TASKS[:0]).shape == (0, 3, 4)


@pytest.mark.parametrize(
    "options, error, problem",
    [
        ({"r": 0}, ValueError, "first, adapter 'default': the rank must be positive, got r=0"),
        ({"n_tasks": 0}, ValueError, "first, adapter 'default': n_tasks must be positive, got 0; the smallest is 1"),
        ({"poly_type": "mlp"}, ValueError, "poly_type 'mlp'; supported is 'poly'"),
        ({"n_splits": 4}, ValueError, "first, adapter 'default': n_splits=4 must divide the 6 .* 8 .* divisors of 2"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, error, problem):
    base = Mlp()
    with pytest.raises(error, match=problem):
        get_peft_model(base, config(**options))
    assert isinstance(base.first, nn.Linear) and not hasattr(base, "peft_config")


def test_layers_that_are_not_linear():
    with pytest.raises(TypeError, match="first: it is a Conv1d"):
        get_peft_model(Mlp(nn.Conv1d(6, 8, 1)), config())


def test_there_is_nothing_to_merge():
    model = adapted()
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="acts on activations"):
            call()
    assert isinstance(model.unload().first, nn.Linear)


def test_public_names():
    found = PolyConfig(target_modules=["first"], exclude_modules=["x"])
    assert (found.peft_type, found.target_modules, found.exclude_modules) == ("POLY", {"first"}, {"x"})
    assert (found.r, found.n_tasks, found.n_skills, found.n_splits) == (8, 1, 4, 1)
    assert isinstance(get_router(found), Router)
    with pytest.raises(TypeError, match="abstract"):
        Router()
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING["POLY"] is PolyModel
    assert PolyModel.special_forward_args == ("task_ids",)
