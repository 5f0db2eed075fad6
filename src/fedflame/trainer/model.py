"""The base model of a site and its rows as tokens: loaded for a job, and kept for the next plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from fedflame.base.adapted import load_adapted_model
from fedflame.base.card_memory import Need, require_room, spread_if_needed
from fedflame.base.device import DeviceChoice, device_in_words
from fedflame.base.files import model_config_path, model_digest
from fedflame.config.sections import DataConfig
from fedflame.cost.model_shape import ModelShape, read_model_shape
from fedflame.cost.row_length import prompt_length
from fedflame.data.client_tests import encode_tests
from fedflame.data.encoder import Encoder, new_encoder
from fedflame.data.encoding import EncodedRow, encode_rows, require_known_ids
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.rows import SiteRows
from fedflame.trainer.site import Site
from fedflame.training.evaluation import HeldOut
from fedflame.training.score_tests import rows_to_score


@dataclass(frozen=True)
class Ready:
    """A job with its loaded model, tokenizer and encoded rows."""

    job: TrainingJob
    room: int
    """Bytes that the device was chosen for."""
    adapted: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    rows: list[EncodedRow]
    by_number: list[EncodedRow | str]
    """The same for each row of the site's data; in the place of one that cannot be used, the reason."""
    tests: dict[int, HeldOut] = field(default_factory=dict)
    """By the most tokens of an answer: the rows to score."""


class SiteModel:
    """Loads at most one model, because two may not fit into memory."""

    def __init__(self, site: Site, rows: SiteRows, device: DeviceChoice, say: Callable[[str], None]) -> None:
        self._site, self._rows, self._device, self._say = site, rows, device, say
        self.ready: Ready | None = None
        self._digests: dict[str, str] = {}

    @property
    def num_examples(self) -> int:
        """The rows of the site, also those that a job's tokenizer or template cannot use."""
        return len(self._rows.training)

    def shape(self, job: TrainingJob) -> ModelShape:
        """Return the sizes of the job's model, of its files alone."""
        return read_model_shape(model_config_path(self._site.models[job.model_name_or_path]))

    def require_same(self, job: TrainingJob) -> None:
        """Raise Refusal if the model under the job's name is not the hub's."""
        path = self._site.models[job.model_name_or_path]
        if path not in self._digests:
            self._digests[path] = model_digest(path)
        if self._digests[path] != job.model_digest:
            raise Refusal(
                f"model {job.model_name_or_path!r} is another one here ({path} has digest "
                f"{self._digests[path][:8]}, the hub's {job.model_digest[:8]})"
            )

    def loaded(self, job: TrainingJob, need: Need) -> Ready:
        """Return the model with the job's adapter and the encoded rows; load them unless they are loaded.

        Raises:
            Refusal: the chat template is not the hub's, or none of the rows can be used.
            UserError: the cards are too small for the need, or the model cannot be loaded.
        """
        if self.ready is None or self.ready.job != job or self._is_too_narrow(self.ready, need):
            self.ready = None  # free it first
            device = spread_if_needed(self._device, need)
            require_room(device, need)
            self._say(f"loading {job.model_name_or_path} in {job.dtype} onto {device_in_words(device)}")
            path = self._site.models[job.model_name_or_path]
            checkpointing = self._site.trainer.gradient_checkpointing
            adapted, tokenizer = load_adapted_model(path, job.dtype, job.adapter, checkpointing, device.name)
            encoder = self._encoder(job, tokenizer)
            by_number = encode_rows(self._rows.training, encoder)
            rows = self._usable(by_number)
            require_known_ids(rows, adapted.vocabulary, encoder)
            self.ready = Ready(job, need.size, adapted, tokenizer, encoder, rows, by_number)
        return self.ready

    def _is_too_narrow(self, ready: Ready, need: Need) -> bool:
        """Return whether it was loaded for less, such as to score, where another device could be chosen."""
        return bool(self._device.cards) and need.size > ready.room

    def tests(self, ready: Ready, max_new_tokens: int) -> HeldOut:
        """Return the rows to score with answers of at most so many tokens; rows of no use are left out.

        Raises:
            UserError: the model's context has no room for such an answer.
        """
        if max_new_tokens not in ready.tests:
            longest = prompt_length(max_new_tokens, self.shape(ready.job))
            tests, skipped = encode_tests(self._rows.tests, ready.encoder, longest, max_new_tokens > 0)
            if skipped:
                first = f"{skipped[0].where}: {skipped[0].reason}"
                self._say(f"{len(skipped):,} rows to score cannot be used; the first, {first}")
            require_known_ids(tests.encoded, ready.adapted.vocabulary, ready.encoder)
            ready.tests[max_new_tokens] = rows_to_score(tests, ready.encoder)
        return ready.tests[max_new_tokens]

    def _encoder(self, job: TrainingJob, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Return the encoder of the job. Raises Refusal if the chat template here is not the hub's."""
        data = DataConfig(
            chat_template_path=self._site.chat_template_path,
            assistant_only_loss=job.assistant_only_loss,
            completion_only_loss=job.completion_only_loss,
            train_on_eos=job.train_on_eos,
        )
        encoder = new_encoder(tokenizer, job.max_length, data)
        if encoder.template.digest != job.template_digest:
            raise Refusal(
                f"the chat template is another one here ({encoder.template.in_words}, digest "
                f"{encoder.template.digest[:8] or 'none'}; the hub's {job.template_digest[:8] or 'none'}); "
                "data.chat_template_path names one"
            )
        return encoder

    def _usable(self, encoded: Sequence[EncodedRow | str]) -> list[EncodedRow]:
        """Return the rows that could be encoded. Raises Refusal if there is none."""
        rows = [row for row in encoded if not isinstance(row, str)]
        if reasons := [row for row in encoded if isinstance(row, str)]:
            self._say(f"{len(reasons):,} of {len(encoded):,} rows cannot be used; the first: {reasons[0]}")
        if not rows:
            raise Refusal("none of the site's rows can be used; its log says why")
        return rows
