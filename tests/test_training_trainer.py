"""transformers' Trainer with adapters: what trains, what a checkpoint holds, and how a training goes on from one."""

import copy
import json

import pytest
import torch
from prompts import bert, llama, opt, t5
from training import (
    CONFIG,
    IN_CHECKPOINT,
    OF_THE_RUN,
    WEIGHTS,
    Gradients,
    assert_equal,
    changed,
    counted,
    files,
    in_file,
    kinds,
    rows,
    trainable,
    values,
)
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from versions import needs

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer

pytestmark = pytest.mark.compat


def arguments(folder, cls=TrainingArguments, **options):
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return cls(str(folder), **{**defaults, **options})


def train(model, folder, callbacks=(), resume=None, data=None, optimizer=None, **options):
    trainer = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=data or rows(),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def lora(**options):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 2, **options})


LORA = {"self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B", "self_attn.v_proj.lora_A", "self_attn.v_proj.lora_B"}
BIASES = {f"self_attn.{name}.base_layer.bias" for name in ("q_proj", "v_proj")}

METHODS = {
    "LoRA": (llama, lora(lora_dropout=0.2), {f"{name}.default.weight" for name in LORA}),
    "DoRA": (
        llama,
        lora(use_dora=True),
        {f"{name}.default.weight" for name in LORA | {f"self_attn.{p}_proj.lora_magnitude_vector" for p in "qv"}},
    ),
    "LoRA with a copy": (
        llama,
        lora(modules_to_save=["lm_head"]),
        {f"{name}.default.weight" for name in LORA | {"lm_head.modules_to_save"}},
    ),
    "LoRA with token rows": (
        llama,
        lora(trainable_token_indices=[5, 6]),
        {f"{name}.default.weight" for name in LORA} | {"embed_tokens.token_adapter.trainable_tokens_delta.default"},
    ),
    "LoRA with biases": (opt, lora(bias="lora_only"), {f"{name}.default.weight" for name in LORA} | BIASES),
    "IA3": (
        llama,
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        {"self_attn.k_proj.ia3_l.default", "mlp.down_proj.ia3_l.default"},
    ),
    "OFT": (
        llama,
        OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4),
        {"self_attn.q_proj.oft_R.default.weight"},
    ),
    "VeRA": (
        llama,
        VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
        {"self_attn.q_proj.vera_lambda_b.default", "self_attn.q_proj.vera_lambda_d.default"},
    ),
    "trainable tokens": (
        llama,
        TrainableTokensConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], token_indices=[5, 6, 7]),
        {"embed_tokens.trainable_tokens_delta.default"},
    ),
    "prompt tuning": (
        llama,
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        {"prompt_encoder.default.embedding.weight"},
    ),
}
"""Name -> base model, configuration, and what trains."""

IN_FILE = {
    "DoRA": {f"{name}.weight" for name in LORA} | {f"self_attn.{p}_proj.lora_magnitude_vector" for p in "qv"},
    "LoRA with biases": {f"{name}.weight" for name in LORA} | BIASES,
    "VeRA": {"vera_A", "vera_B", "self_attn.q_proj.vera_lambda_b", "self_attn.q_proj.vera_lambda_d"},
    "trainable tokens": {"embed_tokens.trainable_tokens_delta"},
    "prompt tuning": {"prompt_embeddings"},
    "LoRA with a copy": {f"{name}.weight" for name in LORA | {"lm_head"}},
}
"""Names in the file where they are not those in memory without the adapter's name."""


def adapted(name, seed=0):
    torch.manual_seed(0)
    base, config, _ = METHODS[name]
    base = base()
    torch.manual_seed(seed)
    return get_peft_model(base, copy.deepcopy(config))


@pytest.mark.parametrize("name", METHODS)
def test_training_stopping_and_going_on(name, tmp_path):
    """Training changes the adapter and nothing else; a checkpoint has nothing else, and leads to the same end."""
    expected = METHODS[name][2]
    model = adapted(name)
    assert kinds(trainable(model)) == expected
    before = values(model)
    trainer = train(model, tmp_path, save_strategy="steps", save_steps=2)
    assert changed(before, model) == trainable(model)
    assert kinds(changed(before, model)) == expected

    checkpoint = tmp_path / "checkpoint-2"
    assert files(checkpoint) == IN_CHECKPOINT | OF_THE_RUN
    saved = in_file(checkpoint)
    assert kinds(saved) == IN_FILE.get(name, {key.replace(".default", "") for key in expected})
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert len(moments) == len(trainable(model))

    again = adapted(name, seed=1)  # another start, so that it matters that the weights are loaded
    resumed = train(again, tmp_path / "again", resume=checkpoint)
    assert_equal(get_peft_model_state_dict(again), get_peft_model_state_dict(model))
    assert losses(resumed) == losses(trainer)
    assert kinds(trainable(again)) == expected
    assert again.training and again.active_adapters == ["default"]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class UpdateAdaLora(TrainerCallback):
    """As a user of AdaLoRA has it: ranks are divided anew after each step, while there are gradients."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


def test_adalora(tmp_path):
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        init_r=4,
        target_r=2,
        tinit=1,
        tfinal=1,
        total_step=6,
    )
    base = llama()
    model = get_peft_model(copy.deepcopy(base), config)
    before = values(model)
    train(model, tmp_path, callbacks=[UpdateAdaLora()], max_steps=6, save_strategy="steps", save_steps=6)
    assert kinds(changed(before, model)) == {
        f"self_attn.{name}_proj.lora_{part}.default" for name in "qv" for part in "ABE"
    }
    pattern = json.loads((tmp_path / "checkpoint-6" / CONFIG).read_text())["rank_pattern"]
    assert sum(sum(mask) for mask in pattern.values()) == 4 * 2
    ids = rows(2)[0]["input_ids"][None]
    again = PeftModel.from_pretrained(base, tmp_path / "checkpoint-6")
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


# ------------------------------------------------------------------------------------------------------------- gradients


def gradients(model, folder, **options):
    seen = Gradients()
    train(model, folder, callbacks=[seen], max_steps=1, max_grad_norm=0.0, **options)
    return seen.values


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["LoRA", "LoRA with a copy", "LoRA with token rows", "IA3", "prompt tuning"])
def test_checkpointing_changes_no_gradient(name, reentrant, tmp_path):
    """Each row of random numbers is the same in the recomputation, so dropout gives the same too."""
    plain, model = adapted(name), adapted(name)
    plain.config.use_cache = False  # as checkpointing does: with a cache, sums may be in another order
    expected = gradients(plain, tmp_path)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found = gradients(model, tmp_path, **options)
    assert model.base_model.is_gradient_checkpointing
    assert kinds(found) == METHODS[name][2]
    assert_equal(found, expected)
    assert any(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "base, task", [(llama, "CAUSAL_LM"), (bert(BertForSequenceClassification), "SEQ_CLS"), (t5, "SEQ_2_SEQ_LM")]
)
def test_a_prefix_is_not_left_out_of_checkpointed_layers(base, task, reentrant, tmp_path):
    """Where transformers would drop it, with a line in the log or none, the first step says so."""
    model = get_peft_model(base(), PrefixTuningConfig(task_type=task, num_virtual_tokens=3))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    data = labelled(task) if task == "SEQ_CLS" else rows()
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        train(model, tmp_path, data=data, **options)
    model.base_model.gradient_checkpointing_disable()
    train(model, tmp_path, data=data, max_steps=1)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole = gradients(adapted("LoRA with a copy").eval(), tmp_path, per_device_train_batch_size=4)
    parts = gradients(
        adapted("LoRA with a copy"), tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["LoRA", "LoRA with a copy", "prompt tuning"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_to_bfloat16(name, dtype, tmp_path):
    base, config, _ = METHODS[name]
    model = get_peft_model(base().to(dtype), copy.deepcopy(config))
    before = values(model)
    trainer = train(model, tmp_path, bf16=True, max_steps=2)
    assert changed(before, model) == trainable(model)
    for key, parameter in model.named_parameters():  # a copy has the dtype of the original, what is new is precise
        if parameter.requires_grad:
            assert parameter.dtype == (dtype if "modules_to_save" in key else torch.float32)
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


# ------------------------------------------------------------------------------------------- what a Trainer can be told


OPTIMIZERS = {
    "LoRA+": (lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4.0), LORA),
    "LoRA-FA": (
        lambda model: create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=0.01),
        {name for name in LORA if name.endswith("B")},
    ),
    "Riemannian": (lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01), LORA),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_this_library_go_on_as_others_do(name, tmp_path):
    make, expected = OPTIMIZERS[name]
    model = adapted("LoRA")
    before = values(model)
    train(model, tmp_path, optimizer=make(model), save_strategy="steps", save_steps=2)
    assert kinds(changed(before, model)) == {f"{key}.default.weight" for key in expected}
    again = adapted("LoRA", seed=1)
    train(again, tmp_path / "again", optimizer=make(again), resume=tmp_path / "checkpoint-2")
    assert_equal(get_peft_model_state_dict(again), get_peft_model_state_dict(model))


def test_a_checkpoint_of_the_adapter_alone(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "save_only_model": True}
    train(adapted("LoRA"), tmp_path, **options)
    assert files(tmp_path) == {"checkpoint-3", "checkpoint-4"}
    assert files(tmp_path / "checkpoint-4") == IN_CHECKPOINT | {"trainer_state.json", "training_args.bin"}


NOISY = {
    "LoRA": lora(),
    "LoRA in the embedding": lora(target_modules=["embed_tokens"]),
    "a copy of the embedding": lora(modules_to_save=["embed_tokens"]),
    "token rows": lora(trainable_token_indices=[5, 6]),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", NOISY)
def test_noise_on_the_embeddings(name, tmp_path):
    """NEFTune: in training alone, whatever is adapted there."""

    def first_loss(**options):
        torch.manual_seed(0)
        model = get_peft_model(llama(), copy.deepcopy(NOISY[name]))
        trainer = train(model, tmp_path, max_steps=1, **options)
        assert trainer.evaluate(rows(2)) is not None
        ids = rows(2)[0]["input_ids"][None]
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        return losses(trainer)[0]

    assert first_loss(neftune_noise_alpha=50.0) != first_loss()


@pytest.mark.parametrize("mixed", [False, True])
def test_smoothed_labels_are_shifted_as_for_the_base_model(mixed, tmp_path):
    """The Trainer looks at the class of the model inside."""

    def first_loss(model, **options):
        return losses(train(model, tmp_path, max_steps=1, **options))[0]

    base, options = llama(), {"label_smoothing_factor": 0.1}
    model = get_peft_model(copy.deepcopy(base), lora(), mixed=mixed)
    found = first_loss(model, **options)
    assert found == first_loss(copy.deepcopy(base), **options) != first_loss(base)


@pytest.mark.slow
def test_a_compiled_model_is_saved_as_itself(tmp_path):
    expected = adapted("LoRA with a copy")
    train(expected, tmp_path, max_steps=1)
    model = adapted("LoRA with a copy")
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1}
    train(model, tmp_path, save_strategy="steps", save_steps=1, **options)
    assert_equal(get_peft_model_state_dict(model), get_peft_model_state_dict(expected))
    assert_equal(in_file(tmp_path / "checkpoint-1"), get_peft_model_state_dict(expected))


def test_several_methods_at_once(tmp_path):
    """A PeftMixedModel has no adapter files, so the Trainer writes and reads all of the model."""

    def make(seed):
        torch.manual_seed(0)
        base = llama()
        torch.manual_seed(seed)
        model = get_peft_model(base, lora(), mixed=True)
        model.add_adapter("other", LoHaConfig(target_modules=["k_proj"], r=2))
        model.set_adapter(["default", "other"])
        return model

    straight, resumed = make(0), make(1)
    before = values(straight)
    train(straight, tmp_path, save_strategy="steps", save_steps=2)
    assert changed(before, straight) == trainable(straight)
    assert "model.safetensors" in files(tmp_path / "checkpoint-2")
    train(resumed, tmp_path / "again", resume=tmp_path / "checkpoint-2")
    assert_equal(values(resumed), values(straight))


# ------------------------------------------------------------------------------------------------------------ evaluation


def scored(*scores):
    scores = iter(scores)
    return lambda prediction: {"score": next(scores)}


def train_for_the_best(model, folder, best):
    """Three steps, of which the one named is the best."""
    trainer = Trainer(
        model,
        arguments(
            folder,
            max_steps=3,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=1,
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
        ),
        train_dataset=rows(),
        eval_dataset=rows(2),
        compute_metrics=scored(*(float(step == best) for step in (1, 2, 3))),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["LoRA with a copy", "LoRA with token rows", "LoRA with biases", "prompt tuning"])
def test_the_best_adapter_is_loaded_at_the_end(name, tmp_path):
    model = adapted(name)
    train_for_the_best(model, tmp_path, best=2)
    found = get_peft_model_state_dict(model)
    assert_equal(found, in_file(tmp_path / "checkpoint-2"))
    last = in_file(tmp_path / "checkpoint-3")
    assert not any(torch.equal(value, last[key]) for key, value in found.items())
    assert kinds(trainable(model)) == METHODS[name][2]
    before = values(model)
    train(model, tmp_path, max_steps=2)
    assert kinds(changed(before, model)) == METHODS[name][2]


@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
    ],
    ids=["P-tuning", "projected prefix"],
)
def test_the_best_prompt_of_a_network(config, tmp_path):
    """A file has the prompt, not the network that computed it; the network goes on from that prompt."""
    model = get_peft_model(llama(), copy.deepcopy(config))
    before = trainable(model)
    train_for_the_best(model, tmp_path, best=2)
    best = in_file(tmp_path / "checkpoint-2")
    assert_equal(get_peft_model_state_dict(model), best)
    assert trainable(model) == before and len(before) > 1
    train(model, tmp_path, max_steps=1)
    assert not torch.equal(get_peft_model_state_dict(model)["prompt_embeddings"], best["prompt_embeddings"])


def test_going_on_with_an_adapter_of_another_name(tmp_path):
    def make(seed):
        torch.manual_seed(0)
        base = llama()
        torch.manual_seed(seed)
        return get_peft_model(base, lora(lora_dropout=0.2), adapter_name="mine")

    straight, resumed = make(0), make(1)
    train(straight, tmp_path, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    assert files(checkpoint) == {"README.md", "mine"} | OF_THE_RUN
    assert files(checkpoint / "mine") == {WEIGHTS, CONFIG}
    train(resumed, tmp_path / "again", resume=checkpoint)
    assert_equal(
        get_peft_model_state_dict(resumed, adapter_name="mine"),
        get_peft_model_state_dict(straight, adapter_name="mine"),
    )
    assert list(resumed.peft_config) == ["mine"]


def test_the_best_of_several_adapters_is_the_one_of_its_name(tmp_path):
    """The checkpoint has "default" at its top, and the Trainer passes the checkpoint and the name of the adapter."""
    model = get_peft_model(llama(), lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False, modules_to_save=["lm_head"]))
    model.set_adapter("other")
    untouched = get_peft_model_state_dict(model, adapter_name="default")
    train_for_the_best(model, tmp_path, best=2)
    best = tmp_path / "checkpoint-2"
    assert files(best) == IN_CHECKPOINT | OF_THE_RUN | {"other"}
    assert files(best / "other") == {WEIGHTS, CONFIG}
    assert_equal(get_peft_model_state_dict(model, adapter_name="other"), in_file(best / "other"))
    assert_equal(get_peft_model_state_dict(model, adapter_name="default"), untouched)
    assert model.active_adapters == ["other"]
    assert all(".other." in name for name in trainable(model)) and len(trainable(model)) == 9


@needs("transformers", "5.23", 'goes on with the adapters of other names than "default" only')
def test_going_on_with_several_adapters(tmp_path):
    def make(seed):
        torch.manual_seed(0)
        base = llama()
        torch.manual_seed(seed)
        model = get_peft_model(base, lora())
        model.add_adapter("other", lora(r=3, modules_to_save=["lm_head"]))
        model.set_adapter("other")
        return model

    straight = make(0)
    train(straight, tmp_path, save_strategy="steps", save_steps=2)
    resumed = make(1)
    train(resumed, tmp_path / "again", resume=tmp_path / "checkpoint-2")
    for name in ("default", "other"):
        assert_equal(
            get_peft_model_state_dict(resumed, adapter_name=name),
            get_peft_model_state_dict(straight, adapter_name=name),
        )
    assert resumed.active_adapters == ["other"] and trainable(resumed) == trainable(straight)


@pytest.mark.parametrize("config", [lora(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)])
def test_evaluation_and_prediction(config, tmp_path):
    model = get_peft_model(llama(), copy.deepcopy(config))
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=rows(4))
    assert trainer.label_names == ["labels"]
    loss = trainer.evaluate()["eval_loss"]
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss * (8 if config.is_prompt_learning else 7)
        expected = expected * 4 / counted(ids)  # the Trainer's number: a prompt predicts the first label, too
        torch.testing.assert_close(torch.tensor(loss), expected)
        expected = model(input_ids=ids).logits
    predicted = trainer.predict(rows(4))
    torch.testing.assert_close(torch.tensor(predicted.predictions), expected)
    assert predicted.label_ids.tolist() == ids.tolist()


def test_columns_that_the_base_model_does_not_take_are_left_out(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the Trainer removes columns of a Dataset of this package only")
    data = datasets.Dataset.from_list([{key: row[key].tolist() for key in row} | {"note": "x"} for row in rows(4)])
    model = adapted("LoRA")
    before = values(model)
    train(model, tmp_path, data=data, max_steps=2)
    assert changed(before, model) == trainable(model)


def test_the_model_card(tmp_path):
    model = adapted("LoRA")
    trainer = train(model, tmp_path, max_steps=1)
    trainer.save_model()
    trainer.create_model_card(tags="mine")
    text = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in text and "- mine" in text
    model.create_or_update_model_card(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert "- mine" in again and "- lora" in again and "## Training procedure" in again


# --------------------------------------------------------------------------------------------------------- other models


def labelled(task):
    data = rows(8, 6, labels=False)
    for index, row in enumerate(data):
        if task == "QUESTION_ANS":
            row |= {"start_positions": torch.tensor(index % 3), "end_positions": torch.tensor(3 + index % 3)}
        else:
            row["labels"] = row["input_ids"] % 2 if task == "TOKEN_CLS" else torch.tensor(index % 2)
    return data


HEADS = {
    "SEQ_CLS": (BertForSequenceClassification, "classifier", ["labels"]),
    "TOKEN_CLS": (BertForTokenClassification, "classifier", ["labels"]),
    "QUESTION_ANS": (BertForQuestionAnswering, "qa_outputs", ["start_positions", "end_positions"]),
}
ON_BERT = {
    "LoRA": (LoraConfig(target_modules=["query"]), "attention.self.query.lora_A.default.weight"),
    "IA3": (IA3Config(target_modules=["key"], feedforward_modules=[]), "attention.self.key.ia3_l.default"),
    "prompt tuning": (PromptTuningConfig(num_virtual_tokens=3), "prompt_encoder.default.embedding.weight"),
    "prefix tuning": (PrefixTuningConfig(num_virtual_tokens=3), "prompt_encoder.default.embedding.weight"),
}


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", ON_BERT)
def test_a_head_is_trained_beside_the_adapter(task, name, tmp_path):
    cls, head, labels = HEADS[task]
    config, adapter = copy.deepcopy(ON_BERT[name])
    config.task_type = task
    base = bert(cls, num_labels=2)()
    model = get_peft_model(copy.deepcopy(base), config)
    before = values(model)
    trainer = train(model, tmp_path, data=labelled(task), max_steps=3, save_strategy="steps", save_steps=3)
    assert changed(before, model) == trainable(model)
    copies = {key for key in trainable(model) if f"{head}.modules_to_save.default" in key}
    assert {key.rpartition(".")[2] for key in copies} == {"weight", "bias"}
    assert any(key.endswith(adapter) for key in trainable(model))
    assert trainer.label_names == labels and trainer.evaluate(labelled(task))["eval_loss"] > 0
    predicted = trainer.predict(labelled(task)).predictions
    again = PeftModel.from_pretrained(base, tmp_path / "checkpoint-3")
    ids = torch.stack([row["input_ids"] for row in labelled(task)])
    with torch.no_grad():
        expected = again(input_ids=ids).to_tuple()
    for found, value in zip(predicted if task == "QUESTION_ANS" else [predicted], expected):
        torch.testing.assert_close(torch.tensor(found), value)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(target_modules=["q", "v"]), PromptTuningConfig(num_virtual_tokens=3)],
    ids=["LoRA", "prompt tuning"],
)
def test_two_stacks_that_are_trained_and_generate(config, tmp_path):
    config.task_type = "SEQ_2_SEQ_LM"
    model = get_peft_model(t5(), config)
    before = values(model)
    options = {"predict_with_generate": True, "generation_max_length": 6, "generation_num_beams": 1}
    trainer = Seq2SeqTrainer(
        model,
        arguments(tmp_path, Seq2SeqTrainingArguments, max_steps=3, **options),
        train_dataset=rows(),
        eval_dataset=rows(4),
    )
    trainer.train()
    assert changed(before, model) == trainable(model)
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    predicted = torch.tensor(trainer.predict(rows(4)).predictions)
    expected = model.generate(input_ids=ids, max_length=6, num_beams=1)
    assert predicted[:, : expected.shape[1]].tolist() == expected.tolist()
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


# ---------------------------------------------------------------------------------- adapters that transformers injected


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_an_adapter_added_by_the_model_itself(reentrant, tmp_path):
    base = llama()
    model = copy.deepcopy(base)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    before = values(model)
    checkpointing = {} if reentrant is None else {"gradient_checkpointing": True}
    options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    train(model, tmp_path, save_strategy="steps", save_steps=4, **checkpointing, **options)
    assert kinds(changed(before, model)) == {
        "self_attn.q_proj.lora_A.default.weight",
        "self_attn.q_proj.lora_B.default.weight",
        "lm_head.modules_to_save.default.weight",
    }
    checkpoint = tmp_path / "checkpoint-4"
    assert {WEIGHTS, CONFIG} <= files(checkpoint) and "model.safetensors" not in files(checkpoint)
    assert kinds(in_file(checkpoint)) == {
        "self_attn.q_proj.lora_A.weight",
        "self_attn.q_proj.lora_B.weight",
        "lm_head.weight",
    }
    ids = rows(2)[0]["input_ids"][None]
    again = PeftModel.from_pretrained(base, checkpoint)
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
