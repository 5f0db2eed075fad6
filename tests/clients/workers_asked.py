"""What workers are asked in tests, and what they are doing."""

from __future__ import annotations

import torch

from fedflame.clients.local import LocalClients
from fedflame.clients.workers import WorkerClients, _Worker
from fedflame.messages import RoundPlan
from fedflame.wire.codec import encode_plan

CLIENTS = 5


def all_at_rest(clients: WorkerClients) -> None:
    while not all(worker.ready for worker in clients._workers.values()):
        clients._listen(lambda _: None, timeout=30)


def others_at_work(clients: WorkerClients) -> list[_Worker]:
    return [worker for worker in clients._workers.values() if worker.asked]


def plan(local: LocalClients, client: int, steps: int = 2) -> tuple[int, bytes]:
    adapted = local.adapted
    return client, encode_plan(
        RoundPlan(
            round=1,
            client=client,
            seed=0,
            active_experts=1 + client % 3,
            rescaler="learned",
            rescaler_values=torch.ones(len(adapted.layers)),
            adapter=adapted.initial_adapter(0),
            learning_rate=0.01,
            weight_decay=0.0,
            batch_size=2,
            max_steps=steps,
            lora_dropout=0.2,  # masks follow from the plan, not from who draws them
            router_aux_loss_coef=0.1,
        )
    )
