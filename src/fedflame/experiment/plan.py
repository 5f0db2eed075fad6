"""What a run will do and cost, without loading weights or torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedflame.base.device import DeviceChoice, device_facts
from fedflame.base.dtype import DtypeChoice
from fedflame.base.files import has_tokenizer, model_config_path
from fedflame.base.tokenizer import read_tokenizer
from fedflame.config.run_config import RunConfig
from fedflame.cost.model_shape import read_model_shape
from fedflame.cost.row_length import prompt_length, row_length
from fedflame.cost.run_cost import RunCost, run_cost
from fedflame.data.encoded_federation import encode_federation
from fedflame.data.encoder import new_encoder
from fedflame.data.encoding import Shown, shown_row
from fedflame.data.federation import describe, load_federation
from fedflame.data.given import GivenRows
from fedflame.experiment.placement import place
from fedflame.experiment.prepare import require_fitting, with_target_modules
from fedflame.experiment.private_clients import PrivateClient, private_clients


@dataclass(frozen=True)
class Plan:
    """The partition of the data, and what each client and tier will do and cost."""

    config: RunConfig
    clients: list[dict[str, Any]]
    """By client: `client`, `active_experts` (k), `rows`, and `per_category`, its rows by label."""
    cost: RunCost
    """FLOPs, bytes and memory by tier, and each client's optimizer steps."""
    device: DeviceChoice
    """The device that would train, with the reason."""
    dtype: DtypeChoice
    """The number format that the memory is for, with the reason."""
    truncated_rows: int
    """Rows that are longer than `data.max_length` tokens."""
    cut_prompts: int
    """Held-out prompts that are longer than the model's context has room for beside an answer."""
    skipped_rows: int
    """Rows that cannot be used."""
    columns: tuple[str, ...]
    """For each source of rows, which columns are read as what, and which are ignored."""
    privacy: tuple[PrivateClient, ...]
    """By client that has rows, what the run will spend; empty without `privacy.unit = "row"`."""
    first_row: tuple[Shown, ...]
    """The first row of client 0 as it is trained on; empty where the model folder has no tokenizer."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `fedflame plan --json` prints them."""
        costs = self.cost.to_json()
        costs["clients"] = [self.clients[cost["client"]] | cost for cost in costs["clients"]]
        return {
            **device_facts(self.device),
            "truncated_rows": self.truncated_rows,
            "cut_prompts": self.cut_prompts,
            "skipped_rows": self.skipped_rows,
            "columns": list(self.columns),
            "clients_per_round": self.config.clients_per_round(),
            **costs,
            **({"privacy": [asdict(client) for client in self.privacy]} if self.privacy else {}),
        }


def plan_run(config: RunConfig, sequence_length: int | None = None, given: GivenRows | None = None) -> Plan:
    """The plan of a run.

    Args:
        config: the run.
        sequence_length: FLOPs are for rows of so many tokens, with the head at each of them. None: for the
            rows of the data, or for `data.max_length` where the model folder has no tokenizer.
        given: rows that a program hands over, instead of `data.dataset_name`.

    Raises:
        UserError: data or device cannot be used, the model cannot run what is asked for, or a card has too
            little memory.
    """
    config = with_target_modules(config)
    path = model_config_path(config.model.model_name_or_path)
    shape = read_model_shape(path)
    require_fitting(config, shape)
    federation = load_federation(config, given)
    most, answer = row_length(config.data.max_length, shape), config.evaluation.max_new_tokens
    most_prompt = prompt_length(answer, shape)
    length, share, truncated, cut = sequence_length or most, 1.0, 0, 0
    first: tuple[Shown, ...] = ()
    folder: Path = path if path.is_dir() else path.parent
    if sequence_length is None and has_tokenizer(folder):
        encoder = new_encoder(read_tokenizer(folder), most, config.data)
        encoded = encode_federation(federation, encoder, most_prompt, answer > 0)
        encoded.require_known_ids(shape.vocab_size, encoder)
        federation = encoded.federation
        length, share = encoded.mean_length, encoded.labelled_share
        truncated, cut = encoded.truncated, encoded.cut_prompts
        first = shown_row(encoded.clients[0][0], encoder)
    device, dtype = place(config, shape)
    rows = [len(part) for part in federation.parts]
    cost = run_cost(config, shape, dtype.name, length, share, rows)
    clients = describe(federation, config.afforded_experts())
    return Plan(
        config,
        clients,
        cost,
        device,
        dtype,
        truncated,
        cut,
        len(federation.skipped),
        federation.columns,
        private_clients(config, shape, cost, rows),
        first,
    )
