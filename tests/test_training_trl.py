"""trl's trainers with adapters: what trains, what they compare with, and what they hand on."""

import contextlib
import copy
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl", reason="trl trains the models here")
pytest.importorskip("datasets", reason="trl takes data as datasets")

from datasets import Dataset, disable_progress_bars
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from training import (
    CONFIG,
    IN_CHECKPOINT,
    WEIGHTS,
    Gradients,
    assert_equal,
    changed,
    counted,
    files,
    in_file,
    kinds,
    trainable,
    values,
)
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
    get_peft_config,
)
from trl.generation.vllm_generation import VLLMGeneration
from versions import is_at_least, needs

import peft
from peft import (
    AutoPeftModelForCausalLM,
    CPTConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)

pytestmark = pytest.mark.compat
disable_progress_bars()

SPECIAL = ["<pad>", "<s>", "</s>"]
LETTERS = list("abcdefghijklmnopqrstuvwxyz .?")
VOCAB = len(SPECIAL) + len(LETTERS)
ANSWER = "{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
CHAT = (
    "{% for m in messages %}{{ m['role'] }}.{% if m['role'] == 'assistant' %}"
    + ANSWER
    + "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def tokenizer():
    """One token for each letter."""
    model = WordLevel({token: index for index, token in enumerate(SPECIAL + LETTERS)}, unk_token="?")
    letters = Tokenizer(model)
    letters.pre_tokenizer = Split(Regex("."), "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}
    result = PreTrainedTokenizerFast(tokenizer_object=letters, **names)
    result.chat_template = CHAT
    return result


def llama(cls=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return cls(config)


TEXTS = ["the cat sat.", "a dog ran.", "fish swim.", "birds fly."]
PAIRS = [("the cat", " sat.", " flew."), ("a dog", " ran.", " sang."), ("fish", " swim.", " bark.")]
DATA = {
    "text": [{"text": text} for text in TEXTS],
    "pairs": [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in PAIRS],
    "prompts": [{"prompt": prompt} for prompt, _, _ in PAIRS],
    "answers": [{"prompt": prompt, "completion": answer} for prompt, answer, _ in PAIRS],
    "chats": [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer, _ in PAIRS
    ],
    "judged": [
        {"prompt": prompt, "completion": answer, "label": good}
        for prompt, *answers in PAIRS
        for answer, good in zip(answers, (True, False))
    ],
}


def later_is_better(completions, **kwargs):
    return [float(index) for index, _ in enumerate(completions)]


GENERATES = {"max_completion_length": 4, "num_generations": 2, "beta": 0.1}
TRAINERS = {
    "SFT": (SFTTrainer, SFTConfig, "text", {"max_length": 32}, {}),
    "DPO": (DPOTrainer, DPOConfig, "pairs", {"max_length": 32}, {}),
    "KTO": (KTOTrainer, KTOConfig, "judged", {"max_length": 32}, {}),
    "GRPO": (GRPOTrainer, GRPOConfig, "prompts", GENERATES, {"reward_funcs": later_is_better}),
    "RLOO": (RLOOTrainer, RLOOConfig, "prompts", GENERATES, {"reward_funcs": later_is_better}),
    "reward": (RewardTrainer, RewardConfig, "pairs", {"max_length": 32}, {}),
}


def trainer_for(name, model, folder, config=None, data=None, callbacks=None, more=None, **options):
    cls, args_cls, default_data, own, inputs = TRAINERS[name]
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return cls(
        model=model,
        args=args_cls(str(folder), **{**defaults, **own, **options}),
        train_dataset=Dataset.from_list(DATA[default_data] if data is None else data),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=callbacks,
        **{**inputs, **(more or {})},
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lora(**options):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2, **options})


LORA = {"self_attn.q_proj.lora_A.default.weight", "self_attn.q_proj.lora_B.default.weight"}
ROWS = {"embed_tokens.token_adapter.trainable_tokens_delta.default"}
PROMPT = {"prompt_encoder.default.embedding.weight"}
CONFIGS = {
    "LoRA": (lora(), LORA),
    "LoRA with a copy": (lora(modules_to_save=["lm_head"]), LORA | {"lm_head.modules_to_save.default.weight"}),
    "LoRA with token rows": (lora(trainable_token_indices=[3, 4, 5]), LORA | ROWS),
    "IA3": (
        IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        {"self_attn.v_proj.ia3_l.default", "mlp.down_proj.ia3_l.default"},
    ),
    "prompt tuning": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), PROMPT),
    "P-tuning": (
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        {f"prompt_encoder.default.{name}.weight" for name in ("embedding", "mlp_head.0", "mlp_head.2", "mlp_head.4")}
        | {f"prompt_encoder.default.mlp_head.{index}.bias" for index in (0, 2, 4)},
    ),
}
LANGUAGE = [name for name in TRAINERS if name != "reward"]


def moved(model, by=0.3):
    """Away from where the adapter starts, as an earlier training would have left it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def saved(model, name="default"):
    return {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}


def train_and_compare(trainer, expected):
    before = values(trainer.model)
    trainer.train()
    assert len(losses(trainer)) == 2 and all(torch.isfinite(torch.tensor(losses(trainer))))
    assert kinds(changed(before, trainer.model)) == expected
    assert kinds(trainable(trainer.model)) == expected


# ------------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "name, adapter",
    [(name, "LoRA with a copy") for name in LANGUAGE]
    + [("SFT", adapter) for adapter in ("LoRA with token rows", "P-tuning")]
    + [("GRPO", "prompt tuning")],
)
def test_from_a_configuration(name, adapter, tmp_path):
    config, expected = CONFIGS[adapter]
    trainer = trainer_for(name, llama(), tmp_path, copy.deepcopy(config))
    assert list(trainer.model.peft_config) == ["default"]
    train_and_compare(trainer, expected)


@pytest.mark.parametrize(
    "name, adapter",
    [("SFT", "IA3"), ("DPO", "LoRA with token rows")]
    + [(name, "LoRA with a copy") for name in ("KTO", "GRPO", "RLOO")],
)
def test_from_a_model_that_has_an_adapter(name, adapter, tmp_path):
    config, expected = CONFIGS[adapter]
    model = moved(get_peft_model(llama(), copy.deepcopy(config)))
    trainer = trainer_for(name, model, tmp_path)
    assert list(model.peft_config) == (["default"] if name == "SFT" else ["default", "ref"])
    train_and_compare(trainer, expected)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize(
    "config, expected",
    [
        (LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2), LORA),
        (PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3), PROMPT),
    ],
    ids=["LoRA", "prompt tuning"],
)
def test_a_reward_model_is_trained_with_its_head(config, expected, ready, tmp_path):
    model, config = llama(LlamaForSequenceClassification, num_labels=1), copy.deepcopy(config)
    trainer = trainer_for(
        "reward", get_peft_model(model, config) if ready else model, tmp_path, None if ready else config
    )
    train_and_compare(trainer, expected | {"score.modules_to_save.default.weight"})


@pytest.mark.parametrize("name", ["SFT", "GRPO"])
def test_an_adapted_head_is_refused_by_trl(name, tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        trainer_for(name, llama(), tmp_path, lora(target_modules=["lm_head"]))


def test_one_target_module_on_the_command_line_of_trl(tmp_path):
    """It arrives as a string, and so as a regular expression: the error shows what was meant."""
    config = get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["q_proj"], lora_r=2))
    with pytest.raises(ValueError, match=r"regular expression for whole names; for their ends, pass \['q_proj'\]"):
        trainer_for("SFT", llama(), tmp_path, config)
    options = {"lora_target_modules": ["q_proj", "v_proj"], "use_dora": True, "lora_modules_to_save": ["lm_head"]}
    config = get_peft_config(ModelConfig(use_peft=True, lora_r=2, **options))
    dora = {f"self_attn.{layer}_proj.lora_{part}.default.weight" for layer in "qv" for part in ("A", "B")}
    dora |= {f"self_attn.{layer}_proj.lora_magnitude_vector.default.weight" for layer in "qv"}
    train_and_compare(trainer_for("SFT", llama(), tmp_path, config), dora | {"lm_head.modules_to_save.default.weight"})


WAYS = {
    "texts": ("text", {}),
    "answers": ("answers", {}),
    "answers in chats": ("chats", {"assistant_only_loss": True}),
    "packed": ("text", {"packing": True, "max_length": 16}),
    "weighted by probability": ("text", {"loss_type": "dft"}),
    "bfloat16": ("text", {"bf16": True}),
    "smoothed labels": ("text", {"label_smoothing_factor": 0.1}),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_that_changes_nothing_starts_at_the_loss_of_the_base_model(way, tmp_path):
    data, options = WAYS[way]
    options = {**options, "data": DATA[data], "max_steps": 2}
    plain = trainer_for("SFT", llama(), tmp_path, **options)
    adapted = trainer_for("SFT", llama(), tmp_path, lora(), **options)
    for trainer in (plain, adapted):
        trainer.train()
    assert losses(adapted)[0] == losses(plain)[0] and losses(adapted)[1] != losses(plain)[1]


def test_a_loss_of_its_own_is_refused(tmp_path):
    """trl's output layer gives a loss and no logits, from which a context's loss could be computed."""
    config = CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 2]
    )
    for name in ("SFT", "DPO"):
        with pytest.raises(ValueError, match="CPT computes its own loss, from logits.*transformers' Trainer"):
            trainer_for(name, llama(), tmp_path, copy.deepcopy(config)).train()


QUIET = {
    "SFT from a configuration": ("SFT", lora(modules_to_save=["lm_head"]), False),
    "DPO": ("DPO", lora(), True),
    "DPO with a prefix": ("DPO", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), True),
    "GRPO with a prompt": ("GRPO", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), True),
    "reward": ("reward", LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2), True),
}


@pytest.mark.parametrize("case", QUIET)
def test_there_is_nothing_to_warn_of(case, tmp_path):
    """trl itself names an adapter "ref", and its generation passes positions."""
    name, config, ready = QUIET[case]
    base = llama(LlamaForSequenceClassification, num_labels=1) if name == "reward" else llama()
    config = copy.deepcopy(config)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = get_peft_model(base, config) if ready else base
        options = {"gradient_checkpointing": not config.peft_type == "PREFIX_TUNING", "save_strategy": "steps"}
        trainer = trainer_for(name, model, tmp_path, None if ready else config, **options, save_steps=2)
        trainer.train()
    ours = Path(peft.__file__).parent
    assert [str(warning.message) for warning in seen if ours in Path(warning.filename).parents] == []
    assert IN_CHECKPOINT <= files(tmp_path / "checkpoint-2")


def test_an_adapted_model_that_gives_rewards(tmp_path):
    judge = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2, init_lora_weights=False)
    judge = get_peft_model(llama(LlamaForSequenceClassification, num_labels=1), judge)
    before = values(judge)
    more = {"reward_funcs": judge, "reward_processing_classes": tokenizer()}
    trainer = trainer_for("GRPO", llama(), tmp_path, lora(modules_to_save=["lm_head"]), more=more)
    train_and_compare(trainer, CONFIGS["LoRA with a copy"][1])
    assert changed(before, judge) == set()
    assert all(parameter.grad is None for parameter in judge.parameters())
    assert trainer.state.log_history[0]["reward"] != 0


TIED = {
    "a copy": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), "modules_to_save.default.weight"),
    "token rows": (lora(trainable_token_indices=[3, 4, 5]), "token_adapter.trainable_tokens_delta.default"),
}


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings(kind, name, tmp_path):
    config, part = TIED[kind]
    trainer = trainer_for(name, llama(tie_word_embeddings=True), tmp_path, copy.deepcopy(config))
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    found = {key for key, value in trainer.model.named_parameters() if not torch.equal(value, before[key])}
    assert kinds(found) == LORA | {f"embed_tokens.{part}"}


# ---------------------------------------------------------------------------------------------- the head that trl reads


def test_the_output_layer_of_a_model():
    """trl multiplies with the weight of this layer, and refuses what it takes for an adapter there."""
    copied = get_peft_model(llama(), lora(modules_to_save=["lm_head"]))
    wrapper = copied.base_model.model.lm_head
    assert copied.get_output_embeddings() is wrapper.modules_to_save["default"]
    assert copied.get_base_model().get_output_embeddings() is wrapper
    with copied.disable_adapter():
        assert copied.get_output_embeddings() is wrapper.original_module
    tied = get_peft_model(llama(tie_word_embeddings=True), lora(trainable_token_indices=[3]))
    assert tied.get_output_embeddings() is tied.base_model.model.lm_head.original_module
    targeted = get_peft_model(llama(), lora(target_modules=["lm_head"]))
    assert targeted.get_output_embeddings() is targeted.base_model.model.lm_head
    assert get_peft_model(llama(), lora()).get_output_embeddings().weight.shape == (VOCAB, 16)
    assert get_peft_model(llama(LlamaModel), lora(task_type=None)).get_output_embeddings() is None


@pytest.mark.parametrize("name", ["a copy", "tied copies", "tied token rows"])
def test_gradients_through_that_head(name, tmp_path):
    config = {
        "a copy": lora(modules_to_save=["lm_head"]),
        "tied copies": TIED["a copy"][0],
        "tied token rows": TIED["token rows"][0],
    }[name]
    model = moved(get_peft_model(llama(tie_word_embeddings=name != "a copy"), copy.deepcopy(config)))
    batch = tokenizer()([text + "</s>" for text in TEXTS], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    (loss * (labels[:, 1:] != -100).sum() / counted(labels)).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    seen = Gradients()
    options = {"max_steps": 1, "per_device_train_batch_size": len(TEXTS), "max_grad_norm": 0.0}
    trainer_for("SFT", model, tmp_path, callbacks=[seen], **options).train()
    assert seen.values.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(seen.values[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


# -------------------------------------------------------------------------------------------------- what it compares with


def log_probability(model, prompt, answer):
    start, ids = len(prompt), tokenizer()(prompt + answer + "</s>", return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids).logits[0, -ids.shape[1] :]  # past the virtual tokens
    steps = F.log_softmax(logits[:-1], dim=-1).gather(-1, ids[0, 1:, None])
    return steps[start - 1 :].sum()


@torch.no_grad()
def preference_loss(model, reference):
    """DPO's, over all pairs; the reference is a context in which the model is it."""
    margins = []
    for prompt, chosen, rejected in PAIRS:
        own = log_probability(model, prompt, chosen) - log_probability(model, prompt, rejected)
        with reference():
            other = log_probability(model, prompt, chosen) - log_probability(model, prompt, rejected)
        margins.append(own - other)
    return -F.logsigmoid(0.1 * torch.stack(margins)).mean()


def first_loss(trainer):
    trainer.train()
    return torch.tensor(losses(trainer)[0])


WHOLE = {"per_device_train_batch_size": len(PAIRS), "max_steps": 1}
EVEN = torch.tensor(2.0).log()
"""The loss of a model that is its own reference."""

LOGGED = {} if is_at_least("transformers", "5.0") else {"rtol": 0, "atol": 5e-5}
"""To how many digits losses are noted: four before transformers 5."""


@pytest.mark.parametrize("adapter", ["LoRA", "LoRA with a copy", "LoRA with token rows", "IA3", "prompt tuning"])
def test_the_reference_of_a_new_adapter_is_the_base_model(adapter, tmp_path):
    trainer = trainer_for("DPO", llama(), tmp_path, copy.deepcopy(CONFIGS[adapter][0]), **WHOLE)
    model = moved(trainer.model).eval()
    expected = preference_loss(model, model.disable_adapter)
    assert abs(expected - EVEN) > 1e-5
    torch.testing.assert_close(first_loss(trainer), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", ["LoRA", "LoRA with a copy", "prompt tuning", "P-tuning"])
def test_the_reference_of_a_trained_adapter_is_what_it_was(adapter, tmp_path):
    """trl adds an adapter "ref" of the same configuration, and copies into it what has `.default.` in its name."""
    model = moved(get_peft_model(llama(), copy.deepcopy(CONFIGS[adapter][0])))
    start = saved(model)
    trainer = trainer_for("DPO", model, tmp_path, **WHOLE)
    assert_equal(get_peft_model_state_dict(model, adapter_name="ref"), start)
    torch.testing.assert_close(first_loss(trainer), EVEN, **LOGGED)
    assert_equal(get_peft_model_state_dict(model, adapter_name="ref"), start)
    assert not any(torch.equal(value, start[key]) for key, value in get_peft_model_state_dict(model).items())


@pytest.mark.parametrize("adapter", ["LoRA with token rows", "IA3"])
def test_a_reference_that_trl_does_not_copy_in_full_can_be_loaded(adapter, tmp_path):
    """Of parameters whose names end in `.default` it makes no copies."""
    model = moved(get_peft_model(llama(), copy.deepcopy(CONFIGS[adapter][0])))
    model.save_pretrained(tmp_path / "start")
    trainer = trainer_for("DPO", model, tmp_path, **WHOLE)
    start = get_peft_model_state_dict(model)
    reference = get_peft_model_state_dict(model, adapter_name="ref")
    assert not all(torch.equal(value, start[key]) for key, value in reference.items())
    model.load_adapter(tmp_path / "start", "ref")
    torch.testing.assert_close(first_loss(trainer), EVEN, **LOGGED)


def test_two_adapters_that_train_biases_are_refused(tmp_path):
    model = get_peft_model(llama(attention_bias=True), lora(bias="all"))
    with pytest.raises(ValueError, match="one adapter that trains biases"):
        trainer_for("DPO", model, tmp_path)
    assert list(model.peft_config) == ["default"]
    expected = LORA | {f"self_attn.{name}_proj.bias" for name in "kvo"} | {"self_attn.q_proj.base_layer.bias"}
    train_and_compare(trainer_for("DPO", llama(attention_bias=True), tmp_path, lora(bias="all")), expected)


# ------------------------------------------------------------------------------------------------------------ memory


def test_checkpointing_is_on_in_trl_and_changes_nothing(tmp_path):
    def adapter(**options):
        trainer = trainer_for("SFT", llama(), tmp_path, lora(lora_dropout=0.1), **options)
        trainer.train()
        return get_peft_model_state_dict(trainer.model)

    expected = adapter(gradient_checkpointing=False)
    assert SFTConfig(str(tmp_path), use_cpu=True, bf16=False).gradient_checkpointing
    assert_equal(adapter(), expected)
    assert_equal(adapter(gradient_checkpointing_kwargs={"use_reentrant": True}), expected)


def test_a_prefix_needs_it_off(tmp_path):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = trainer_for("SFT", llama(), tmp_path, config)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        trainer.train()
    train_and_compare(trainer_for("SFT", llama(), tmp_path, config, gradient_checkpointing=False), PROMPT)


def test_a_base_model_prepared_for_low_precision(tmp_path):
    base = prepare_model_for_kbit_training(llama().to(torch.bfloat16))
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    trainer = trainer_for("SFT", get_peft_model(base, lora(modules_to_save=["lm_head"])), tmp_path, bf16=True)
    train_and_compare(trainer, CONFIGS["LoRA with a copy"][1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_quantised_base_model(bits, prepared, tmp_path):
    """trl turns the adapter of such a model to bfloat16 after it is made, all but DoRA's magnitudes."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the model")
    llama().save_pretrained(tmp_path / "base")
    options = {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True}), "device_map": {"": "cpu"}}
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", **options)
    if prepared:
        base = prepare_model_for_kbit_training(base)
    trainer = trainer_for("SFT", base, tmp_path, lora(use_dora=True, modules_to_save=["lm_head"]))
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    precise = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    magnitude = "self_attn.q_proj.lora_magnitude_vector.default.weight"
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16} and kinds(precise) == {magnitude}
    train_and_compare(trainer, CONFIGS["LoRA with a copy"][1] | {magnitude})


# ------------------------------------------------------------------------------------------------------------ new tokens


def test_tokens_that_a_chat_template_brings(tmp_path):
    """trl makes their rows trainable, and a copy of the head, by changing the configuration."""
    source = tokenizer()
    source.add_tokens(["<turn>"])
    source.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}</s>{% endfor %}"
    source.save_pretrained(tmp_path / "source")
    config = lora()
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes."}]} for text in TEXTS
    ]
    base = llama()
    trainer = trainer_for(
        "SFT", base, tmp_path, config, data=chats, chat_template_path=str(tmp_path / "source"), max_length=48
    )
    resized = copy.deepcopy(trainer.model).unload()
    added = config.trainable_token_indices["embed_tokens"]
    assert VOCAB in added and config.modules_to_save == ["lm_head"]
    train_and_compare(trainer, LORA | ROWS | {"lm_head.modules_to_save.default.weight"})
    trainer.save_model(tmp_path / "adapter")
    rows = in_file(tmp_path / "adapter")["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert rows.shape == (len(added), 16)
    ids = tokenizer()("the cat", return_tensors="pt")["input_ids"]
    ids = torch.cat([torch.tensor([[VOCAB]]), ids], dim=1)
    again = PeftModel.from_pretrained(resized, tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


# ---------------------------------------------------------------------------------------------------- saving and loading


def test_a_saved_adapter_is_loaded_and_trained_on(tmp_path):
    def start():
        return get_peft_model(llama(), lora(modules_to_save=["lm_head"], lora_dropout=0.1))

    straight = trainer_for("SFT", start(), tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    straight.train()
    resumed = trainer_for("SFT", moved(start()), tmp_path / "again", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = get_peft_model_state_dict(straight.model)
    assert_equal(get_peft_model_state_dict(resumed.model), expected)
    straight.save_model(tmp_path / "adapter")
    assert IN_CHECKPOINT <= files(tmp_path / "adapter")
    assert_equal(in_file(tmp_path / "adapter"), expected)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True)
    ids = tokenizer()("the cat", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded.eval()(input_ids=ids).logits, straight.model.eval()(input_ids=ids).logits)
    train_and_compare(trainer_for("SFT", loaded, tmp_path), CONFIGS["LoRA with a copy"][1])


def test_from_the_folder_of_a_model(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    trainer = trainer_for("SFT", str(tmp_path / "base"), tmp_path, lora(target_modules="all-linear"))
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    tokens = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    found = files(tmp_path / "adapter") - {"special_tokens_map.json"}  # of transformers before 5
    assert found == IN_CHECKPOINT | tokens | {"training_args.bin"}
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.active_peft_config.base_model_name_or_path == str(tmp_path / "base")
    ids = tokenizer()("the cat", return_tensors="pt")["input_ids"]
    expected = trainer.model.eval()(input_ids=ids).logits
    assert torch.equal(again(input_ids=ids).logits, expected)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=ids).logits, expected)


def test_the_best_adapter_beside_its_reference(tmp_path):
    model = moved(get_peft_model(llama(), lora(modules_to_save=["lm_head"])))
    reference = saved(model)
    options = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # of the loss, which falls: the first step is the best
        "max_steps": 3,
    }
    trainer = trainer_for("DPO", model, tmp_path, more={"eval_dataset": Dataset.from_list(DATA["pairs"])}, **options)
    trainer.train()
    best, last = Path(trainer.state.best_model_checkpoint), tmp_path / "checkpoint-3"
    assert best.name == "checkpoint-1"
    assert_equal(saved(model), in_file(best))
    assert not any(torch.equal(value, in_file(last)[key]) for key, value in in_file(best).items())
    assert_equal(get_peft_model_state_dict(model, adapter_name="ref"), reference)
    assert_equal(in_file(last / "ref"), reference)
    assert model.active_adapters == ["default"] and kinds(trainable(model)) == CONFIGS["LoRA with a copy"][1]


@needs("transformers", "5.23", 'goes on with the adapters of other names than "default" only')
def test_the_reference_is_saved_and_comes_back(tmp_path):
    model = moved(get_peft_model(llama(), lora()))
    straight = trainer_for("DPO", model, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    straight.train()
    assert files(tmp_path / "checkpoint-2" / "ref") == {WEIGHTS, CONFIG}
    resumed = trainer_for("DPO", get_peft_model(llama(), lora()), tmp_path / "again", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name in ("default", "ref"):
        assert_equal(
            get_peft_model_state_dict(resumed.model, adapter_name=name),
            get_peft_model_state_dict(model, adapter_name=name),
        )
    assert kinds(trainable(resumed.model)) == LORA


# ---------------------------------------------------------------------------------------- handing weights to a generator


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_dora=True),
        lora(modules_to_save=["lm_head", "norm"]),
        lora(bias="all"),
        CONFIGS["IA3"][0],
        TrainableTokensConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], token_indices=[3, 4]),
    ],
    ids=["LoRA", "DoRA", "copies", "biases", "IA3", "trainable tokens"],
)
def test_merged_weights_are_sent_by_their_plain_names(config, tmp_path):
    model = moved(get_peft_model(llama(attention_bias=True), copy.deepcopy(config)))
    before = values(model)
    distributed = types.SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: contextlib.nullcontext())
    sender = types.SimpleNamespace(model=model, _dist=distributed)
    sender._fix_param_name_to_vllm = types.MethodType(VLLMGeneration._fix_param_name_to_vllm, sender)
    sent = {name: value.clone() for name, value in VLLMGeneration._iter_named_params(sender)}
    assert changed(before, model) == set()
    expected = model.merge_and_unload().state_dict()
    assert sent.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(sent[name], value, msg=name)
