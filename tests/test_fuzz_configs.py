"""Configurations with anything in them: a file is read or refused by name, and a model is adapted or left alone.

The methods are those of the registry, and the values are made after the annotations of their fields.
"""

import copy
import dataclasses
import json
import time

import fuzzing
import numpy as np
import prompts
import pytest
import test_config
import torch
from fuzzing import IDS, differences, fuzzed, json_values, net, snapshot, typed_errors_only, values_for
from hypothesis import strategies as st
from torch import nn

import peft
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from peft.utils.constants import CONFIG_NAME
from peft.utils.field_types import _hints

CLASSES = {peft_type.value: cls for peft_type, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
NEEDED = {**test_config.NEEDED, "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1}}


def is_prompt(cls):
    """Whether a method is for language models only, whose layers it leaves alone."""
    return issubclass(cls, peft.PromptLearningConfig) or cls is peft.CPTConfig or cls is peft.AdaptionPromptConfig


PROMPTS = sorted(name for name, cls in CLASSES.items() if is_prompt(cls))


def fields_of(name):
    """The fields of a method's file as they are by default."""
    config = test_config.make(CLASSES[name](**test_config.NEEDED.get(name, {})).peft_type)
    return json.loads(json.dumps(test_config.as_json(config), default=str))


def hint(name, field):
    return _hints(CLASSES[name]).get(field, str)


@st.composite
def mutated_fields(draw, name):
    """One field of a method's file, and a value for it: one of the right type, or anything."""
    field = draw(st.sampled_from(sorted(set(fields_of(name)) - {"peft_type"})))
    return field, draw(st.one_of(json_values, values_for(hint(name, field))))


def read(folder, data):
    """What `from_pretrained` makes of a file; its error, which must be one ValueError that names the file."""
    (folder / CONFIG_NAME).write_bytes(data)
    config = None
    with typed_errors_only() as caught:
        config = PeftConfig.from_pretrained(folder)
    for error in caught:
        assert isinstance(error, ValueError)
        assert str(folder / CONFIG_NAME) in str(error)
        assert len(str(error)) < 2000
    return config, caught


@pytest.mark.parametrize("name", sorted(CLASSES))
@fuzzed(12, data=st.data())
def test_a_file_with_any_value_in_a_field(name, data, tmp_path):
    field, value = data.draw(mutated_fields(name))
    content = {**fields_of(name), field: value}
    config, caught = read(tmp_path, json.dumps(content).encode())
    for error in caught:
        assert field in str(error)
    if config is not None:
        assert type(config) is CLASSES[name]
        config.save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path) == config


NO_OBJECTS = [
    b"",
    b"\0",
    b"null",
    b'"LORA"',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"peft_type": "LORA"}\0',
    b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
    '{"peft_type": "LORA"}'.encode("utf-16"),
    b'{"peft_type": "LORA", "r": 1}{}',
    b'{"peft_type": "\xff"}',
    b'{"peft_type": "LORA", "peft_type": {}}',
]


@fuzzed(60, content=st.one_of(st.sampled_from(NO_OBJECTS), st.binary(max_size=40), json_values))
def test_a_file_with_anything_in_it(content, tmp_path):
    read(tmp_path, content if isinstance(content, bytes) else json.dumps(content).encode())


@fuzzed(40, data=st.data())
def test_a_file_that_is_cut_or_has_other_bytes_in_it(data, tmp_path):
    whole = json.dumps(fields_of(data.draw(st.sampled_from(sorted(CLASSES))))).encode()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    read(tmp_path, whole[:start] + data.draw(st.binary(max_size=4)) + whole[end:])


@fuzzed(40, names=st.lists(fuzzing.texts, max_size=3), value=json_values)
def test_fields_that_no_version_has(names, value, tmp_path):
    content = {"peft_type": "IA3", **{f"x_{name}": value for name in names}}
    config, caught = read(tmp_path, json.dumps(content).encode())
    assert caught == []
    assert config == peft.IA3Config()


# ------------------------------------------------------------------------------------------------------ adapting a model


def arguments_of(name):
    """The fields of a method's configuration, but those that decide something else."""
    names = {entry.name for entry in dataclasses.fields(CLASSES[name]) if entry.init}
    return sorted(names - {"peft_type", "task_type", "runtime_config"})


def adapt(make, config):
    """Wrap a model, or leave it as it was; then use it."""
    base = make()
    before = snapshot(base)
    model = None
    with typed_errors_only() as caught:
        model = peft.get_peft_model(base, config, adapter_name="a")
    if caught:
        assert differences(before, snapshot(base)) == [], caught
        assert not hasattr(base, "peft_config")
    return model


@pytest.mark.parametrize("name", sorted(fuzzing.layer_methods()))
@fuzzed(25, data=st.data())
def test_a_model_is_adapted_or_as_it_was(name, data):
    field = data.draw(st.sampled_from(arguments_of(name)))
    value = data.draw(values_for(hint(name, field)))
    config = None
    with typed_errors_only():
        config = fuzzing.config_of(name, **{field: value})
    if config is None:
        return
    model = adapt(net, copy.deepcopy(config))
    if model is not None:
        with typed_errors_only(), model.disable_adapter():
            model(IDS)


@pytest.mark.parametrize("name", PROMPTS)
@fuzzed(6, data=st.data())
def test_a_language_model_has_a_prompt_or_is_as_it_was(name, data):
    field = data.draw(st.sampled_from(arguments_of(name)))
    value = data.draw(values_for(hint(name, field)))
    needed = {"task_type": "CAUSAL_LM", **NEEDED.get(name, {"num_virtual_tokens": 3})}
    config = None
    with typed_errors_only():
        config = CLASSES[name](**{**needed, field: value})
    if config is not None:
        adapt(lambda: prompts.base_of(prompts.llama), config)


# --------------------------------------------------------------------------------- numbers that training scripts write

NUMBERS = [
    ("LORA", "r", 2.0, 2),
    ("LORA", "r", np.int64(2), 2),
    ("LORA", "r", torch.tensor(2), 2),
    ("LORA", "lora_alpha", 16.5, 16.5),
    ("LORA", "lora_alpha", np.float32(16.5), 16.5),
    ("LORA", "lora_dropout", 0, 0),
    ("LORA", "lora_dropout", False, 0),
    ("LORA", "lora_dropout", np.float64(0.5), 0.5),
    ("LORA", "layers_to_transform", np.int64(1), 1),
    ("LORA", "layers_to_transform", np.array([0, 1]), [0, 1]),
    ("LORA", "layers_to_transform", range(2), [0, 1]),
    ("LORA", "layers_to_transform", (0, 1.0), (0, 1)),
    ("LORA", "rank_pattern", {"lin0": np.int32(3), "lin1": 2.0}, {"lin0": 3, "lin1": 2}),
    ("LORA", "alpha_pattern", {"lin0": 2.5, "lin1": np.float32(0.5)}, {"lin0": 2.5, "lin1": 0.5}),
    ("LORA", "trainable_token_indices", {"embed": np.array([1, 3])}, {"embed": [1, 3]}),
    ("LORA", "trainable_token_indices", {"embed": torch.tensor([1, 3])}, {"embed": [1, 3]}),
    ("TRAINABLE_TOKENS", "token_indices", [np.int64(1), 3.0], [1, 3]),
    ("LOKR", "decompose_factor", -1.0, -1),
    ("LOHA", "alpha", 2.5, 2.5),
    ("FOURIERFT", "n_frequency_pattern", {"lin0": np.int64(4)}, {"lin0": 4}),
]


@pytest.mark.parametrize("name, field, value, expected", NUMBERS, ids=lambda value: str(value)[:30])
def test_a_number_of_another_kind_is_taken_as_what_it_means(name, field, value, expected, tmp_path):
    model = peft.get_peft_model(net(), fuzzing.config_of(name, **{field: value}))
    found = getattr(model.peft_config["default"], field)
    assert found == expected and repr(found) == repr(expected)
    model(IDS)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(IDS), model.eval()(IDS))


WRONG = [
    ("LORA", "r", 2.5, "a whole number, found 2.5"),
    ("LORA", "r", "2", "expected int, found str '2'"),
    ("LORA", "r", (2,), "expected int, found tuple"),
    ("LORA", "r", torch.tensor([2]), "expected int, found list"),
    ("LORA", "lora_alpha", float("nan"), "nan"),
    ("LORA", "lora_dropout", 1.5, "a probability"),
    ("LORA", "layers_to_transform", [[1]], "found list"),
    ("LORA", "layers_to_transform", [0.5], "a whole number, found 0.5"),
    ("LORA", "alora_invocation_tokens", 2, "found int 2"),
    ("LORA", "trainable_token_indices", {"embed": [1.5]}, "a whole number, found 1.5"),
    ("LORA", "rank_pattern", {"lin0": 2.5}, "a whole number for 'lin0', found 2.5"),
    ("LORA", "rank_pattern", {"lin0": "2"}, "a whole number for 'lin0', found '2'"),
    ("LORA", "alpha_pattern", [1], "expected dict"),
]


@pytest.mark.parametrize("name, field, value, words", WRONG, ids=lambda value: str(value)[:30])
def test_a_number_that_cannot_be_calculated_with(name, field, value, words):
    base = net()
    before = snapshot(base)
    with pytest.raises(peft.utils.error.ConfigValueError, match=field) as caught:
        peft.get_peft_model(base, fuzzing.config_of(name, **{field: value}))
    assert words in str(caught.value)
    assert differences(before, snapshot(base)) == []


@pytest.mark.parametrize("number", [np.int64(2), 2.0, torch.tensor(2)], ids=lambda number: type(number).__name__)
def test_the_numbers_of_an_adaption_prompt(number):
    config = peft.AdaptionPromptConfig(adapter_len=number, adapter_layers=number, task_type="CAUSAL_LM")
    model = peft.get_peft_model(prompts.base_of(prompts.llama), config)
    assert (model.peft_config["default"].adapter_len, model.peft_config["default"].adapter_layers) == (2, 2)


# ------------------------------------------------------------------------------------------------------ many entries


def many_layers(count):
    names = [f"layer{number}" for number in range(count)]
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in names}), names


def test_a_misspelled_name_among_many_is_told():
    base, names = many_layers(30)
    config = peft.LoraConfig(target_modules=[*names[:25], "layr1"])
    with pytest.warns(UserWarning, match=r"match no module: 'layr1' \(nearest: layer1"):
        model = peft.get_peft_model(base, config)
    assert sorted(model.targeted_module_names) == sorted(names[:25])


def test_many_names_that_match_nothing_are_told():
    config = peft.LoraConfig(target_modules=[f"layr{number}" for number in range(30)])
    with pytest.raises(
        ValueError, match="No module matches target_modules: 'layr0' .*; 20 more. Nothing was injected"
    ):
        peft.get_peft_model(many_layers(3)[0], config)


def test_a_rank_for_each_of_many_layers_takes_no_time():
    base, names = many_layers(560)  # more patterns than the module re remembers
    ranks = {name: 1 + number % 3 for number, name in enumerate(names)}
    begin = time.process_time()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", rank_pattern=ranks))
    assert time.process_time() - begin < 8
    assert {name: layer.r["default"] for name, layer in model.base_model.model.items()} == ranks
