"""Is an adapter folder what its config says? Answered from the config, the file's header and its bytes, without torch.

Compared with what the method states (`Adapter.tensors`): tensors that are missing, unexpected, of the wrong shape or
dtype, not finite, or never trained. The base model's sizes are used if the base is on this machine.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from peftcli.adapters.audit_copies import check_copies
from peftcli.adapters.audit_gate import check_gate
from peftcli.adapters.audit_modules import Contents, check_modules, sort_out
from peftcli.adapters.audit_prompt import check_prompt
from peftcli.adapters.audit_values import check_values
from peftcli.adapters.base_facts import BaseFacts, read_base
from peftcli.adapters.base_places import find_base
from peftcli.adapters.config import CONFIG_NAME, PeftConfig, TunerConfig, read_config
from peftcli.adapters.findings import Findings
from peftcli.adapters.fit import Fit, Found
from peftcli.adapters.header import TensorFile, TensorInfo, read_header
from peftcli.adapters.methods.xlora import XLoraConfig
from peftcli.adapters.pickle_header import read_pickle_header
from peftcli.adapters.values import Values
from peftcli.errors import InputError, InputErrors, printable

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class Audit:
    """What an adapter folder holds and what is wrong with it.

    Attributes:
        folder: the adapter's folder.
        config: its config.
        file: its weights' header.
        base: the base model's facts, if it is on this machine.
        contents: the tensors, sorted by what their names say.
        copies: tensors of what is trained in full (`modules_to_save`, biases, embeddings), by key.
        values: what each float tensor's values look like, by key.
        errors: what makes the adapter unusable or wrong.
        doubts: what deserves a look.
    """

    folder: Path
    config: PeftConfig
    file: TensorFile
    base: BaseFacts | None
    contents: Contents
    copies: dict[str, TensorInfo]
    values: dict[str, Values]
    errors: list[InputError]
    doubts: list[InputError]

    @property
    def modules(self) -> dict[str, Fit]:
        """What was made out of each adapted module's tensors, by its path; empty for a prompt."""
        return self.contents.parts[0].fits if self.contents.parts else {}

    @property
    def found(self) -> dict[str, Found]:
        """The tensors at each adapted module, by its path."""
        return self.contents.parts[0].modules if self.contents.parts else {}


def audit_folder(folder: Path, *, base: Path | None = None) -> Audit:
    """Check an adapter folder.

    Args:
        folder: holds `adapter_config.json` and the weights.
        base: the base model's folder; looked for by the name in the config otherwise.

    Raises:
        InputErrors: if config or weights can't be read at all; everything else is reported in the result.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # methods tell what they adjust while a model is built; here nothing is
        return _audit(folder, base)


def _audit(folder: Path, base: Path | None) -> Audit:
    weights = locate(folder)
    config, file = _read_both(folder / CONFIG_NAME, weights)
    findings = Findings(weights)
    facts = _read_facts(config, folder, base, findings)
    _check_start(config, findings)
    try:
        contents = _check_tensors(config, file, facts, findings)
    except InputError as error:  # an expression in the config that is broken or too slow, a token that is not there
        findings.add(error, folder / CONFIG_NAME)
        contents = Contents()
        copies: dict[str, TensorInfo] = {}
    else:
        copies = check_copies(config, contents, facts, findings, folder)
    values = check_values(file, contents, findings)
    return Audit(folder, config, file, facts, contents, copies, values, findings.errors, findings.doubts)


def _check_tensors(config: PeftConfig, file: TensorFile, base: BaseFacts | None, findings: Findings) -> Contents:
    """Compare the method's tensors with what it states."""
    if isinstance(config, XLoraConfig):
        return check_gate(config, file, findings)
    if not isinstance(config, TunerConfig):
        return check_prompt(config, file, base, findings)
    contents = sort_out(file, config, findings)
    for part in contents.parts:
        check_modules(part, base, findings, is_companion=part is not contents.parts[0])
    return contents


def _check_start(config: PeftConfig, findings: Findings) -> None:
    """PiSSA, OLoRA and the like move a part of the base into the adapter; a plain base needs the converted form."""
    start = getattr(config, "init_lora_weights", None)
    if config.stored() is not config:
        findings.error(
            f"`init_lora_weights` is {printable(repr(start), 60)}, saved without conversion: the base must lose what the "
            "adapter started from, or that counts twice",
            fix="save it with peftcli, or with PEFT's path_initial_model_for_weight_conversion",
        )


def locate(folder: Path) -> Path:
    """The weights of an adapter folder: safetensors, or else the `.bin` (which then is looked at, never unpickled).

    Raises:
        InputError: if the folder, its config or the weights are missing; names the sub-folder that holds an adapter.
    """
    if not folder.is_dir():
        raise InputError("is a file, not an adapter's folder" if folder.exists() else "does not exist", place=folder)
    if not _lexists(folder / CONFIG_NAME):
        below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        fix = f"the sub-folder {', '.join(map(printable, below[:5]))} holds an adapter" if below else None
        raise InputError(f"holds no {CONFIG_NAME}", place=folder, fix=fix)
    found = [folder / name for name in (WEIGHTS_NAME, PICKLE_NAME) if _lexists(folder / name)]
    if not found:
        raise InputError(f"holds no weights: neither {WEIGHTS_NAME} nor {PICKLE_NAME}", place=folder)
    return found[0]


def _lexists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _read_both(config_path: Path, weights: Path) -> tuple[PeftConfig, TensorFile]:
    """Config and header; what is wrong with either is told at once."""
    problems: list[InputError] = []
    config = file = None
    try:
        config = read_config(config_path)
    except InputError as error:
        problems.append(error)
    try:
        file = read_pickle_header(weights) if weights.name == PICKLE_NAME else read_header(weights)
        if not file.tensors:
            problems.append(InputError("holds no tensors", place=weights))
    except InputError as error:
        problems.append(error)
    if problems or config is None or file is None:
        raise problems[0] if len(problems) == 1 else InputErrors(problems)
    config.follow_file({name: tensor.shape for name, tensor in file.tensors.items()})
    return config, file


def _read_facts(config: PeftConfig, folder: Path, base: Path | None, findings: Findings) -> BaseFacts | None:
    found = base or find_base(config.base_model_name_or_path, config.revision, beside=folder)
    if found is None:
        return None
    try:
        return read_base(found)
    except InputError as error:
        if base is not None:
            raise
        findings.doubt(f"the base it names can't be read: {error.problem}")
        return None
