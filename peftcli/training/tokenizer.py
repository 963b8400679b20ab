"""A base model's tokenizer, checked against its model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.adapters.base_facts import BaseFacts
from peftcli.errors import InputError, printable
from peftcli.training.base_checks import whole_number
from peftcli.training.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
"""Names under which vocabularies keep a token for padding, the likeliest first."""


def read_tokenizer(facts: BaseFacts, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a base model's folder. It always has a pad token; one is chosen, and said, where it has none.

    Raises:
        InputError: if it can't be read, has tokens the model does not embed, or its chat template is hostile.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                facts.folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # `tokenizers` raises bare Exceptions, and a broken file may raise anything
            raise InputError(
                f"the tokenizer can't be read: {printable(error)}", place=_vocabulary(facts.folder)
            ) from error
    vocab_size = whole_number(facts, "vocab_size")
    if vocab_size is not None:
        _check_ids(tokenizer, vocab_size, facts.folder)
    _check_template(tokenizer, facts.folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = choose_pad(tokenizer, vocab_size)
        warnings.warn(f"the tokenizer has no pad token: {tokenizer.pad_token} fills up short samples", stacklevel=3)
    return tokenizer


def choose_pad(tokenizer: Any, vocab_size: int | None = None) -> str:
    """A token to fill rows up with: not the end of sequence, if the vocabulary has any other that the model embeds."""
    vocabulary = tokenizer.get_vocab()
    for token in (*PADS, tokenizer.unk_token):
        index = vocabulary.get(token)
        if index is not None and token != tokenizer.eos_token and (vocab_size is None or index < vocab_size):
            return token
    return tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def _vocabulary(folder: Path) -> Path:
    file = folder / "tokenizer.json"
    return file if file.exists() else folder


def _check_ids(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    """Ordinary tokens need an embedding; an added token without one is refused only where the data holds it."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer's vocabulary has {tokenizer.vocab_size:,} tokens, but the model embeds only {vocab_size:,} "
            "(vocab_size)",
            place=folder,
            fix="use the tokenizer the model was trained with",
        )
    if beyond := [token for index, token in tokenizer.added_tokens_decoder.items() if index >= vocab_size]:
        warnings.warn(
            f"{folder}: the model has no embedding for {printable(beyond[0].content)}"
            + f" and {len(beyond) - 1} more added tokens" * (len(beyond) > 1),
            stacklevel=4,
        )


def _check_template(tokenizer: Any, folder: Path) -> None:
    """Try the chat template once: one that breaks out of its sandbox, or does not parse, is no template to train with."""
    if not tokenizer.chat_template:
        return
    if not isinstance(tokenizer.chat_template, (str, dict)):
        found = printable(repr(tokenizer.chat_template), 80)
        raise InputError(f"{found} is no chat template", place=folder, field="chat_template", allowed="a string")
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except (SecurityError, TemplateSyntaxError) as error:
        what = "reaches out of its sandbox" if isinstance(error, SecurityError) else "is no Jinja template"
        raise InputError(f"the tokenizer's chat template {what}: {printable(error)}", place=folder) from error
    except Exception:
        return  # it refuses this conversation, as a template may; the data's own are tried when they are tokenised
