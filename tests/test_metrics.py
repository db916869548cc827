"""Measures of distributions are their definitions, at their limits too, whole, in chunks and over processes."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from taid.evaluation import metrics
from taid.evaluation.metrics import (
    BINS,
    TokenSums,
    agreement,
    calibration_bins,
    calibration_error,
    distinct,
    exact_match,
    head_mass,
    rouge_l,
    self_bleu,
    tail_mass,
)
from taid.losses.fused import Head
from taid.losses.kernels.head_matmul import HeadProducts

ALONE = types.SimpleNamespace(reduce=lambda total, _: total)


def logits(tokens=64, ids=97, scale=3.0, seed=0, dtype=torch.float32):
    return (scale * torch.randn(tokens, ids, generator=torch.Generator().manual_seed(seed))).to(dtype)


def by_hand(student, teacher, labels, order=None):
    """In float64, token by token, with plain sorting."""
    q, p = (z.double().softmax(-1) for z in (student, teacher))
    order = teacher if order is None else order
    falling = order.double().argsort(dim=-1, descending=True, stable=True)
    ids = q.shape[-1]
    confidence, likeliest = q.max(-1)
    error = 0.0
    for b in range(BINS):
        inside = (confidence > b / BINS) & (confidence <= (b + 1) / BINS)
        right = (likeliest == labels)[inside].double()
        error += abs(right.sum() - confidence[inside].sum()).item() / len(q)
    return {
        "reverse_kl": (q * (q.log() - p.log())).sum(-1).mean().item(),
        "agreement": (q.argmax(-1) == p.argmax(-1)).double().mean().item(),
        "head_mass": q.gather(-1, falling[:, :10]).sum(-1).mean().item(),
        "tail_mass": q.gather(-1, falling[:, ids - ids // 5 :]).sum(-1).mean().item(),
        "calibration_error": error,
    }


def measured(student, teacher, labels, **options):
    sums = metrics.token_sums(student, teacher, labels, **options)
    found = {name: (value / sums["trained"]).item() for name, value in sums.items() if name != "calibration"}
    found.pop("trained")
    return found | {"calibration_error": calibration_error(sums["calibration"])}


@pytest.mark.parametrize("own_order", [False, True])
@pytest.mark.parametrize(("ids", "scale"), [(97, 3.0), (1003, 0.3), (11, 8.0), (4, 1.0)])
def test_each_measure_is_its_definition_in_float64(ids, scale, own_order):
    student, teacher = logits(200, ids, scale), logits(200, ids, scale, seed=1)
    student = student + teacher
    labels = torch.randint(ids, (200,), generator=torch.Generator().manual_seed(2))
    labels[:90] = student[:90].argmax(-1)
    expected = by_hand(student, teacher, labels, student if own_order else None)
    assert measured(student, teacher, labels, own_order=own_order) == pytest.approx(expected, rel=2e-5, abs=1e-7)


def test_half_precision_logits_are_computed_with_in_float32():
    student, teacher = logits(dtype=torch.float16), logits(seed=1, dtype=torch.float16)
    labels = torch.zeros(64, dtype=torch.long)
    assert measured(student, teacher, labels) == measured(student.float(), teacher.float(), labels)


def test_a_student_that_is_its_teacher_agrees_in_everything():
    both, labels = logits(), torch.arange(64)
    found = measured(both, both.clone(), labels)
    assert (found["reverse_kl"], found["agreement"]) == (0.0, 1.0)
    assert found == measured(both, both, labels, own_order=True)


def test_a_common_offset_of_a_tokens_logits_changes_nothing():
    student, teacher, labels = logits(), logits(seed=1), torch.arange(64)
    moved = measured(student + 100, teacher - 300, labels)
    assert moved == pytest.approx(measured(student, teacher, labels), rel=1e-3)


def test_without_a_teacher_only_calibration_is_summed():
    assert set(metrics.token_sums(logits(), None, torch.arange(64))) == {"trained", "calibration"}


# --- head and tail mass -----------------------------------------------------------------------------------------------


def test_by_a_uniform_teacher_each_token_has_its_share_of_head_and_tail():
    student, teacher = logits(), torch.zeros(64, 97)
    torch.testing.assert_close(head_mass(student, teacher), torch.full((64,), 10 / 97))
    torch.testing.assert_close(tail_mass(student, teacher), torch.full((64,), 19 / 97))


def test_a_uniform_student_has_ten_tokens_in_the_head_and_a_fifth_in_the_tail():
    student, teacher = torch.zeros(64, 97), logits()
    torch.testing.assert_close(head_mass(student, teacher), torch.full((64,), 10 / 97))
    torch.testing.assert_close(tail_mass(student, teacher), torch.full((64,), 19 / 97))


@pytest.mark.parametrize(
    ("place", "head", "tail"), [(0, 1, 0), (9, 1, 0), (10, 0, 0), (77, 0, 0), (78, 0, 1), (96, 0, 1)]
)
def test_a_sure_student_is_in_the_head_the_tail_or_neither(place, head, tail):
    """Among 97 tokens in the teacher's order, 0 to 9 are the head and the last 19 the tail."""
    teacher = logits()
    student = torch.full_like(teacher, -torch.inf)
    student.scatter_(-1, teacher.argsort(-1, descending=True)[:, place, None], 0.0)
    assert head_mass(student, teacher).tolist() == [head] * 64
    assert tail_mass(student, teacher).tolist() == [tail] * 64


def test_of_few_tokens_all_are_the_head_and_of_less_than_five_none_is_the_tail():
    student, teacher = logits(ids=4), logits(ids=4, seed=1)
    torch.testing.assert_close(head_mass(student, teacher), torch.ones(64))
    assert tail_mass(student, teacher).tolist() == [0.0] * 64


def test_equally_likely_tokens_share_the_places_that_are_left():
    """Return the mean over all orders, as if the order among them were drawn."""
    student = logits(1, 12)
    q = student.double().softmax(-1)[0]
    teacher = torch.tensor([[5.0] * 8 + [1.0] * 4])  # two of the last four are in the head, two of them in the tail
    head = q[:8].sum() + torch.stack([q[list(two)].sum() for two in itertools.combinations(range(8, 12), 2)]).mean()
    tail = torch.stack([q[list(two)].sum() for two in itertools.combinations(range(8, 12), 2)]).mean()
    assert head_mass(student, teacher).item() == pytest.approx(head.item(), rel=1e-6)
    assert tail_mass(student, teacher).item() == pytest.approx(tail.item(), rel=1e-6)


def test_a_tail_of_a_millionth_keeps_its_digits():
    student = torch.cat([torch.full((1, 800), 12.0), torch.linspace(-3, -1, 200)[None]], -1)
    q = student.double().softmax(-1)
    assert q[:, 800:].sum() < 1e-6
    assert tail_mass(student, student).item() == pytest.approx(q[:, 800:].sum().item(), rel=1e-5)


# --- calibration ------------------------------------------------------------------------------------------------------


def sure(confidence, right, tokens=1000, ids=50):
    """A model that gives its likeliest token this probability, and is right for this share of the tokens."""
    rest = (1 - confidence) / (ids - 1)
    z = torch.full((tokens, ids), rest, dtype=torch.float64)
    z[:, 7] = confidence
    labels = torch.full((tokens,), 7)
    labels[round(tokens * right) :] = 8
    return z.log().float(), labels


@pytest.mark.parametrize(("confidence", "right", "error"), [(0.8, 0.6, 0.2), (0.5, 0.5, 0.0), (0.3, 1.0, 0.7)])
def test_a_model_that_is_surer_than_it_is_right_is_off_by_the_difference(confidence, right, error):
    assert calibration_error(calibration_bins(*sure(confidence, right))) == pytest.approx(error, abs=1e-6)


def test_too_sure_here_and_not_sure_enough_there_do_not_cancel():
    bins = calibration_bins(*sure(0.9, 0.7)) + calibration_bins(*sure(0.5, 0.7))
    assert calibration_error(bins) == pytest.approx(0.2, abs=1e-6)
    bins = calibration_bins(*sure(0.90, 0.8)) + calibration_bins(*sure(0.88, 0.96))  # one bin: they do
    assert calibration_error(bins) == pytest.approx(0.01, abs=1e-6)


def test_a_token_that_is_certain_and_one_that_is_hardly_likelier_than_others_have_a_bin():
    certain = torch.full((1, 50), -torch.inf)
    certain[0, 3] = 0.0
    assert calibration_bins(certain, torch.tensor([3]))[:, -1].tolist() == [1.0, 1.0, 1.0]
    assert calibration_bins(torch.zeros(1, 5000), torch.tensor([3]))[0, 0] == 1.0
    assert calibration_error(torch.zeros(3, BINS)) == 0.0


def test_agreement_takes_the_first_of_equally_likely_tokens():
    assert agreement(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 2.0]])).tolist() == [1.0]


# --- in chunks, over batches and processes ----------------------------------------------------------------------------

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale and cap": {"scale": 0.5, "softcap": 3.0},
    "half": {"dtype": torch.bfloat16},
}


def pair(kind, rows=2, positions=40, ids=97):
    """Hidden states and heads of a student and a teacher whose heads are padded differently, and labels."""
    options, generator = HEADS[kind], torch.Generator().manual_seed(3)
    found = []
    for width, padded in ((16, 99), (24, 104)):
        dtype = options.get("dtype", torch.float32)
        weight, hidden = (
            torch.randn(*shape, generator=generator).to(dtype) for shape in ((padded, width), (rows, positions, width))
        )
        bias = torch.randn(padded, generator=generator).to(dtype) if options.get("bias") else None
        found += [hidden, Head(weight, bias, options.get("scale", 1.0), options.get("softcap"))]
    labels = torch.randint(ids, (rows, positions), generator=generator)
    labels[:, ::3] = -100
    return found, labels


def of_heads(found, labels, ids=97):
    """Compute it by the plain formula, from logits in float64 of the same numbers."""
    trained = labels != -100
    logits = [
        Head(
            head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.softcap
        ).logits(hidden[trained].double())[:, :ids]
        for hidden, head in (found[:2], found[2:])
    ]  # fmt: skip
    return by_hand(*logits, labels[trained])


@pytest.mark.parametrize("rows", [1, 7, 16, 1000])
@pytest.mark.parametrize("kind", HEADS)
def test_chunks_of_any_size_give_the_plain_formula(kind, rows, monkeypatch):
    monkeypatch.setattr(metrics, "_chunk_rows", lambda V, device: rows)
    monkeypatch.setattr(metrics, "block_rows", lambda V: 5)
    found, labels = pair(kind)
    sums = TokenSums()
    sums(*found, labels, 97)
    # bfloat16 has tiles of its own where a processor multiplies in it.
    close = {"rel": 3e-2, "abs": 3e-2} if kind == "half" else {"rel": 3e-5, "abs": 1e-7}
    assert sums.means(ALONE) == pytest.approx(of_heads(found, labels), **close)


def test_batches_and_processes_add_up_to_the_whole(monkeypatch):
    found, labels = pair("bias", rows=6)
    whole = TokenSums()
    whole(*found, labels, 97)
    processes = [TokenSums(), TokenSums()]
    for row in range(6):
        part = [x[row : row + 1] if isinstance(x, torch.Tensor) else x for x in found]
        processes[row % 2](*part, labels[row : row + 1], 97)
    untrained = [x[:1] if isinstance(x, torch.Tensor) else x for x in found]  # what fills a batch up
    processes[0](*untrained, torch.full((1, 40), -100), 97)
    totals = []
    for process in processes:
        process.means(types.SimpleNamespace(reduce=lambda total, _: totals.append(total) or total))
    together = types.SimpleNamespace(reduce=lambda total, _: totals[0] + totals[1])
    expected = whole.means(ALONE)
    for process in processes:
        assert process.means(together) == pytest.approx(expected, rel=1e-6)


def test_a_process_without_a_trained_token_has_the_same_names():
    found, labels = pair("plain")
    sums = TokenSums()
    sums(*found, torch.full_like(labels, -100), 97)
    assert sums.means(ALONE) == dict.fromkeys(of_heads(found, labels), 0.0)


def test_beside_hidden_states_and_heads_only_tiles_are_held(monkeypatch):
    """4,096 tokens of 32,000 ids would be 500 MB of logits a model; a tile has 64, of which parts are summed."""
    hidden, weight, tiles, parts = torch.randn(1, 4096, 8), torch.randn(32_000, 8), [], []
    project = HeadProducts.project

    def projected(self, hidden_MD, tile):
        tiles.append(tile.untyped_storage().nbytes())
        return project(self, hidden_MD, tile)

    def summed(student, teacher, labels, **_):
        parts.append(student.numel() * 4)
        return {}

    monkeypatch.setattr(HeadProducts, "project", projected)
    monkeypatch.setattr(metrics, "token_sums", summed)
    TokenSums()(hidden, Head(weight), hidden, Head(weight), torch.zeros(1, 4096, dtype=torch.long), 32_000)
    assert sum(parts) == 4096 * 32_000 * 4
    assert max(tiles) <= 65 * 2**20
    assert max(parts) <= 4 * 2**20


# --- measures of text -------------------------------------------------------------------------------------------------


def test_rouge_l_is_that_of_the_longest_common_subsequence():
    assert rouge_l("the cat sat", "a cat sat down") == pytest.approx(2 / (4 / 2 + 3 / 2))  # 2 of 4 words, 2 of 3
    assert rouge_l("Jumping dogs!", "dog jumps") == pytest.approx(0.5)  # stemmed, and only in their order
    assert rouge_l("a cat", "a cat") == 1.0
    assert rouge_l("a cat", "") == 0.0
    assert rouge_l("東京です。", "東京です。") is None  # it counts Latin letters and digits only


def test_an_exact_match_is_the_text_but_for_blanks_around_it():
    assert exact_match(" Paris.\n", "Paris.")
    assert not exact_match("Paris.", "paris.")


def test_distinct_n_is_the_share_of_different_n_grams():
    samples = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(samples, 1) == 3 / 7
    assert distinct(samples, 2) == 3 / 5  # 12 21 12 | 12 23
    assert distinct(samples, 4) == 1.0
    assert distinct(samples, 5) is None
    assert distinct([[5] * 100], 2) == 1 / 99


@pytest.mark.parametrize("sample", [list(range(9)), [1, 2], [7]])
def test_self_bleu_of_a_student_that_says_one_thing_is_1_however_short(sample):
    assert self_bleu([[sample] * 4, [sample] * 4]) == pytest.approx(1.0)


def test_self_bleu_is_the_mean_over_samples_and_falls_to_0():
    one, other = list(range(20)), list(range(50, 70))
    assert self_bleu([[one, other]]) == 0.0
    assert self_bleu([[one, one, other]]) == pytest.approx(2 / 3)
    assert self_bleu([[one, one], [one, other]]) == pytest.approx(1 / 2)  # prompts are not compared with each other
    half = self_bleu([[one, one[:10] + other[:10]]])
    assert 0.2 < half < 0.8
    assert self_bleu([[one], [other]]) is None
