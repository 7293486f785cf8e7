"""Configurations with anything in them: a file is read or refused by name, and a model is adapted or left alone.

The methods are those of the registry, and the values are made after the annotations of their fields.
"""

import copy
import dataclasses
import json

import fuzzing
import prompts
import pytest
import test_config
from fuzzing import IDS, differences, fuzzed, json_values, net, snapshot, typed_errors_only, values_for
from hypothesis import strategies as st

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
