"""The Python API, cell by cell: a run on your own rows, a method of your own, scores as a table.

Open it in an editor that runs `# %%` cells, or as a whole: `python examples/python_api.py`. It takes about a
minute on a laptop and leaves its runs in `runs/python-api/`.
"""

# %% Rows: one list of dicts for each client. They stay in memory.
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

import fedflame
from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies import FedAvg
from fedflame.strategies.base import ServerState, in_client_order

SIZES = {"a clinic": 30, "a hospital": 60, "a university": 90}


def sums(first: int, rows: int) -> list[dict[str, str]]:
    """Rows that ask for a sum, from `first` on."""
    return [
        {"instruction": f"Add {n} and {n % 7}.", "output": str(n + n % 7)} for n in range(first, first + rows)
    ]


data = [sums(200 * client, rows) for client, rows in enumerate(SIZES.values())]

# %% The plan: what each client will do and cost. No weights are loaded.
settings = {
    "output_dir": "runs/python-api/flame",
    "clients": {"active_experts": [1, 4, 8]},
    "training": {"max_steps": 4},
    "server": {"num_server_rounds": 2},
    "evaluation": {"rows_per_category": 10, "max_new_tokens": 0},
}
plan = fedflame.plan(settings, data=data)
for name, client, cost in zip(SIZES, plan.clients, plan.cost.clients, strict=False):
    print(f"{name}: k = {client['active_experts']}, {client['rows']} rows, {cost.training_flops:.2g} FLOPs")

# %% A run. `on_event` sees every line of metrics.jsonl as it happens.
flame = fedflame.run(
    settings,
    data=data,
    on_event=lambda event: print(event["event"], event.get("round"), event.get("loss")),
    overwrite=True,
)


# %% A method of your own: any object with the three hooks. This one takes the median instead of the mean.
@dataclass(frozen=True)
class Median(FedAvg):
    """The median of what the clients learned, value by value: one client alone cannot move it far."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """The state with the median delta added to the adapter."""
        deltas = [update.delta.tensors() for update in in_client_order(updates)]
        names = state.adapter.tensors()
        median = {name: torch.stack([delta[name] for delta in deltas]).median(0).values for name in names}
        return replace(state, adapter=state.adapter.combine(Adapter.from_tensors(median), torch.add))


settings["output_dir"] = "runs/python-api/median"
median = fedflame.run(settings, data=data, strategy=Median(active_experts=1, rank=8), overwrite=True)

# %% Both side by side, after each round, with one expert per token.
for method, run in (("flame", flame), ("median", median)):
    losses = [round(scores[1]["loss"] or 0.0, 3) for scores in run.scores.values()]
    print(f"{method}: loss at k = 1 by round: {losses}")

# %% As a table: `pandas.DataFrame(flame.metrics)` has a row for every event.
clients = [event for event in flame.metrics if event["event"] == "client"]
print(f"{len(clients)} updates, {sum(event['bytes_up'] for event in clients):,} bytes up")

# %% The adapter: for PEFT in a folder, or as tensors.
folder = fedflame.export(flame, "runs/python-api/adapter", overwrite=True)
print(f"{folder}: rank {flame.adapter(1).rank}, rescaler at k = 1: {flame.rescaler(1)}")
print(f"report: {flame.report}")
