"""Which ids student and teacher share, by the identity of tokens; and a student that takes over a tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from taid.models.vocabulary import Vocabulary, adopt_tokenizer

REAL = Path("/work/shared/tokenizers")
TEXT = "The student asks: what is 12 + 3? The teacher answers, it is 15.\n"


@pytest.fixture(scope="module")
def edited(tokenizer) -> Callable[..., PreTrainedTokenizerFast]:
    """edited(change, **special): the tokenizer, with `change` applied to its JSON description."""

    def edited(change: Callable[[dict[str, Any]], None], **special: Any) -> PreTrainedTokenizerFast:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        change(description)
        names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"} | special
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), **names)

    return edited


def with_ids(new_id: Callable[[int], int]) -> Callable[[dict[str, Any]], None]:
    """A change that gives token i the id new_id(i)."""

    def change(description: dict[str, Any]) -> None:
        vocab = description["model"]["vocab"]
        description["model"]["vocab"] = {token: new_id(i) for token, i in vocab.items()}
        for token in description["added_tokens"]:
            token["id"] = new_id(token["id"])

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """A change that renames a special token and leaves its id."""

    def change(description: dict[str, Any]) -> None:
        description["model"]["vocab"][new] = description["model"]["vocab"].pop(old)
        for token in description["added_tokens"]:
            token["content"] = new if token["content"] == old else token["content"]

    return change


def permuted(description: dict[str, Any]) -> None:
    ids = list(range(len(description["model"]["vocab"])))
    random.Random(0).shuffle(ids)
    with_ids(ids.__getitem__)(description)


def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    path = REAL / name / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"needs the real tokenizer {path}")
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def shared(student: Any, teacher: Any, student_rows: int = 300, teacher_rows: int = 308) -> Vocabulary:
    return Vocabulary.shared(student, teacher, student_rows=student_rows, teacher_rows=teacher_rows)


# --- shared ids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(300, 300), (300, 308), (320, 304), (512, 301)])
def test_embeddings_padded_to_different_sizes_share_every_token_and_no_padding(tokenizer, student_rows, teacher_rows):
    vocabulary = shared(tokenizer, tokenizer, student_rows, teacher_rows)
    assert vocabulary.ids == tuple(range(300))
    assert vocabulary.is_prefix


def test_a_token_beyond_the_rows_of_either_model_is_not_shared(tokenizer):
    assert shared(tokenizer, tokenizer, 290, 308).ids == tuple(range(290))
    assert shared(tokenizer, tokenizer, 300, 280).ids == tuple(range(280))


def test_one_tokenizer_alone_has_the_ids_that_its_model_can_predict(tokenizer):
    assert Vocabulary.from_tokenizer(tokenizer, 308).ids == tuple(range(300))
    assert Vocabulary.from_tokenizer(tokenizer, 290).ids == tuple(range(290))


def test_ids_with_holes_are_shared_without_the_holes(edited):
    with_holes = edited(with_ids(lambda i: i if i < 100 else i + 7))
    expected = (*range(100), *range(107, 307))
    assert shared(with_holes, with_holes, 320, 308).ids == expected
    assert Vocabulary.from_tokenizer(with_holes, 320).ids == expected
    assert Vocabulary.from_tokenizer(with_holes, 200).ids == (*range(100), *range(107, 200))
    assert not shared(with_holes, with_holes, 320, 308).is_prefix


def test_a_renamed_special_token_is_not_shared(tokenizer, edited):
    other = edited(renamed("<|im_end|>", "<|reserved_7|>"))
    for student, teacher in ((tokenizer, other), (other, tokenizer)):
        vocabulary = shared(student, teacher)
        assert vocabulary.ids == (0, 1, *range(3, 300))
        assert not vocabulary.is_prefix


def test_special_tokens_that_change_places_are_not_shared(tokenizer, edited):
    swapped = edited(with_ids(lambda i: {1: 2, 2: 1}.get(i, i)))
    assert shared(tokenizer, swapped).ids == (0, *range(3, 300))


def test_a_special_token_that_only_one_side_has_is_not_shared(tokenizer, edited):
    larger = edited(lambda description: None)
    larger.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    assert larger.get_vocab()["<|image|>"] == 300
    assert shared(tokenizer, larger, 308, 308).ids == tuple(range(300))
    assert shared(larger, tokenizer, 308, 308).ids == tuple(range(300))
    assert shared(larger, larger, 308, 308).ids == tuple(range(301))


def test_a_token_that_is_not_shared_is_found_in_the_rows_and_named(tokenizer, edited):
    vocabulary = shared(tokenizer, edited(renamed("<|im_end|>", "<|reserved_7|>")))
    rows = [tokenizer("The fox")["input_ids"], tokenizer("<|im_start|>The fox<|im_end|>")["input_ids"]]
    with pytest.raises(
        ValueError, match=r"row 1 of the train data set contains token '<\|im_end\|>' \(id 2\)"
    ) as error:
        vocabulary.require_shared(rows, tokenizer, "the train data set")
    assert "tokenizer_from: teacher" in str(error.value)
    vocabulary.require_shared(rows[:1], tokenizer, "the train data set")


def test_a_token_without_a_row_in_the_teacher_is_found_in_the_rows(tokenizer):
    vocabulary = shared(tokenizer, tokenizer, 300, 290)
    (last,) = (token for token, i in tokenizer.get_vocab().items() if i == 299)
    with pytest.raises(ValueError, match=r"row 2 of rows contains token .* \(id 299\)") as error:
        vocabulary.require_shared([[1], [289], [5, 299]], tokenizer, "rows")
    assert repr(last) in str(error.value)


# --- different tokenizers ---------------------------------------------------------------------------------------------


def test_different_tokenizers_are_refused_with_the_first_token_and_both_ways_out(tokenizer, edited):
    moved = edited(with_ids(lambda i: {150: 160, 160: 150}.get(i, i)))
    token = tokenizer.convert_ids_to_tokens(150)
    with pytest.raises(ValueError, match="different tokenizers") as error:
        shared(tokenizer, moved)
    message = str(error.value)
    assert f"token {token!r}, id 150 for the student and 160 for the teacher" in message
    assert "tokenizer_from: teacher" in message
    assert "choose a teacher of the student's family" in message


def test_a_token_that_one_side_lacks_is_named_with_none_for_its_id(tokenizer, edited):
    def without_the_last_merge(description: dict[str, Any]) -> None:
        left, right = description["model"]["merges"].pop()
        assert description["model"]["vocab"].pop(left + right) == 299

    smaller, token = edited(without_the_last_merge), repr(tokenizer.convert_ids_to_tokens(299))
    with pytest.raises(ValueError, match=f"token {token}, id none for the student and 299 for the teacher"):
        shared(smaller, tokenizer)
    with pytest.raises(ValueError, match=f"token {token}, id 299 for the student and none for the teacher"):
        shared(tokenizer, smaller)


def first_merges(*merges: tuple[str, str]) -> Callable[[dict[str, Any]], None]:
    """A change that adds the tokens of these merges, and the merges before all others, in this order."""

    def change(description: dict[str, Any]) -> None:
        for left, right in sorted(merges):
            description["model"]["vocab"].setdefault(left + right, len(description["model"]["vocab"]))
        description["model"]["merges"][:0] = [list(merge) for merge in merges]

    return change


def test_the_same_vocabulary_merged_in_another_order_is_found_by_a_probe(edited):
    one = edited(first_merges(("q", "u"), ("u", "i")))
    other = edited(first_merges(("u", "i"), ("q", "u")))
    assert one.get_vocab() == other.get_vocab()
    with pytest.raises(ValueError, match="same vocabulary but split text differently: 'The quick brown fox'") as error:
        shared(one, other, 302, 302)
    assert str(one("The quick brown fox")["input_ids"]) in str(error.value)
    assert str(other("The quick brown fox")["input_ids"]) in str(error.value)
    assert "tokenizer_from: teacher" in str(error.value)
    assert shared(one, one, 302, 302).ids == tuple(range(302))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["pre_tokenizer"].update(use_regex=False),
        lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
        lambda d: d.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, d["pre_tokenizer"]],
            }
        ),
        lambda d: d.update(normalizer={"type": "Lowercase"}),
        lambda d: d.update(normalizer={"type": "NFD"}),
        lambda d: d.update(normalizer={"type": "NFC"}),
        lambda d: d.update(normalizer={"type": "NFKC"}),
        lambda d: d.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
    ],
    ids=["no regex", "prefix space", "single digits", "lower case", "decomposed accents", "NFC", "NFKC", "stripped"],
)
def test_the_same_vocabulary_split_in_another_way_is_found_by_a_probe(tokenizer, edited, change):
    other = edited(change)
    assert other.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="same vocabulary but split text differently"):
        shared(tokenizer, other)


def test_the_same_vocabulary_with_all_merges_reversed_is_found(tokenizer, edited):
    other = edited(lambda d: d["model"]["merges"].reverse())
    assert other("the teacher")["input_ids"] != tokenizer("the teacher")["input_ids"]
    with pytest.raises(ValueError, match="split text differently"):
        shared(tokenizer, other)


def test_real_tokenizers_of_two_families_are_told_apart():
    gpt2, mistral = real_tokenizer("gpt2-base"), real_tokenizer("mistral-7b-v0.1")
    with pytest.raises(
        ValueError, match="first difference is token '!', id 0 for the student and 28808 for the teacher"
    ):
        shared(gpt2, mistral, 50257, 32000)


def test_a_real_tokenizer_shares_all_its_tokens_with_itself_padded():
    gpt2 = real_tokenizer("gpt2-base")
    assert shared(gpt2, real_tokenizer("gpt2-base"), 50257, 50304).ids == tuple(range(50257))


# --- cutting ----------------------------------------------------------------------------------------------------------

HOLES = Vocabulary((0, 2, 3, 7, 11))


def test_select_with_holes_is_indexing():
    logits = torch.randn(2, 3, 13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(HOLES.select(logits), logits[..., [0, 2, 3, 7, 11]])
    assert torch.equal(Vocabulary((1, 2)).select(logits), logits[..., 1:3])


def test_select_of_a_prefix_is_a_view():
    logits = torch.randn(4, 13)
    cut = Vocabulary(tuple(range(9))).select(logits)
    assert torch.equal(cut, logits[:, :9])
    assert cut.data_ptr() == logits.data_ptr()


def test_position_is_the_place_among_the_shared_ids():
    labels = torch.tensor([[11, 0, 7], [3, 2, 0]])
    assert HOLES.position(labels).tolist() == [[4, 0, 3], [2, 1, 0]]
    assert Vocabulary(tuple(range(12))).position(labels).tolist() == labels.tolist()


def test_select_and_position_fit_together():
    logits = torch.randn(5, 13)
    labels = torch.tensor([0, 2, 3, 7, 11])
    chosen = HOLES.select(logits).gather(-1, HOLES.position(labels)[:, None])
    assert torch.equal(chosen, logits.gather(-1, labels[:, None]))


def test_cutting_is_probability_zero_for_every_other_row():
    logits = torch.randn(6, 13, dtype=torch.float64)
    masked = logits.clone()
    masked[:, [i for i in range(13) if i not in HOLES.ids]] = -torch.inf
    torch.testing.assert_close(HOLES.select(logits).softmax(-1), masked.softmax(-1)[:, list(HOLES.ids)])


@pytest.mark.parametrize("vocabulary", [HOLES, Vocabulary((0, 1, 2))], ids=["holes", "prefix"])
def test_the_gradient_reaches_the_shared_rows_only(vocabulary):
    logits = torch.randn(2, 13, requires_grad=True)
    vocabulary.select(logits).sum().backward()
    assert torch.equal(logits.grad, torch.tensor([[float(i in vocabulary.ids) for i in range(13)]] * 2))


# --- another tokenizer for the student --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of another family: other text, other special tokens, 320 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        [
            "All the old houses stood there, and a river ran around them.",
            "In the morning, sunlight touched every window.",
        ],
        trainer,
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def logits_by_token(model: Any, tokenizer: Any, text: str) -> dict[str, torch.Tensor]:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0]
    return {token: logits[:, i] for token, i in tokenizer.get_vocab().items() if i < logits.shape[-1]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_permuted_tokenizer_leaves_every_logit_as_it_was(tokenizer, edited, make_model, tied):
    model, new = make_model(tied=tied), edited(permuted)
    before = logits_by_token(model, tokenizer, TEXT)
    assert tokenizer(TEXT)["input_ids"] != new(TEXT)["input_ids"]
    adopt_tokenizer(model, tokenizer, new)
    after = logits_by_token(model, new, TEXT)
    assert after.keys() == before.keys() == tokenizer.get_vocab().keys()
    for token, values in before.items():
        torch.testing.assert_close(after[token], values, msg=token)


def test_a_permuted_tokenizer_takes_the_bias_of_the_head_along(tokenizer, edited):
    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    ).eval()
    model.lm_head.bias.data.normal_()
    new = edited(permuted)
    before = logits_by_token(model, tokenizer, TEXT)
    adopt_tokenizer(model, tokenizer, new)
    after = logits_by_token(model, new, TEXT)
    for token, values in before.items():
        torch.testing.assert_close(after[token], values, msg=token)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_known_to_both_keep_their_vectors_and_others_start_at_the_mean(
    tokenizer, other_tokenizer, make_model, tied, dtype
):
    model = make_model(308, tied=tied).to(dtype)
    heads = (model.get_input_embeddings, model.get_output_embeddings)
    with torch.no_grad():
        for head in heads:
            head().weight[300:] = 1e4  # padding, which belongs to no token and must not shift the mean
    before = [head().weight.detach().clone() for head in heads]
    adopt_tokenizer(model, tokenizer, other_tokenizer)
    old, new = tokenizer.get_vocab(), other_tokenizer.get_vocab()
    common, unknown = old.keys() & new.keys(), new.keys() - old.keys()
    assert len(common) > 256
    assert len(unknown) > 20
    for head, weight in zip(heads, before, strict=True):
        mean = weight[:300].float().mean(0).to(dtype)
        assert head().weight.shape == (320, 32)
        assert head().weight.dtype == dtype
        for token in common:
            assert torch.equal(head().weight[new[token]], weight[old[token]]), token
        for token in unknown:
            assert torch.equal(head().weight[new[token]], mean), token
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_smaller_tokenizer_leaves_no_row_of_the_old_one(tokenizer, other_tokenizer, make_model):
    model = make_model(352)
    weight = model.get_input_embeddings().weight.detach().clone()
    adopt_tokenizer(model, other_tokenizer, tokenizer)
    old, new = other_tokenizer.get_vocab(), tokenizer.get_vocab()
    assert model.get_input_embeddings().weight.shape == (300, 32)
    for token in old.keys() & new.keys():
        assert torch.equal(model.get_input_embeddings().weight[new[token]], weight[old[token]])


def test_the_same_tokenizer_changes_no_vector_and_drops_the_padding(tokenizer, make_model):
    model = make_model(308, tied=False)
    before = [head.weight.detach().clone() for head in (model.get_input_embeddings(), model.get_output_embeddings())]
    adopt_tokenizer(model, tokenizer, tokenizer)
    assert torch.equal(model.get_input_embeddings().weight, before[0][:300])
    assert torch.equal(model.get_output_embeddings().weight, before[1][:300])


def test_a_hole_in_the_new_ids_starts_at_the_mean(tokenizer, edited, make_model):
    model = make_model()
    before = model.get_input_embeddings().weight.detach().clone()
    adopt_tokenizer(model, tokenizer, edited(with_ids(lambda i: i if i < 100 else i + 7)))
    after = model.get_input_embeddings().weight
    assert after.shape == (307, 32)
    assert torch.equal(after[:100], before[:100])
    assert torch.equal(after[107:], before[100:])
    assert torch.equal(after[100:107], before.mean(0).expand(7, -1))


def test_special_ids_of_both_configurations_follow_the_new_tokenizer(tokenizer, other_tokenizer, make_model):
    model = make_model()
    adopt_tokenizer(model, tokenizer, other_tokenizer)
    for configuration in (model.config, model.generation_config):
        ids = (configuration.bos_token_id, configuration.eos_token_id, configuration.pad_token_id)
        assert ids == (1, 2, 3)
    assert model.config.vocab_size == 320


def test_a_special_token_that_the_new_tokenizer_lacks_is_unset(tokenizer, edited, make_model):
    model = make_model()
    adopt_tokenizer(model, tokenizer, edited(permuted, bos_token=None, pad_token=None))
    for configuration in (model.config, model.generation_config):
        assert configuration.bos_token_id is None
        assert configuration.pad_token_id is None
        assert configuration.eos_token_id is not None


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_student_with_another_tokenizer_is_saved_and_loaded_as_it_is(
    tokenizer, other_tokenizer, make_model, tmp_path, tied
):
    model = make_model(tied=tied)
    adopt_tokenizer(model, tokenizer, other_tokenizer)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = other_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_student_with_another_tokenizer_shares_it_with_the_teacher(tokenizer, other_tokenizer, make_model):
    model = make_model()
    adopt_tokenizer(model, tokenizer, other_tokenizer)
    rows = model.get_output_embeddings().weight.shape[0]
    assert shared(other_tokenizer, other_tokenizer, rows, 384).ids == tuple(range(320))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_new_vectors_learn(tokenizer, other_tokenizer, make_model, tied):
    model = make_model(tied=tied)
    adopt_tokenizer(model, tokenizer, other_tokenizer)
    ids = other_tokenizer("the morning sun", return_tensors="pt")["input_ids"]
    model(ids, labels=ids).loss.backward()
    for head, trained in ((model.get_input_embeddings(), ids[0, :-1]), (model.get_output_embeddings(), ids[0, 1:])):
        assert (head.weight.grad[trained].norm(dim=-1) > 0).all()


def test_the_token_at_the_old_padding_id_learns_like_any_other(tokenizer, edited, make_model):
    model, new = make_model(tied=False), edited(permuted)
    assert model.get_input_embeddings().padding_idx == tokenizer.pad_token_id == 0
    adopt_tokenizer(model, tokenizer, new)
    assert new.pad_token_id != 0
    assert model.get_input_embeddings().padding_idx in (None, new.pad_token_id)
    ids = torch.tensor([[0, 1, 2]])
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[0].norm() > 0
