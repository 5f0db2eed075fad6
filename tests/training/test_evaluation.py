from __future__ import annotations

import itertools
import random
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chat_templates import tokenizer_of
from tests.tiny_models import (
    END,
    LAYERS,
    PAD,
    TOP_K,
    character_tokenizer,
    exact_token_losses,
    merged,
    random_adapter,
    tiny_olmoe,
    with_active_experts,
)
from transformers import OlmoeForCausalLM

import fedflame.training.evaluation as evaluation
from fedflame.data.batches import collate
from fedflame.data.conversations import Conversation, single_turn
from fedflame.data.encoder import new_encoder
from fedflame.data.encoding import EncodedRow, encode, encode_prompts
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.training.evaluation import HeldOut, evaluate, generate_responses
from fedflame.training.scores import Scores, total

TOKENIZER = character_tokenizer()
MAX_LENGTH, NEW_TOKENS = 60, 8
ENCODER = new_encoder(TOKENIZER, MAX_LENGTH)
RESCALERS = torch.tensor([0.9, 1.2])
ROWS = [
    single_turn("Add", "2 3", "5", "sum"),
    single_turn("Greet Ann", "", "Hello Ann", "greeting"),
    single_turn("Add these", "20 30", "50", "sum"),
    single_turn("Turn round", "abc", "cba", "reverse"),
    single_turn("Greet", "Bob, who is late", "Hello Bob, at last", "greeting"),
    single_turn("Add", "1 1 1", "3", "sum"),
    single_turn("Turn this round, please: " + "x" * 30, "", "d", "reverse"),
]


def ends_early(model: OlmoeForCausalLM) -> OlmoeForCausalLM:
    """Make the end token likely, so that some answers end before the last allowed token."""
    model.lm_head.weight.data[END] *= 4
    return model


def adapted_model() -> AdaptedModel:
    return AdaptedModel(ends_early(tiny_olmoe()), 4, 6.0, ["q_proj", "v_proj"])


def oracle_at(adapted: AdaptedModel, k: int) -> OlmoeForCausalLM:
    """The stock model in float64, built with k, with the adapter that `held_out_scores` loads merged in."""
    adapted.load(random_adapter(adapted), RESCALERS)
    return merged(adapted, ends_early(with_active_experts(k)))


def held_out(rows: list[Conversation] = ROWS, batch_size: int = 3) -> HeldOut:
    encoded = [encode(row, ENCODER) for row in rows]
    prompts = encode_prompts(rows, ENCODER, MAX_LENGTH - NEW_TOKENS)
    return HeldOut(rows, encoded, prompts, ENCODER, NEW_TOKENS, batch_size)


def scores_at(
    k: int, rows: list[Conversation] = ROWS, batch_size: int = 3, generate: bool = False
) -> dict[str, Scores]:
    adapted = adapted_model()
    return evaluate(adapted, held_out(rows, batch_size), random_adapter(adapted), k, RESCALERS, generate)


def answer_by_hand(model: OlmoeForCausalLM, row: Conversation) -> tuple[str, bool]:
    """Greedy, one full forward per token, one row at a time; and whether the end token ended it."""
    prompt = encode_prompts([row], ENCODER, MAX_LENGTH - NEW_TOKENS)[0].ids
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    answer = [id for id in ids[len(prompt) :] if id not in (END, PAD, 2)]
    return TOKENIZER.decode(answer).strip(), ids[-1] == END


def answered(row: Conversation, response: str) -> Conversation:
    """The row with another answer."""
    return replace(row, turns=(*row.turns[:-1], replace(row.turns[-1], content=response)))


def rouge_l_by_hand(reference: str, answer: str) -> float:
    """F-measure of the longest common subsequence of words (no word here has an ending to stem)."""
    words, others = reference.split(), answer.split()
    table = [[0] * (len(others) + 1) for _ in range(len(words) + 1)]
    for i, word in enumerate(words):
        for j, other in enumerate(others):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(words) + len(others)) if common else 0.0


# Loss


@pytest.mark.parametrize("k", [1, TOP_K])
def test_the_loss_of_every_category_sums_the_losses_of_its_rows_each_computed_alone(k: int) -> None:
    oracle, scores = oracle_at(adapted_model(), k), scores_at(k)
    assert list(scores) == ["greeting", "reverse", "sum"]
    for category, score in scores.items():
        encoded = [encode(row, ENCODER) for row in ROWS if row.category == category]
        with torch.no_grad():
            losses = torch.cat([exact_token_losses(oracle, collate([row], PAD)) for row in encoded])
        assert (score.rows, score.response_tokens) == (len(encoded), len(losses))
        assert score.loss_sum == pytest.approx(float(losses.sum()), rel=1e-5)
        assert score.loss == pytest.approx(float(losses.mean()), rel=1e-5)
        assert score.exact_match is None and score.rouge_l is None


def test_the_loss_of_one_row_is_that_of_transformers() -> None:
    oracle = oracle_at(adapted_model(), 2)
    for row in ROWS:
        (score,) = scores_at(2, [row]).values()
        encoded: EncodedRow = encode(row, ENCODER)
        with torch.no_grad():
            expected = oracle(**vars(collate([encoded], PAD))).loss.item()
        assert score.loss == pytest.approx(expected, rel=1e-5)


def test_k_and_the_rescalers_change_the_loss() -> None:
    adapted = adapted_model()
    adapter = random_adapter(adapted)
    losses = [
        total(evaluate(adapted, held_out(), adapter, k, s, False)).loss
        for k, s in ((1, RESCALERS), (2, RESCALERS), (2, torch.ones(LAYERS)))
    ]
    assert min(abs(one - other) for one, other in itertools.pairwise(losses)) > 1e-3


def test_the_total_is_the_sum_over_the_categories() -> None:
    scores = scores_at(2, generate=True)
    together = total(scores)
    assert (together.rows, sum(score.rows for score in scores.values())) == (len(ROWS), len(ROWS))
    for field in ("loss_sum", "response_tokens", "exact_matches", "rouge_l_sum"):
        assert getattr(together, field) == pytest.approx(sum(getattr(s, field) for s in scores.values()))


def test_scores_add_and_divide() -> None:
    both = Scores(3, 6.0, 12, 1, 0.9) + Scores(2, 4.0, 8, 1, 1.1)
    assert both == Scores(5, 10.0, 20, 2, 2.0)
    assert (both.loss, both.exact_match, both.rouge_l) == (0.5, 0.4, 0.4)
    plain = Scores(3, 6.0, 12) + Scores(2, 4.0, 8)
    assert plain == Scores(5, 10.0, 20, None, None)
    assert plain.exact_match is None and plain.rouge_l is None


def test_no_match_is_zero_and_not_none() -> None:
    none = Scores(4, 1.0, 2, 0, 0.0)
    assert none.exact_match == 0.0 and none.rouge_l == 0.0


# Generation


@pytest.mark.parametrize("k", [1, TOP_K])
def test_answers_are_greedy_and_those_of_each_row_alone(k: int) -> None:
    adapted = adapted_model()
    oracle = oracle_at(adapted, k)
    by_hand = [answer_by_hand(oracle, row) for row in ROWS]
    assert len({ended for _, ended in by_hand}) == 2, "some answers end early, some do not"
    with torch.no_grad():
        adapted.load(random_adapter(adapted), RESCALERS)
        with adapted.active_experts(k):
            assert generate_responses(adapted, held_out(), range(len(ROWS))) == [
                answer for answer, _ in by_hand
            ]


class Answers:
    """A model whose answers are given, one token row for each prompt."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = answers, dict[str, object]()

    def generate(self, input_ids: torch.Tensor, **asked: object) -> torch.Tensor:
        self.asked = asked
        rows = [TOKENIZER.encode(answer) for answer in self.answers]
        width = max(map(len, rows))
        filled = torch.tensor([row + [END] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, filled], 1)


def test_of_an_answer_with_thoughts_what_follows_them_is_scored() -> None:
    model = Answers("<think>\n2 3\n</think>\n\n5", "Hello Ann")
    adapted: object = SimpleNamespace(model=model, device=torch.device("cpu"))
    assert generate_responses(adapted, held_out(), [0, 1]) == ["5", "Hello Ann"]  # type: ignore[arg-type]


def test_generation_stops_at_the_templates_end_of_turn_too() -> None:
    tokenizer = tokenizer_of("gemma")
    encoder, row = new_encoder(tokenizer, 100), single_turn("Add", "", "5", "sum")
    scored = HeldOut([row], [encode(row, encoder)], encode_prompts([row], encoder, None), encoder, 4)
    model = Answers("5")
    generate_responses(SimpleNamespace(model=model, device=torch.device("cpu")), scored, [0])  # type: ignore[arg-type]
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert sorted(model.asked["eos_token_id"]) == sorted(ends)  # type: ignore[call-overload]


@pytest.mark.parametrize("k", [1, TOP_K])
def test_exact_matches_and_rouge_l_are_those_of_the_answers_by_hand(k: int) -> None:
    oracle = oracle_at(adapted_model(), k)
    answers = [answer_by_hand(oracle, row)[0] for row in ROWS]
    # Three references are the answer itself, one of them with blanks around it.
    references = {1: answers[1], 3: f" {answers[3]} ", 5: answers[5]}
    rows = [answered(row, references.get(index, row.response)) for index, row in enumerate(ROWS)]
    scores = scores_at(k, rows, generate=True)
    right = [row.response.strip() == answer for row, answer in zip(rows, answers, strict=True)]
    assert sum(right) == 3
    for category, score in scores.items():
        assert score.exact_matches == sum(
            r for r, row in zip(right, rows, strict=True) if row.category == category
        )
    assert total(scores).exact_match == pytest.approx(3 / 7)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50])
def test_the_scores_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    one, other = scores_at(2, batch_size=3, generate=True), scores_at(2, batch_size=batch_size, generate=True)
    assert one.keys() == other.keys()
    for category in one:
        assert one[category].loss_sum == pytest.approx(other[category].loss_sum, rel=1e-6)
        assert replace(one[category], loss_sum=0.0) == replace(other[category], loss_sum=0.0)


def test_two_evaluations_are_equal_whatever_the_global_generators_hold() -> None:
    adapted = adapted_model()
    adapter = random_adapter(adapted)
    first = evaluate(adapted, held_out(), adapter, 2, RESCALERS, True)
    torch.manual_seed(9)
    random.seed(9)
    before = torch.get_rng_state(), random.getstate()
    assert evaluate(adapted, held_out(), adapter, 2, RESCALERS, True) == first
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("the cat sat on the mat", "the cat on the mat", 10 / 11),
        ("the cat sat on the mat", "the mat sat on the cat", 2 / 3),
        ("one two three", "four five", 0.0),
        ("red", "red", 1.0),
        ("red", "", 0.0),
    ],
)
def test_rouge_l_is_the_longest_common_subsequence(
    monkeypatch: pytest.MonkeyPatch, reference: str, answer: str, expected: float
) -> None:
    monkeypatch.setattr(evaluation, "generate_responses", lambda *_: [answer])
    (score,) = scores_at(2, [single_turn("Say", "", reference, "any")], generate=True).values()
    assert rouge_l_by_hand(reference, answer) == pytest.approx(expected)
    assert score.rouge_l == pytest.approx(expected)
    assert score.exact_matches == int(reference == answer)


def test_each_answer_is_scored_against_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def echo(_: AdaptedModel, held_out: HeldOut, indices: list[int]) -> list[str]:
        rows = [held_out.rows[index] for index in indices]
        return [row.response if row.category == "sum" else "nothing of it" for row in rows]

    monkeypatch.setattr(evaluation, "generate_responses", echo)
    scores = scores_at(2, generate=True)
    assert {category: score.exact_match for category, score in scores.items()} == {
        "greeting": 0.0,
        "reverse": 0.0,
        "sum": 1.0,
    }
    assert {category: score.rouge_l for category, score in scores.items()} == {
        "greeting": 0.0,
        "reverse": 0.0,
        "sum": 1.0,
    }


def test_evaluation_restores_k_counts_nothing_and_tracks_no_gradient() -> None:
    adapted = adapted_model()
    evaluate(adapted, held_out(), random_adapter(adapted), 1, RESCALERS, True)
    assert [layer.router.top_k for layer in adapted.layers] == [TOP_K] * LAYERS
    assert not adapted.counts.total.any()
    assert all(parameter.grad is None for parameter in adapted.model.parameters())


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 20_000), min_size=1, max_size=120),
    st.integers(0, 40),
    st.integers(1, 60),
    st.integers(1, 30_000),
)
def test_a_batch_of_long_rows_has_fewer_of_them(
    lengths: list[int], new_tokens: int, rows: int, tokens: int
) -> None:
    encoded = [EncodedRow([5] * length, 1, False) for length in sorted(lengths)]
    held_out = HeldOut([], encoded, [], ENCODER, new_tokens)
    batches = list(evaluation._batches(range(len(encoded)), held_out, rows, tokens))
    assert [index for batch in batches for index in batch] == list(range(len(encoded)))
    for batch in batches:
        widest = max(len(encoded[index].ids) for index in batch) + new_tokens
        assert len(batch) == 1 or (len(batch) <= rows and len(batch) * widest <= tokens)
    for batch, (first, *_) in pairwise(batches):  # a batch ends only where the next row does not fit
        width = len(encoded[first].ids) + new_tokens
        assert len(batch) == rows or (len(batch) + 1) * width > tokens


class OnCard:
    """What `_limits` asks of an adapted model, as if it lay on two cards."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self.layers, self.model = adapted.layers, adapted.model
        self.devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
        self.device = self.devices[0]


def test_on_a_gpu_a_batch_has_the_tokens_that_its_free_memory_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapted, rows = adapted_model(), held_out()
    assert evaluation._limits(adapted, rows, 2) == (rows.batch_rows, evaluation.BATCH_TOKENS)
    card, per_token = OnCard(adapted), evaluation.bytes_per_token(adapted, 2)
    assert per_token < evaluation.bytes_per_token(adapted, TOP_K)
    free = {0: 5000 * per_token, 1: 2000 * per_token}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300 * per_token)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200 * per_token)
    assert evaluation._limits(card, rows, 2) == (1024, 1024), "half of 2100 tokens on the fuller card"
    free[1] = 0
    assert evaluation._limits(card, rows, 2) == (32, 32)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200 * per_token)
    assert evaluation._limits(card, rows, 2) == (2, 2), "at least something: torch says what does not fit"
