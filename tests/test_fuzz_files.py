"""Adapter files with anything in them, links in folders, and names: nothing is run, half loaded or written elsewhere.

A load either succeeds or raises one error of this library. Then the model is as it was, and so are the files.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import resource
import struct
import sys
import time
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
        if tensor.numel() and tensor.is_floating_point() and tensor.element_size() > 1:
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


# ----------------------------------------------------------------------------------- sizes that the weights do not have

ROOM = 4 << 30
"""Bytes that a load may take beside what the process has already."""
HUGE_SIZES = [10**6, 10**9, 2**62]


def sizes_of(saved):
    """The fields of a method that may say how large its tensors are."""
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[saved.config().peft_type]
    return sorted({entry.name for entry in dataclasses.fields(cls)} & SIZES)


SIZES = {
    *(
        "r",
        "init_r",
        "adapter_len",
        "n_tasks",
        "n_skills",
        "n_splits",
        "n_frequency",
        "oft_block_size",
        "num_virtual_tokens",
    ),
    *("num_layers", "token_dim", "num_transformer_submodules", "num_ranks", "num_tasks", "encoder_hidden_size"),
}
OF_SIZES = [(saved, field) for saved in SAVED for field in sizes_of(saved)]


def numbers_in(model):
    """How many numbers a model has; a size in a configuration that has no say in it may be anything."""
    return sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])


@contextlib.contextmanager
def little_memory():
    """Context in which whoever asks for much memory is refused, instead of everybody on the machine waiting for it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
@pytest.mark.parametrize("saved, field", OF_SIZES, ids=str)
def test_a_size_that_the_weights_do_not_have_is_refused_before_memory_is_taken(saved, field, folder_of, tmp_path):
    content = json.loads((folder_of(saved) / "adapter_config.json").read_text())
    whole = (folder_of(saved) / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    as_saved = {door: numbers_in(load(saved, folder_of(saved), door)) for door in (load_anew, load_beside)}
    for size in HUGE_SIZES:
        folder = copy_of(folder_of(saved), tmp_path / str(size), whole)
        (folder / "adapter_config.json").write_text(json.dumps({**content, field: size}))
        for door in (load_anew, load_beside):
            begin = time.process_time()
            with little_memory():
                loaded = load(saved, folder, door)
            assert loaded is None or numbers_in(loaded) == as_saved[door], f"{size} by {door.__name__}"
            assert time.process_time() - begin < 5


# --------------------------------------------------------------------------------------- configurations with much in them

MUCH = {
    "a long expression": {"target_modules": "x" * 100_000},
    "many names": {"target_modules": [f"m{number}" for number in range(20_000)]},
    "long names": {"target_modules": [f"{number}".zfill(50_000) for number in range(100)]},
    "unknown fields": {f"x{number}": 1 for number in range(20_000)},
    "a long unknown field": {"x" * 1_000_000: 1},
    "a long place": {"base_model_name_or_path": "x" * 1_000_000},
}


@pytest.mark.parametrize("much", MUCH)
def test_what_is_wrong_with_much_is_said_soon_and_briefly(much, folder_of, tmp_path):
    saved = BY_NAME["lora"]
    content = json.loads((folder_of(saved) / "adapter_config.json").read_text()) | MUCH[much]
    weights = (folder_of(saved) / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    folder = copy_of(folder_of(saved), tmp_path / "much", weights)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    begin = time.process_time()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            peft.PeftModel.from_pretrained(saved.base(), folder)
        except ValueError as error:
            assert "target_modules" in MUCH[much]
            assert "No module matches target_modules" in str(error)
            assert len(str(error)) < 5000
        else:
            assert "target_modules" not in MUCH[much]
    assert all(len(str(one.message)) < 5000 for one in warned)
    assert time.process_time() - begin < 5


ENDLESS = {
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**9}},
    "pissa": {"init_lora_weights": "pissa_niter_1000000000"},
    "pissa of many digits": {"init_lora_weights": "pissa_niter_" + "9" * 100_000},
}


@pytest.mark.parametrize("endless", ENDLESS)
def test_a_start_that_would_never_end_is_refused(endless, folder_of, tmp_path):
    if endless == "loftq":
        pytest.importorskip("bitsandbytes")
    saved = BY_NAME["lora"]
    content = json.loads((folder_of(saved) / "adapter_config.json").read_text()) | ENDLESS[endless]
    folder = copy_of(folder_of(saved), tmp_path / "bad", (folder_of(saved) / SAFETENSORS_WEIGHTS_NAME).read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(content))
    for door in (load_anew, load_beside, load_over):
        assert (load(saved, folder, door) is None) is (door is not load_over)


# ------------------------------------------------------------------------------------------- the class of a base model


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """An adapter beside its base model, for `AutoPeftModel`."""
    base, folder = prompts.base_of(prompts.llama), tmp_path_factory.mktemp("auto")
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def with_mapping(folder, target, **fields):
    weights = (folder / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    copied = copy_of(folder, target, weights)
    content = json.loads((folder / "adapter_config.json").read_text()) | fields
    (copied / "adapter_config.json").write_text(json.dumps(content))
    return copied


def test_the_class_that_a_file_names_is_loaded(plain_folder):
    model = peft.AutoPeftModel.from_pretrained(plain_folder)
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"


MAPPINGS = [
    ({"parent_library": "os", "base_model_class": "system"}, "not among the libraries"),
    ({"parent_library": "transformers_evil", "base_model_class": "x"}, "not among the libraries"),
    ({"parent_library": "transformers"}, "base_model_class; found"),
    ({"parent_library": 3, "base_model_class": "x"}, "base_model_class; found"),
    ({"parent_library": "transformers", "base_model_class": ["x"]}, "base_model_class; found"),
    ({"parent_library": "transformers", "base_model_class": "NoSuchModel"}, "'NoSuchModel' in 'transformers'"),
    ({"parent_library": "transformers", "base_model_class": "utils.logging"}, "which is not there"),
    ({"parent_library": "transformers.nope", "base_model_class": "x"}, "which is not there"),
    ({"parent_library": "transformers..os", "base_model_class": "x"}, "which is not there"),
    ({"parent_library": "transformers", "base_model_class": "pipeline"}, "none that has from_pretrained"),
    ({"parent_library": "transformers", "base_model_class": "__class__"}, "none that has from_pretrained"),
    ({"parent_library": "transformers", "base_model_class": "logging"}, "none that has from_pretrained"),
]


@pytest.mark.parametrize("mapping, words", MAPPINGS, ids=str)
def test_a_class_that_is_no_model_is_refused(mapping, words, plain_folder, tmp_path):
    folder = with_mapping(plain_folder, tmp_path / "other", auto_mapping=mapping)
    with fuzzing.typed_errors_only() as caught:
        peft.AutoPeftModel.from_pretrained(folder)
    assert isinstance(caught[0], ValueError) and words in str(caught[0])


@pytest.mark.parametrize("place", [None, ""])
def test_a_base_model_without_a_place_is_refused(place, plain_folder, tmp_path):
    folder = with_mapping(plain_folder, tmp_path / "other", base_model_name_or_path=place)
    with fuzzing.typed_errors_only() as caught:
        peft.AutoPeftModel.from_pretrained(folder)
    assert "base_model_name_or_path" in str(caught[0]) and str(folder) in str(caught[0])


# -------------------------------------------------------------------------------------------------------- odd folders


def shards(folder):
    (folder / SAFETENSORS_WEIGHTS_NAME).unlink()
    index = {"metadata": {}, "weight_map": {"x": "../../outside.safetensors"}}
    (folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.json").write_text(json.dumps(index))


def in_place_of(name, make):
    def change(folder):
        (folder / name).unlink()
        make(folder / name)

    return change


ODD_FOLDERS = {
    "an index of shards": shards,
    "weights that are a device": in_place_of(SAFETENSORS_WEIGHTS_NAME, lambda path: path.symlink_to("/dev/zero")),
    "weights that link to themselves": in_place_of(SAFETENSORS_WEIGHTS_NAME, lambda path: path.symlink_to(path)),
    "weights that link to nothing": in_place_of(SAFETENSORS_WEIGHTS_NAME, lambda path: path.symlink_to("nothing")),
    "weights that are a folder": in_place_of(SAFETENSORS_WEIGHTS_NAME, Path.mkdir),
    "weights that are a pipe": in_place_of(SAFETENSORS_WEIGHTS_NAME, os.mkfifo),
    "empty weights": in_place_of(SAFETENSORS_WEIGHTS_NAME, Path.touch),
    "a configuration that is a device": in_place_of("adapter_config.json", lambda path: path.symlink_to("/dev/zero")),
    "a configuration that is a folder": in_place_of("adapter_config.json", Path.mkdir),
    "an empty configuration": in_place_of("adapter_config.json", Path.touch),
}


@pytest.mark.parametrize("door", [load_anew, load_beside, load_over, swap], ids=lambda door: door.__name__)
@pytest.mark.parametrize("odd", ODD_FOLDERS)
def test_an_odd_folder_is_refused(odd, door, folder_of, tmp_path, monkeypatch):
    saved = BY_NAME["lora"]
    monkeypatch.setattr(fuzzing, "tree", lambda folder: sorted(path.name for path in folder.rglob("*")))
    whole = (folder_of(saved) / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    ODD_FOLDERS[odd](copy_of(folder_of(saved), tmp_path / "odd", whole))
    loaded = load(saved, tmp_path / "odd", door)
    assert loaded is None or (
        door is load_over and "configuration" in odd
    )  # which an adapter that is there has already


def test_a_folder_of_links_is_loaded(folder_of, tmp_path):
    saved = BY_NAME["lora"]
    (tmp_path / "links").mkdir()
    for path in folder_of(saved).iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to(tmp_path / "links")
    loaded = load(saved, tmp_path / "link", load_anew)
    assert torch.equal(saved.forward(loaded), saved.forward(load(saved, folder_of(saved), load_anew)))
