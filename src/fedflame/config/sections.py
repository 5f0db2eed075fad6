"""Every key of a run's configuration, by section; the docstring of a field is its help.

A list may be written as a list or as text: `[8, 4, 2, 1]` and `"8,4,2,1"` are the same value.
docs/configuration.md is made from this file; the section `strategy` is in `strategy_section`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedflame.config.lists import Integers, IntegersOrNone, Names
from fedflame.config.lora_scale import lora_scale, lora_scale_divisor
from fedflame.config.settings import Section
from fedflame.config.values import (
    CompletionOnly,
    Device,
    NothingOrALength,
    TrainedBy,
)
from fedflame.config.words import (
    BestMetric,
    Checkpointed,
    LRScheduler,
    UpdateDtype,
)

AUTO = ("auto",)
"""`adapter.target_modules` before the model is known."""
EMBEDDED_MODEL = "olmoe-tiny"
SKILLS = "skills"


LARGEST_RANK = 65_536
"""Of any adapter; `prepare.require_fitting` knows the model and allows less."""
MOST_STEPS = MOST_ROUNDS = 1_000_000
"""Steps of a client in a round; rounds of a run."""
Rank = Annotated[int, Field(ge=1, le=LARGEST_RANK)]


class ModelConfig(Section):
    model_name_or_path: str = EMBEDDED_MODEL
    """The base model: `olmoe-tiny` (inside the package), a folder in Hugging Face layout, or a hub id."""
    adapter_name_or_path: str = ""
    """The folder of a LoRA adapter, written by fedflame or by PEFT, that the run goes on from. Empty: the run
    starts a new adapter."""
    device: Device = "auto"
    """The device that trains and evaluates. `auto`: a CUDA card if there is one, otherwise the CPU. `cuda`:
    the first card, and the others for more workers. A card such as `cuda:1`: that card alone. Another device
    rounds otherwise."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The number format of the frozen base. On a card, `auto` takes bfloat16, or float16 if the card has no
    bfloat16. On a CPU, it takes one of them only where this machine multiplies in it at least 1.5 times
    faster. With float16 the loss is scaled, and a step whose gradients overflow is skipped."""


class AdapterConfig(Section):
    r: Rank = 8
    """The LoRA rank of every projection, at most the smaller side of an expert's matrices. Some methods give
    a client a smaller one."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """The low-rank product is multiplied by lora_alpha / r. The factor is the same for a client that trains a
    smaller rank."""
    use_rslora: bool = False
    """Whether it is multiplied by lora_alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732), so that a large
    rank learns as fast as a small one."""
    lora_dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    """The chance that an input of an A, in experts and attention, is dropped in a training step."""
    target_modules: Names = AUTO
    """The attention projections that carry LoRA, such as `["q_proj", "v_proj"]`. `auto`: all that the
    model's family has, in softmax, latent and linear attention; docs/families.md lists them. Empty: only the
    experts carry it."""

    @property
    def scale(self) -> float:
        """The factor of every low-rank product."""
        return lora_scale(self.lora_alpha, self.r, self.use_rslora)

    @property
    def in_words(self) -> str:
        """Rank and scale, as PEFT names them."""
        return f"r = {self.r}, lora_alpha = {self.lora_alpha:g}" + ", use_rslora" * self.use_rslora

    def plain_alpha(self, r: int) -> float:
        """The lora_alpha of an adapter of rank r that has this scale without rsLoRA."""
        return self.lora_alpha * (r / lora_scale_divisor(self.r, self.use_rslora))


class DataConfig(Section):
    dataset_name: str = SKILLS
    """The rows: `skills` (generated tasks with exact answers), a .jsonl, .json, .jsonl.gz, .parquet or .csv
    file, or a hub id."""
    client_files: Names = ()
    """Files with the rows of one client each, or patterns such as `silos/*.jsonl`, instead of `dataset_name`.
    The files are the clients, in the order of their names, and `clients.num_clients` follows from them."""
    client_test_files: Names = ()
    """Files with the rows that each client is scored on, or patterns, as many and in the same order as
    `data.client_files`; nobody trains on them. They take the place of `evaluation.client_test_size`, and need
    `server.fraction_evaluate`."""
    split: str = "train"
    """The split of a hub data set."""
    dataset_config_name: str = ""
    """The configuration of a hub data set that has several, such as `main`."""
    messages_field: str = ""
    """The column of whole conversations, in OpenAI's spelling (role, content) or ShareGPT's (from, value).
    Empty: `messages` and `conversations` are recognised."""
    instruction_field: str = ""
    """The column of the instruction, as text or as messages. Empty: the names of Alpaca, Dolly,
    question/answer and prompt/completion data are recognised."""
    context_field: str = ""
    """The column of the context or input."""
    response_field: str = ""
    """The column of the response, as text or as messages."""
    category_field: str = ""
    """The column of a label. The partition uses it, and scores are given for each label."""
    client_field: str = ""
    """The column that names the client of a row, such as a hospital. Each name is a client, in sorted order,
    and nothing is partitioned."""
    max_rows: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """A seeded sample of at most this many rows is used; 0: all rows. For `skills`: the rows to generate."""
    max_rows_per_client: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """A seeded sample of at most this many rows of each client is used; 0: all of them."""
    max_length: NothingOrALength = 0
    """The most tokens in a row, prompt and answer together. Longer rows lose their oldest turns first, and
    are counted. 0: as many as the rows have, at most 1024 and at most the model's context."""
    chat_template_path: str = ""
    """The chat template that rows are rendered by: a jinja file or a tokenizer's folder. Empty: the model's
    own, or the plain form (Instruction, Input, Response) if it has none. `plain`: the plain form."""
    assistant_only_loss: bool = True
    """Whether only what the assistant says has loss. false: all tokens of a row."""
    completion_only_loss: CompletionOnly = "auto"
    """Whether only the completion of a row has loss: what `completion` holds, or the assistant's last turn.
    `auto`: yes for rows of prompt and completion or of instruction and response; of whole conversations,
    every turn of the assistant has loss."""
    train_on_eos: bool = True
    """Whether the end of a turn has loss, so that the model learns to stop."""
    partition: Literal["iid", "dirichlet", "by_label", "quantity"] = "dirichlet"
    """How the rows are split over the clients: evenly at random, by a Dirichlet draw for each label, by
    label, or at random in unequal numbers, which one Dirichlet draw decides."""
    alpha: Annotated[float, Field(gt=0)] = 5.0
    """The concentration of the Dirichlet draws. The smaller it is, the more the clients differ."""
    trained_by: TrainedBy = "each"
    """Who trains on the rows. `each`: every client on its own. `one`: the first client on those of all. The
    number of a client: that one alone, on its own. The last two are the bounds that `fedflame compare` sets
    beside the methods (docs/compare.md)."""


class ClientsConfig(Section):
    num_clients: Annotated[int, Field(ge=1, le=100_000)] = 4
    """The number of clients."""
    active_experts: Integers = (8, 4, 2, 1)
    """The experts per token that each client affords. With fewer entries than clients, they are repeated."""
    ranks: IntegersOrNone = ()
    """The LoRA ranks that the clients afford, under a method that adapts the rank (hetlora, flexlora, flora).
    With fewer entries than clients, they are repeated. Empty: the share of adapter.r that is the client's
    share of the model's K experts."""


class TrainingConfig(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """The learning rate of AdamW in round 1, or after the warm-up if there is one."""
    lr_scheduler_type: LRScheduler = "cosine"
    """How the learning rate changes from round to round. `linear`, `cosine`: it falls towards zero after the
    last."""
    local_lr_scheduler_type: LRScheduler = "constant"
    """How the learning rate of a round changes from step to step. `linear`, `cosine`: it falls towards zero
    after the client's last step, and the next round starts anew."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The optimizer steps at the start of the run in which the learning rate rises in a line. They go on over
    the rounds: with 80 steps in a round, 100 warm up round 1 and a quarter of round 2."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The same as a share of all rounds, if `warmup_steps` is 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """The weight decay of AdamW. It applies to experts that saw a token in the step."""
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8
    """The rows of a batch, or with `packing` its sequences, unless `tokens_per_step` is set."""
    tokens_per_step: IntegersOrNone = ()
    """The tokens of a batch. It then has as many rows of similar length as fit, or with `packing` as many
    sequences, padding counted, and at least one. One number for all clients, or several that are repeated
    over the clients, such as `[1024, 2048]`: more where fewer experts run. Empty:
    `per_device_train_batch_size` rows or sequences."""
    packing: bool = False
    """Whether several rows share a sequence of at most `data.max_length` tokens. No row is divided, and none
    sees another: it has the loss and the experts that it has alone. Families with recurrent layers are
    refused (docs/families.md)."""
    packing_strategy: Literal["bfd"] = "bfd"
    """How rows are packed. `bfd`: best-fit decreasing, which keeps rows whole. TRL's others divide rows."""
    padding_free: bool = False
    """Whether the rows of a batch lie end to end in one sequence without padding. The result is the same.
    Time and memory of attention grow with the square of the tokens of the batch. Families with recurrent
    layers are refused."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65_536)] = 1
    """The batches of an optimizer step. Their gradients are added up as those of one batch, each token alike:
    less memory than a larger batch, and more time."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """The largest L2 norm of the gradient of a step, over experts, attention and rescalers together; a larger
    gradient is scaled down. 0: it stays as it is."""
    max_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 80
    """The optimizer steps of each client in each round."""
    num_train_epochs: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """How often each client goes over its rows in each round, instead of `max_steps`: so a client with more
    rows takes more steps. It can be a fraction. 0: `max_steps` decide."""
    budget: Literal["steps", "compute"] = "steps"
    """`steps`: every client takes `max_steps`, as in the paper. `compute`: every client spends the FLOPs that
    `max_steps`, or its epochs, cost with the experts that it affords and rank adapter.r. A method that runs
    more experts then takes fewer steps, and one that runs fewer takes more."""
    router_aux_loss_coef: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """This times the load-balancing loss of the routers is added to the objective. It is that of transformers
    for the family, over the tokens of a batch and the experts that the client runs. Routers are frozen: the
    loss acts on what they read. Families for which transformers has none are refused."""
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    """FedProx (arXiv 1812.06127), with any method: a client's objective has mu/2 times the squared distance
    from the adapter that it was given added to it. 0: nothing is added."""
    gradient_checkpointing: Checkpointed = "none"
    """What the backward pass computes again instead of keeping it: less memory, more time, the same result.
    `experts`: the activations inside the experts, which are the largest part. `layers`: everything but the
    input of each layer."""

    @property
    def holds_gradients(self) -> bool:
        """Whether the gradients of all layers exist at once."""
        return self.gradient_accumulation_steps > 1 or self.max_grad_norm > 0

    @property
    def packs(self) -> bool:
        """Whether rows share a sequence."""
        return self.packing or self.padding_free


class ServerConfig(Section):
    num_server_rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = 10
    """The number of federated rounds."""
    fraction_train: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the clients that is sampled in each round."""
    fraction_evaluate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of the clients that is sampled to score the global model on rows of their own, whenever it is
    evaluated; they send sums alone. 0: no client is asked."""
    min_clients: Annotated[int, Field(ge=1)] = 1
    """The usable updates that a round needs. With fewer the run stops and keeps its checkpoint."""
    save_total_limit: Annotated[int, Field(ge=1, le=1000)] = 2
    """The checkpoints that are kept: those after the last so many rounds. `--resume-from` goes on from any of
    them, such as the one before a damaged one."""
    load_best_model_at_end: bool = False
    """Whether each k has the adapter of its best round, not the last: in the adapter folder, `evaluate`,
    `export` and the report. These rounds are kept, too: at most one more checkpoint for each k."""
    metric_for_best_model: BestMetric = "loss"
    """What says which round is best, on the held-out rows at each k. A round without it does not count; the
    model before training does, as round 0."""
    early_stopping_patience: Annotated[int, Field(ge=0, le=MOST_ROUNDS)] = 0
    """The run stops after so many evaluations in which the metric, as the mean over all k, did not improve.
    0: it goes through all rounds."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """An evaluation is an improvement where it is better than the best before by more than this."""

    @property
    def looks_for_best(self) -> bool:
        """Whether something depends on which round is best."""
        return self.load_best_model_at_end or self.early_stopping_patience > 0


class CommunicationConfig(Section):
    update_dtype: UpdateDtype = "float32"
    """How the values of an update travel. `float32`: unchanged. `bfloat16`: rounded. `int8`: rounded, with
    one scale for each expert and matrix. The client remembers the rounding error of an update and adds it to
    its next update."""


class EvaluationConfig(Section):
    dataset_name: str = ""
    """A file or hub id with rows that are scored, all of them, and trained on by nobody. Empty: rows are held
    out of the data."""
    dataset_split: str = "test"
    """The split of a hub data set named by `evaluation.dataset_name`."""
    split: Literal["test", "validation"] = "test"
    """Which held-out rows are scored. `validation`: rows for choosing settings. The training rows are the
    same, and no row is in both. In a file or a hub data set they come from what data.max_rows leaves out."""
    rows_per_category: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    """The held-out rows of each category."""
    client_test_size: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """With `server.fraction_evaluate`: about this share of each client's rows is held out to be scored there,
    and at least one row. Which rows these are follows from what they say and from the seed, so that copies of
    a row are on one side. Sites say in their own file what they hold out."""
    evaluate_every: Annotated[int, Field(ge=0)] = 1
    """The rounds from one evaluation to the next. 0: only before and after the run."""
    generate_every: Annotated[int, Field(ge=0)] = 3
    """The rounds from one score of generated answers to the next. Only rounds that are evaluated have one.
    0: only before and after the run."""
    max_new_tokens: Annotated[int, Field(ge=0)] = 24
    """The most tokens of a generated answer. 0: no answers are generated, the loss is the only score."""
