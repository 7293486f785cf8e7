"""Small models with prompts, and what their tests ask of them."""

from __future__ import annotations

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft import (
    PromptTuningConfig,
    get_peft_model,
)

N, VOCAB, WIDTH = 3, 48, 16
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            **TOKENS,
        )
    )


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, **NO_DROPOUT, **TOKENS)
    )


def opt():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            dropout=0.0,
            **TOKENS,
        )
    )


GEMMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 64,
    **TOKENS,
}


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**GEMMA))


def gemma3():
    return Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA))


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


def bart():
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB,
            d_model=WIDTH,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=64,
            dropout=0.0,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            **TOKENS,
        )
    )


def bert(cls, num_labels=3):
    def make():
        return cls(
            BertConfig(
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                num_labels=num_labels,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    return make


DECODERS = [llama, gpt2, opt]
TWO_STACKS = [t5, bart]
TASKS = {
    "CAUSAL_LM": llama,
    "SEQ_2_SEQ_LM": t5,
    "SEQ_CLS": bert(BertForSequenceClassification),
    "TOKEN_CLS": bert(BertForTokenClassification),
    "QUESTION_ANS": bert(BertForQuestionAnswering, num_labels=2),
    "FEATURE_EXTRACTION": bert(BertModel),
}


def base_of(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():  # logits far enough apart that rounding decides no token
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def config_for(task, **options):
    return PromptTuningConfig(**{"task_type": task, "num_virtual_tokens": N, **options})


def prompted(make=llama, task="CAUSAL_LM", name="default", **options):
    return get_peft_model(base_of(make), config_for(task, **options), adapter_name=name).eval()


def batch(tokens=6, padding=(0, 2, 4)):
    """Rows of ids, padded on the left, with their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (len(padding), tokens), generator=generator)
    mask = (torch.arange(tokens) >= torch.tensor(padding)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def with_prompt(model, ids, prompt=None):
    """The embeddings that the base model is to see."""
    prompt = model.prompt_encoder["default"].embedding.weight if prompt is None else prompt
    return torch.cat([prompt.expand(len(ids), *prompt.shape), model.word_embeddings(ids)], dim=1)


def ones_before(mask, tokens=N):
    return torch.cat([mask.new_ones(len(mask), tokens), mask], dim=1)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(before, after, but=()):
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == set(but)


NEW = 5


def greedy(logits, eos):
    scores = logits[:, -1].clone()
    scores[:, eos] = -torch.inf
    return scores.argmax(-1, keepdim=True)


@torch.no_grad()
def continued_by_hand(model, input_ids, attention_mask, choose=lambda logits: greedy(logits, 2), count=False):
    """Continuation by forward passes over the whole text, greedy if nothing else is chosen.

    With `count`, padding on the left has no positions, as in a generation of the base model.
    """
    for _ in range(NEW):
        places = {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)} if count else {}
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **places).logits
        input_ids = torch.cat([input_ids, choose(logits)], dim=1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], dim=1)
    return input_ids


@torch.no_grad()
def decoded_by_hand(model, input_ids, attention_mask):
    decoded = torch.full((len(input_ids), 1), model.config.decoder_start_token_id)
    for _ in range(NEW):
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoded, use_cache=False
        ).logits
        decoded = torch.cat([decoded, greedy(logits, 2)], dim=1)
    return decoded


def generate(model, **inputs):
    return model.generate(**{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **inputs})


WITH_ASSISTANT = {"min_new_tokens": None, "suppress_tokens": [TOKENS["eos_token_id"]]}
"""As long a text as `generate` makes, asked for in a way that transformers 4 takes beside an assistant as well."""

HEADS = ["SEQ_CLS", "TOKEN_CLS"]


def weights_of(name, task="SEQ_CLS"):
    prompt = {f"prompt_encoder.{name}.embedding.weight"}
    if task not in HEADS:
        return prompt
    return prompt | {f"base_model.classifier.modules_to_save.{name}.{part}" for part in ("weight", "bias")}


def move(model, name):
    """Away from where the adapter started, as training would."""
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if f".{name}." in parameter_name:
                parameter.add_(torch.randn_like(parameter))


def two(task="SEQ_CLS"):
    """Adapters a and b, both moved, a active."""
    model = prompted(TASKS[task], task, name="a")
    model.add_adapter("b", config_for(task, num_virtual_tokens=2))
    move(model, "a")
    move(model, "b")
    return model


def scorer(model, input_ids, attention_mask, **extra):
    """A function from new tokens, of one or several rows per text, to log probabilities of the next; never the end."""

    @torch.no_grad()
    def score(new):
        times = len(new) // len(input_ids)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **extra}
        given = {name: value.repeat_interleave(times, 0) for name, value in given.items()}
        if model.has_two_stacks:
            start = torch.full((len(new), 1), model.config.decoder_start_token_id)
            given["decoder_input_ids"] = torch.cat([start, new], dim=1)
        else:
            given["input_ids"] = torch.cat([given["input_ids"], new], dim=1)
            given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(new)], dim=1)
        scores = model(**given, use_cache=False).logits[:, -1].log_softmax(-1)
        scores[:, 2] = -torch.inf
        return scores

    return score


def best(scores):
    return scores.argmax(-1, keepdim=True)


def drawn(scores):
    return torch.multinomial(scores.exp(), 1)


def new_tokens_by_hand(model, inputs, choose=best):
    """The tokens that forward passes over the whole text give, each chosen by `choose`."""
    score, new = scorer(model, **inputs), torch.empty(len(inputs["input_ids"]), 0, dtype=torch.long)
    for _ in range(NEW):
        new = torch.cat([new, choose(score(new))], dim=1)
    return new


def best_beam_by_hand(model, inputs, beams):
    """The tokens of the best of so many beams."""
    score, texts = scorer(model, **inputs), len(inputs["input_ids"])
    new = torch.empty(texts * beams, 0, dtype=torch.long)
    sums = torch.tensor([0.0] + [-torch.inf] * (beams - 1)).repeat(texts, 1)
    first = torch.arange(texts)[:, None] * beams
    for _ in range(NEW):
        scores = score(new)
        found = (sums.flatten()[:, None] + scores).view(texts, -1).topk(beams)
        sums, (rows, tokens) = found.values, (found.indices // scores.shape[1], found.indices % scores.shape[1])
        new = torch.cat([new[(first + rows).flatten()], tokens.view(-1, 1)], dim=1)
    return new[::beams]


def assert_generates(model, inputs, way):
    """That generate gives, in one of `WAYS`, the tokens of forward passes repeated by hand."""
    options = WAYS[way]
    if "num_beams" in options:
        expected = best_beam_by_hand(model, inputs, options["num_beams"])
    else:
        torch.manual_seed(0)
        expected = new_tokens_by_hand(model, inputs, drawn if options.get("do_sample") else best)
    torch.manual_seed(0)
    assert generate(model, **inputs, **options)[:, -NEW:].tolist() == expected.tolist()


WAYS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 3, "length_penalty": 0.0},
}
