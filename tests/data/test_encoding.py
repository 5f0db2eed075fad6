"""Rows in the plain form as tokens, the special tokens among them, and how a row is shown."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.chat_templates import FAMILIES, byte_tokenizer, tokenizer_of
from tests.data.encoded_rows import TOKENIZER, labelled, text
from tests.tiny_models import END, PAD, character_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedflame.base.files import resolve_model
from fedflame.data.batches import collate
from fedflame.data.conversations import Conversation, Turn, single_turn
from fedflame.data.encoder import new_encoder, pad_token
from fedflame.data.encoding import (
    EncodedRow,
    Shown,
    encode,
    encode_prompts,
    encode_rows,
    require_known_ids,
    shown_row,
)
from fedflame.data.skills import instructions
from fedflame.errors import UserError

GREET = single_turn("Greet", "Ann", "Hi Ann!", "greeting")


# The plain form


def test_a_row_is_the_prompt_the_marker_a_blank_the_response_and_the_end() -> None:
    row = encode(GREET, new_encoder(TOKENIZER, 100))
    assert text(row.ids[:-1]) == "Instruction: Greet\nInput: Ann\nResponse: Hi Ann!"
    assert row.ids[-1] == END and row.ids.count(END) == 1
    assert text(row.ids[: row.prompt_length]) == "Instruction: Greet\nInput: Ann\nResponse:"
    assert not row.truncated and row.gaps == ()
    without = encode(single_turn("Greet", "", "Hi", "greeting"), new_encoder(TOKENIZER, 100))
    assert text(without.ids[:-1]) == "Instruction: Greet\nResponse: Hi"


def test_later_turns_follow_in_the_same_form_and_each_answer_has_its_end() -> None:
    turns = (
        Turn("system", "Be kind."), Turn("user", "Greet", "Ann"), Turn("assistant", "Hi Ann"),
        Turn("user", "Part"), Turn("assistant", "Bye"),
    )  # fmt: skip
    row = encode(Conversation(turns), new_encoder(TOKENIZER, 200))
    assert text(row.ids).replace(" <end>", "<end>") == (
        "System: Be kind.\nInstruction: Greet\nInput: Ann\nResponse: Hi Ann<end>\n"
        "Instruction: Part\nResponse: Bye<end>"
    )
    assert text(labelled(row)) == " Hi Ann<end> Bye<end>"
    assert row.labelled == len(labelled(row)) == len(" Hi Ann") + len(" Bye") + 2


def test_generation_starts_from_exactly_the_prompt_of_the_row() -> None:
    encoder = new_encoder(TOKENIZER, 100)
    row, (prompt,) = encode(GREET, encoder), encode_prompts([GREET], encoder, None)
    assert prompt.ids == row.ids[: row.prompt_length]


def test_the_rows_of_skills_are_the_tokens_that_results_were_reported_with() -> None:
    """As the code before there were templates made them: pieces of a row, tokenised apart."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("olmoe-tiny"))
    rows = instructions(300, 0, "train")
    for row, encoded in zip(rows, encode_rows(rows, new_encoder(tokenizer, 256)), strict=True):
        pieces = (f"Instruction: {row.turns[0].content}", "\nResponse:", f" {row.response}")
        apart = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
        assert encoded == EncodedRow(
            [*apart[0], *apart[1], *apart[2], tokenizer.eos_token_id], len(apart[0]) + len(apart[1]), False
        )


def test_what_a_tokenizer_puts_before_a_text_begins_the_row_and_what_it_puts_after_does_not_end_it() -> None:
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unknown> $A <end>", special_tokens=[("<unknown>", 2), ("<end>", END)]
    )
    encoder, bare = new_encoder(tokenizer, 100), encode(GREET, new_encoder(TOKENIZER, 100))
    row = encode(GREET, encoder)
    assert row == replace(bare, ids=[2, *bare.ids], prompt_length=bare.prompt_length + 1)
    assert row.ids == tokenizer("Instruction: Greet\nInput: Ann\nResponse: Hi Ann!")["input_ids"]
    assert encode_prompts([GREET], encoder, None)[0].ids == row.ids[: row.prompt_length]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.bos])
def test_a_plain_row_begins_with_bos_once_if_the_tokenizer_adds_it(name: str) -> None:
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = None
    row = encode(GREET, new_encoder(tokenizer, 1000))
    assert row.ids[:2] == tokenizer("Instruction: Greet\nInput: Ann")["input_ids"][:2]
    assert row.ids.count(tokenizer.bos_token_id) == 1


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's and Mixtral's: a blank before every text that is tokenised."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = ["Instruction: What is 3 plus 4?\nInput: abc\nResponse: Yes 42 No"] * 50
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("context", ["", "abc"])
def test_the_tokens_are_those_of_the_text_as_one_string(context: str) -> None:
    tokenizer = metaspace_tokenizer()
    row = encode(single_turn("Hi", context, "Yes", "all"), new_encoder(tokenizer, 200))
    whole = "Instruction: Hi" + (f"\nInput: {context}" if context else "") + "\nResponse: Yes"
    assert row.ids == [*tokenizer(whole, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(row.ids[:-1]) == whole
    assert tokenizer.decode(labelled(row)[:-1]).endswith("Yes")


class Slow:
    """A tokenizer that does not say where its tokens end, as those written in Python do not."""

    is_fast = False

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self._fast = fast

    def __getattr__(self, name: str) -> object:
        return getattr(self._fast, name)

    def __call__(self, *arguments: object, **options: object) -> object:
        assert not options.get("return_offsets_mapping")
        return self._fast(*arguments, **options)


@pytest.mark.parametrize("name", ["chatml", "llama3", "deepseek"])
def test_a_tokenizer_without_offsets_gives_the_same_rows(name: str) -> None:
    tokenizer, row = tokenizer_of(name), Conversation((Turn("user", "2 and é"), Turn("assistant", "4 the é")))
    slow: object = Slow(tokenizer)
    assert encode(row, new_encoder(slow, 100)) == encode(row, new_encoder(tokenizer, 100))  # type: ignore[arg-type]


# Special tokens


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError) as caught:
        encode(GREET, new_encoder(tokenizer, 100))
    assert str(caught.value) == "the tokenizer has no eos_token; responses need one to end"


def test_without_a_padding_token_the_end_token_pads() -> None:
    tokenizer = character_tokenizer()
    assert pad_token(tokenizer) == PAD
    tokenizer.pad_token = None
    assert pad_token(tokenizer) == END


def test_with_the_end_token_as_padding_each_answer_still_learns_to_end() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.pad_token = tokenizer.eos_token
    encoder = new_encoder(tokenizer, 100)
    rows = [encode(single_turn(task, "", "Hi", "all"), encoder) for task in ("Greet", "Greet them all")]
    batch = collate(rows, pad_token(tokenizer))
    ends = (batch.labels == tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1]
    assert (batch.input_ids[0] == tokenizer.eos_token_id).sum() > 2, "padded with the same token"


def test_tokens_that_were_added_to_a_tokenizer_are_one_token_in_a_row() -> None:
    tokenizer = byte_tokenizer("</s>")
    known = len(tokenizer)
    tokenizer.add_tokens(["<glucose>"])
    row = encode(single_turn("What is <glucose>?", "", "A <glucose>", "all"), new_encoder(tokenizer, 100))
    assert row.ids.count(known) == 2 and known in labelled(row)
    require_known_ids([row], known + 1, new_encoder(tokenizer, 100))
    with pytest.raises(UserError) as caught:
        require_known_ids([row], known, new_encoder(tokenizer, 100))
    assert str(caught.value) == (
        f"the tokenizer gives '<glucose>' the id {known}; the model has embeddings for the ids 0 to "
        f"{known - 1}: they do not belong together"
    )


# Shown


def test_a_row_is_shown_as_it_is_trained_on() -> None:
    tokenizer = tokenizer_of("chatml")
    encoder = new_encoder(tokenizer, 1000)
    turns = (Turn("user", "2 and 2"), Turn("assistant", "4"), Turn("user", "So?"), Turn("assistant", "é"))
    assert shown_row(encode(Conversation(turns), encoder), encoder) == (
        Shown("<|im_start|>user\n2 and 2<|im_end|>\n<|im_start|>assistant\n", False),
        Shown("4<|im_end|>", True),
        Shown("\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n", False),
        Shown("é<|im_end|>", True),
        Shown("\n", False),
    )


@pytest.mark.slow
def test_rows_are_encoded_without_torch(tmp_path: Path) -> None:
    tokenizer_of("llama3").save_pretrained(tmp_path)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fedflame.base.tokenizer import read_tokenizer\n"
        "from fedflame.data.conversations import single_turn\n"
        "from fedflame.data.encoder import new_encoder\n"
        "from fedflame.data.encoding import encode\n"
        f"encoder = new_encoder(read_tokenizer(Path({json.dumps(str(tmp_path))})), 100)\n"
        "assert encoder.template.kind == 'model'\n"
        "assert encode(single_turn('Hi', '', 'Yes', 'all'), encoder).labelled == 4\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
