"""Names of adapters, and near misses."""

import pytest
from torch import nn

from peft.utils.naming import check_adapter_name, did_you_mean, near_misses, reserved_names


@pytest.mark.parametrize(
    "name", ["default", "default_0", "a", "two words", "Ünïcödé-42", "_x", "key", "lora", "v1-final"]
)
def test_a_usable_name_comes_back(name):
    assert check_adapter_name(name) == name
    nn.ModuleDict({name: nn.Identity()})


@pytest.mark.parametrize(
    "name, reason",
    [
        ("", "empty"),
        (" \t", "blank"),
        ("a.b", r"contains '\.'; try 'a_b'"),
        ("..", "contains"),
        ("../evil", "contains"),
        ("a/b", "contains '/'; try 'a_b'"),
        ("a\\b", "contains"),
        ("a\nb", "control"),
        ("a\x00", "control"),
        ("a\x7f", "control"),
        ("a\u2028b", "control"),
        ("\ud800", "control"),
        ("__base__", "reserved"),
        ("keys", "reserved; try 'keys_adapter'"),
        *((name, "reserved") for name in ("type", "training", "pop", "forward", "get", "_modules", "__len__", "half")),
    ],
)
def test_an_unusable_name_is_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        check_adapter_name(name)


@pytest.mark.parametrize("name", [None, 1, b"default", ["default"]])
def test_a_name_is_a_string(name):
    with pytest.raises(TypeError, match=type(name).__name__):
        check_adapter_name(name)


def test_every_attribute_of_the_containers_is_reserved():
    reserved_names.cache_clear()  # libraries add attributes to torch's modules as they are imported
    for container in (nn.ModuleDict(), nn.ParameterDict()):
        assert set(dir(container)) <= reserved_names()
    assert "default" not in reserved_names()


def test_near_misses_are_ordered_and_limited():
    choices = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp"]
    assert near_misses("qproj", choices)[0] == "q_proj"
    assert len(near_misses("qproj", choices)) == 3
    assert near_misses("qproj", choices, n=1) == ["q_proj"]
    assert near_misses("zzz", choices) == []


def test_near_misses_do_not_mind_case():
    assert near_misses("causal_lm", ["CAUSAL_LM", "SEQ_CLS"]) == ["CAUSAL_LM"]


def test_did_you_mean_is_a_sentence_or_nothing():
    assert did_you_mean("defalt", ["default", "other"]) == " Did you mean 'default'?"
    assert did_you_mean("xyz", ["default"]) == ""
