"""The calls at each door as state machines, for the tests of calls in any order.

After each step, names, tensors, flags, states and output of the model are compared with those that
`oracle.Oracle` works out without any adapter layer. Among the calls are some that must fail, and leave everything as it
was.
"""

import copy
import os
import shutil
import tempfile
from pathlib import Path

import fuzzing
import prompts
import torch
from fuzzing import whole_or_not_at_all
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracle import IDS, LORAS, MIXED, PROMPTS, Oracle, PromptOracle, loss_of, net, weighted
from safetensors.torch import load_file, save_file

import peft
from peft import functional
from peft.engine.lifecycle import AdapterHolder
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.hotswap import hotswap_adapter

# ------------------------------------------------------------------------------------------------------------ the calls

NAMES = ["a", "b", "default", "two words"]
names = st.sampled_from(NAMES)
LOADING = st.fixed_dictionaries({"low_cpu_mem_usage": st.booleans(), "strict": st.booleans()})


class Calls(RuleBasedStateMachine):
    """Calls at one door; what a client calls is in the subclasses."""

    recipes = LORAS
    prefix = ""
    activates_new = False
    can_merge = True
    can_save = True
    can_cast = True
    can_swap = False

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.saved = []
        self.model = self.oracle = None

    def teardown(self):
        shutil.rmtree(self.folder)
        super().teardown()

    # ---------------------------------------------------------------------------------------------------- the first

    def base_model(self):
        return net()

    @initialize(name=names, data=st.data())
    def start(self, name, data):
        base = self.base_model()
        self.plain = copy.deepcopy(base)
        self.oracle = self.new_oracle(base)
        self.oracle.active = [name]
        self.first(base, name, self.draw_recipe(data))

    def new_oracle(self, base):
        return Oracle({key: value.clone() for key, value in base.state_dict().items()})

    def draw_recipe(self, data):
        return self.recipes[data.draw(st.sampled_from(sorted(self.recipes)))]

    def first(self, base, name, recipe):
        self.oracle.add(name, recipe)
        self.wrap(base, name, recipe.config())
        self.oracle.decide([name])
        self.adopt(name)
        self.agrees()

    def live(self, name):
        """The adapter's parameters in the model by their names on disk."""
        parameters = dict(self.model.named_parameters())
        return {saved: parameters[self.prefix + live] for saved, live in self.oracle.names(name).items()}

    def adopt(self, name, perturb=True):
        """Take over how an adapter starts, and move it away from there, as training would."""
        generator = torch.Generator().manual_seed(len(NAMES) * len(self.saved) + NAMES.index(name))
        with torch.no_grad():
            for parameter in self.live(name).values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.1
                parameter.add_(noise.to(parameter.dtype) if perturb else 0)
        self.oracle.adapters[name].tensors = {
            saved: parameter.detach().clone() for saved, parameter in self.live(name).items()
        }

    # ------------------------------------------------------------------------------------------------- what must hold

    def output(self, model=None):
        with torch.no_grad():
            return (self.model if model is None else model)(IDS)

    def expected_output(self):
        return self.oracle.output()

    def holders(self):
        return [module for module in self.model.modules() if isinstance(module, AdapterHolder)]

    @invariant()
    def agrees(self):
        if self.oracle is None:
            return
        self.names_and_flags_agree()
        self.tensors_agree()
        self.adapters_agree()
        output, expected = self.output(), self.expected_output()
        assert close(output, expected, rounded=any(self.oracle.merged.values()))
        if not self.oracle.enabled and not any(self.oracle.merged.values()):
            assert torch.equal(output, self.output(self.plain))

    def names_and_flags_agree(self):
        oracle = self.oracle
        expected = {
            self.prefix + live: oracle.flags[name, saved]
            for name in oracle.adapters
            for saved, live in oracle.names(name).items()
        }
        for key, _ in self.plain.named_parameters(remove_duplicate=False):
            expected[self.live_base_name(key)] = False
        assert {name: parameter.requires_grad for name, parameter in self.parameters()} == expected

    def parameters(self):
        return self.model.named_parameters(remove_duplicate=False)

    def tensors_agree(self):
        for name, adapter in self.oracle.adapters.items():
            for saved, parameter in self.live(name).items():
                assert same(parameter, adapter.tensors[saved]), f"{saved} of {name}"
        if not any(self.oracle.merged.values()):
            state = self.model.state_dict()
            for key, value in self.oracle.base.items():
                assert same(state[self.live_base_name(key)], value), key

    def live_base_name(self, key):
        module, _, leaf = key.rpartition(".")
        path = module
        for owner in reversed(self.oracle.layers.get(module, ())):
            path += {"copy": ".original_module", "rows": ".token_adapter.base_layer"}.get(owner[1], ".base_layer")
        return f"{self.prefix}{path}.{leaf}"

    def adapters_agree(self):
        oracle = self.oracle
        assert list(self.model.peft_config) == list(oracle.adapters)
        for holder in self.holders():
            assert list(holder.active_adapters) == oracle.active
            assert holder.disable_adapters is not oracle.enabled
        found = {name for holder in self.holders() for name in holder.merged_adapters}
        assert found == {name for names in oracle.merged.values() for name in names}

    # ---------------------------------------------------------------------------------------------------- what exists

    def existing(self, data):
        return data.draw(st.sampled_from(sorted(self.oracle.adapters)))

    def some(self, data):
        found = data.draw(st.lists(st.sampled_from(sorted(self.oracle.adapters)), min_size=1, max_size=2, unique=True))
        return found

    def some_saved(self, data):
        return self.saved[data.draw(st.integers(0, len(self.saved) - 1))]

    # ------------------------------------------------------------------------------------------------------ life cycle

    @rule(name=names, data=st.data())
    def add(self, name, data):
        recipe = self.draw_recipe(data)
        if name in self.oracle.adapters:
            if not self.activates_new:  # a client that injects looks for itself
                with must_fail(self):
                    self.call_add(name, recipe.config())
            return
        self.call_add(name, recipe.config())
        self.oracle.add(name, recipe)
        if self.activates_new:
            self.oracle.activate([name])
        self.adopt(name)

    @precondition(lambda self: self.oracle.adapters)
    @rule(data=st.data(), inference=st.booleans(), as_list=st.booleans())
    def set(self, data, inference, as_list):
        chosen = self.some(data) if as_list else [self.existing(data)]
        if self.oracle.overlap(chosen) or self.oracle.excludes(chosen):
            with must_fail(self):
                self.call_set(chosen, inference)
            return
        self.call_set(chosen if as_list else chosen[0], inference)
        self.oracle.activate(chosen, inference)

    @rule()
    def disable(self):
        self.call_enable(False)
        self.oracle.disable()

    @rule()
    def enable(self):
        self.call_enable(True)
        self.oracle.enable()

    @precondition(lambda self: self.oracle.adapters)
    @rule(data=st.data())
    def delete(self, data):
        name = self.existing(data)
        if self.refuses_deletion(name):
            with must_fail(self):
                self.call_delete(name)
            return
        self.call_delete(name)
        self.oracle.delete(name)

    def is_merged(self, name):
        return any(name in names for names in self.oracle.merged.values())

    def refuses_deletion(self, name):
        return self.is_merged(name)

    @precondition(lambda self: self.oracle.enabled and self.oracle.adapters)
    @rule(data=st.data(), flag=st.booleans())
    def set_requires_grad(self, data, flag):
        chosen = self.some(data)
        self.call_set_requires_grad(chosen, flag)
        self.oracle.flags |= {key: flag for key in self.oracle.flags if key[0] in chosen}

    # ---------------------------------------------------------------------------------------------------------- merging

    @precondition(lambda self: self.can_merge and self.oracle.enabled and self.oracle.adapters)
    @rule(data=st.data(), chosen=st.booleans(), safe=st.booleans())
    def merge(self, data, chosen, safe):
        chosen = self.some(data) if chosen and self.merges_some else None
        after = self.oracle.merges(chosen)
        if after is None:
            if self.merges_whole_or_not_at_all:
                with must_fail(self):
                    self.call_merge(chosen, safe)
            return
        self.call_merge(chosen, safe)
        self.oracle.merged = after

    merges_whole_or_not_at_all = True
    merges_some = True

    @precondition(lambda self: self.can_merge and self.oracle.enabled)
    @rule()
    def unmerge(self):
        self.call_unmerge()
        self.oracle.unmerge()

    # --------------------------------------------------------------------------------------------------- the model itself

    @rule(mode=st.booleans())
    def train_or_eval(self, mode):
        self.model.train(mode)

    @precondition(lambda self: self.can_cast)
    @rule(wide=st.booleans())
    def to_dtype(self, wide):
        dtype = torch.float64 if wide else torch.float32
        self.model.to(dtype)
        self.plain.to(dtype)
        self.oracle.base = {key: value.to(dtype) for key, value in self.oracle.base.items()}
        for adapter in self.oracle.adapters.values():
            adapter.tensors = {key: value.to(dtype) for key, value in adapter.tensors.items()}

    @rule()
    def copy_the_model(self):
        before = self.model
        self.model = copy.deepcopy(before)
        with torch.no_grad():
            for parameter in before.parameters():
                parameter.fill_(torch.nan)  # nothing is shared

    @precondition(lambda self: self.oracle.enabled and not any(self.oracle.merged.values()) and self.trains())
    @rule()
    def train_one_step(self):
        expected = self.expected_gradients()
        loss_of(self.logits()).backward()
        for name, adapter in self.oracle.adapters.items():
            for saved, parameter in self.live(name).items():
                gradient = expected.get((name, saved))
                if gradient is None:
                    assert parameter.grad is None or not parameter.grad.any()
                else:
                    assert close(parameter.grad, gradient), f"{saved} of {name}"
                    parameter.data.sub_(0.01 * parameter.grad)
                    adapter.tensors[saved] = parameter.detach().clone()
        assert all(p.grad is None for p in self.model.parameters() if not p.requires_grad)
        self.model.zero_grad(set_to_none=True)

    def logits(self):
        return self.model(IDS)

    def expected_gradients(self):
        return self.oracle.gradients()

    def trains(self):
        oracle = self.oracle
        return any(flag and name in oracle.active for (name, _), flag in oracle.flags.items())

    # -------------------------------------------------------------------------------------------------------------- files

    def expected_state(self, name):
        adapter = self.oracle.adapters[name]
        return {f"base_model.model.{key}": value for key, value in adapter.tensors.items()}

    @precondition(lambda self: self.can_save and self.oracle.adapters)
    @rule(data=st.data())
    def save(self, data):
        name = self.existing(data)
        folder = self.folder / str(len(self.saved))
        path = self.call_save(name, folder)
        self.file_agrees(name, path)
        adapter = self.oracle.adapters[name]
        self.saved.append((path, adapter.recipe, dict(adapter.tensors)))

    def file_agrees(self, name, path):
        state, expected = load_file(path / SAFETENSORS_WEIGHTS_NAME), self.expected_state(name)
        assert state.keys() == expected.keys()
        assert all(same(state[key], expected[key]) for key in state)

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=names, trainable=st.booleans(), options=LOADING)
    def load(self, data, name, trainable, options):
        path, recipe, tensors = self.some_saved(data)
        there = self.oracle.adapters.get(name)
        if there is not None and there.recipe != recipe:
            return
        trainable = trainable and self.loads_to_train
        self.call_load(path, name, recipe, trainable, **options)
        if there is None:
            if not trainable and not self.loaded_trains:
                self.oracle.inference |= {name}
            self.oracle.add(name, recipe)
            if self.activates_new:
                self.oracle.activate([name], inference=not trainable)
            elif trainable:
                self.oracle.flags |= {key: True for key in self.oracle.flags if key[0] == name}
        self.oracle.adapters[name].tensors = self.cast(tensors)

    def cast(self, tensors):
        """Tensors in the dtype that the model is in by now."""
        dtype = next(iter(self.oracle.base.values())).dtype
        return {key: value.to(dtype) for key, value in tensors.items()}

    loads_to_train = True
    loaded_trains = False
    """Whether what is loaded for inference trains all the same."""

    @precondition(lambda self: self.can_swap and self.saved and self.oracle.adapters)
    @rule(data=st.data())
    def hotswap(self, data):
        path, recipe, tensors = self.some_saved(data)
        name = self.existing(data)
        if self.oracle.adapters[name].recipe != recipe:
            return
        if self.is_merged(name):
            with must_fail(self):
                hotswap_adapter(self.model, str(path), name)
            return
        hotswap_adapter(self.model, str(path), name)
        self.oracle.adapters[name].tensors = self.cast(tensors)

    # ------------------------------------------------------------------------------------------------- what must fail

    @rule(data=st.data(), bad=st.sampled_from(fuzzing.BAD_NAMES))
    def add_with_a_bad_name(self, data, bad):
        recipe = self.draw_recipe(data)
        with must_fail(self):
            self.call_add(bad, recipe.config())

    @rule(data=st.data(), name=names, wrong=st.sampled_from(["nothing", "norm"]))
    def add_what_does_not_fit(self, data, name, wrong):
        config = self.draw_recipe(data).config()
        config.target_modules = {"lin", "norm"} if wrong == "norm" else {wrong}
        with must_fail(self):
            self.call_add(name if name not in self.oracle.adapters else "other", config)

    @rule(bad=st.sampled_from(["nobody", "", "A", "a.b", "__base__"]))
    def name_an_adapter_that_is_not_there(self, bad):
        for call in self.calls_with_a_name():
            with must_fail(self):
                call(bad)

    def calls_with_a_name(self):
        return [self.call_set]

    def copy_of(self, path):
        """A saved adapter once more, to be damaged."""
        copied = self.folder / "damaged"
        shutil.rmtree(copied, ignore_errors=True)
        return shutil.copytree(path, copied)

    @precondition(lambda self: self.can_save and self.saved)
    @rule(data=st.data(), name=names, at=st.floats(0, 0.95))
    def load_a_damaged_file(self, data, name, at):
        path, recipe, _ = self.some_saved(data)
        there = self.oracle.adapters.get(name)
        if there is not None and there.recipe != recipe:
            return
        bad = self.copy_of(path)
        whole = (bad / SAFETENSORS_WEIGHTS_NAME).read_bytes()
        (bad / SAFETENSORS_WEIGHTS_NAME).write_bytes(whole[: int(len(whole) * at)])
        with must_fail(self):
            self.call_load(bad, name, recipe, False)

    @precondition(lambda self: self.can_load_strictly and self.saved)
    @rule(data=st.data(), name=names, change=st.sampled_from(["less", "more", "other"]))
    def load_strictly_what_has_other_names(self, data, name, change):
        path, recipe, _ = self.some_saved(data)
        there = self.oracle.adapters.get(name)
        if there is not None and there.recipe != recipe:
            return
        bad = self.copy_of(path)
        state = load_file(bad / SAFETENSORS_WEIGHTS_NAME)
        key = data.draw(st.sampled_from(sorted(state)))
        if change != "less":
            state[f"{key}x"] = state[key].clone()
        if change != "more":
            del state[key]
        save_file(state, bad / SAFETENSORS_WEIGHTS_NAME)
        with must_fail(self):
            self.call_load(bad, name, recipe, False, strict=True)

    can_load_strictly = False


def must_fail(machine):
    """Context of a call that must raise a typed error, and change nothing."""
    return _MustFail(whole_or_not_at_all(machine.model, machine.folder))


class _MustFail:
    def __init__(self, context):
        self.context = context

    def __enter__(self):
        self.caught = self.context.__enter__()

    def __exit__(self, *error):
        swallowed = self.context.__exit__(*error)
        assert error[0] is None or swallowed
        assert self.caught, "nothing was raised"
        return True


def same(first, second):
    return first.dtype == second.dtype and torch.equal(first, second)


def close(first, second, rounded=False):
    """Whether two tensors are equal up to rounding; what was merged may have been rounded to float32 before."""
    tolerance = 1e-4 if rounded or first.dtype == torch.float32 else 1e-9
    return (first - second).abs().max() <= tolerance * second.abs().max().clamp_min(1)


class PeftCalls(Calls):
    """`PeftModel`'s methods."""

    prefix = "base_model.model."
    can_swap = can_load_strictly = True

    def wrap(self, base, name, config):
        self.model = peft.get_peft_model(base, config, adapter_name=name)

    def call_add(self, name, config):
        self.model.add_adapter(name, config)

    def call_set(self, chosen, inference=False):
        if isinstance(chosen, str):
            self.model.set_adapter(chosen, inference_mode=inference)
        else:
            self.model.base_model.set_adapter(chosen, inference_mode=inference)

    def call_enable(self, flag):
        tuner = self.model.base_model
        tuner.enable_adapter_layers() if flag else tuner.disable_adapter_layers()

    def call_delete(self, name):
        self.model.delete_adapter(name)

    def call_set_requires_grad(self, chosen, flag):
        self.model.set_requires_grad(chosen, flag)

    def call_merge(self, chosen, safe):
        self.model.merge_adapter(adapter_names=chosen, safe_merge=safe)

    def call_unmerge(self):
        self.model.unmerge_adapter()

    def call_save(self, name, folder):
        self.model.save_pretrained(folder, selected_adapters=[name])
        path = folder if name == "default" else folder / name
        files = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME}
        expected = {"README.md"} | {os.path.join(path.relative_to(folder), file) for file in files}
        found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert found == {os.path.normpath(file) for file in expected}
        return path

    def call_load(self, path, name, recipe, trainable, **options):
        self.model.load_adapter(path, name, is_trainable=trainable, **options)

    def calls_with_a_name(self):
        model, folder = self.model, self.folder
        calls = [
            self.call_set,
            lambda name: self.call_set([name]),
            self.call_delete,
            lambda name: model.save_pretrained(folder / "new", selected_adapters=[name]),
        ]
        if self.can_merge:
            calls.append(lambda name: model.merge_adapter(adapter_names=[name]))
            calls.append(lambda name: model.merge_and_unload(adapter_names=[name]))
        if self.can_swap and self.saved:
            calls.append(lambda name: hotswap_adapter(model, str(self.saved[0][0]), name))
        return calls

    @rule(fails=st.booleans())
    def within_a_context(self, fails):
        oracle = self.oracle
        before = copy.deepcopy(oracle.__dict__)
        merged_before = copy.deepcopy(oracle.merged)
        try:
            with self.model.disable_adapter():
                oracle.disable()
                self.agrees()
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        if before["enabled"]:
            oracle.enable()
        assert oracle.merged == merged_before

    @precondition(lambda self: self.can_merge)
    @rule(data=st.data(), chosen=st.booleans())
    def merge_and_unload(self, data, chosen):
        oracle = self.oracle
        chosen = self.some(data) if chosen and oracle.adapters else None
        used = oracle.merges(chosen)
        if used is None:
            return
        plain = copy.deepcopy(self.model).merge_and_unload(adapter_names=chosen)
        assert close(self.output(plain), oracle.output(used), rounded=True)
        self.is_plain(plain)

    @precondition(lambda self: self.can_save and self.oracle.adapters)
    @rule(data=st.data())
    def save_several(self, data):
        chosen = data.draw(st.sampled_from([None, *([name] for name in self.oracle.adapters), []]))
        folder = self.folder / str(len(self.saved))
        self.model.save_pretrained(folder, selected_adapters=chosen)
        expected = list(self.oracle.adapters) if chosen is None else chosen
        for name in expected:
            path = folder if name == "default" else folder / name
            self.file_agrees(name, path)
            adapter = self.oracle.adapters[name]
            self.saved.append((path, adapter.recipe, dict(adapter.tensors)))
        assert {path.parent.name for path in folder.rglob(CONFIG_NAME)} == {
            folder.name if name == "default" else name for name in expected
        }
        if not expected:
            shutil.rmtree(folder)  # its number is the next one's

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=names, low_cpu_mem_usage=st.booleans())
    def load_into_a_new_model(self, data, name, low_cpu_mem_usage):
        path, recipe, tensors = self.some_saved(data)
        base = copy.deepcopy(self.plain)
        oracle = self.new_oracle(base)
        oracle.active = [name]
        oracle.add(name, recipe)
        oracle.adapters[name].tensors = self.cast(tensors)
        model = peft.PeftModel.from_pretrained(base, path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
        own = {self.prefix + live for live in oracle.names(name).values()}
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == (own if self.loaded_trains else set())
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert close(self.output(model), oracle.output(), rounded=True)

    @precondition(lambda self: self.can_swap and self.oracle.adapters)
    @rule(data=st.data(), name=names, exact=st.booleans(), weights=st.tuples(*[st.sampled_from([1, -0.5, 2])] * 2))
    def combine(self, data, name, exact, weights):
        """Add a weighted sum of adapters: their factors side by side, or the updates' singular vectors."""
        oracle = self.oracle
        chosen = [one for one in self.some(data) if "dora" not in dict(oracle.adapters[one].recipe.parts).values()]
        if not chosen or name in oracle.adapters:
            return
        options = {"combination_type": "cat"} if exact else {"combination_type": "svd", "svd_rank": 8}
        arguments = chosen, list(weights[: len(chosen)]), name
        recipes = [oracle.adapters[one].recipe for one in chosen]
        replaced = [module for one in recipes for module, part in one.parts if part in ("copy", "rows")]
        if len(replaced) > len(set(replaced)):
            with must_fail(self):
                self.model.base_model.add_weighted_adapter(*arguments, **options)
            return
        self.model.base_model.add_weighted_adapter(*arguments, **options)
        oracle.add(name, weighted(recipes, self.model.peft_config[name].r))
        self.adopt(name, perturb=False)
        for module, update in oracle.updates(name).items():
            found = [weight * oracle.updates(one).get(module, 0 * update) for one, weight in zip(chosen, weights)]
            assert close(update, sum(found), rounded=True), module
        for one in chosen:
            for key, value in oracle.adapters[one].tensors.items():
                assert "lora_" in key or same(oracle.adapters[name].tensors[key], value), key

    @rule()
    def unload(self):
        plain = copy.deepcopy(self.model).unload()
        self.is_plain(plain)
        assert torch.equal(self.output(plain), self.output(self.plain))
        assert all(same(value, self.oracle.base[key]) for key, value in plain.state_dict().items())

    def is_plain(self, model):
        assert model.state_dict().keys() == self.oracle.base.keys()
        assert not any(isinstance(module, AdapterHolder) for module in model.modules())


class InjectCalls(Calls):
    """`inject_adapter_in_model` and `peft.functional`, and what clients call on each layer."""

    activates_new = True
    merges_whole_or_not_at_all = False
    can_swap = True

    def wrap(self, base, name, config):
        self.model = peft.inject_adapter_in_model(config, base, adapter_name=name)

    def layers(self):
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def call_add(self, name, config):
        peft.inject_adapter_in_model(config, self.model, adapter_name=name)

    def call_set(self, chosen, inference=False):
        functional.set_adapter(self.model, chosen, inference_mode=inference)

    def call_enable(self, flag):
        for layer in self.layers():
            layer.enable_adapters(flag)

    def refuses_deletion(self, name):
        return False

    def call_delete(self, name):
        functional.delete_adapter(self.model, name, prefix="lora_")
        self.model.peft_config.pop(name)

    def call_set_requires_grad(self, chosen, flag):
        functional.set_requires_grad(self.model, chosen, flag)

    def call_merge(self, chosen, safe):
        for layer in self.layers():
            layer.merge(safe_merge=safe, adapter_names=chosen)

    def call_unmerge(self):
        for layer in self.layers():
            if layer.merged:
                layer.unmerge()

    def expected_state(self, name):
        return self.oracle.adapters[name].tensors

    def call_save(self, name, folder):
        folder.mkdir()
        save_file(
            functional.get_peft_model_state_dict(self.model, adapter_name=name), folder / SAFETENSORS_WEIGHTS_NAME
        )
        self.model.peft_config[name].save_pretrained(folder)
        return folder

    def call_load(self, path, name, recipe, trainable, low_cpu_mem_usage=False, strict=False):
        state, options = peft.load_peft_weights(path), {"low_cpu_mem_usage": low_cpu_mem_usage}
        if name not in self.oracle.adapters:
            config = recipe.config()
            config.inference_mode = not trainable
            peft.inject_adapter_in_model(config, self.model, adapter_name=name, **options)
        functional.set_peft_model_state_dict(self.model, state, adapter_name=name, **options)


class MixedCalls(PeftCalls):
    """`PeftMixedModel`'s methods."""

    recipes = MIXED
    can_save = can_swap = False
    merges_some = False  # the layers of different methods around a module are merged from the inside out

    def wrap(self, base, name, config):
        self.model = peft.get_peft_model(base, config, adapter_name=name, mixed=True)

    def call_set(self, chosen, inference=False):
        self.model.set_adapter(chosen, inference_mode=inference)

    def call_set_requires_grad(self, chosen, flag):
        self.model.base_model.set_requires_grad(chosen, flag)

    def calls_with_a_name(self):
        return [self.call_set, lambda name: self.call_set([name]), self.call_delete]


class PromptCalls(PeftCalls):
    """`PeftModel`'s methods for prompts, which have no layers to merge and are disabled within a context only."""

    recipes = PROMPTS
    prefix = ""
    can_merge = can_swap = can_cast = loads_to_train = False
    loaded_trains = True

    def base_model(self):
        return prompts.base_of(prompts.llama)

    @initialize(name=names, data=st.data())
    def start(self, name, data):
        base = self.base_model()
        self.plain = copy.deepcopy(base)
        self.oracle = self.new_oracle(base)
        self.oracle.active = [name]
        self.first(base, name, self.draw_recipe(data))

    def new_oracle(self, base):
        state = {key: value.clone() for key, value in base.state_dict().items()}
        return PromptOracle(state, copy.deepcopy(base))

    def logits(self):
        return self.model(input_ids=IDS).logits

    def output(self, model=None):
        with torch.no_grad():
            return (self.model if model is None else model)(input_ids=IDS).logits

    def live_base_name(self, key):
        return f"base_model.{key}"

    def parameters(self):
        # Where the model has its embeddings once more.
        return ((name, value) for name, value in super().parameters() if not name.startswith("word_embeddings."))

    def expected_state(self, name):
        return self.oracle.adapters[name].tensors

    def call_set(self, chosen, inference=False):
        chosen = chosen[0] if len(chosen) == 1 else chosen
        self.model.set_adapter(chosen, inference_mode=inference)

    @precondition(lambda self: False)
    @rule()
    def disable(self):
        """Within a context only."""

    @precondition(lambda self: False)
    @rule()
    def enable(self):
        """Within a context only."""

    @precondition(lambda self: False)
    @rule()
    def unload(self):
        """There is nothing to take out."""

    @precondition(lambda self: False)
    @rule()
    def set_requires_grad(self):
        """Refused."""

    @rule(data=st.data(), name=names, count=st.sampled_from([0, -1, 2.5, "3", None]))
    def add_what_does_not_fit(self, data, name, count):
        config = self.draw_recipe(data).config()
        config.num_virtual_tokens = count
        with must_fail(self):
            self.call_add(name, config)

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=names)
    def load_to_train(self, data, name):
        path, recipe, _ = self.some_saved(data)
        if name not in self.oracle.adapters:
            with must_fail(self):
                self.model.load_adapter(path, name, is_trainable=True)
