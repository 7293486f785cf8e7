"""The steps of an adapter's life, once for every door by which adapters come into a model.

A `Door` knows the calls of one client (PeftModel, injection, diffusers, transformers). `STEPS` is the table: each step
takes a door and checks what must hold. The test files run the table over their models.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable

import torch

import peft
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

STEPS: dict[str, Callable] = {}


def step(function: Callable) -> Callable:
    STEPS[function.__name__] = function
    return function


class Door:
    """One way for adapters into a model; a model with inputs to go with it.

    Args:
        make: builds the base model, always with the same weights.
        inputs: builds the inputs, always the same, in a dtype.
        targets: suffixes of the modules that LoRA adapts.
        saved: names of the modules that are copied.
        frozen: whether the base model is frozen beforehand.
        dtype: of the base model.
    """

    prefix = ""
    activates_new = True

    def __init__(self, make, inputs, targets, saved, frozen=False, dtype=torch.float32):
        self.make, self.make_inputs, self.targets, self.saved = make, inputs, targets, saved
        self.dtype = dtype
        self.model = make().to(dtype).eval().requires_grad_(not frozen)
        self.base_state = {name: value.clone() for name, value in self.model.state_dict().items()}
        names = [name for name, _ in self.model.named_modules()]
        self.target_names = [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]
        self.saved_names = [n for n in names if any(n == s or n.endswith(f".{s}") for s in saved)]
        self.saved_parameters = {
            n: [p for p, _ in self.model.get_submodule(n).named_parameters()] for n in self.saved_names
        }
        self.base_output = self.out()

    # What a client calls. A door that lacks a call leaves it out, and steps that need it are not run for it.

    def config(self, copies=True, **options):
        options = {"r": 4, "lora_alpha": 4, "init_lora_weights": True, "target_modules": list(self.targets), **options}
        return LoraConfig(**options, modules_to_save=list(self.saved) if copies else None)

    # What steps ask.

    def inner(self):
        return self.model

    def forward(self, model=None):
        model = self.model if model is None else model
        output = model(**self.make_inputs(self.dtype))
        if torch.is_tensor(output):
            return output
        return output[0] if isinstance(output, tuple) else next(iter(output.values()))

    def out(self, model=None):
        with torch.no_grad():
            return self.forward(model).clone()

    def trainable(self, model=None):
        model = self.model if model is None else model
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def tuner_names(self, adapter):
        return {f"{self.prefix}{n}.lora_{f}.{adapter}.weight" for n in self.target_names for f in "AB"}

    def copy_names(self, adapter):
        return {
            f"{self.prefix}{n}.modules_to_save.{adapter}.{p}"
            for n in self.saved_names
            for p in self.saved_parameters[n]
        }

    def names(self, *adapters, copies=True):
        found = set()
        for adapter in adapters:
            found |= self.tuner_names(adapter) | (self.copy_names(adapter) if copies else set())
        return found

    def weights(self, model=None):
        model = self.model if model is None else model
        return {name: value.clone() for name, value in model.state_dict().items()}

    def perturb(self, adapter, seed):
        """Move an adapter away from where it started, as training would."""
        generator = torch.Generator().manual_seed(seed)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name in sorted(self.names(adapter) & parameters.keys()):
                noise = torch.randn(parameters[name].shape, generator=generator) * 0.1
                parameters[name].add_(noise.to(parameters[name].dtype))

    def flags(self):
        return {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}

    def two(self):
        """Adapters a and b, both moved, a active."""
        self.add("a")
        self.perturb("a", 1)
        self.add("b")
        self.perturb("b", 2)
        self.set("a")


def same(first, second):
    return first.shape == second.shape and torch.equal(first, second)


def close(first, second, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    scale = second.float().abs().max().clamp_min(1)
    assert (first.float() - second.float()).abs().max() <= tolerance * scale


def assert_weights_equal(before, after):
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == []


@contextlib.contextmanager
def refused(*mentions):
    """A ValueError whose message names all of these."""
    try:
        yield
    except ValueError as error:
        assert [word for word in mentions if word not in str(error)] == []
    else:
        raise AssertionError("nothing was raised")


# --------------------------------------------------------------------------------------------------------------- the table


@step
def first_adapter(door):
    originals = {n: door.inner().get_submodule(n) for n in door.saved_names}
    door.add("a")
    assert door.trainable() == door.names("a")
    assert same(door.out(), door.base_output)
    for name, original in originals.items():
        duplicate = door.inner().get_submodule(name).modules_to_save["a"]
        for key, value in original.state_dict().items():
            assert torch.equal(duplicate.state_dict()[key], value)
            assert duplicate.state_dict()[key].data_ptr() != value.data_ptr()
            assert duplicate.state_dict()[key].dtype == door.dtype


@step
def first_adapter_for_inference(door):
    door.add("a", inference_mode=True)
    assert door.trainable() == set()
    door.perturb("a", 1)
    assert not same(door.out(), door.base_output)


@step
def second_adapter(door):
    door.add("a")
    door.perturb("a", 1)
    output = door.out()
    door.add("b")
    active = "b" if door.activates_new else "a"
    assert door.trainable() == door.names(active)
    assert door.active() == [active]
    assert same(door.out(), door.base_output if door.activates_new else output)


@step
def second_adapter_without_copies(door):
    door.add("a")
    door.perturb("a", 1)
    output = door.out()
    door.add("b", copies=False)
    door.set("b")
    assert door.trainable() == door.names("b", copies=False)
    assert same(door.out(), door.base_output)  # the original is used where b has no copy
    door.set("a")
    assert door.trainable() == door.names("a")
    assert same(door.out(), output)


@step
def set_adapter(door):
    door.two()
    before = door.weights()
    output_a = door.out()
    door.set("b")
    assert door.trainable() == door.names("b")
    assert door.active() == ["b"]
    output_b = door.out()
    assert not same(output_a, output_b)
    door.set_list(["a"])
    assert door.trainable() == door.names("a")
    assert same(door.out(), output_a)
    assert_weights_equal(before, door.weights())


@step
def set_two_adapters_of_which_one_has_a_copy(door):
    door.add("a")
    door.perturb("a", 1)
    door.add("b", copies=False)
    door.perturb("b", 2)
    door.set_list(["a", "b"])
    assert door.trainable() == door.names("a") | door.names("b", copies=False)
    both = door.out()
    door.set("a")
    assert not same(both, door.out())


@step
def set_two_adapters_with_copies_of_one_module(door):
    door.two()
    output, flags = door.out(), door.flags()
    with refused("a", "b", door.saved_names[0]):
        door.set_list(["a", "b"])
    assert door.active() == ["a"]
    assert door.flags() == flags
    assert same(door.out(), output)


@step
def set_unknown_adapter(door):
    door.two()
    output, flags = door.out(), door.flags()
    with refused("zzz"):
        door.set("zzz")
    for module in door.inner().modules():
        if isinstance(module, BaseTunerLayer):
            with refused("zzz", "a", "b"):
                module.set_adapter("zzz")
    assert door.flags() == flags
    assert same(door.out(), output)


@step
def disable_and_enable(door):
    door.two()
    output, flags = door.out(), door.flags()
    door.disable()
    assert door.trainable() == set()
    assert same(door.out(), door.base_output)
    assert not door.forward().requires_grad  # the loss has no path to an adapter tensor
    door.disable()
    door.enable()
    assert door.flags() == flags
    assert same(door.out(), output)
    door.enable()
    assert door.flags() == flags


@step
def what_the_user_froze_stays_frozen(door):
    door.two()
    frozen = sorted(door.names("a"))[::2]
    for name in frozen:
        door.model.get_parameter(name).requires_grad_(False)
    flags = door.flags()
    door.disable()
    assert door.trainable() == set()
    door.enable()
    assert door.flags() == flags


@step
def disable_set_enable(door):
    door.two()
    door.set("b")
    output = door.out()
    door.set("a")
    door.disable()
    door.set("b")
    assert door.trainable() == set()
    assert same(door.out(), door.base_output)
    door.enable()
    assert door.trainable() == door.names("b")
    assert same(door.out(), output)


@step
def one_optimiser_step(door):
    door.two()
    before = door.weights()
    # The sign of the gradient, so that the step is seen in bfloat16 whatever its size.
    optimizer = torch.optim.AdamW([p for p in door.model.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    door.forward().float().square().mean().backward()
    optimizer.step()
    after = door.weights()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == door.names("a")


@step
def copy_has_the_gradient_of_a_plain_model(door):
    door.add("a")  # B is zero, so that everything but the copy is the base model
    plain = door.make().to(door.dtype).eval()
    for model in (door.model, plain):
        door.forward(model).float().square().mean().backward()
    for name in door.saved_names:
        copied = door.inner().get_submodule(name).modules_to_save["a"]
        original = plain.get_submodule(name)
        for key, parameter in original.named_parameters():
            assert torch.equal(copied.get_parameter(key).grad, parameter.grad)
        assert all(p.grad is None for p in door.inner().get_submodule(name).original_module.parameters())


@step
def state_of_an_inactive_adapter(door):
    door.two()
    door.set("b")
    expected = {
        name.replace(".b.", ".").replace("modules_to_save.", ""): value.clone()
        for name, value in door.model.state_dict().items()
        if name in door.names("b")
    }
    door.set("a")
    state = peft.get_peft_model_state_dict(door.model, adapter_name="b")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@step
def save_and_load(door, tmp_path):
    door.two()
    door.set("b")
    output = door.out()
    door.set("a")
    door.save("b", tmp_path)
    fresh = door.fresh()
    fresh.load(tmp_path, "b")
    assert same(fresh.out(), output)
    fresh.add("c")
    fresh.set("b")
    assert same(fresh.out(), output)
    assert fresh.trainable() == fresh.names("b")


@step
def training_goes_on_after_a_reload(door, tmp_path):
    def train(at, steps):
        optimizer = torch.optim.SGD([p for p in at.model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            at.forward().float().square().mean().backward()
            optimizer.step()

    door.add("a")
    door.perturb("a", 1)
    train(door, 2)
    door.save("a", tmp_path)
    fresh = door.fresh()
    fresh.load(tmp_path, "a", trainable=True)
    assert fresh.trainable() == fresh.names("a")
    train(door, 2)
    train(fresh, 2)
    for name in door.names("a"):
        assert torch.equal(door.model.get_parameter(name), fresh.model.get_parameter(name))


@step
def delete_inactive(door):
    door.two()
    output = door.out()
    door.delete("b")
    assert not any(".b." in name for name in door.model.state_dict())
    assert door.trainable() == door.names("a")
    assert same(door.out(), output)


@step
def delete_active(door):
    door.two()
    door.set("b")
    output = door.out()
    door.set("a")
    door.delete("a")
    assert not any(".a." in name for name in door.model.state_dict())
    assert door.active() == ["b"]
    assert door.trainable() == door.names("b")
    assert same(door.out(), output)
    states = {
        (tuple(m.active_adapters), m.disable_adapters) for m in door.inner().modules() if isinstance(m, BaseTunerLayer)
    }
    assert states == {(("b",), False)}


@step
def delete_only(door):
    door.add("a")
    door.perturb("a", 1)
    door.delete("a")
    assert door.trainable() == set()
    assert not any(".a." in name for name in door.model.state_dict())
    assert same(door.out(), door.base_output)


@step
def a_new_adapter_of_a_deleted_name_starts_over(door):
    door.two()
    door.delete("b")
    door.add("b")
    door.set("b")
    assert same(door.out(), door.base_output)
    assert door.trainable() == door.names("b")


@step
def merge_and_unmerge(door):
    door.two()
    output = door.out()
    before = door.weights()
    door.merge()
    close(door.out(), output, door.dtype)
    for name in door.saved_names:
        wrapper = door.inner().get_submodule(name)
        for key, value in wrapper.modules_to_save["a"].state_dict().items():
            assert torch.equal(wrapper.original_module.state_dict()[key], value)
    door.unmerge()
    assert_weights_equal(before, door.weights())
    assert same(door.out(), output)


@step
def unload_after_merging(door):
    door.two()
    output = door.out()
    plain = door.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert plain.state_dict().keys() == door.base_state.keys()
    close(door.out(plain), output, door.dtype)


@step
def unload(door):
    door.two()
    plain = door.unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert_weights_equal(door.base_state, plain.state_dict())
    assert same(door.out(plain), door.base_output)


@step
def scaling_leaves_copies_alone(door):
    door.two()
    output = door.out()
    layers = [module for module in door.inner().modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.scale_layer(0.0)
    unscaled_tuner = door.out()
    for layer in door.inner().modules():
        if isinstance(layer, ModulesToSaveWrapper):
            assert layer.active_adapters == ["a"]
    assert not same(unscaled_tuner, output) and not same(unscaled_tuner, door.base_output)
    for layer in layers:
        layer.unscale_layer()
    assert same(door.out(), output)
    for layer in layers:
        layer.set_scale("a", 0.0)
    assert same(door.out(), unscaled_tuner)


@step
def deepcopy_and_pickle(door):
    door.two()
    output, flags = door.out(), door.flags()
    buffer = io.BytesIO()
    torch.save(door.model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(door.model), torch.load(buffer, weights_only=False)):
        assert same(door.out(twin), output)
        assert {name: p.requires_grad for name, p in twin.named_parameters()} == flags
        for module in twin.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter("b")
        assert door.trainable(twin) == door.names("b")
    assert door.flags() == flags
    assert same(door.out(), output)


@step
def other_dtype(door):
    door.two()
    flags = door.flags()
    door.model.to(torch.float64)
    door.dtype = torch.float64
    assert door.flags() == flags
    assert {value.dtype for name, value in door.model.state_dict().items() if name in door.names("a")} == {
        torch.float64
    }
    assert door.out().dtype == torch.float64


@step
def freeing_a_copy_by_hand_goes_on_working(door):
    door.add("a")
    for name in door.saved_names:
        door.inner().get_submodule(name).modules_to_save["a"].requires_grad_(True)
    assert door.trainable() == door.names("a")


NEEDS_FOLDER = {"save_and_load", "training_goes_on_after_a_reload"}


def run(name, door, tmp_path):
    STEPS[name](*([door, tmp_path] if name in NEEDS_FOLDER else [door]))


# ----------------------------------------------------------------------------------------------------------- two doors


class PeftModelDoor(Door):
    """`get_peft_model`, then the methods of `PeftModel`."""

    prefix = "base_model.model."
    activates_new = False

    def inner(self):
        return self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model

    def fresh(self):
        return type(self)(self.make, self.make_inputs, self.targets, self.saved, dtype=self.dtype)

    def add(self, name, copies=True, **options):
        config = self.config(copies, **options)
        if isinstance(self.model, peft.PeftModel):
            self.model.add_adapter(name, config, autocast_adapter_dtype=False)
        else:
            self.model = peft.get_peft_model(self.model, config, adapter_name=name, autocast_adapter_dtype=False)

    def set(self, name):
        self.model.set_adapter(name)

    def set_list(self, names):
        self.model.base_model.set_adapter(names)

    def active(self):
        return self.model.active_adapters

    def disable(self):
        self.model.base_model.disable_adapter_layers()

    def enable(self):
        self.model.base_model.enable_adapter_layers()

    def delete(self, name):
        self.model.delete_adapter(name)

    def merge(self):
        self.model.merge_adapter()

    def unmerge(self):
        self.model.unmerge_adapter()

    def merge_and_unload(self):
        return self.model.merge_and_unload()

    def unload(self):
        return self.model.unload()

    def save(self, name, folder):
        self.model.save_pretrained(folder, selected_adapters=[name])
        self.folder_of = folder / name

    def load(self, folder, name, trainable=False):
        self.model = peft.PeftModel.from_pretrained(
            self.model, folder / name, adapter_name=name, is_trainable=trainable, autocast_adapter_dtype=False
        )


class InjectDoor(Door):
    """`inject_adapter_in_model` and `peft.functional`."""

    def fresh(self):
        return type(self)(self.make, self.make_inputs, self.targets, self.saved, dtype=self.dtype)

    def add(self, name, copies=True, **options):
        peft.inject_adapter_in_model(self.config(copies, **options), self.model, adapter_name=name)

    def set(self, name, **options):
        peft.functional.set_adapter(self.model, name, **options)

    def set_list(self, names):
        peft.functional.set_adapter(self.model, names)

    def layers(self):
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def active(self):
        return self.layers()[0].active_adapters

    def disable(self):
        for layer in self.layers():
            layer.enable_adapters(False)

    def enable(self):
        for layer in self.layers():
            layer.enable_adapters(True)

    def delete(self, name):
        peft.functional.delete_adapter(self.model, name, prefix="lora_")
        self.model.peft_config.pop(name)

    def merge(self):
        for layer in self.layers():
            layer.merge()

    def unmerge(self):
        for layer in self.layers():
            layer.unmerge()

    def save(self, name, folder):
        self.state, self.saved_config = (
            peft.get_peft_model_state_dict(self.model, adapter_name=name),
            self.model.peft_config[name],
        )
        torch.save(self.state, folder / "state.bin")

    def load(self, folder, name, trainable=False):
        self.add(name)
        peft.set_peft_model_state_dict(
            self.model, torch.load(folder / "state.bin", weights_only=True), adapter_name=name
        )
