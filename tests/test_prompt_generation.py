"""Generation with a prompt gives the tokens that forward passes, repeated by hand, give."""

from __future__ import annotations

import warnings

import pytest
import torch
from prompts import (
    DECODERS,
    NEW,
    TWO_STACKS,
    WITH_ASSISTANT,
    base_of,
    batch,
    bert,
    config_for,
    continued_by_hand,
    decoded_by_hand,
    generate,
    llama,
    prompted,
    t5,
)
from transformers import BertModel

from peft import get_peft_model
from peft.utils.caches import cache_argument

pytestmark = pytest.mark.compat


class TestGeneration:
    @pytest.mark.parametrize("make", DECODERS)
    @pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str)
    def test_is_a_forward_repeated(self, make, options):
        model, inputs = prompted(make), batch()
        expected = continued_by_hand(model, **inputs)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*left out")
            assert torch.equal(generate(model, **inputs, **options), expected)
        with model.disable_adapter():
            assert not torch.equal(generate(model, **inputs, **options), expected)

    @pytest.mark.parametrize("make", TWO_STACKS)
    @pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
    def test_with_two_stacks_is_a_forward_repeated(self, make, options):
        model, inputs = prompted(make, "SEQ_2_SEQ_LM"), batch()
        assert torch.equal(generate(model, **inputs, **options), decoded_by_hand(model, **inputs))

    @pytest.mark.parametrize("make", DECODERS)
    def test_a_cache_of_fixed_size_has_room_for_the_prompt(self, make):
        model, inputs = prompted(make), batch()
        output = generate(model, **inputs, cache_implementation="static")
        assert torch.equal(output, continued_by_hand(model, **inputs))

    @pytest.mark.parametrize("make, task", [(llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
    def test_beams_are_scored_with_the_prompt(self, make, task):
        model, inputs = prompted(make, task), batch()
        found = generate(
            model, **inputs, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
        )
        if task == "CAUSAL_LM":
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], dim=1)
            logits = model(input_ids=found.sequences, attention_mask=mask).logits[:, -NEW - 1 : -1]
        else:
            logits = model(**inputs, decoder_input_ids=found.sequences[:, :-1]).logits
        chosen = logits.log_softmax(-1).gather(-1, found.sequences[:, -NEW:, None]).squeeze(-1)
        torch.testing.assert_close(found.sequences_scores, chosen.sum(1), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("make", DECODERS)
    def test_from_embeddings(self, make):
        model, inputs = prompted(make), batch()
        embeds = model.word_embeddings(inputs["input_ids"])
        output = generate(model, inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        assert torch.equal(output, continued_by_hand(model, **inputs)[:, 6:])

    def test_with_two_stacks_from_embeddings(self):
        model, inputs = prompted(t5, "SEQ_2_SEQ_LM"), batch()
        embeds = model.word_embeddings(inputs["input_ids"])
        output = generate(model, inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        assert torch.equal(output, decoded_by_hand(model, **inputs))
        with pytest.raises(ValueError, match="input_ids"):
            generate(model, attention_mask=inputs["attention_mask"])

    def test_with_two_stacks_the_encoder_runs_again_with_the_prompt(self):
        model, inputs = prompted(t5, "SEQ_2_SEQ_LM"), batch()
        encoded = model.base_model.encoder(**inputs)
        with pytest.warns(UserWarning, match="encoder_outputs"):
            output = generate(model, **inputs, encoder_outputs=encoded)
        assert torch.equal(output, decoded_by_hand(model, **inputs))

    @pytest.mark.parametrize("make", DECODERS)
    def test_goes_on_from_a_cache(self, make):
        model, inputs = prompted(make), batch(padding=(0, 0))
        name = cache_argument(model.base_model.forward)
        first = generate(model, **inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
        rest = {"max_new_tokens": NEW - 2, "min_new_tokens": NEW - 2}
        output = generate(model, input_ids=first.sequences, **{name: first[name]}, **rest)
        assert torch.equal(output, continued_by_hand(model, **inputs))

    @pytest.mark.parametrize("make", DECODERS)
    @pytest.mark.parametrize("by_assistant", [False, True])
    def test_drafted_tokens_are_checked_with_the_prompt(self, make, by_assistant):
        model, inputs = prompted(make), batch(padding=(0,))
        assistant = {"assistant_model": base_of(make), **WITH_ASSISTANT}
        options = assistant if by_assistant else {"prompt_lookup_num_tokens": 2}
        assert torch.equal(generate(model, **inputs, **options), continued_by_hand(model, **inputs))

    def test_with_two_stacks_an_assistant_is_refused(self):
        model, inputs = prompted(t5, "SEQ_2_SEQ_LM"), batch(padding=(0,))
        with pytest.raises(ValueError, match="assistant_model .* prompt_lookup_num_tokens"):
            generate(model, **inputs, assistant_model=base_of(t5))
        drafted = generate(model, **inputs, prompt_lookup_num_tokens=2)
        assert torch.equal(drafted, decoded_by_hand(model, **inputs))

    @pytest.mark.parametrize("make", TWO_STACKS)
    def test_with_two_stacks_the_input_may_go_by_its_other_name(self, make):
        model, inputs = prompted(make, "SEQ_2_SEQ_LM"), batch()
        output = generate(model, inputs=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        assert torch.equal(output, decoded_by_hand(model, **inputs))

    def test_positions_that_the_user_gives_are_left_out(self):
        model, inputs = prompted(), batch(padding=(0, 0))
        with pytest.warns(UserWarning, match="position_ids") as caught:
            output = generate(model, **inputs, position_ids=torch.zeros(2, 6, dtype=torch.long))
        assert len([w for w in caught if "position_ids" in str(w.message)]) == 1
        assert torch.equal(output, continued_by_hand(model, **inputs))

    def test_the_base_model_is_itself_afterwards(self):
        model, inputs = prompted(), batch()
        before = set(vars(model.base_model))
        generate(model, **inputs)
        with pytest.raises(ValueError):
            generate(model, **inputs, nonsense=1)
        assert set(vars(model.base_model)) - before <= {"_cache"}

    def test_a_base_model_that_cannot_generate_is_refused(self):
        with pytest.raises(AttributeError, match="BertModel.*prepare_inputs_for_generation"):
            get_peft_model(base_of(bert(BertModel)), config_for("CAUSAL_LM", num_virtual_tokens=2))
