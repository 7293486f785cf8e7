"""Adapters on base models that accelerate keeps on the CPU or on disk, and in what `Accelerator.prepare` gives back."""

import contextlib
import copy
import warnings

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.utils import is_peft_model
from accelerate.utils.other import compile_regions
from training import IN_CHECKPOINT, OF_THE_RUN, assert_equal, changed, files, in_file, kinds, rows, trainable, values
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft import (
    CPTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.engine.offload import offload_hook
from peft.tuners.tuners_utils import BaseTunerLayer

pytestmark = pytest.mark.compat
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
SPREAD = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
TASK = {"task_type": "CAUSAL_LM"}


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def all_on_cpu(base, folder):
    return cpu_offload(base, execution_device="cpu")


def all_on_disk(base, folder):
    return disk_offload(base, str(folder / "weights"), execution_device="cpu")


def spread(base, folder):
    return dispatch_model(base, SPREAD, offload_dir=str(folder / "weights"))


def loaded_and_spread(base, folder):
    base.save_pretrained(folder / "base")
    with init_empty_weights():
        empty = LlamaForCausalLM(base.config)
    folders = {"offload_folder": str(folder / "weights")}
    return load_checkpoint_and_dispatch(empty, str(folder / "base"), device_map=SPREAD, **folders).eval()


PLACES = [all_on_cpu, all_on_disk, spread, loaded_and_spread]


def lora(**options):
    return LoraConfig(
        **{**TASK, "target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": False, **options}
    )


CONFIGS = {
    "LoRA": lora(),
    "LoRA in embedding and head": lora(target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "LoRA on parameters": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "LoRA with biases": lora(bias="all"),
    "DoRA": lora(use_dora=True),
    "IA3": IA3Config(**TASK, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": OFTConfig(**TASK, target_modules=["q_proj"], oft_block_size=4),
    "HRA": HRAConfig(**TASK, target_modules=["q_proj"], r=2),
    "LoHa": LoHaConfig(**TASK, target_modules=["q_proj"], r=2),
    "VeRA": VeraConfig(**TASK, target_modules=["q_proj"], r=4),
    "LN tuning": LNTuningConfig(**TASK, target_modules=["norm", "input_layernorm"]),
    "copies": lora(modules_to_save=["lm_head", "norm"]),
    "a copy of the embedding": lora(modules_to_save=["embed_tokens"]),
    "token rows": lora(trainable_token_indices=[1, 2]),
    "trainable tokens": TrainableTokensConfig(**TASK, target_modules=["embed_tokens"], token_indices=[1, 2]),
    "prompt tuning": PromptTuningConfig(**TASK, num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(**TASK, num_virtual_tokens=3),
}
PROMPTS = {"prompt tuning", "prefix tuning"}
MERGED = [name for name in CONFIGS if name not in PROMPTS]


def moved(model):
    """Away from where the adapter starts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pair(name, place, folder, tied=False):
    """The same adapter on a model in memory and on one whose weights are elsewhere."""
    plain = moved(get_peft_model(llama(tied), copy.deepcopy(CONFIGS[name])).eval())
    away = get_peft_model(place(llama(tied), folder), copy.deepcopy(CONFIGS[name])).eval()
    assert trainable(away) == trainable(plain)
    source = dict(plain.named_parameters())
    with torch.no_grad():
        for key, parameter in away.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(source[key])
    if name == "VeRA":
        away.base_model.load_state_dict(
            {k: v for k, v in plain.base_model.state_dict().items() if "vera_" in k}, strict=False
        )
    return plain, away


def logits(model):
    return model(input_ids=IDS).logits


def kept(model):
    """The base model's weights by name, where they are kept."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        hook = offload_hook(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and "default" not in f"{path}.{name}":
                value = hook.weights_map[name] if parameter.is_meta else parameter
                found[f"{path}.{name}"] = value.detach().clone()
    return found


def is_away(model):
    return any(parameter.is_meta for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------- computing and training


@pytest.mark.parametrize(
    "name, place",
    [(name, place) for name in CONFIGS for place in (all_on_cpu, all_on_disk)]
    + [(name, place) for name in ("copies", "prompt tuning") for place in (spread, loaded_and_spread)],
)
def test_it_computes_and_trains_as_in_memory(name, place, tmp_path):
    plain, away = pair(name, place, tmp_path)
    before = kept(away)
    torch.testing.assert_close(logits(away), logits(plain))
    for model in (plain, away):
        step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        step.step()
    trained = dict(plain.named_parameters())
    for key, parameter in away.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, trained[key].grad, msg=key)
            torch.testing.assert_close(parameter, trained[key], msg=key)
    torch.testing.assert_close(logits(away), logits(plain))
    if name != "LoRA with biases":  # these are the base model's own
        with away.disable_adapter():
            torch.testing.assert_close(logits(away), logits(llama()))
    assert {key for key, value in kept(away).items() if not torch.equal(value, before[key])} == {
        key for key in trainable(away) if "default" not in key
    }
    assert is_away(away)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["LoRA", "copies", "prompt tuning"])
def test_a_trainer_takes_it_as_it_is(name, checkpointing, tmp_path):
    data = [{key: row % 32 for key, row in entry.items()} for entry in rows()]
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "learning_rate": 0.01}
    options |= {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": checkpointing}
    plain, away = pair(name, spread, tmp_path)
    before = kept(away)
    for folder, model in (("plain", plain), ("away", away)):
        Trainer(model, TrainingArguments(str(tmp_path / folder), **options), train_dataset=data).train()
    checkpoint = tmp_path / "away" / "checkpoint-2"
    assert files(checkpoint) == IN_CHECKPOINT | OF_THE_RUN
    assert_equal(in_file(checkpoint), in_file(tmp_path / "plain" / "checkpoint-2"))
    assert_equal(kept(away), before)
    assert is_away(away)


@pytest.mark.parametrize("place", [all_on_cpu, all_on_disk])
@pytest.mark.parametrize(
    "name", ["a copy of the embedding", "token rows", "LoRA in embedding and head", "prompt tuning"]
)
def test_tied_embeddings(name, place, tmp_path):
    plain, away = pair(name, place, tmp_path, tied=True)
    torch.testing.assert_close(logits(away), logits(plain))
    if name not in PROMPTS:
        torch.testing.assert_close(logits(away.merge_and_unload()), logits(plain))


# -------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize(
    "name, place",
    [(name, all_on_cpu) for name in MERGED] + [(name, spread) for name in ("LoRA", "DoRA", "copies", "token rows")],
)
def test_merging_writes_to_where_the_weights_are_kept(name, place, tmp_path):
    plain, away = pair(name, place, tmp_path)
    expected, before = logits(plain), kept(away)
    plain.merge_adapter()
    away.merge_adapter()
    assert is_away(away)
    torch.testing.assert_close(logits(away), expected)
    merged = kept(plain)
    for key, value in kept(away).items():
        torch.testing.assert_close(value, merged[key], msg=key)
    assert any(not torch.equal(value, before[key]) for key, value in kept(away).items())
    away.unmerge_adapter()
    assert_equal(kept(away), before)
    torch.testing.assert_close(logits(away), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["LoRA", "copies"])
def test_a_merged_model_without_adapters(name, place, tmp_path):
    plain, away = pair(name, place, tmp_path)
    expected = logits(plain)
    merged, in_memory = away.merge_and_unload(), plain.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert is_away(merged)
    torch.testing.assert_close(logits(merged), expected)
    found = kept(merged)
    for key, value in in_memory.named_parameters():
        torch.testing.assert_close(found[key], value, msg=key)
    if not hasattr(merged, "hf_device_map"):  # without it transformers does not know that weights are elsewhere
        return
    merged.save_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), expected)


def test_what_is_merged_is_no_longer_read_from_disk(tmp_path):
    _, away = pair("LoRA", spread, tmp_path)
    layer = away.base_model.model.model.layers[1].self_attn
    dataset = offload_hook(layer.q_proj.base_layer).weights_map.dataset
    name, other = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
    assert {name, other} <= set(dataset.index)
    away.merge_and_unload()
    assert name not in dataset.index and name in dataset.state_dict
    assert other in dataset.index


# ----------------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_is_the_same_and_is_loaded_onto_an_offloaded_model(name, tmp_path):
    plain, away = pair(name, all_on_cpu, tmp_path)
    assert not any(tensor.is_meta for tensor in get_peft_model_state_dict(away).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # embeddings that are adapted are saved as well
        plain.save_pretrained(tmp_path / "plain")
        away.save_pretrained(tmp_path / "away")
    assert_equal(in_file(tmp_path / "away"), in_file(tmp_path / "plain"))
    again = PeftModel.from_pretrained(all_on_disk(llama(), tmp_path), tmp_path / "plain")
    torch.testing.assert_close(logits(again), logits(plain))
    assert trainable(again) == {key for key in trainable(plain) if key.startswith("prompt_encoder.")}
    assert is_away(again)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(**TASK, num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"),
        CPTConfig(**TASK, cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 4]),
    ],
    ids=["prompt tuning", "CPT"],
)
def test_a_prompt_starts_at_embeddings_that_are_elsewhere(config, place, tmp_path):
    starts = []
    for base in (llama(), place(llama(), tmp_path)):
        torch.manual_seed(1)
        starts.append(get_peft_model(base, copy.deepcopy(config)))
    plain, away = starts
    assert torch.equal(away.get_prompt_embedding_to_save("default"), plain.get_prompt_embedding_to_save("default"))
    torch.testing.assert_close(logits(away.eval()), logits(plain.eval()))
    assert is_away(away)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3", "copies", "token rows", "prompt tuning"])
def test_several_adapters(name, tmp_path):
    plain, away = pair(name, all_on_disk, tmp_path)
    plain.save_pretrained(tmp_path / "plain")
    first = logits(away)
    away.load_adapter(tmp_path / "plain", "second")
    away.add_adapter("third", copy.deepcopy(CONFIGS[name]))
    torch.testing.assert_close(logits(away.eval()), first)
    away.set_adapter("second")
    torch.testing.assert_close(logits(away), first)
    away.set_adapter("third")
    assert trainable(away) and all("third" in key for key in trainable(away))
    away.delete_adapter("third")
    away.set_adapter("second")
    torch.testing.assert_close(logits(away), first)
    if name not in PROMPTS:
        torch.testing.assert_close(logits(away.unload()), logits(llama()))


OTHERWISE, MORE_ON_DISK = {**SPREAD, "model.norm": "disk"}, {"model.layers.1", "model.norm", "lm_head"}


@pytest.mark.parametrize(
    "options, on_disk",
    [
        ({}, {"model.layers.1", "lm_head"}),
        ({"device_map": {"": "cpu"}}, set()),
        ({"device_map": "auto"}, set()),
        (
            {"device_map": OTHERWISE, "offload_folder": "new"},
            MORE_ON_DISK,
        ),
        (
            {"device_map": OTHERWISE, "offload_dir": "new"},
            MORE_ON_DISK,
        ),
    ],
    ids=["as it was", "in memory", "auto", "another map", "the folder by its other name"],
)
def test_spreading_the_model_while_loading(options, on_disk, tmp_path):
    expected = moved(get_peft_model(llama(), lora(modules_to_save=["norm"])))
    expected.save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    folder = str(tmp_path / "weights")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=SPREAD, offload_folder=folder).eval()
    options = {key: str(tmp_path / value) if value == "new" else value for key, value in options.items()}
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", **options)
    torch.testing.assert_close(logits(model), logits(expected.eval()))
    away = {key for key, parameter in model.named_parameters() if parameter.is_meta}
    prefix = "base_model.model."
    assert {name for name in SPREAD if any(key.startswith(prefix + name) for key in away)} == on_disk
    assert (tmp_path / "new").exists() == ("offload" in "".join(options))


def test_the_folder_has_one_name(tmp_path):
    get_peft_model(llama(), lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="offload_folder and offload_dir mean the same"):
        PeftModel.from_pretrained(llama(), tmp_path / "adapter", offload_folder="a", offload_dir="b")


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3"])
def test_initial_norms_on_an_accelerator(name, tmp_path):
    """Without one the option changes nothing; a method that has no use for it says so."""
    plain = moved(get_peft_model(llama(), copy.deepcopy(CONFIGS[name])))
    plain.save_pretrained(tmp_path / "adapter")
    expectation = pytest.warns(UserWarning, match="ephemeral_gpu_offload has no effect on IA3")
    with expectation if name == "IA3" else contextlib.nullcontext():
        model = PeftModel.from_pretrained(
            all_on_cpu(llama(), tmp_path), tmp_path / "adapter", ephemeral_gpu_offload=True
        )
    torch.testing.assert_close(logits(model), logits(plain.eval()))


# -------------------------------------------------------------------------------------------------------- the Accelerator


PREPARED = ["DoRA", "copies", "token rows", "IA3", "prompt tuning"]


@pytest.fixture
def accelerator(request):
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    yield Accelerator(cpu=True, **getattr(request, "param", {}))
    AcceleratorState._reset_state()
    PartialState._reset_state()


def steps(accelerator, model, optimizer, number=2):
    for _ in range(number):
        loss = model(input_ids=IDS, labels=IDS).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def prepared(accelerator, name, seed=0):
    base = llama()
    torch.manual_seed(seed)
    model = get_peft_model(base, copy.deepcopy(CONFIGS[name]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return accelerator.prepare(model, optimizer)


@pytest.mark.parametrize("name", PREPARED)
def test_a_prepared_model_is_still_a_peft_model(name, accelerator, tmp_path):
    model, optimizer = prepared(accelerator, name)
    inner = accelerator.unwrap_model(model)
    assert isinstance(inner, PeftModel) and is_peft_model(model)
    before = values(inner)
    steps(accelerator, model, optimizer)
    assert changed(before, inner) == trainable(inner)
    inner.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(model))
    assert_equal(in_file(tmp_path), get_peft_model_state_dict(inner))


@pytest.mark.parametrize("name", PREPARED)
def test_a_saved_state_is_gone_on_from(name, accelerator, tmp_path):
    model, optimizer = prepared(accelerator, name)
    steps(accelerator, model, optimizer)
    accelerator.save_state(str(tmp_path))
    steps(accelerator, model, optimizer)
    expected = values(accelerator.unwrap_model(model))
    again, optimizer = prepared(accelerator, name, seed=1)
    accelerator._models, accelerator._optimizers = accelerator._models[1:], accelerator._optimizers[1:]
    accelerator.load_state(str(tmp_path))
    steps(accelerator, again, optimizer)
    assert_equal(values(accelerator.unwrap_model(again)), expected)
    assert kinds(trainable(again)) == kinds(trainable(model))


@pytest.mark.parametrize("accelerator", [{"mixed_precision": "bf16"}], indirect=True)
@pytest.mark.parametrize("name", PREPARED)
def test_mixed_precision(name, accelerator):
    model, optimizer = prepared(accelerator, name)
    loss = steps(accelerator, model, optimizer, number=1)
    plain = prepared(accelerator, name)[0]
    inner = accelerator.unwrap_model(plain, keep_fp32_wrapper=False)
    assert isinstance(inner, PeftModel)
    expected = inner(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    assert loss != expected
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("accelerator", [{"gradient_accumulation_steps": 2}], indirect=True)
def test_gradients_are_accumulated(accelerator):
    model, optimizer = prepared(accelerator, "copies")
    before = values(model)
    moments = []
    for row in IDS:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=row[None], labels=row[None]).loss)
            moments.append({key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad})
            optimizer.step()
            optimizer.zero_grad()
        assert (changed(before, model) == set()) == (len(moments) == 1)
    whole = prepared(accelerator, "copies")[0]
    whole(input_ids=IDS, labels=IDS).loss.backward()
    for key, parameter in whole.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(moments[1][key], parameter.grad, msg=key)


@pytest.mark.parametrize("accelerator", [{"dynamo_backend": "eager"}], indirect=True)
def test_a_compiled_model_is_saved_as_itself(accelerator, tmp_path):
    model, _ = prepared(accelerator, "copies")
    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    assert isinstance(inner, PeftModel) and inner is not model
    inner.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(model))
    assert_equal(in_file(tmp_path), get_peft_model_state_dict(inner))


@pytest.mark.parametrize("name", ["copies", "prompt tuning"])
def test_a_model_that_is_compiled_by_its_blocks(name, tmp_path):
    """Each block is wrapped, and whatever stands beside the blocks as a whole: the prompts of a model, too."""
    model = moved(get_peft_model(llama(), copy.deepcopy(CONFIGS[name])).eval())
    expected, file = logits(model), get_peft_model_state_dict(model)
    compiled = compile_regions(model, backend="eager")
    torch.testing.assert_close(logits(compiled), expected)
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)
    compiled.save_pretrained(tmp_path)
    assert_equal(in_file(tmp_path), file)
