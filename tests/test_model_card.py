"""The model card beside saved adapters."""

import pytest
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.compat


def llama(name=""):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    config._name_or_path = name
    return LlamaForCausalLM(config)


def card_of(model, folder):
    model.create_or_update_model_card(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def lora(base, **options):
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"], **options))


def test_card_of_a_language_model(tmp_path):
    base = llama("org/model")
    base.add_model_tags(["zebra", "aardvark"])
    head, body = card_of(lora(base, task_type="CAUSAL_LM"), tmp_path)
    assert head == {
        "library_name": "peft",
        "base_model": "org/model",
        "pipeline_tag": "text-generation",
        "tags": ["aardvark", "base_model:adapter:org/model", "lora", "transformers", "zebra"],
    }
    assert body.rstrip().endswith(f"### Framework versions\n\n- PEFT {peft.__version__}")


@pytest.mark.parametrize(
    "base, config, expected",
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), {"tags": ["lora"]}),
        (lambda: nn.Sequential(nn.Linear(2, 2)), LoHaConfig(target_modules=["0"]), {}),
        (
            lambda: llama().model,
            IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="FEATURE_EXTRACTION"),
            {"tags": ["transformers"]},
        ),
    ],
)
def test_a_card_says_only_what_is_known(base, config, expected, tmp_path):
    head, _ = card_of(get_peft_model(base(), config), tmp_path)
    assert head == {"library_name": "peft", **expected}


def test_writing_it_twice_changes_nothing(tmp_path):
    model = lora(llama("org/model"))
    assert card_of(model, tmp_path) == card_of(model, tmp_path)


def test_what_a_card_says_already_stays(tmp_path):
    text = "---\nlicense: mit\npipeline_tag: summarization\ntags:\n- mine\n- base_model:adapter:org/old\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(text + "\n### Framework versions\n\n- Torch 2\n")
    head, body = card_of(lora(llama("org/new"), task_type="CAUSAL_LM"), tmp_path)
    assert head["license"] == "mit" and head["pipeline_tag"] == "summarization"
    assert head["tags"] == ["base_model:adapter:org/new", "lora", "mine", "transformers"]
    assert body == f"# Mine\n\n### Framework versions\n\n- PEFT {peft.__version__}\n- Torch 2\n"


def test_a_text_without_a_head(tmp_path):
    (tmp_path / "README.md").write_text("# Mine")
    head, body = card_of(lora(llama("org/model")), tmp_path)
    assert head["base_model"] == "org/model"
    assert body == f"# Mine\n### Framework versions\n\n- PEFT {peft.__version__}\n"


def test_saving_writes_a_card(tmp_path):
    lora(llama("org/model")).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").startswith("---\nbase_model: org/model\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_card_that_cannot_be_written_stays(tmp_path, monkeypatch):
    model = lora(llama("org/model"))
    (tmp_path / "README.md").write_text("# Mine\n")
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.create_or_update_model_card(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_a_dictionary_as_configuration_of_the_base_model(tmp_path):
    base = nn.Sequential(nn.Linear(2, 2))
    base.config = {"_name_or_path": "org/plain"}
    model = PeftModel(base, LoHaConfig(target_modules=["0"]))
    head, _ = card_of(model, tmp_path)
    assert head["base_model"] == "org/plain"
