"""Merged checkpoints, held against our own forward and against numpy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_exports import (
    TIERS,
    K,
    adapt,
    load,
    logits,
    our_logits,
    random_state,
    run_config,
    save_base,
    with_merged,
    with_tiers,
)
from transformers import PreTrainedTokenizerFast

from fedflame.errors import UserError
from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import merge_checkpoint
from fedflame.messages import Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState


@pytest.mark.parametrize("k", TIERS)
def test_a_merged_checkpoint_has_the_adapter_of_its_k(
    k: int, base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    merge_checkpoint(with_tiers(state), trained_run(run_config(base), 4), k, tmp_path / "merged")
    of_k = replace(state, adapter=with_tiers(state).adapter_at(k))
    ours = our_logits(adapted, of_k, k)
    got = logits(load(tmp_path / "merged"))
    torch.testing.assert_close(got, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    if k < K:
        assert float((our_logits(adapted, state, k) - ours).abs().max()) > 0.01 * float(ours.abs().max())


@pytest.mark.parametrize(
    "kind", ["olmoe", "qwen2_moe"]
)  # qwen2_moe has a shared expert, which s must not touch
@pytest.mark.parametrize("k", TIERS)
@pytest.mark.parametrize("merged_rank", [0, 6])
def test_merged_checkpoint_gives_our_logits(kind: str, k: int, merged_rank: int, tmp_path: Path) -> None:
    base = save_base(kind, tmp_path / "base")
    adapted = adapt(base)
    state = random_state(adapted)
    state = with_merged(state, merged_rank) if merged_rank else state
    merge_checkpoint(state, trained_run(run_config(base), 4), k, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.config.num_experts_per_tok == k
    ours = our_logits(adapted, state, k)
    torch.testing.assert_close(logits(merged), ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    assert float((logits(load(base)) - ours).abs().max()) > 0.1 * float(ours.abs().max())
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")("w7 w9")["input_ids"]
    assert words == [7, 9]


def test_merged_weights_by_hand_in_the_dtype_of_the_base(tmp_path: Path, state: ServerState) -> None:
    base = save_base("olmoe", tmp_path / "base", torch.bfloat16)
    merge_checkpoint(state, trained_run(run_config(base), 4), 1, tmp_path / "merged")
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    bank = {name: value.double().numpy() for name, value in state.adapter.experts.items()}
    low = {
        "gate_proj": bank["1.B1"][4, :20] @ bank["1.A1"][4, :4],
        "up_proj": bank["1.B1"][4, 20:] @ bank["1.A1"][4, 4:],
        "down_proj": bank["1.B2"][4] @ bank["1.A2"][4],
    }
    for projection, product in low.items():
        name = f"model.layers.1.mlp.experts.4.{projection}.weight"
        s = 2.25 if projection == "down_proj" else 1.0
        expected = s * (before[name].double().numpy() + 1.5 * product)
        error = np.abs(after[name].double().numpy() - expected)
        assert (error <= np.abs(expected) * 2.0**-8 + 1e-6).all(), projection  # one rounding to 8 bits
    for name in ("model.layers.1.mlp.gate.weight", "model.embed_tokens.weight"):
        assert torch.equal(before[name], after[name])


def test_merge_refuses_a_k_that_no_client_had(base: Path, state: ServerState, tmp_path: Path) -> None:
    few = ServerState(state.adapter, {1: torch.ones(2)})
    with pytest.raises(UserError, match="k = 2: no client had this tier; allowed are 3, 1"):
        merge_checkpoint(few, trained_run(run_config(base), 1), 2, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    merge_checkpoint(few, trained_run(run_config(base), 1), 3, tmp_path / "merged")


def test_merge_leaves_the_k_of_the_base_at_full_k_without_a_tier(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    merge_checkpoint(ServerState(state.adapter, {}), trained_run(run_config(base), 1), K, tmp_path / "merged")
    ours = our_logits(adapted, state, K)
    torch.testing.assert_close(
        logits(load(tmp_path / "merged")), ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max())
    )


def test_merging_into_another_base_is_refused(base: Path, state: ServerState, tmp_path: Path) -> None:
    deeper = ServerState(
        Adapter({**state.adapter.experts, "2.A1": torch.ones(6, 8, 32)}, {}), state.rescalers
    )
    with pytest.raises(UserError, match=r"not the run's: 2\.A1 is \(6, 8, 32\); the model needs nothing"):
        merge_checkpoint(deeper, trained_run(run_config(base), 1), K, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
