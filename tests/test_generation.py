"""The one function that generates: whose settings count, which ids it may write, and how answers end."""

from __future__ import annotations

import math

import pytest
import torch

from taid.models.generation import VocabularyMask, decoding, generate, own_greedy_decoding, up_to_end
from taid.models.vocabulary import Vocabulary

PROMPTS = [[7, 8, 9], [10, 11], [12, 13, 14, 15, 16]]


def test_ids_outside_the_shared_vocabulary_are_masked():
    scores = VocabularyMask(Vocabulary((0, 2, 3)))(torch.zeros(1, 1), torch.arange(6.0)[None])
    assert scores.tolist() == [[0.0, -math.inf, 2.0, 3.0, -math.inf, -math.inf]]


def test_scores_that_are_not_finite_can_still_be_drawn_from():
    scores = torch.tensor([[0.0, 5.0, float("nan"), float("inf")], [float("-inf"), 1.0, 2.0, 3e38]])
    probs = (VocabularyMask(Vocabulary((0, 2, 3)))(None, scores) / 0.1).softmax(-1)
    assert probs.tolist() == [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]


def test_an_answer_ends_with_the_first_token_that_ends_it():
    assert up_to_end([5, 2, 6, 2], [1, 2]) == [5, 2]
    assert up_to_end([5, 6], [1, 2]) == [5, 6]
    assert up_to_end([5, 6], [None]) == [5, 6]


def test_answers_of_one_batch_are_those_of_each_prompt_alone_and_the_model_is_left_as_it_was(make_model):
    model = make_model(300, seed=4).train()
    own = model.generation_config
    config = decoding([0], 0)
    together = generate(model, PROMPTS, config, max_new_tokens=9)
    assert together == [generate(model, [prompt], config, max_new_tokens=9)[0] for prompt in PROMPTS]
    assert model.training
    assert model.generation_config is own


def test_the_models_own_settings_count_only_where_they_are_asked_for(make_model):
    model = make_model(300, seed=4)
    plain = generate(model, PROMPTS, decoding([0], 0), max_new_tokens=12)
    model.generation_config.update(repetition_penalty=9.0, do_sample=True, temperature=5.0, num_beams=2)
    assert generate(model, PROMPTS, decoding([0], 0), max_new_tokens=12) == plain
    penalised = generate(model, PROMPTS, own_greedy_decoding(model, 0), max_new_tokens=12)
    assert penalised != plain
    assert all(len(set(answer)) == len(answer) for answer in penalised)
    assert model.generation_config.do_sample is True


def test_samples_of_a_prompt_stand_together_and_follow_the_seed(make_model):
    model = make_model(300, seed=4)
    config = decoding([], 0, temperature=1e-4)  # so cold that each sample is the greedy answer
    greedy = generate(model, PROMPTS, decoding([], 0), max_new_tokens=5)
    assert generate(model, PROMPTS, config, max_new_tokens=5, samples=2, seed=1) == [a for a in greedy for _ in "12"]
    config = decoding([], 0, temperature=1.0)
    before = torch.get_rng_state()
    first, again, other = (generate(model, PROMPTS, config, max_new_tokens=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other


@pytest.mark.parametrize("temperature", [None, 50.0])
def test_no_row_of_the_head_that_is_no_token_is_written(make_model, temperature):
    model = make_model(308, seed=4, tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[290:] *= 5
    config = decoding([], 0, temperature=temperature)
    options = {"max_new_tokens": 20, "seed": 1}
    assert max(map(max, generate(model, PROMPTS, config, **options))) >= 300
    kept = generate(model, PROMPTS, config, vocabulary=Vocabulary(tuple(range(300))), **options)
    assert max(map(max, kept)) < 300
