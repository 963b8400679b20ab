"""The standard checkpoint: `adapter_config.json` + `adapter_model.safetensors`, keyed as PEFT keys them.

A key is `base_model.model.` + the module's path + the tensor's name, without the adapter's name. Keys are found by
asking each layer what it owns, never by searching for substrings in names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.base import Adapter
from peftcli.adapters.config import CONFIG_NAME, PeftConfig, read_strict_json
from peftcli.adapters.copies import is_bias_by_name
from peftcli.adapters.engine import Attached, base_modules, embeddings
from peftcli.adapters.fingerprint import FILE as FINGERPRINT
from peftcli.adapters.fingerprint import write_fingerprint
from peftcli.adapters.holding import Buffers
from peftcli.adapters.registry import adapter_class
from peftcli.errors import ArgumentTypeError, InputError, InputErrors, RunError, printable
from peftcli.files import write_atomically

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
HUB_OPTIONS = frozenset({"subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download"})
"""What may be said of where on the hub an adapter is."""


def owned_tensors(attached: Attached, name: str) -> dict[str, Tensor]:
    """Every stored tensor of one adapter, live (not copied), by its key in the file."""
    owned: dict[str, Tensor] = {}
    for path, layer in attached.layers():
        if name in layer.adapters:
            owned.update(
                {f"{attached.key_prefix}{path}.{slot.key}": t for slot, t in layer.own_tensors(name) if slot.spec.saved}
            )
    for path, copied in attached.copies():
        if name in copied.copies:
            state = copied.copies[name].state_dict(keep_vars=True)
            owned.update(
                {f"{attached.key_prefix}{path}.{copied.names.saved}{key}": tensor for key, tensor in state.items()}
            )
    owned.update(bias_tensors(attached, name))
    for key, bank in attached.shared.items():
        if name in bank and shared_is_saved(attached, name, key):
            owned[f"base_model.{key}"] = bank[name]
    if (prompt := attached.prompt_of(name)) is not None:
        owned.update(prompt.live())
    if name in attached.gates:
        gate = attached.gates[name].state_dict(keep_vars=True)
        owned.update({f"base_model.internal_xlora_classifier.{key}": tensor for key, tensor in gate.items()})
    return owned


def shared_is_saved(attached: Attached, name: str, key: str) -> bool:
    """Whether a tensor kept once a model goes into the file (VeRA's projections can be regenerated instead)."""
    specs = (
        layer.adapters[name].tensors()[key]
        for _, layer in attached.layers()
        if name in layer.adapters and key in layer.adapters[name].tensors()
    )
    return next(specs).saved


def bias_tensors(attached: Attached, name: str) -> dict[str, Tensor]:
    """The biases one adapter trains, by their key in the file."""
    if name not in attached.biases:
        return {}
    biases = attached.biases[name]
    paths = {module: path for path, module in attached.modules()}
    return {
        f"{attached.key_prefix}{paths[module]}.{parameter}": trained
        for (module, parameter), trained in zip(biases.owners, biases.trained, strict=True)
    }


def embedding_tensors(attached: Attached) -> dict[str, Tensor]:
    """The base's input and output embeddings by their key in the file, where they are not owned by an adapter."""
    found = {}
    for module in embeddings(attached.root):
        for path, candidate in attached.modules():
            inner: Any = getattr(candidate, "base_layer", candidate)
            if (
                module is not None
                and module in (candidate, inner)
                and isinstance(getattr(inner, "weight", None), Tensor)
            ):
                middle = "base_layer." if inner is not candidate else ""
                found[f"{attached.key_prefix}{path}.{middle}weight"] = inner.weight
                break
    return found


def stored_tensors(attached: Attached, name: str) -> dict[str, Tensor]:
    """Every stored tensor of one adapter, in the form its file has, by key."""
    stored = owned_tensors(attached, name)
    for path, layer in attached.layers():
        if name in layer.adapters:
            for slot, _ in layer.own_tensors(name):
                stored.pop(f"{attached.key_prefix}{path}.{slot.key}", None)
            if layer.leader(name) is not None and not layer.adapters[name].stored_at_ties:
                continue
            form = layer.adapters[name].stored(layer.tensors(name))
            stored.update({f"{attached.key_prefix}{path}.{key}": tensor for key, tensor in form.items()})
    stored.update({again: stored[key] for again, key in _repeated_biases(attached, name).items()})
    if (prompt := attached.prompt_of(name)) is not None:
        stored.update(prompt.stored())
    return stored


def adapter_state_dict(
    attached: Attached, name: str, *, save_embedding_layers: bool | str = "auto"
) -> dict[str, Tensor]:
    """The tensors of one adapter as its file holds them, detached.

    Args:
        attached: the model's adapters.
        name: which one.
        save_embedding_layers: also store the base's embeddings: True, False, or `auto`: when their number of rows is
            not the one the base's config names, i.e. tokens were added; of `embed_tokens` and `lm_head` also where the
            adapter's target_modules name them, as in PEFT.
    """
    state = stored_tensors(attached, name)
    if save_embedding_layers is True or (save_embedding_layers == "auto" and _vocabulary_grew(attached, name)):
        state = embedding_tensors(attached) | state
    elif save_embedding_layers == "auto" and _names_embeddings(attached.configs[name]):
        state = {key: t for key, t in embedding_tensors(attached).items() if ".base_layer." in key} | state
    return {key: tensor.detach() for key, tensor in sorted(state.items())}


def _names_embeddings(config: PeftConfig) -> bool:
    """Whether `target_modules` names an embedding by the name PEFT looks for."""
    targets = getattr(config, "target_modules", None) or ()
    return config.peft_type != "TRAINABLE_TOKENS" and any(name in targets for name in ("embed_tokens", "lm_head"))


def _repeated_biases(attached: Attached, name: str) -> dict[str, str]:
    """Keys under which PEFT repeats the biases of modules trained in full when it stores all biases, and their own."""
    if getattr(attached.configs[name], "bias", "none") != "all":
        return {}
    return {
        f"{attached.key_prefix}{path}.{copied.names.copies}.{key}": f"{attached.key_prefix}{path}.{copied.names.saved}{key}"
        for path, copied in attached.copies()
        if name in copied.copies
        for key in copied.copies[name].state_dict()
        if key.endswith("bias")
    }


def _vocabulary_grew(attached: Attached, name: str) -> bool:
    """Whether the model has another number of token embeddings than its base was published with."""
    from huggingface_hub import try_to_load_from_cache

    base = attached.configs[name].base_model_name_or_path
    size = getattr(getattr(attached.root, "config", None), "vocab_size", None)
    if not base or size is None:
        return False
    try:
        local = Path(base) / "config.json"
        path = local if local.is_file() else try_to_load_from_cache(base, "config.json")
    except ValueError:  # no path and no hub id
        return False
    if not isinstance(path, (str, Path)):
        return False  # nothing to compare with; adapted or trained embeddings are stored as such anyway
    return read_strict_json(Path(path)).get("vocab_size", size) != size


def load_state(
    attached: Attached, name: str, tensors: Mapping[str, Tensor], *, place: str | Path = "state dict"
) -> None:
    """Copy a file's tensors into an adapter that is attached.

    Raises:
        InputErrors: listing every missing, unexpected and mis-shaped tensor; nothing has been changed then.
    """
    if (prompt := attached.prompt_of(name)) is not None:
        prompt.check_loadable(tensors, place)
    _train_old_biases(attached, name, tensors)
    owned = owned_tensors(attached, name)
    banks = {f"base_model.{key}": bank for key, bank in attached.shared.items() if name in bank}
    targets = embedding_tensors(attached) | {key: bank[name] for key, bank in banks.items()} | owned
    tensors = _restored(attached, name, _without_tied(attached, name, tensors, place))
    given = {key: tensor for key, tensor in tensors.items() if not _obsolete(attached, name, key)}
    lost = _lost_biases(attached, name, given, place)
    problems = [_missing(key, given, place) for key in owned if key not in given and key not in lost]
    first: dict[int, str] = {}
    for key, tensor in given.items():
        target = targets.get(key)
        same = first.setdefault(id(target), key)
        if target is None:
            problems.append(_unexpected(key, place))
        elif target.shape != tensor.shape:
            problems.append(
                InputError(
                    f"has the shape {list(tensor.shape)}, but the model needs {list(target.shape)}",
                    place=place,
                    field=key,
                )
            )
        elif same != key and not torch.equal(tensor, given[same]):
            problems.append(InputError(f"differs from {same}, though the two modules share it", place=place, field=key))
        elif not (tensor.is_floating_point() or not target.is_floating_point()):
            problems.append(InputError(f"is {tensor.dtype}, not floating point", place=place, field=key))
    if problems:
        raise problems[0] if len(problems) == 1 else InputErrors(problems)
    frozen = {key: bank for key, bank in banks.items() if isinstance(bank, Buffers) and key in given}
    with torch.no_grad():
        if _replace(frozen, name, given):
            for _, layer in attached.layers():
                if name in layer.adapters:  # what follows from tensors kept once a model (FRoD's U)
                    layer.adapters[name].regenerate(layer.tensors(name))
        for key in given.keys() - frozen.keys():
            targets[key].copy_(given[key])
        if prompt is not None:
            prompt.method.accept(prompt, given)


def _train_old_biases(attached: Attached, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Train what a file of PEFT 0.13 with `bias="all"` holds because its name says bias, though it is none."""
    if getattr(attached.configs[name], "bias", "none") != "all":
        return
    known = bias_tensors(attached, name)
    attached.biases[name].add(
        [
            (module, parameter)
            for path, module in base_modules(attached.root)
            for parameter in module._parameters
            if is_bias_by_name(path, parameter)
            and (key := f"{attached.key_prefix}{path}.{parameter}") in tensors
            and key not in known
        ]
    )


def _lost_biases(attached: Attached, name: str, given: Mapping[str, Tensor], place: str | Path) -> set[str]:
    """Keys of trained biases where the file has none at all: PEFT 0.13 trains `lora_only` biases and does not save them."""
    keys = set(bias_tensors(attached, name))
    if not keys or keys & set(given):
        return set()
    warnings.warn(
        f"{place}: the adapter was trained with biases, but the file holds none of them (PEFT 0.13 loses them on save): "
        "the base's biases are used",
        stacklevel=4,
    )
    return keys


def _replace(banks: Mapping[str, Buffers], name: str, given: Mapping[str, Tensor]) -> bool:
    """Give an adapter a file's tensors kept once a model. New ones, since other adapters may share the old.

    Returns:
        Whether that changed any.
    """
    changed = False
    for key, bank in banks.items():
        before, bank[name] = bank[name], given[key].to(bank[name])
        changed |= not (before.is_meta or torch.equal(before, bank[name]))
    return changed


def _without_tied(attached: Attached, name: str, tensors: Mapping[str, Tensor], place: str | Path) -> dict[str, Tensor]:
    """A file's tensors without those PEFT writes twice: of modules tied to another, biases of modules trained in full."""
    repeated = _repeated_biases(attached, name)
    kept = {key: tensor for key, tensor in tensors.items() if key not in repeated}
    paths = {layer: path for path, layer in attached.layers()}
    for layer, path in paths.items():
        leader = layer.leader(name)
        for slot, _ in leader.own_tensors(name) if leader else ():
            key, other = (f"{attached.key_prefix}{where}.{slot.key}" for where in (path, paths[leader or layer]))
            if key in kept and other in kept and not torch.equal(kept.pop(key), kept[other]):
                raise InputError(f"differs from {other}, to which the model ties it", place=place, field=key)
    return kept


def _restored(attached: Attached, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors with those replaced that a method stores in another form than it uses.

    Raises:
        InputError: if a method finds values it can't use.
    """
    restored = dict(tensors)
    for path, layer in attached.layers():
        adapter = layer.adapters.get(name)
        if adapter is None or type(adapter).restored is Adapter.restored:
            continue
        prefix, specs = f"{attached.key_prefix}{path}.", adapter.file_tensors()
        if all(prefix + part in restored and restored[prefix + part].shape == specs[part].shape for part in specs):
            form = adapter.restored({part: restored.pop(prefix + part) for part in specs})
            restored.update({prefix + part: tensor for part, tensor in form.items()})
    return restored


def _obsolete(attached: Attached, name: str, key: str) -> bool:
    """Tensors other versions store at a module and nothing needs (BOFT's permutation)."""
    adapters = (layer.adapters[name] for _, layer in attached.layers() if name in layer.adapters)
    first = next(adapters, None)
    at_module = key.startswith(attached.key_prefix)  # not a tensor kept once a model
    return first is not None and at_module and key.rpartition(".")[2] in first.obsolete


def _missing(key: str, given: Iterable[str], place: str | Path) -> InputError:
    tail = key.removeprefix(PREFIX)
    near = [other for other in given if other.replace(".default", "").endswith(tail)]
    keys = f"keys must start with `{PREFIX}` and not hold the adapter's name"
    fix = f"the file has `{printable(near[0])}`: {keys}" if near else None
    return InputError("is missing from the file", place=place, field=key, fix=fix)


def _unexpected(key: str, place: str | Path) -> InputError:
    return InputError("is in the file, but belongs to no adapted module of this model", place=place, field=key)


# -- files --------------------------------------------------------------------------------------------------------


def resolve_adapter_folder(
    name_or_path: str | Path, *, subfolder: str | None = None, revision: str | None = None, **hub: Any
) -> Path:
    """The local folder of an adapter; a hub id is downloaded (config and weights only).

    Raises:
        InputError: if there is no adapter there.
        TypeError: for an argument that is none of `HUB_OPTIONS`.
    """
    if unknown := sorted(hub.keys() - HUB_OPTIONS):
        raise ArgumentTypeError(
            f"got an unexpected keyword argument '{unknown[0]}'", allowed=", ".join(sorted(HUB_OPTIONS))
        )
    folder = Path(name_or_path)
    if folder.is_dir():
        folder = folder / (subfolder or "")
        if not (folder / CONFIG_NAME).exists():
            below = sorted(str(path.parent.relative_to(folder)) for path in folder.glob(f"*/{CONFIG_NAME}"))
            raise InputError(
                f"Can't find '{CONFIG_NAME}' at '{folder}'",
                place=folder,
                fix=f"the sub-folder {below[0]} holds an adapter" if below else None,
            )
        return folder
    return _download(str(name_or_path), subfolder, revision, hub)


def _download(name: str, subfolder: str | None, revision: str | None, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    inside = f"{subfolder}/" if subfolder else ""
    try:
        patterns = [inside + file for file in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, FINGERPRINT)]
        root = snapshot_download(name, revision=revision, allow_patterns=patterns, **hub)
    except Exception as error:  # the hub client has dozens of exception types, all of them mean the same here
        raise InputError(
            f"Can't find '{CONFIG_NAME}' at '{printable(name)}': it is no folder here, and the hub answers: "
            + printable(str(error).splitlines()[0]),
            allowed="an adapter folder or the id of an adapter on the hub (OWNER/NAME)",
        ) from error
    return Path(root) / inside


def read_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """An adapter folder's tensors, on CPU. A `.bin` file is opened only on request, and only as plain tensors.

    Raises:
        InputError: if there are no weights, the file is damaged, or holds something that is not a finite number.
    """
    for path in (folder / WEIGHTS_NAME, folder / PICKLE_NAME):
        if path.exists() or path.is_symlink():
            return read_tensor_file(path, allow_pickle=allow_pickle)
    raise InputError(f"no weights: neither {WEIGHTS_NAME} nor {PICKLE_NAME}", place=folder)


def read_tensor_file(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or on request of a pickle. Raises as `read_tensors`."""
    from safetensors.torch import load_file

    from peftcli.adapters.header import read_header

    if path.suffix == ".safetensors":
        read_header(path)  # strict: sizes and offsets are proved before anything is allocated
        tensors = load_file(path)
    else:
        tensors = _read_pickle(path, allow_pickle)
    broken = [key for key, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()]
    if broken:
        raise InputErrors(InputError("holds NaN or infinity", place=path, field=key) for key in broken)
    return tensors


def _read_pickle(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    from peftcli.adapters.pickle_header import read_pickle_header

    if not allow_pickle:
        raise InputError(
            "is a pickle; pickles can run code, so they are read only on request",
            place=path,
            fix="pass allow_pickle=True (--allow-pickle), or convert it to safetensors",
        )
    read_pickle_header(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def save_adapter(
    attached: Attached,
    name: str,
    folder: str | Path,
    *,
    state: dict[str, Tensor] | None = None,
    save_embedding_layers: bool | str = "auto",
) -> None:
    """Write one adapter's config and weights. Each file appears whole or not at all.

    Args:
        attached: the model's adapters.
        name: which one.
        folder: where to; made if missing.
        state: tensors by file key where they had to be gathered; taken from the model otherwise.
        save_embedding_layers: see `adapter_state_dict`.

    Raises:
        InputError: if a tensor is not finite: a broken adapter is never written.
    """
    folder = Path(folder)
    if state is None:
        state = adapter_state_dict(attached, name, save_embedding_layers=save_embedding_layers)
    write_weights(folder, state)
    write_fingerprint(folder, attached.base)
    write_atomically(folder / CONFIG_NAME, stored_config(attached, name).to_json().encode())
    if name in attached.gates and attached.gates[name].config.use_trainable_adapters:
        for expert in attached.members(name):
            save_adapter(attached, expert, folder / expert, save_embedding_layers=save_embedding_layers)


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's weights; its config comes after them, since without it a folder is no adapter.

    Raises:
        InputError: if a tensor is not finite: a broken adapter is never written.
        RunError: if the disk does not hold what was written.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    broken = [key for key, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()]
    if broken:
        raise InputErrors(InputError("holds NaN or infinity: not saved", place=folder, field=key) for key in broken)
    plain = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS_NAME, save(plain, metadata={"format": "pt"}))
    _check_written(folder / WEIGHTS_NAME, plain)


def _check_written(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a file back: what is on the disk is what was in memory.

    Raises:
        RunError: it is not.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        wrong = sorted(
            names.symmetric_difference(tensors)
            | {name for name in names & set(tensors) if not torch.equal(file.get_tensor(name), tensors[name])}
        )
    if wrong:
        raise RunError(f"{path}: reads back different from what was written ({', '.join(wrong[:5])})")


def stored_config(attached: Attached, name: str) -> PeftConfig:
    """The config that belongs to the tensors a file of the adapter holds."""
    config = attached.configs[name]
    if config.is_prompt_learning:
        return config.stored()
    method = adapter_class(config)
    sites = [(adapter, p) for adapter, p in attached.sites(name) if isinstance(adapter, method)]
    stored = method.stored_config(sites, config) if sites else config.stored()
    if stored.task_type is None and stored.auto_mapping is None:
        return replace(stored, auto_mapping=_class_of(attached.root))
    return stored


def _class_of(model: nn.Module) -> dict[str, str]:
    """The class of the base of an adapter without a task, for `AutoPeftModel` (ours loads those of transformers only)."""
    cls = type(model)
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}
