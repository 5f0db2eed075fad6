"""What a tracker is told of a round and its steps: numbers by name, from the events in metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedflame.run_files.spans import in_spans

Event = Mapping[str, Any]
_SCORES = ("loss", "exact_match", "rouge_l")
_STEPS = {"loss": "step_losses", "learning_rate": "step_rates"}
_COUNTS = {"excluded": "excluded", "clipped": "clipped", "outlier": "outliers"}


def round_metrics(events: Iterable[Event]) -> dict[str, float]:
    """Return the numbers of one round.

    `eval/loss/k8` is of the global model with 8 experts per token, `eval/loss/k8_r4` of its first 4 ranks
    only, `eval_clients/loss/k8_r8` of the rows of the clients that deploy 8 and this rank, with `all` for all
    of them, and `train/loss/k8` of the clients that trained with 8, weighed by tokens. Losses are in nats per
    response token, scores from 0 to 1. What a client withholds is left out.
    """
    by_kind: dict[str, list[Event]] = {}
    for event in events:
        by_kind.setdefault(event["event"], []).append(event)
    metrics: dict[str, float] = {}
    for event in by_kind.get("evaluation", []) + by_kind.get("deployment", []):
        if event.get("category") is None:
            metrics |= _evaluation(event)
    for event in by_kind.get("federated_evaluation", []):
        metrics |= _evaluation(event, "eval_clients")
    if clients := by_kind.get("client", []):
        metrics |= _training(clients)
    for end in by_kind.get("round", []):
        metrics |= {"round/seconds": end["seconds"], "clients/used": end["clients"]}
        metrics |= {f"clients/{name}": len(by_kind.get(kind, [])) for kind, name in _COUNTS.items()}
    return metrics


def step_metrics(events: Iterable[Event], round_number: int, steps: int) -> dict[int, dict[str, float]]:
    """Return the numbers of the steps of one round, by optimizer step of the run.

    `train/step_loss/k8` and `train/step_learning_rate/k8` are means over the clients that trained with 8
    experts per token. A client with fewer steps than `steps` is drawn over the whole round. Rounds of sites,
    which do not tell their steps, have none.
    """
    found: dict[int, dict[str, float]] = {}
    by_k: dict[int, list[Event]] = {}
    for event in events:
        if event["event"] == "client" and event.get("step_losses"):
            by_k.setdefault(event["active_experts"], []).append(event)
    for k, clients in by_k.items():
        count = min(len(client["step_losses"]) for client in clients)
        for name, key in _STEPS.items():
            curves = zip(*(in_spans(client[key], count) for client in clients), strict=True)
            for at, values in enumerate(curves, 1):
                step = (round_number - 1) * steps + math.ceil(at * steps / count)
                found.setdefault(step, {})[f"train/step_{name}/k{k}"] = sum(values) / len(values)
    return dict(sorted(found.items()))


def _evaluation(event: Event, group: str = "eval") -> dict[str, float]:
    place = f"k{event['active_experts']}" + (f"_r{event['rank']}" if "rank" in event else "")
    place = "all" if event["active_experts"] is None else place
    return {f"{group}/{name}/{place}": event[name] for name in _SCORES if event.get(name) is not None}


def _training(clients: Sequence[Event]) -> dict[str, float]:
    metrics: dict[str, float] = {
        f"train/{name}": sum(client[name] for client in clients)
        for name in ("tokens", "bytes_up", "bytes_down", "training_flops")
    }
    metrics |= _means(clients, "")
    for k in sorted({client["active_experts"] for client in clients}, reverse=True):
        metrics |= _means([client for client in clients if client["active_experts"] == k], f"/k{k}")
    return metrics


def _means(clients: Sequence[Event], place: str) -> dict[str, float]:
    """Return what is a mean over clients: loss by tokens, learning rate, seconds and speed."""
    told = [client for client in clients if client["loss"] is not None]
    tokens, seconds = (sum(client[name] for client in clients) for name in ("tokens", "seconds"))
    metrics = {f"train/seconds{place}": seconds / len(clients)}
    if told:
        loss = sum(client["loss"] * client["tokens"] for client in told)
        metrics[f"train/loss{place}"] = loss / sum(client["tokens"] for client in told)
    if seconds:
        metrics[f"train/tokens_per_second{place}"] = tokens / seconds
    rates = [client["learning_rate"] for client in clients if "learning_rate" in client]
    if rates:
        metrics[f"train/learning_rate{place}"] = sum(rates) / len(rates)
    return metrics
