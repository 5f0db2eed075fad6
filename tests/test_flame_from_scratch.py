"""The one-file example and the library, two implementations of one method, held to the same numbers."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

import flame_from_scratch as scratch
from fedflame.data.batches import collate, training_batches
from fedflame.data.encoding import EncodedRow
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.seeds import derive_seed
from fedflame.strategies import Flame
from fedflame.strategies.base import ClientProfile, ServerState
from fedflame.training.fine_tune import fine_tune

HIDDEN, WIDTH, EXPERTS, K, LAYERS, VOCABULARY = 24, 20, 6, 4, 2, 50
RANK, ALPHA, TEMPERATURE, LEARNING_RATE, WEIGHT_DECAY = 3, 5.0, 2.0, 3e-3, 0.5
TIERS, ROWS = (4, 2, 1, 2), (7, 5, 4, 3)
ROUNDS, STEPS, BATCH_SIZE, SEED, PAD = 2, 3, 2, 11, 0


@dataclass(frozen=True)
class Round:
    """One implementation's state after a round, with the library's names and layouts."""

    adapter: Adapter
    rescalers: dict[int, Tensor]
    counts: list[Tensor]
    tokens: list[int]
    losses: list[float]


@dataclass(frozen=True)
class Comparison:
    start: Adapter
    library: list[Round]
    example: list[Round]


@pytest.fixture(scope="module")
def comparison() -> Iterator[Comparison]:
    """Two rounds of four clients, two of one tier, by the library and by the example, from the same start."""
    base = tiny_olmoe()
    rows = [random_rows(client, count) for client, count in enumerate(ROWS)]
    adapted = AdaptedModel(copy.deepcopy(base), RANK, ALPHA, scratch.ATTENTION)
    start = adapted.initial_adapter(SEED)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "ALPHA", "TEMPERATURE", "LEARNING_RATE", "WEIGHT_DECAY"):
            patch.setattr(scratch, name, globals()[name])
        example = run_example(copy.deepcopy(base).requires_grad_(False), rows, start)
    yield Comparison(start, run_library(adapted, rows, start), example)


@pytest.mark.slow
def test_adapters_are_equal_after_every_round(comparison: Comparison) -> None:
    # AdamW divides by the gradient's size, so where a gradient is mere rounding, single values differ more.
    for library, example in zip(comparison.library, comparison.example, strict=True):
        wanted, got = library.adapter.tensors(), example.adapter.tensors()
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            difference = (got[name] - value).abs()
            assert difference.max() < 1e-5, name
            assert difference.mean() < 1e-7, name


def test_every_part_of_the_adapter_moved_by_far_more_than_the_tolerance(comparison: Comparison) -> None:
    start, end = comparison.start.tensors(), comparison.library[-1].adapter.tensors()
    for name, value in end.items():
        assert (value - start[name]).abs().max() > 1e-3, name


def test_activation_counts_and_tokens_are_exactly_equal(comparison: Comparison) -> None:
    for library, example in zip(comparison.library, comparison.example, strict=True):
        assert example.tokens == library.tokens
        for got, wanted in zip(example.counts, library.counts, strict=True):
            assert torch.equal(got, wanted)


def test_some_client_never_used_an_expert_that_another_used(comparison: Comparison) -> None:
    used = torch.stack([counts > 0 for counts in comparison.library[0].counts])
    assert (used.any(0) & ~used.all(0)).any()


def test_rescalers_are_equal_and_learned_for_every_tier_but_the_full_one(comparison: Comparison) -> None:
    for library, example in zip(comparison.library, comparison.example, strict=True):
        assert example.rescalers.keys() == library.rescalers.keys() == set(TIERS)
        for k in set(TIERS):
            torch.testing.assert_close(example.rescalers[k], library.rescalers[k], rtol=0, atol=1e-5)
        assert torch.equal(library.rescalers[K], torch.ones(LAYERS))
        assert all((library.rescalers[k] != 1).all() for k in (2, 1))


def test_losses_are_equal(comparison: Comparison) -> None:
    for library, example in zip(comparison.library, comparison.example, strict=True):
        assert example.losses == pytest.approx(library.losses, abs=1e-5)


def test_an_expert_without_tokens_in_a_step_skips_weight_decay_and_momentum() -> None:
    value, moments = torch.tensor([2.0], requires_grad=True), dict[Tensor, tuple[int, Tensor, Tensor]]()
    reference = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.AdamW([reference], lr=scratch.LEARNING_RATE, weight_decay=0.5)
    for gradient in (0.3, None, -0.1):  # None: the step leaves the tensor out
        if gradient is not None:
            value.grad = torch.tensor([gradient])
            scratch.adamw_step(value, moments, weight_decay=0.5)
        reference.grad = None if gradient is None else torch.tensor([gradient])
        optimizer.step()
    torch.testing.assert_close(value.detach(), reference.detach(), rtol=1e-6, atol=0)


def test_the_start_is_the_base_model_and_the_initial_values_are_those_of_the_library() -> None:
    base = tiny_olmoe().requires_grad_(False)
    adapter = scratch.initial_adapter(base, seed=3)
    like = AdaptedModel(copy.deepcopy(base), scratch.RANK, scratch.ALPHA, scratch.ATTENTION).initial_adapter(
        3
    )
    for name, (A, B) in {name: adapter[key] for key, name in keys_and_names(adapter)}.items():
        assert not B.any(), name
        bound = A.shape[1] ** -0.5
        assert 0.5 * bound < A.abs().max() <= bound, name
    converted = to_library(adapter)
    assert {name: value.shape for name, value in converted.tensors().items()} == {
        name: value.shape for name, value in like.tensors().items()
    }
    batch = collate(random_rows(0, 5), PAD)
    before = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    after = scratch.AdaptedModel(base, adapter, torch.ones(LAYERS), K).loss(batch)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_main_prints_a_falling_loss_at_every_k_for_every_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_olmoe().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    scratch.main(str(tmp_path), rounds=1, steps=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round")]
    losses = [[float(number) for number in re.findall(r"\d+\.\d{3}", line)] for line in lines]
    assert [re.findall(r"k=(\d+)", line) for line in lines] == [["4", "2", "1"]] * 2
    assert all(after < before for before, after in zip(*losses, strict=True))


def test_the_example_fits_into_two_hundred_lines() -> None:
    assert len(Path(scratch.__file__).read_text(encoding="utf-8").splitlines()) <= 200


def tiny_olmoe() -> OlmoeForCausalLM:
    """Random weights large enough that routing, experts and attention all matter to the loss."""
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_experts=EXPERTS,
        num_experts_per_tok=K,
        max_position_embeddings=128,
        pad_token_id=PAD,
        eos_token_id=1,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return OlmoeForCausalLM(config).eval()


def random_rows(client: int, count: int) -> list[EncodedRow]:
    """Rows of 4 to 9 tokens; each client uses a part of the vocabulary of its own."""
    generator = torch.Generator().manual_seed(100 + client)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, 10, (), generator=generator))
        ids = torch.randint(2 + 12 * client, 14 + 12 * client, (length,), generator=generator)
        rows.append(EncodedRow(ids.tolist(), length // 2, False))
    return rows


def run_library(adapted: AdaptedModel, rows: list[list[EncodedRow]], start: Adapter) -> list[Round]:
    strategy = Flame(K, TEMPERATURE)
    state = strategy.initialize(start, TIERS, LAYERS)
    rounds = []
    for number in range(1, ROUNDS + 1):
        updates = [
            library_update(adapted, rows[client], strategy, state, number, client)
            for client in range(len(TIERS))
        ]
        state = strategy.aggregate_train(state, updates)
        counts, tokens = [update.counts for update in updates], [update.tokens for update in updates]
        losses = [update.loss for update in updates]
        rounds.append(Round(state.adapter, dict(state.rescalers), counts, tokens, losses))
    return rounds


def library_update(
    adapted: AdaptedModel,
    rows: list[EncodedRow],
    strategy: Flame,
    state: ServerState,
    number: int,
    client: int,
) -> ClientUpdate:
    told = strategy.configure_train(state, ClientProfile(client, TIERS[client], 1, len(rows)))
    plan = RoundPlan(
        round=number,
        client=client,
        seed=SEED,
        active_experts=told.active_experts,
        rescaler=told.rescaler,
        rescaler_values=told.rescaler_values,
        adapter=told.adapter,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        batch_size=BATCH_SIZE,
        max_steps=STEPS,
    )
    return fine_tune(adapted, rows, plan, PAD)


def run_example(model: OlmoeForCausalLM, rows: list[list[EncodedRow]], start: Adapter) -> list[Round]:
    def batches(number: int, client: int) -> Iterator[scratch.Batch]:
        seed = derive_seed(SEED, "batches", number, client)
        return itertools.islice(training_batches(rows[client], BATCH_SIZE, PAD, seed), STEPS)

    clients = list(zip(TIERS, ROWS, strict=True))
    states = list(scratch.flame(model, from_library(start), clients, ROUNDS, batches))[1:]
    return [
        Round(
            to_library(adapter),
            rescalers,
            [update.counts for update in updates],
            [update.tokens for update in updates],
            [update.loss for update in updates],
        )
        for adapter, rescalers, updates in states
    ]


def from_library(adapter: Adapter) -> scratch.Adapter:
    """Banks cut into pairs: in A1 and B1 the gate's rows come before the up projection's."""
    pairs: scratch.Adapter = {}
    for layer, expert in itertools.product(range(LAYERS), range(EXPERTS)):
        A1, B1, A2, B2 = (adapter.experts[f"{layer}.{name}"][expert] for name in ("A1", "B1", "A2", "B2"))
        pairs[layer, expert, "gate"] = A1[:RANK], B1[:WIDTH]
        pairs[layer, expert, "up"] = A1[RANK:], B1[WIDTH:]
        pairs[layer, expert, "down"] = A2, B2
    for layer, name in itertools.product(range(LAYERS), scratch.ATTENTION):
        module = f"model.layers.{layer}.self_attn.{name}"
        pairs[layer, None, name] = adapter.attention[f"{module}.A"], adapter.attention[f"{module}.B"]
    return pairs


def to_library(pairs: scratch.Adapter) -> Adapter:
    """The inverse of `from_library`."""
    banks, attention = {}, {}
    for layer in range(LAYERS):
        gate, up, down = (
            [pairs[layer, expert, name] for expert in range(EXPERTS)] for name in ("gate", "up", "down")
        )
        for index, matrix in enumerate("AB"):
            both = zip(gate, up, strict=True)
            banks[f"{layer}.{matrix}1"] = torch.stack([torch.cat([g[index], u[index]]) for g, u in both])
            banks[f"{layer}.{matrix}2"] = torch.stack([d[index] for d in down])
            for name in scratch.ATTENTION:
                module = f"model.layers.{layer}.self_attn.{name}"
                attention[f"{module}.{matrix}"] = pairs[layer, None, name][index]
    return Adapter(banks, attention)


def keys_and_names(pairs: scratch.Adapter) -> list[tuple[tuple[int, int | None, str], str]]:
    return [(key, ".".join(str(part) for part in key)) for key in pairs]


def save_tokenizer(folder: Path) -> None:
    """Characters as tokens, enough for `main` to run on English text."""
    characters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789 .?:,-"))
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", "<unk>", *characters])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
