"""Configurations of all methods: fields, files, and what happens with files that are not right."""

import dataclasses
import json
import warnings

import pytest

from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftType,
    PromptLearningConfig,
    TaskType,
    get_peft_config,
)
from peft.config import PeftConfigMixin
from peft.utils.constants import CONFIG_NAME

NEEDED = {
    "ADALORA": {"total_step": 10},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1], "task_type": "CAUSAL_LM"},
}
"""What the configuration of a method cannot be made without."""

CLASSES = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
EVERY = pytest.mark.parametrize("peft_type", list(CLASSES), ids=lambda peft_type: peft_type.value)


def make(peft_type, **fields):
    """A configuration of a method, or a skip where it needs a package that is not here."""
    try:
        return CLASSES[peft_type](**{**NEEDED.get(peft_type.value, {}), **fields})
    except ImportError as error:
        pytest.skip(str(error))


def write(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / CONFIG_NAME).write_text(text)
    return folder


def read(folder):
    return json.loads((folder / CONFIG_NAME).read_text())


def as_json(config):
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


@EVERY
def test_a_configuration_knows_its_method(peft_type):
    config = make(peft_type)
    assert config.peft_type is peft_type
    assert isinstance(config, PeftConfig)
    assert config.is_prompt_learning == (isinstance(config, PromptLearningConfig) or peft_type == PeftType.CPT)
    assert config.is_adaption_prompt == (peft_type == PeftType.ADAPTION_PROMPT)
    assert config.peft_version == "0.22.0"
    assert config.inference_mode is False


@EVERY
def test_the_common_fields_come_first(peft_type):
    common = [entry.name for entry in dataclasses.fields(PeftConfig)]
    assert [entry.name for entry in dataclasses.fields(CLASSES[peft_type])][: len(common)] == common


@EVERY
def test_every_field_is_explained(peft_type):
    cls = CLASSES[peft_type]
    text = " ".join(base.__doc__ or "" for base in cls.__mro__)
    unexplained = [entry.name for entry in dataclasses.fields(cls) if not entry.metadata.get("help")]
    assert [name for name in unexplained if f"{name}:" not in text] == []


@EVERY
def test_saving_then_loading_gives_the_same(peft_type, tmp_path):
    config = make(peft_type, base_model_name_or_path="some/model", revision="main", task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    for cls in (PeftConfig, CLASSES[peft_type]):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is CLASSES[peft_type]
        assert loaded == config
    assert as_json(loaded) == as_json(config)


@EVERY
def test_the_file_has_all_fields_as_plain_json(peft_type, tmp_path):
    config = make(peft_type)
    config.save_pretrained(tmp_path)
    stored = read(tmp_path)
    assert set(stored) == {entry.name for entry in dataclasses.fields(config)} - {"runtime_config"}
    assert stored["peft_type"] == peft_type.value
    text = (tmp_path / CONFIG_NAME).read_text()
    assert text == json.dumps(stored, indent=2, sort_keys=True)


@EVERY
def test_saving_does_not_change_the_configuration(peft_type, tmp_path):
    config = make(peft_type)
    before = config.to_dict()
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "Custom"})
    assert config.to_dict() == before
    assert read(tmp_path)["auto_mapping"] == {"base_model_class": "Custom"}


@EVERY
def test_lists_of_modules_survive_the_file(peft_type, tmp_path):
    names = {entry.name for entry in dataclasses.fields(CLASSES[peft_type])}
    collections = names & {"target_modules", "exclude_modules", "modules_to_save"}
    if peft_type == PeftType.ADAPTION_PROMPT:
        collections.remove("target_modules")  # there, it is one name
    config = make(peft_type, **{name: ["b", "a"] for name in collections})
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    for name in collections:
        assert set(getattr(loaded, name)) == {"a", "b"}
    assert loaded == config


@EVERY
def test_an_unknown_task_is_refused_and_a_known_one_kept_as_given(peft_type):
    for task in TaskType:
        for given in (task, task.value):
            if peft_type != PeftType.CPT or task == TaskType.CAUSAL_LM:
                assert type(make(peft_type, task_type=given).task_type) is type(given)
    with pytest.raises(ValueError, match="Did you mean 'CAUSAL_LM'"):
        make(peft_type, task_type="CASUAL_LM")


@EVERY
def test_from_a_dictionary(peft_type):
    fields = {**NEEDED.get(peft_type.value, {}), "peft_type": peft_type.value}
    assert get_peft_config(fields) == make(peft_type)


@EVERY
def test_unknown_fields_are_named_in_one_warning(peft_type, tmp_path):
    make(peft_type).save_pretrained(tmp_path)
    write(tmp_path, {**read(tmp_path), "from_the_future": 1, "inference_moed": True})
    with pytest.warns(UserWarning) as caught:
        loaded = PeftConfig.from_pretrained(tmp_path)
    messages = [str(warning.message) for warning in caught if "from_the_future" in str(warning.message)]
    assert len(messages) == 1
    assert type(loaded).__name__ in messages[0]
    assert "'inference_moed' (there is 'inference_mode')" in messages[0]
    assert loaded == make(peft_type)


@EVERY
def test_a_field_of_the_wrong_type_is_named_with_the_file(peft_type, tmp_path):
    make(peft_type).save_pretrained(tmp_path)
    write(tmp_path, {**read(tmp_path), "inference_mode": "yes"})
    with pytest.raises(
        ValueError, match=r"adapter_config.json: field 'inference_mode': expected bool, found str 'yes'"
    ):
        PeftConfig.from_pretrained(tmp_path)


def test_the_base_classes():
    config = PeftConfig()
    assert config.peft_type is None
    assert not config.is_prompt_learning
    assert PromptLearningConfig().is_prompt_learning
    assert [entry.name for entry in dataclasses.fields(PeftConfigMixin)] == [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
    ]
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)


def test_a_configuration_without_a_method_is_of_the_class_that_reads_it(tmp_path):
    PeftConfig(task_type="SEQ_CLS").save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == PeftConfig(task_type="SEQ_CLS")


def test_a_given_version_is_kept(tmp_path):
    write(tmp_path, {"peft_type": "LORA", "peft_version": "0.15.1"})
    assert PeftConfig.from_pretrained(tmp_path).peft_version == "0.15.1"


@pytest.mark.parametrize(
    "record, commit",
    [
        ('{"url": "u", "vcs_info": {"commit_id": "abc123"}}', "abc123"),
        ('{"url": "u", "dir_info": {}}', "UNKNOWN"),
        (None, "UNKNOWN"),
    ],
)
def test_a_development_version_says_its_commit(monkeypatch, record, commit):
    import importlib.metadata

    class Distribution:
        def read_text(self, name):
            return record if name == "direct_url.json" else None

    monkeypatch.setattr("peft.__version__", "0.23.0.dev0")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    assert PeftConfig().peft_version == f"0.23.0.dev0@{commit}"


def test_an_unreadable_record_of_the_installation_warns(monkeypatch):
    import importlib.metadata

    class Distribution:
        def read_text(self, name):
            return "no json"

    monkeypatch.setattr("peft.__version__", "0.23.0.dev0")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.warns(UserWarning, match="can't be read"):
        assert PeftConfig().peft_version == "0.23.0.dev0@UNKNOWN"


def test_the_file_wins_over_arguments_and_decides_the_class(tmp_path):
    write(tmp_path, {"peft_type": "LORA", "r": 3})
    loaded = IA3Config.from_pretrained(tmp_path, revision="other", inference_mode=True)
    assert type(loaded) is LoraConfig
    assert loaded.r == 3
    assert loaded.inference_mode is True  # the file leaves it out
    assert LoraConfig.from_pretrained(tmp_path, r=99).r == 3


def test_arguments_of_the_download_and_others_are_told_apart():
    of_class, download, rest = LoraConfig._split_kwargs({"r": 2, "token": "t", "cache_dir": "c", "colour": 1})
    assert of_class == {"r": 2}
    assert download.pop("user_agent").startswith("transformers/")
    assert download == {"token": "t", "cache_dir": "c"}
    assert rest == {"colour": 1}


@pytest.mark.parametrize("call", [PeftConfig.from_pretrained, PeftConfig._get_peft_type])
def test_a_subfolder(tmp_path, call):
    LoraConfig().save_pretrained(tmp_path / "inner")
    result = call(tmp_path, subfolder="inner")
    assert getattr(result, "peft_type", result) == "LORA"
    with pytest.raises(ValueError, match="subfolders: 'inner'"):
        call(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        call(str(tmp_path / "outer"))


def test_the_method_is_read_as_it_is_written(tmp_path):
    assert PeftConfig._get_peft_type(write(tmp_path, {"peft_type": "NEWER"})) == "NEWER"
    with pytest.raises(KeyError, match="expected the field 'peft_type'.*Did you mean 'peft_tpye'"):
        PeftConfig._get_peft_type(write(tmp_path, {"peft_tpye": "LORA"}))


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[]", "expected a JSON object, found a list"),
        ({"peft_type": "LORRA"}, "field 'peft_type'.*LORA"),
        ({"peft_type": 3}, "field 'peft_type': expected the name of a method, found 3"),
        ({"peft_type": ["LORA"]}, "field 'peft_type'"),
        ({"peft_type": "LORA", "r": "8"}, "field 'r': expected int, found str '8'"),
        ({"peft_type": "LORA", "r": True}, "field 'r'"),
        ({"peft_type": "LORA", "target_modules": [1]}, "field 'target_modules'"),
        ({"peft_type": "LORA", "rank_pattern": ["a"]}, "field 'rank_pattern'"),
        ({"peft_type": "LORA", "task_type": "CAUSALLM"}, "Did you mean 'CAUSAL_LM'"),
        ({"r": 8}, "no 'peft_type'"),
    ],
)
def test_an_unusable_file_is_one_value_error_that_names_it(tmp_path, content, complaint):
    write(tmp_path, content)
    with pytest.raises(ValueError, match=complaint) as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert CONFIG_NAME in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": 0.5},
        {"lora_dropout": 0},
        {"bias": "a_newer_choice"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"loftq_config": {}},
        {"layers_to_transform": 1, "target_modules": ["q"]},
        {"rank_pattern": {"a": 1}},
    ],
)
def test_values_that_json_changed_are_accepted(tmp_path, values):
    loaded = PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "LORA", **values}))
    for name, value in values.items():
        found = getattr(loaded, name)
        assert (list(found) if isinstance(found, set) else found) == value


def test_an_unknown_method_is_a_key_error_too(tmp_path):
    with pytest.raises(KeyError, match="Did you mean"):
        PeftConfig.from_peft_type(peft_type="LORRA")
    with pytest.raises(KeyError, match="'peft_type'"):
        PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "LORRA"}))


def test_unknown_fields_without_a_method_are_a_type_error():
    with pytest.raises(TypeError, match="'banana'"):
        LoraConfig.from_peft_type(banana=1)


def test_what_says_how_to_run_is_not_stored(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    assert "runtime_config" not in read(tmp_path)
    write(tmp_path, {**read(tmp_path), "runtime_config": {"ephemeral_gpu_offload": True}})
    with pytest.warns(UserWarning, match="runtime_config"):
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == LoraConfig()


def test_saving_over_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match="is a file"):
            PeftConfig().save_pretrained(file)
    assert file.read_text() == "mine"


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    PeftConfig(revision="old").save_pretrained(tmp_path)
    before = read(tmp_path)
    with pytest.raises(TypeError, match="cannot hold"):
        PeftConfig(auto_mapping={"a": object()}).save_pretrained(tmp_path)

    def full_disk(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        PeftConfig(revision="new").save_pretrained(tmp_path)
    assert read(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_NAME]


def test_options_of_saving_that_do_nothing_are_named(tmp_path):
    with pytest.warns(UserWarning, match="ignored: push_to_hub"):
        PeftConfig().save_pretrained(tmp_path, push_to_hub=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftConfig().save_pretrained(tmp_path)


def test_equal_sets_give_equal_files(tmp_path):
    for folder, names in (("a", ["q", "k", "v", "o"]), ("b", ["o", "v", "k", "q"])):
        LoraConfig(target_modules=names).save_pretrained(tmp_path / folder)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert read(tmp_path / "a")["target_modules"] == ["k", "o", "q", "v"]
