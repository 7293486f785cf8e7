"""Adapter files with anything in them, links in folders, and names: nothing is run, half loaded or written elsewhere.

A load either succeeds or raises one error of this library. Then the model is as it was, and so are the files.
"""

import json
import os
import pickle
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzzing
import prompts
import pytest
import test_config
import torch
from fuzzing import IDS, fuzzed, net, whole_or_not_at_all
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import peft
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.hotswap import hotswap_adapter

# ------------------------------------------------------------------------------------------------ adapters that were saved

RICH = {"modules_to_save": ["head"], "trainable_token_indices": {"embed": [1, 3]}}


@dataclass(frozen=True)
class Saved:
    """A method whose adapter is saved, and the model that it is for."""

    name: str
    method: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name.lower()

    @property
    def is_prompt(self) -> bool:
        return self.method in PROMPTS

    def base(self):
        return prompts.base_of(prompts.llama) if self.is_prompt else net()

    def config(self, **options):
        if self.is_prompt:
            return PROMPTS[self.method](**options)
        return fuzzing.config_of(self.method, **dict(self.options), **options)

    def fresh(self, adapter="a"):
        model = peft.get_peft_model(self.base(), self.config(), adapter_name=adapter).eval()
        perturb(model)
        return model

    def forward(self, model):
        with torch.no_grad():
            methods = {config.peft_type.value for config in model.peft_config.values()}
            needs_tasks = not methods.isdisjoint(("POLY", "MULTITASK_PROMPT_TUNING"))
            rows = {"task_ids": torch.zeros(len(IDS), dtype=torch.long)} if needs_tasks else {}
            return model(input_ids=IDS, **rows).logits if self.is_prompt else model(IDS, **rows)


def perturb(model, seed=1):
    """Move all that trains away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def prompt_config(cls, needed):
    return lambda **options: cls(**{"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", **needed, **options})


PROMPTS = {
    peft_type.value: prompt_config(cls, test_config.NEEDED.get(peft_type.value, {}))
    for peft_type, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if issubclass(cls, peft.PromptLearningConfig)
}
SAVED = [
    *(Saved(name, name) for name in sorted(fuzzing.layer_methods())),
    Saved("LORA-rich", "LORA", tuple(RICH.items())),
    Saved("LORA-dora", "LORA", (("use_dora", True),)),
    *(Saved(name, name) for name in sorted(PROMPTS)),
]
BY_NAME = {str(saved): saved for saved in SAVED}
each = pytest.mark.parametrize("saved", SAVED, ids=str)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that gives the folder of a saved adapter."""
    folders: dict[str, Path] = {}

    def folder(saved):
        if str(saved) not in folders:
            path = tmp_path_factory.mktemp(str(saved))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                saved.fresh("default").save_pretrained(path)
            folders[str(saved)] = path
        return folders[str(saved)]

    return folder


# ------------------------------------------------------------------------------------------------------------- the doors


def load_anew(saved, folder):
    base = saved.base()
    model = None
    with whole_or_not_at_all(base, folder) as caught:
        model = peft.PeftModel.from_pretrained(base, folder, adapter_name="a")
    assert caught == [] or not hasattr(base, "peft_config")
    return base, model


def load_beside(saved, folder, **options):
    model = saved.fresh("first")
    with whole_or_not_at_all(model, folder) as caught:
        model.load_adapter(folder, "a", **options)
    return model, None if caught else model


def load_strictly(saved, folder):
    return load_beside(saved, folder, strict=True)


def load_over(saved, folder):
    model = saved.fresh("a")
    with whole_or_not_at_all(model, folder) as caught:
        model.load_adapter(folder, "a")
    return model, None if caught else model


def load_into_injected(saved, folder):
    model = saved.base()
    if saved.is_prompt or saved.method in ("VERA", "POLY"):
        return model, None  # these live in a PeftModel, or are called by one
    peft.inject_adapter_in_model(saved.config(), model, "a")
    with whole_or_not_at_all(model, folder) as caught:
        state = peft.load_peft_weights(folder)
        peft.set_peft_model_state_dict(model, state, "a")
    return model, None if caught else model


def load_into_mixed(saved, folder):
    base = saved.base()
    if saved.method not in [peft_type.value for peft_type in peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING]:
        return base, None
    model = peft.get_peft_model(base, fuzzing.config_of("LORA"), "first", mixed=True)
    with whole_or_not_at_all(model, folder) as caught:
        model.load_adapter(folder, "a")
    return model, None if caught else model


def swap(saved, folder):
    model = saved.fresh("a")
    with whole_or_not_at_all(model, folder) as caught:
        hotswap_adapter(model, str(folder), "a")
    return model, None if caught else model


DOORS = (load_anew, load_beside, load_strictly, load_over, load_into_injected, load_into_mixed, swap)
doors = st.sampled_from(DOORS)


def load(saved, folder, door):
    """Load a folder by one of the doors; what was loaded computes something finite, and has no tensor without storage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loaded = door(saved, folder)
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        if loaded is not None:
            saved.forward(loaded)
        return loaded


@each
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_what_was_saved_is_loaded(saved, door, folder_of):
    loaded = load(saved, folder_of(saved), door)
    if door in (load_anew, load_beside, load_strictly, load_over):
        assert loaded is not None
        loaded.set_adapter("a")
        assert torch.allclose(saved.forward(loaded), saved.forward(saved.fresh("default")), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- bad bytes


def copy_of(folder, target, weights, name=SAFETENSORS_WEIGHTS_NAME):
    """The folder of an adapter with other weights."""
    target.mkdir(exist_ok=True)
    for other in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        (target / other).unlink(missing_ok=True)
    (target / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    (target / name).write_bytes(weights)
    return target


@st.composite
def broken(draw, data):
    """A safetensors file that is cut, or has other bytes, in one of its three parts."""
    header = 8 + struct.unpack("<Q", data[:8])[0]
    first, last = draw(st.sampled_from([(0, 8), (8, header), (header, len(data))]))
    at = draw(st.integers(first, last))
    if draw(st.booleans()):
        return data[:at]
    upto = draw(st.integers(at, min(at + 9, len(data))))
    return data[:at] + draw(st.binary(max_size=9)) + data[upto:]


@st.composite
def other_header(draw, data):
    """A safetensors file whose header says something else about the same bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    entry = header[name]
    numbers = st.one_of(st.integers(-2, 200), st.sampled_from([2**31, 2**63, 2**64]))
    change = draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "value"]))
    if change == "name":
        header[draw(fuzzing.texts)] = header.pop(name)
    elif change == "value":
        header[name] = draw(fuzzing.json_values)
    elif change == "dtype":
        entry[change] = draw(st.sampled_from(["F64", "F16", "BF16", "I32", "BOOL", "F8_E4M3", "I64", "C64", "", "X"]))
    else:
        entry[change] = draw(st.lists(numbers, max_size=4))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@fuzzed(40, name=st.sampled_from(sorted(BY_NAME)), door=doors, data=st.data())
def test_a_safetensors_file_with_other_bytes(name, door, data, folder_of, tmp_path):
    saved = BY_NAME[name]
    whole = (folder_of(saved) / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    bad = data.draw(st.one_of(broken(whole), other_header(whole)))
    load(saved, copy_of(folder_of(saved), tmp_path / "bad", bad), door)


@fuzzed(25, name=st.sampled_from(sorted(BY_NAME)), door=doors, data=st.data())
def test_a_torch_file_with_other_bytes(name, door, data, folder_of, tmp_path):
    saved = BY_NAME[name]
    torch.save(load_file(folder_of(saved) / SAFETENSORS_WEIGHTS_NAME), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.one_of(st.just(len(whole)), st.integers(start, min(start + 9, len(whole)))))
    bad = whole[:start] + data.draw(st.binary(max_size=9)) + whole[end:]
    load(saved, copy_of(folder_of(saved), tmp_path / "bad", bad, WEIGHTS_NAME), door)


# ----------------------------------------------------------------------------------------------------------- bad tensors


def of_dtype(dtype):
    return lambda draw, tensor: tensor.to(dtype)


def with_value(value):
    def change(draw, tensor):
        tensor = tensor.clone()
        if tensor.numel():
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
        return tensor

    return change


def of_shape(draw, tensor):
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    return torch.ones(shape)


CHANGES = {
    "float64": of_dtype(torch.float64),
    "float16": of_dtype(torch.float16),
    "bfloat16": of_dtype(torch.bfloat16),
    "float8": of_dtype(torch.float8_e4m3fn),
    "int8": of_dtype(torch.int8),
    "int64": of_dtype(torch.int64),
    "bool": of_dtype(torch.bool),
    "complex": of_dtype(torch.complex64),
    "nan": with_value(float("nan")),
    "infinity": with_value(float("inf")),
    "shape": of_shape,
    "transposed": lambda draw, tensor: tensor.transpose(0, -1).contiguous() if tensor.dim() else tensor,
    "rows": lambda draw, tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
    "extra dimension": lambda draw, tensor: tensor.unsqueeze(0),
    "nothing": lambda draw, tensor: tensor.new_empty(0),
}


def other_names(draw, name):
    """Names near a name in a file: of another adapter, of the base model, of nothing."""
    parts = name.split(".")
    at = draw(st.integers(0, len(parts)))
    piece = draw(
        st.sampled_from(["first", "a", "default", "base_layer", "__class__", "..", "weight", "modules_to_save", ""])
    )
    inserted = ".".join([*parts[:at], piece, *parts[at:]])
    return draw(
        st.sampled_from(
            [
                inserted,
                name.removeprefix("base_model.model."),
                f"base_model.model.{name}",
                f"_orig_mod.{name}",
                name.rpartition(".")[0],
                f"{name}.{piece}",
                name.upper(),
                piece,
            ]
        )
    )


@st.composite
def changed_state(draw, state):
    """The tensors of an adapter with some of them changed, renamed, left out or added."""
    state = dict(state)
    for _ in range(draw(st.integers(1, 2))):
        if not state:
            break
        name = draw(st.sampled_from(sorted(state)))
        what = draw(st.sampled_from(["missing", "renamed", "added", *CHANGES]))
        if what == "missing":
            del state[name]
        elif what == "renamed":
            tensor = state.pop(name)
            state[other_names(draw, name)] = tensor
        elif what == "added":
            state[other_names(draw, name)] = state[name].clone()
        else:
            state[name] = CHANGES[what](draw, state[name])
    return state


@fuzzed(60, name=st.sampled_from(sorted(BY_NAME)), door=doors, data=st.data())
def test_a_file_with_other_tensors(name, door, data, folder_of, tmp_path):
    saved = BY_NAME[name]
    state = data.draw(changed_state(load_file(folder_of(saved) / SAFETENSORS_WEIGHTS_NAME)))
    save_file(state, tmp_path / "changed")
    bad = (tmp_path / "changed").read_bytes()
    load(saved, copy_of(folder_of(saved), tmp_path / "bad", bad), door)


@fuzzed(40, one=st.sampled_from(sorted(BY_NAME)), other=st.sampled_from(sorted(BY_NAME)), door=doors)
def test_the_weights_of_another_adapter(one, other, door, folder_of, tmp_path):
    theirs = (folder_of(BY_NAME[other]) / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    load(BY_NAME[one], copy_of(folder_of(BY_NAME[one]), tmp_path / "bad", theirs), door)


@fuzzed(40, one=st.sampled_from(sorted(BY_NAME)), other=st.sampled_from(sorted(BY_NAME)), door=doors)
def test_the_adapter_of_another_method(one, other, door, folder_of):
    load(BY_NAME[one], folder_of(BY_NAME[other]), door)


NO_TENSORS = [
    None,
    3,
    [],
    [torch.zeros(2)],
    {},
    {1: torch.zeros(2)},
    {"a": 1},
    {"a": {"b": torch.zeros(2)}},
    {"a": torch.nn.Parameter(torch.zeros(2))},
    {"base_model.model.lin0.lora_A.weight": torch.zeros(2, 8).to_sparse()},
    {"base_model.model.lin0.lora_A.weight": torch.quantize_per_tensor(torch.zeros(2, 8), 0.1, 0, torch.qint8)},
    {"base_model.model.lin0.lora_A.weight": torch.zeros(2, 8, device="meta")},
    {"": torch.zeros(2)},
    {"\0": torch.zeros(2)},
]


@pytest.mark.parametrize("content", NO_TENSORS, ids=lambda content: str(content)[:40].replace("\0", "0"))
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_torch_file_that_has_something_else(content, door, folder_of, tmp_path):
    saved = BY_NAME["lora"]
    torch.save(content, tmp_path / "content")
    copy_of(folder_of(saved), tmp_path / "bad", (tmp_path / "content").read_bytes(), WEIGHTS_NAME)
    load(saved, tmp_path / "bad", door)


# ------------------------------------------------------------------------------------------------------------------ code


class Payload:
    """What leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("write", [torch.save, "legacy", "pickle"], ids=["zip", "legacy", "pickle"])
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize("beside", [True, False])
def test_code_in_a_file_never_runs(write, door, beside, folder_of, tmp_path):
    saved, mark = BY_NAME["lora"], tmp_path / "mark"
    content = (
        load_file(folder_of(saved) / SAFETENSORS_WEIGHTS_NAME) | {"x": Payload(mark)} if beside else Payload(mark)
    )
    path = tmp_path / "content"
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write != "legacy")
    bad = path.read_bytes()
    assert load(saved, copy_of(folder_of(saved), tmp_path / "bad", bad, WEIGHTS_NAME), door) is None
    assert load(saved, copy_of(folder_of(saved), tmp_path / "bad", bad), door) is None
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


# ------------------------------------------------------------------------------------------------- found by these files


@pytest.mark.parametrize(
    "door", [load_anew, load_beside, load_over, load_into_injected], ids=lambda door: door.__name__
)
def test_a_column_of_twice_the_length_is_of_another_shape(door, folder_of, tmp_path):
    saved = BY_NAME["ia3"]
    state = load_file(folder_of(saved) / SAFETENSORS_WEIGHTS_NAME)
    save_file({name: torch.cat([value, value]) for name, value in state.items()}, tmp_path / "changed")
    bad = copy_of(folder_of(saved), tmp_path / "bad", (tmp_path / "changed").read_bytes())
    assert load(saved, bad, door) is None
