"""Base models in GGUF files: dequantised once, kept in a cache as safetensors.

A GGUF's blocks are not trained on directly: adapters need gradients through the base, and transformers unpacks the blocks
to do that. Unpacked values are kept in float32. They are not exact in bfloat16 (a Q4 value is a 4-bit number times a
16-bit scale), and bfloat16 is slow on CPUs that do not multiply it (measured: 5 times slower than float32 with AVX-512,
20 times with AVX2). `model.dtype` in the recipe still decides what they are loaded as.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from peftcli.adapters.base_places import conversion_folder
from peftcli.errors import InputError, RunError, printable
from peftcli.training.quiet import quiet_transformers
from peftcli.training.tokenizer import choose_pad

log = logging.getLogger(__name__)


def converted(file: Path) -> Path:
    """The folder with `file` as a transformers model, made now if it isn't in the cache.

    The folder appears whole or not at all: it is written beside its place and renamed, so a killed process leaves only a
    temporary folder behind, and of two processes that convert at once the second one's work is dropped.

    Raises:
        InputError: if the file is no GGUF model transformers knows.
        RunError: if the cache can't be written.
    """
    folder = conversion_folder(file)
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    log.info("converting %s, once, to %s", file, folder)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _convert(file, partial)
        _publish(partial, folder)
    except OSError as error:
        raise RunError(f"{folder}: the converted model can't be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _publish(partial: Path, folder: Path) -> None:
    for path in partial.iterdir():
        path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was quicker
            raise


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _convert(file: Path, folder: Path) -> None:
    """Write model, tokenizer with chat template, and generation settings."""
    model, tokenizer = _unpacked(file)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.pad_token = choose_pad(tokenizer, model.config.vocab_size)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _unpacked(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer, every weight a plain float32 tensor."""
    import torch
    import transformers

    arguments: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    settings: dict[str, Any] = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # versions that could leave the blocks packed
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # The loader draws a progress bar with tqdm, whatever transformers' logging is told.
        with quiet_transformers(), redirect_stderr(StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **arguments)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **arguments, **settings)
    except ImportError as error:
        raise InputError(
            f"reading a .gguf file needs another package: {printable(error)}", place=file, fix="pip install gguf"
        ) from error
    except Exception as error:  # the reader of a broken file may stumble anywhere
        raise InputError(
            f"can't be read as a GGUF model: {printable(error) or type(error).__name__}",
            place=file,
            fix="the architectures transformers can read are listed in its GGUF documentation",
        ) from error
    return model, tokenizer
