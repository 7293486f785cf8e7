"""Helpers: signatures, temporary changes of scale and dtype rules, choosing what to adapt by condition numbers."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from peft import IA3Config, LoHaConfig, LoraConfig, find_kappa_target_modules, get_peft_model
from peft.helpers import (
    DoraCaching,
    KappaTuneSelector,
    MontecloraTrainerMixin,
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_forward_signature,
    update_generate_signature,
    update_signature,
)
from peft.tuners.lora import LoraModel, dora


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(4, 4)
        self.lin1 = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        """Runs it."""
        y = self.lin1(self.lin0(x))
        return y * 2 if twice else y

    def generate(self, x: torch.Tensor, length: int = 1) -> list:
        """Goes on."""
        return [self(x)] * length


def adapted(config=None, base=None, **options):
    options = {"target_modules": ["lin0"], **options}
    return get_peft_model(base or Net(), config or LoraConfig(init_lora_weights=False, **options)).eval()


X = torch.ones(2, 4)

# ----------------------------------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize("update", [update_forward_signature, update_signature])
def test_forward_reports_what_the_base_model_takes(update):
    model = adapted()
    assert list(inspect.signature(model.forward).parameters) == ["args", "kwargs"]
    expected = model(X, twice=True)
    update(model)
    assert inspect.signature(model.forward) == inspect.signature(model.get_base_model().forward)
    assert model.forward.__doc__ == "Runs it." and model.forward.__name__ == "forward"
    assert model.forward.__annotations__ == model.get_base_model().forward.__annotations__
    assert torch.equal(model(X, twice=True), expected)


@pytest.mark.parametrize("update", [update_generate_signature, update_signature])
def test_generate_reports_what_the_base_model_takes(update):
    model = adapted()
    update(model)
    assert list(inspect.signature(model.generate).parameters) == ["x", "length"]
    assert model.generate.__doc__ == "Goes on." and len(model.generate(X, length=3)) == 3


def test_only_one_of_the_two():
    model = adapted()
    update_signature(model, method="generate")
    assert list(inspect.signature(model.forward).parameters) == ["args", "kwargs"]
    update_signature(model, method="forward")
    assert list(inspect.signature(model.forward).parameters) == ["x", "twice"]
    with pytest.raises(ValueError, match="'forwards'"):
        update_signature(model, method="forwards")


def test_a_base_model_that_does_not_generate_is_left_alone():
    model = adapted(base=nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])
    update_generate_signature(model)
    assert "generate" not in vars(model)


def test_copies_have_methods_of_their_own():
    model = adapted()
    update_signature(model)
    twin = copy.deepcopy(model)
    assert twin.forward.__self__ is twin
    with torch.no_grad():
        twin.get_base_model().lin1.bias += 1
    assert not torch.equal(twin(X), model(X))
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))


def test_check_if_peft_model(tmp_path):
    LoraConfig().save_pretrained(tmp_path / "adapter")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    assert check_if_peft_model(str(tmp_path / "adapter")) is True
    assert check_if_peft_model(str(tmp_path / "broken")) is False
    assert check_if_peft_model(str(tmp_path / "nothing")) is False


# --------------------------------------------------------------------------------------------------- temporary changes


def test_rescaling_scales_the_adapters_part():
    model = adapted()
    layer = model.base_model.model.lin0
    with model.disable_adapter():
        base = model(X)
    full, before = model(X), layer.scaling
    with rescale_adapter_scale(model, 0.5):
        assert layer.scaling == {"default": 0.5}
        torch.testing.assert_close(model(X), base + 0.5 * (full - base))
    assert layer.scaling == {"default": 1.0} and layer.scaling is not before
    assert torch.equal(model(X), full)


def test_rescaling_is_undone_after_an_exception():
    model = adapted()
    with pytest.raises(RuntimeError), rescale_adapter_scale(model, 2):
        raise RuntimeError
    assert model.base_model.model.lin0.scaling == {"default": 1.0}


def test_rescaling_is_for_every_method_with_a_scaling():
    model = adapted(LoHaConfig(target_modules=["lin0"], init_weights=False))
    with rescale_adapter_scale(model, 0.0), torch.no_grad():
        scaled = model(X)
    with model.disable_adapter():
        assert torch.equal(scaled, model(X))


@pytest.mark.parametrize("multiplier", ["2", None, torch.tensor(2.0)])
def test_a_multiplier_is_a_number(multiplier):
    with pytest.raises(TypeError, match="number"), rescale_adapter_scale(adapted(), multiplier):
        pass


def test_rescaling_needs_something_to_scale():
    with pytest.raises(ValueError, match="nothing to rescale"), rescale_adapter_scale(Net(), 2.0):
        pass


@pytest.mark.parametrize(
    "config", [None, IA3Config(target_modules=["lin0"], feedforward_modules=[])], ids=["lora", "ia3"]
)
def test_input_casting_is_switched_off_and_on_again(config):
    model = adapted(config)
    layer = model.base_model.model.lin0
    with disable_input_dtype_casting(model):
        assert layer.cast_input_dtype_enabled is False
    assert layer.cast_input_dtype_enabled is True
    with disable_input_dtype_casting(model, active=False):
        assert layer.cast_input_dtype_enabled is True
    layer.cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError), disable_input_dtype_casting(model):
        raise RuntimeError
    assert layer.cast_input_dtype_enabled is False


def test_without_casting_dtypes_must_agree():
    model = adapted()
    model.base_model.model.lin0.lora_A.to(torch.float64)
    model.base_model.model.lin0.lora_B.to(torch.float64)
    model(X)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError):
        model(X)


def test_dora_caching():
    assert dora.ENABLE_DORA_CACHING is False
    with DoraCaching() as context:
        assert dora.ENABLE_DORA_CACHING is True
        with context, DoraCaching(False):
            assert dora.ENABLE_DORA_CACHING is False
        assert dora.ENABLE_DORA_CACHING is True
    assert dora.ENABLE_DORA_CACHING is False
    switch = DoraCaching()
    try:
        switch(True)
        assert dora.ENABLE_DORA_CACHING is True
    finally:
        switch(False)
    assert dora.ENABLE_DORA_CACHING is False


def test_dora_computes_the_norm_once_while_caching(monkeypatch):
    model = adapted(use_dora=True)
    calls = []
    norm = dora.DoraLinearLayer.fresh_norm
    monkeypatch.setattr(dora.DoraLinearLayer, "fresh_norm", lambda self, *args: calls.append(1) or norm(self, *args))
    expected = model(X)
    with DoraCaching():
        assert [torch.equal(model(X), expected) for _ in range(3)] == [True] * 3
    assert len(calls) == 2  # one outside, one within


class Trainer:
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.given = kwargs
        outputs = model(inputs["x"])
        return (outputs.mean(), outputs) if return_outputs else outputs.mean()


class MontecloraTrainer(MontecloraTrainerMixin, Trainer):
    pass


def test_monteclora_adds_the_mean_variational_loss(monkeypatch):
    monkeypatch.setattr(LoraModel, "_get_monteclora_loss", lambda self: self.extra)
    first, second = adapted(), adapted()
    first.base_model.extra, second.base_model.extra = torch.tensor(1.0), torch.tensor(4.0)
    model, trainer = nn.Sequential(first, second), MontecloraTrainer()
    plain = model(X).mean()
    loss, outputs = trainer.compute_loss(model, {"x": X}, return_outputs=True, num_items_in_batch=3)
    torch.testing.assert_close(loss, plain + 2.5)
    assert torch.equal(outputs, model(X)) and trainer.given == {"num_items_in_batch": 3}
    torch.testing.assert_close(trainer.compute_loss(model, {"x": X}), plain + 2.5)


def test_monteclora_needs_a_lora_model():
    with pytest.raises(TypeError, match="MonteCLoRA"):
        MontecloraTrainer().compute_loss(Net(), {"x": X})


# ------------------------------------------------------------------------------------------------------- what to adapt


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.stack([torch.diag(torch.tensor([1.0, k])) for k in (2, 4)]))
        self.down_proj = nn.Parameter(torch.eye(2).repeat(2, 1, 1))
        self.up_proj = nn.Parameter(torch.eye(2))  # no stack of experts


class Kappas(nn.Module):
    def __init__(self):
        super().__init__()
        for name, kappa in (("four", 4.0), ("one", 1.0), ("nine", 9.0), ("two", 2.0)):
            layer = nn.Linear(2, 2)
            layer.weight.data = torch.diag(torch.tensor([1.0, kappa]))
            setattr(self, name, layer)
        self.wide = nn.Linear(2, 40)
        self.experts = Experts()
        self.embedding = nn.Embedding(2, 2)


def selector(**options):
    return KappaTuneSelector(Kappas(), max_dim_size_to_analyze=10, show_progress=False, **options)


def test_condition_numbers():
    chosen = selector()
    assert chosen.get_best_targets() == ["one", "two", "four", "nine"]
    assert chosen._condition_numbers == pytest.approx({"four": 4, "one": 1, "nine": 9, "two": 2})
    assert chosen.get_best_target_parameters() == ["experts.down_proj", "experts.gate_up_proj"]
    numbers = {"experts.gate_up_proj": 3, "experts.down_proj": 1}  # the mean over experts
    assert chosen._parameter_condition_numbers == pytest.approx(numbers)


@pytest.mark.parametrize(
    "options, count",
    [
        ({"top_p": 0.5}, 2),
        ({"top_p": 0.74}, 2),
        ({"top_p": 0.001}, 1),
        ({"num_modules": 3}, 3),
        ({"num_modules": 1, "top_p": 1.0, "threshold": 100.0}, 1),
        ({"top_p": 1.0, "threshold": 1.5}, 4),
        ({"threshold": 4.5}, 3),
        ({"threshold": 0.5}, 0),
    ],
)
def test_how_many(options, count):
    assert selector().get_best_targets(**options) == ["one", "two", "four", "nine"][:count]


def test_numbers_are_computed_once(monkeypatch):
    chosen = selector()
    chosen.get_best_targets()
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    assert chosen.get_best_targets(num_modules=1) == ["one"]


def test_other_suffixes_of_experts():
    assert selector(moe_param_suffixes=(".gate_up_proj",)).get_best_target_parameters() == ["experts.gate_up_proj"]


def test_find_kappa_target_modules():
    found = find_kappa_target_modules(Kappas(), top_p=0.4, max_dim_size_to_analyze=10, show_progress=False)
    assert found == {"target_modules": ["one"], "target_parameters": ["experts.down_proj"]}
    found = find_kappa_target_modules(Net(), show_progress=False)
    assert found["target_parameters"] is None and len(found["target_modules"]) == 1


def test_adapters_are_looked_through():
    model = adapted(base=Kappas(), target_modules=["one", "two"])
    chosen = KappaTuneSelector(model, max_dim_size_to_analyze=10, show_progress=False)
    assert chosen.get_best_targets() == ["one", "two", "four", "nine"]
