"""What a round asks of each client."""

from __future__ import annotations

import math
from dataclasses import replace

from fedflame.config.run_config import RunConfig
from fedflame.cost.run_cost import local_steps, within_budget
from fedflame.messages import RoundPlan
from fedflame.server.parts import Server
from fedflame.server.private_rounds import private_plan
from fedflame.strategies.base import ClientProfile, ServerState
from fedflame.training.schedule import remaining


def round_learning_rate(config: RunConfig, round_number: int) -> float:
    """Return the learning rate of a round, from 1, before a method changes it; the warm-up is not in it."""
    training, warm = config.training, config.warmup_rounds()
    done, whole = max(0.0, round_number - 1 - warm), config.server.num_server_rounds - warm
    return training.learning_rate * remaining(training.lr_scheduler_type, done, whole)


def round_plan(server: Server, state: ServerState, profile: ClientProfile, round_number: int) -> RoundPlan:
    """Return the plan of a client for a round of a run in this state."""
    in_turn = server.config.trained_experts(server.adapted.num_experts_per_tok, round_number)
    told = replace(profile, active_experts=in_turn[profile.client])
    instructions = server.strategy.configure_train(state, told)
    training, k = server.config.training, instructions.active_experts
    afforded = server.training_flops(profile.active_experts, server.config.adapter.r)
    spent = server.training_flops(k, instructions.adapter.rank)
    tokens = server.config.tokens_per_step()[profile.client]
    rows = _rows_of_plan(server, profile.client)
    batches = rows if tokens else math.ceil(rows / training.per_device_train_batch_size)
    plan = RoundPlan(
        round=round_number,
        client=profile.client,
        seed=server.config.seed,
        active_experts=k,
        rescaler=instructions.rescaler,
        rescaler_values=instructions.rescaler_values,
        adapter=instructions.adapter,
        learning_rate=round_learning_rate(server.config, round_number) * instructions.learning_rate_factor,
        weight_decay=training.weight_decay,
        batch_size=training.per_device_train_batch_size,
        max_steps=local_steps(server.config, batches, afforded, spent),
        tokens_per_step=tokens,
        packed_length=server.max_length if training.packing else 0,
        padding_free=training.padding_free,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_train_epochs=within_budget(server.config, training.num_train_epochs, afforded, spent),
        lr_scheduler_type=training.local_lr_scheduler_type,
        warmup_rounds=server.config.warmup_rounds(),
        max_grad_norm=training.max_grad_norm,
        lora_dropout=server.config.adapter.lora_dropout,
        trainable=instructions.trainable,
        merged=state.merged,
        proximal_mu=training.proximal_mu,
        router_aux_loss_coef=training.router_aux_loss_coef,
        rank_penalty=instructions.rank_penalty,
        kept_rank=instructions.kept_rank,
        update_dtype=server.config.communication.update_dtype,
        error_feedback=server.config.error_feedback(),
        secure_aggregation=server.config.privacy.secure_aggregation,
    )
    return plan if server.config.privacy.unit == "none" else private_plan(server, plan)


def _rows_of_plan(server: Server, client: int) -> int:
    """Return the rows for which a plan leaves room: those of the client, or the most of any client.

    Members of a masked sum have the same plan; an epoch ends where the client's own rows do.
    """
    sums = server.config.privacy.secure_aggregation
    clients = [profile.client for profile in server.profiles] if sums else [client]
    return max(map(server.clients.believed_rows, clients))
