"""`peft export ADAPTER --to FORM`: from an adapter to what other programs read."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.merge import base_folder
from peftcli.errors import EXIT_FAILURE, InputError

FORMS = ("merged", "peft", "portable", "lora", "gguf")
TARGETS = ("transformers", "vllm", "sglang", "llama.cpp", "ollama")
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def command(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folder; several for --to merged.")],
    to: Annotated[str | None, typer.Option(help="merged, portable, lora, gguf or peft.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model; by default the one the adapter names.")] = None,
    target: Annotated[str | None, typer.Option(help="Say what a program makes of it: " + ", ".join(TARGETS))] = None,
    rank: Annotated[
        str | None, typer.Option(help="Rank (16) or energy to keep (0.95), for lora, portable and gguf.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Most bytes in a weight file of a model, e.g. 5GB.")] = None,
    quantized_base: Annotated[
        str | None, typer.Option(help="After QLoRA, merge into the original or the dequantized base.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Load the result and compare it with the adapter.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON value.")] = False,
) -> int:
    """Write an adapter in another form, or say what other programs make of it."""
    _check(adapters, to, output, target, rank, dtype, shard_size, verify)
    result: dict[str, Any] = {}
    if to is not None and output is not None:
        result = _export(adapters, to, output, base, rank, dtype, shard_size, quantized_base, overwrite)
        if verify:
            result["verified"] = _verify(adapters, to, output, base, result, dtype)
    if target is not None:
        from peftcli.export.targets import judge

        judged = output if output is not None else adapters[0]
        result["target"] = target
        result["rows"] = [asdict(row) for row in judge(judged, target)]
    if as_json:
        console.say_json(result)
    else:
        _show(result)
    return EXIT_FAILURE if any(row["verdict"] == "impossible" for row in result.get("rows", [])) else 0


def _check(
    adapters: list[Path],
    to: str | None,
    output: Path | None,
    target: str | None,
    rank: str | None,
    dtype: str | None,
    shard_size: str | None,
    verify: bool,
) -> None:
    """What can be told before torch is imported."""
    for path in adapters:
        if not path.exists():
            raise InputError("does not exist", place=path)
    if to is None and target is None:
        raise InputError(
            "nothing to do", field="--to", allowed=", ".join(FORMS), fix="or --target, to be told what fits"
        )
    if to is not None and to not in FORMS:
        raise InputError(f"{to!r} is no form", field="--to", allowed=", ".join(FORMS))
    if target is not None and target not in TARGETS:
        raise InputError(f"{target!r} is no program we know", field="--target", allowed=", ".join(TARGETS))
    if to is not None and output is None:
        raise InputError("is needed", field="--output", fix="-o FOLDER")
    if to == "gguf" and target is not None:
        raise InputError(
            "judges adapters, not the GGUF files made of them",
            field="--target",
            fix=f"`peft export {adapters[0]} --target {target}` judges it; --to gguf without --target writes for both",
        )
    if len(adapters) > 1 and to != "merged":
        raise InputError("takes one adapter", field="--to", fix="peft merge makes one adapter of several")
    for value, option, forms in (
        (rank, "--rank", ("lora", "portable", "gguf")),
        (dtype, "--dtype", ("lora", "portable", "gguf", "merged")),
        (shard_size, "--shard-size", ("merged",)),
    ):
        if value is not None and to not in forms:
            raise InputError(f"means nothing for --to {to}", field=option, allowed=f"with --to {' or '.join(forms)}")


def _export(
    adapters: list[Path],
    to: str,
    output: Path,
    base: str | None,
    rank: str | None,
    dtype: str | None,
    shard_size: str | None,
    quantized_base: str | None,
    overwrite: bool,
) -> dict[str, Any]:
    if to == "merged":
        from peftcli.export.merged import export_merged

        root = _base(base, adapters[0])
        merged = export_merged(
            *(adapters, root, output),
            dtype=dtype,
            shard_size=_bytes(shard_size),
            quantized_base=quantized_base,
            overwrite=overwrite,
        )
        return {
            "form": to,
            "output": str(output),
            "base": str(root),
            "quantized_base": quantized_base,
            **asdict(merged),
        }
    from peftcli.export.lora import export_lora, export_peft

    if to == "peft":
        return {"form": to, "output": str(output), **asdict(export_peft(adapters[0], output, overwrite=overwrite))}
    from peftcli.merging.algebra import Rank

    chosen = Rank.parse(rank) if rank else None
    if to == "gguf":
        from peftcli.export.gguf import export_gguf

        root = _base(base, adapters[0])
        exported = export_gguf(adapters[0], root, output, rank=chosen, dtype=dtype, overwrite=overwrite)
    else:
        exported = export_lora(
            *(adapters[0], output),
            portable=to == "portable",
            rank=chosen,
            base=_found_base(base, adapters[0]),
            dtype=dtype,
            overwrite=overwrite,
        )
    return {"form": to, "output": str(output), **asdict(exported)}


def _verify(
    adapters: list[Path], to: str, output: Path, base: str | None, result: dict[str, Any], dtype: str | None
) -> dict[str, Any]:
    from peftcli.export.verify import verify

    is_exact = (
        result.get("is_exact", True) and result.get("quantized_base") != "dequantized"
    )  # compared with the original
    root = _base(base, adapters[0])
    if to == "gguf":
        from peftcli.export.gguf import FILE
        from peftcli.export.verify_gguf import verify_gguf

        return asdict(verify_gguf(output / FILE, adapters[0], root, is_exact=is_exact))
    return asdict(verify(root, adapters, output, is_model=to == "merged", is_exact=is_exact, other_dtype=dtype))


def _base(name: str | None, adapter: Path) -> Path:
    """The base that was named, else the one the adapter names; fetched or converted if need be, as training does.

    Raises:
        InputError: if it can't be had.
    """
    if name is not None:
        return base_folder(name)
    from peftcli.adapters.audit import locate
    from peftcli.training.locate import base_of

    locate(adapter)
    return base_of(adapter)


def _found_base(name: str | None, adapter: Path) -> Path | None:
    """The same for forms that seldom need it: None if the adapter's base, as safetensors, is not on this machine."""
    if name is not None:
        return base_folder(name)
    from peftcli.adapters.audit import locate
    from peftcli.adapters.base_facts import weight_files
    from peftcli.adapters.base_places import find_base
    from peftcli.adapters.config import CONFIG_NAME, read_config

    locate(adapter)
    config = read_config(adapter / CONFIG_NAME)
    found = find_base(config.base_model_name_or_path, config.revision, beside=adapter)
    return found if found is not None and weight_files(found) else None


def _bytes(text: str | None) -> int | None:
    """`5GB` as 5,000,000,000."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([kmg]?b?)", text.strip().lower())
    unit = match[2] if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise InputError(f"{text!r} is no size", field="--shard-size", allowed="5GB, 500MB")
    return int(float(match[1]) * UNITS[unit if unit in UNITS else f"{unit}b"])


def _show(result: dict[str, Any]) -> None:
    if result.get("form") == "merged":
        rows = [
            ("base", result["base"] + (f" ({result['quantized_base']})" if result["quantized_base"] else "")),
            ("tensors", f"{result['changed']} changed, {result['copied']} copied"),
            ("weights", f"{console.size(result['size'])} in {len(result['files'])} file(s)"),
            ("embeddings", "input and output are two tensors now" if result["unties"] else None),
        ]
        console.facts("merged", rows)
    elif "form" in result:
        ranks = result["ranks"]
        rows = [
            ("modules", result["modules"]),
            ("rank", ranks and (str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]} to {ranks[1]}")),
            ("update", "the same" if result["is_exact"] else f"{result['energy']:.2%} of its energy"),
        ]
        console.facts(result["form"], rows)
    if "verified" in result:
        verdict = result["verified"]
        bound = "no bound: not the same update" if verdict["bound"] is None else f"bound {verdict['bound']:.3g}"
        if result["form"] == "gguf":
            told = (
                f"max |difference| of an update {verdict['difference']:.3g} of its largest value "
                f"over {verdict['modules']} modules ({bound}; at {verdict['module']})"
            )
        else:
            told = (
                f"max |difference| of a logit {verdict['difference']:.3g} over {verdict['tokens']} tokens "
                f"(largest logit {verdict['largest']:.3g}; {bound})"
            )
        console.say(f"verified: reloaded, {told}")
    if "rows" in result:
        console.table(
            [result["target"], "", "why or how"], [[row["what"], row["verdict"], row["note"]] for row in result["rows"]]
        )
    if "output" in result:
        console.say(f"written: {result['output']}", "bold")
