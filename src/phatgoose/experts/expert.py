"""The expert directory: an adapter, untouched, with gates and statistics in files beside it.

docs/format.md specifies it. Everything is safetensors or JSON; nothing is pickled. A directory is
written under another name and renamed, so that one that exists is complete.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..base import REVISION, Base, BaseReference, closest_beside
from ..config import Formatting, from_mapping
from ..errors import ConfigError, ExpertError
from ..files import (
    Group,
    TensorFile,
    is_finite,
    new_directory,
    one_line,
    read_json_object,
    regular_file,
    sha256_of,
    shortened,
)
from ..passes import ActsOn
from .card import model_card
from .kind import AdapterFiles, SiteModule, read_tensors
from .lora import LoraFactors
from .peft_files import ADAPTER_CONFIG, INVOCATION, PEFT_FILES
from .registry import Kind, kinds, loaded_kinds
from .statistics import readings_problems


def formats() -> tuple[AdapterFiles, ...]:
    return tuple(dict.fromkeys(kind.site_module.files for kind in loaded_kinds()))


def adapter_file_names() -> tuple[str, ...]:
    return tuple(name for files in formats() for name in (files.config, files.weights))


def kind_of(files: AdapterFiles, config: Mapping[str, Any]) -> Kind:
    """The kind whose adapters have these files; of PEFT's the one that the config names."""
    peft_type = config.get("peft_type") if files is PEFT_FILES else None
    return next(
        kind
        for kind in loaded_kinds()
        if kind.site_module.files is files and kind.peft_type == peft_type
    )


def adapter_files(directory: Path) -> AdapterFiles:
    """The files of the adapter in `directory`, by default PEFT's; ExpertError for several kinds."""
    held = [
        files
        for files in formats()
        if any((directory / name).exists() for name in (files.config, files.weights))
    ]
    beside = {name for files in held for name in files.beside}
    held = [files for files in held if files.config not in beside]
    if len(held) > 1:
        raise ExpertError(
            f"{directory} holds files of two adapters, as {held[0].config} and {held[1].config} "
            f"describe them; an expert has one."
        )
    return held[0] if held else PEFT_FILES


def read_modules(
    directory: Path, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, SiteModule]:
    """What the adapter in `directory` does, by site.

    `tensors` are its weights where they have been read already. Raises ExpertError when its files
    are missing or damaged or it is of no kind that can be routed.
    """
    files = adapter_files(directory)
    config = files.read_config(directory)
    tensors = files.read_weights(directory) if tensors is None else tensors
    return dict(kind_of(files, config).site_module.read(directory, config, tensors))


def named_base(directory: Path) -> str | None:
    """The base that the adapter names, None without. Raises ExpertError without an adapter."""
    files = adapter_files(directory)
    named = files.read_config(directory).get(files.base_key)
    return named if isinstance(named, str) and named else None


def invocation_of(directory: Path) -> ActsOn | None:
    """What an adapter of PEFT's aLoRA acts on; None for others, which act on all tokens."""
    files = adapter_files(directory)
    if files is not PEFT_FILES:
        return None
    tokens = files.read_config(directory).get(INVOCATION)
    return ActsOn.of({"invocation_tokens": tokens}) if tokens else None


SHOWN = 3  # experts named in a warning
UNRECORDED = {"truncation": "right"}  # of experts made before it was recorded


def recorded_formatting(hyperparameters: Mapping[str, Any], where: str) -> Formatting | None:
    """The formatting recorded in hyperparameters, None without; `where` is for ConfigErrors."""
    names = {field.name for field in fields(Formatting)}
    known = {name: value for name, value in hyperparameters.items() if name in names}
    return from_mapping(Formatting, {**UNRECORDED, **known}, where) if known else None


def format_record(
    hyperparameters: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What a pool's records say of it; None for an expert that records no formatting."""
    try:
        formatting = recorded_formatting(hyperparameters, "hyperparameters")
    except ConfigError:
        formatting = None
    if formatting is None:
        return None
    kept = {name: getattr(formatting, name) for name in ("max_input_tokens", "truncation", "chat")}
    return {**kept, "inputs_cut": metrics.get("inputs_cut")}


def trained_in_chats(records: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the training prompts of all experts in a pool's records are in a chat template."""
    forms = [record.get("formatting") for record in records]
    return all(isinstance(form, Mapping) and form.get("chat") is True for form in forms)


def warn_of_other_formatting(records: Iterable[Mapping[str, Any]], given: Formatting) -> None:
    """Warn of experts whose training inputs were formatted otherwise than `given`."""
    others: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        found = record.get("formatting")
        if not isinstance(found, Mapping):
            continue
        try:
            trained = recorded_formatting(found, "formatting")
        except ConfigError:
            continue  # a damaged record, on which nothing depends
        if trained is None:
            continue
        names = ["chat"]
        if found.get("inputs_cut") != 0:
            names += ["max_input_tokens", "truncation"]
        if differ := [name for name in names if getattr(trained, name) != getattr(given, name)]:
            both = _words(given, differ), _words(trained, differ)
            others[both].append(one_line(record.get("name"), 80))
    for (read, form), experts in others.items():
        more = f" and {len(experts) - SHOWN} more" if len(experts) > SHOWN else ""
        warnings.warn(
            f"Inputs are read with {read}, but {', '.join(experts[:SHOWN])}{more} "
            f"{'were' if len(experts) > 1 else 'was'} trained with {form}.",
            stacklevel=3,
        )


def _words(formatting: Formatting, names: Iterable[str]) -> str:
    words = {
        "chat": "the chat template (--chat)" if formatting.chat else "no chat template",
        "max_input_tokens": f"max_input_tokens {formatting.max_input_tokens}",
        "truncation": f"truncation {formatting.truncation}",
    }
    return ", ".join(words[name] for name in names)


FORMAT_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LONGEST_NAME = 200  # of new ones; names of temporary files beside an expert are longer
OPTIONAL = (str, NoneType)
TYPES: dict[str, Any] = {  # of every field but the version
    "name": str,
    "base.id": str,
    "base.revision": OPTIONAL,
    "base.fingerprint": OPTIONAL,
    "adapter_sha256": str,
    "vectors_sha256": OPTIONAL,
    "embeddings_sha256": OPTIONAL,
    "embedder": OPTIONAL,
    "embedding_form": OPTIONAL,
    "measured_in": OPTIONAL,
    "acts_on": (dict, NoneType),
    "task": dict,
    "hyperparameters": dict,
    "metrics": dict,
}


@dataclass(frozen=True)
class ExpertInfo:
    """What `phatgoose.json` says. `task`, `hyperparameters` and `metrics` are free-form records.

    `embedding_form` says what `embedder` embedded (`tasks.embeddings.TEXTS`). None for experts made
    before it was recorded: theirs is the paper's. `measured_in` is the `number_format` of the base
    that means and prompt statistics were measured on, None where it isn't known. `acts_on` is the
    record of an `ActsOn`, None for experts that act on all tokens.
    """

    name: str
    base: BaseReference
    adapter_sha256: str
    vectors_sha256: str | None = None
    embeddings_sha256: str | None = None
    format_version: int = FORMAT_VERSION
    task: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    embedder: str | None = None
    embedding_form: str | None = None
    measured_in: str | None = None
    acts_on: Mapping[str, Any] | None = None


def check_name(name: str) -> None:
    """Raise ExpertError unless `name` can be a new expert's (docs/format.md)."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise ExpertError(
            f"{shortened(name)} can't name an expert: use letters, digits, '.', '_' and '-' only, "
            f"at most {LONGEST_NAME}, and begin with a letter or digit."
        )


def read_info(path: Path) -> ExpertInfo:
    """What the `phatgoose.json` at `path` says. Raises ExpertError when it isn't as specified."""
    try:
        content = read_json_object(path)
        if content.get("format_version") != FORMAT_VERSION:
            raise ExpertError(
                f"{path}: format version {shortened(content.get('format_version'))} is unknown; "
                f"this phatgoose reads version {FORMAT_VERSION}."
            )
        info = ExpertInfo(**{**content, "base": BaseReference(**content["base"])})
    except FileNotFoundError as error:
        holds = next(path.parent.glob(f"*/{path.name}"), None)
        hint = f" It holds experts: name each ({holds.parent}, …)." if holds else ""
        if not path.parent.exists():
            hint = closest_beside(path.parent)
        if (path.parent / ADAPTER_CONFIG).is_file():
            hint = f" It is a PEFT adapter: run 'phatgoose import {path.parent} --out …' first."
        raise ExpertError(
            f"{path.parent} is no expert directory: {path.name} is missing.{hint}"
        ) from error
    except (TypeError, KeyError, ValueError) as error:
        raise ExpertError(
            f"{path} is not a valid description of an expert: {one_line(error)}."
        ) from error
    for key, wanted in TYPES.items():
        value = attrgetter(key)(info)
        if not isinstance(value, wanted) or (isinstance(value, str) and not value.isprintable()):
            raise ExpertError(f"{path}: {key} is {shortened(value)}, which it can't be.")
    try:
        ActsOn.of(info.acts_on)
    except ExpertError as error:
        raise ExpertError(f"{path}: {error}") from error
    return info


def info_json(info: ExpertInfo) -> str:
    """The content of `phatgoose.json`, with null for numbers that JSON lacks (a loss of NaN)."""
    content = _without_nan(asdict(info))
    for name in ("embedding_form", "measured_in", "acts_on"):  # later than the format
        if content[name] is None:
            del content[name]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


MOST_EMBEDDINGS = 1000  # the format's limit (docs/format.md)


@dataclass(frozen=True)
class _Layout:
    """File names inside an expert directory, beside those of its adapter."""

    vectors: str = "phatgoose.safetensors"
    info: str = "phatgoose.json"
    embeddings: str = "embeddings.safetensors"
    card: str = "README.md"
    signature: str = "model.sig"


LAYOUT = _Layout()


def expert_files() -> tuple[str, ...]:
    """Every name that a file of an expert may have."""
    return (*adapter_file_names(), *asdict(LAYOUT).values())


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert: what its adapter does, its gates and its statistics, by site name.

    The tensors of a loaded expert are views of its files, mapped into memory: bytes are read when
    used, and take memory until `release`. Don't write to them; `dataclasses.replace` makes an
    expert with other tensors.

    Attributes:
        info: What its `phatgoose.json` says.
        directory: The folder of the adapter's files.
        modules: What it does at each site, all of one kind.
        gates: A float32 vector of each site's input size; empty when there are none.
        means: Mean activations, likewise.
        embeddings: None or [examples, dims], rows of length 1 made by `info.embedder`.
        readings: Prompt statistics, by `readings.readings_of`; empty when there are none.
        files: The mapped files.
        source: The folder of an adapter that was read as an expert; `directory` may be temporary.
    """

    info: ExpertInfo
    directory: Path
    modules: Mapping[str, SiteModule]
    gates: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    embeddings: Tensor | None = None
    readings: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, TensorFile] = field(default_factory=dict, repr=False, compare=False)
    source: Path | None = None

    def __repr__(self) -> str:
        shared = [part for part in ("gates", "means", "readings", "embeddings") if self.has(part)]
        kind = kinds()[self.kind].label if self.modules else "empty"
        return f"<Expert {self.name!r}, {', '.join([kind, *shared])} (sites: {len(self.modules)})>"

    @property
    def name(self) -> str:
        """The name in `phatgoose.json`, not the directory's; unique within a pool."""
        return self.info.name

    @property
    def place(self) -> Path:
        """Where the user has it: in messages and records."""
        return self.source or self.directory

    @property
    def kind(self) -> str:
        """The name of its kind, a key of `kinds`."""
        return next(iter(self.modules.values())).kind

    @property
    def acts_on(self) -> ActsOn | None:
        """The end of prompts that it acts on, None for all tokens."""
        return ActsOn.of(self.info.acts_on)

    @cached_property
    def lora(self) -> Mapping[str, LoraFactors]:
        """The LoRA factors by site, of a DoRA too; empty for an expert of another kind."""
        held = self.modules.items()
        return {site: module for site, module in held if isinstance(module, LoraFactors)}

    def has(self, part: str) -> bool:
        """True if it has the `part`: "gates", "means", "readings", "embeddings" or "lora"."""
        held = getattr(self, part)
        return held is not None and len(held) > 0

    def release(self) -> None:
        """Free the memory of bytes read from its files; they are read again when used."""
        for file in self.files.values():
            file.release()

    @classmethod
    def from_peft(
        cls,
        adapter_dir: str | Path,
        gates: Mapping[str, Tensor],
        *,
        base: Base | BaseReference | None = None,
        name: str | None = None,
        means: Mapping[str, Tensor] | None = None,
        embeddings: Tensor | None = None,
        readings: Mapping[str, Tensor] | None = None,
        embedder: str | None = None,
        embedding_form: str | None = None,
        measured_in: str | None = None,
        task: Mapping[str, Any] | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        acts_on: ActsOn | None = None,
    ) -> Expert:
        """An expert made of an existing adapter, of any kind, and the gates trained for it.

        `base` defaults to the one that the adapter's config names, at the revision that it names
        and without a fingerprint, `name` to the name of the adapter's folder, `acts_on` to the
        invocation tokens that an adapter of PEFT's aLoRA names. Raises ExpertError
        when the adapter can't be used or names no base where none is given, when a vector doesn't
        fit its site, and when embeddings aren't what the format wants.
        """
        directory = Path(adapter_dir)
        modules = read_modules(directory)
        base = base or _adapter_base(directory)
        if base is None:
            raise ExpertError(f"The adapter in {directory} doesn't name its base; give base.")
        name = name or directory.resolve().name
        check_name(name)
        if isinstance(base, Base):
            base = base.reference
        acts_on = acts_on or invocation_of(directory)
        info = ExpertInfo(
            name=name,
            base=base,
            adapter_sha256=sha256_of(directory / adapter_files(directory).weights),
            task=task or {},
            hyperparameters=hyperparameters or {},
            metrics=metrics or {},
            embedder=embedder,
            embedding_form=embedding_form,
            measured_in=measured_in,
            acts_on=acts_on.record() if acts_on else None,
        )
        expert = cls(
            info,
            directory,
            modules,
            _plain(gates),
            _plain(means or {}),
            embeddings,
            _plain(readings or {}),
        )
        for problem in chain(
            _invocation_problems(expert), _vector_problems(expert), _not_finite(expert)
        ):
            raise ExpertError(problem)
        return expert

    @classmethod
    def load(cls, directory: str | Path) -> Expert:
        """The expert in `directory`, fully checked: hashes, shapes, finiteness.

        Raises ExpertError with the expert, the site, what was got and what was wanted.
        """
        directory = Path(directory)
        expert = _read(directory)
        for problem in _problems(expert):
            raise ExpertError(problem)
        # Every byte was read for its hash; most aren't needed for long.
        expert.release()
        return expert

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Expert:
        """Write a complete directory or none, and return the expert as loaded from it.

        Raises ExpertError when `directory` exists (unless `overwrite`) or can't be written.
        """
        target = Path(directory)
        with new_directory(target, ExpertError, overwrite=overwrite) as work:
            self._write(work)
        return Expert.load(target)

    def _write(self, work: Path) -> None:
        files = adapter_files(self.directory)
        beside = [file for file in files.beside if (self.directory / file).is_file()]
        for file in (files.config, files.weights, *beside):
            shutil.copyfile(regular_file(self.directory / file), work / file)
        info = replace(self.info, vectors_sha256=None, embeddings_sha256=None)
        vectors = {f"gate.{site}": vector for site, vector in self.gates.items()}
        vectors |= {f"mean.{site}": vector for site, vector in self.means.items()}
        vectors |= {f"reading.{part}": tensor for part, tensor in self.readings.items()}
        if vectors:
            # safetensors refuses tensors that share memory.
            save_file({key: each.clone() for key, each in vectors.items()}, work / LAYOUT.vectors)
            info = replace(info, vectors_sha256=sha256_of(work / LAYOUT.vectors))
        if self.embeddings is not None:
            rows = self.embeddings.float().contiguous()
            save_file({"embeddings": rows}, work / LAYOUT.embeddings)
            info = replace(info, embeddings_sha256=sha256_of(work / LAYOUT.embeddings))
        # A file's name may hold bytes that aren't UTF-8; they are escaped as in JSON.
        card = model_card(asdict(info), self.kind, len(self.modules), copied=bool(beside))
        for file, text in (
            (LAYOUT.card, card),
            (LAYOUT.info, info_json(info)),
        ):
            (work / file).write_text(text, encoding="utf-8", errors="backslashreplace")


def check_expert(directory: str | Path) -> list[str]:
    """All problems of the expert in `directory`, a sentence each; empty when it is sound."""
    try:
        return list(_problems(_read(Path(directory))))
    except ExpertError as error:
        return [str(error)]


def base_named_in(directory: Path) -> BaseReference | None:
    """The base that an expert or plain adapter names, if any; ExpertError when it is neither."""
    if (directory / LAYOUT.info).is_file():
        return read_info(directory / LAYOUT.info).base
    return _adapter_base(directory)


def named_revision(config: Mapping[str, Any]) -> str | None:
    """The revision of its base that an adapter names, None without one. Raises ExpertError."""
    named = config.get("revision") or None
    if named is not None and not (isinstance(named, str) and REVISION.fullmatch(named)):
        raise ExpertError(
            f"The adapter names revision {shortened(named)} of its base, but a revision is a "
            f"branch, a tag or a commit; name the base with --base."
        )
    return named


def _adapter_base(directory: Path) -> BaseReference | None:
    named = named_base(directory)
    if named is None:
        return None
    return BaseReference(named, named_revision(adapter_files(directory).read_config(directory)))


def _plain(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {site: v.detach().float().cpu().contiguous() for site, v in vectors.items()}


def _read(directory: Path) -> Expert:
    # A process that was killed while it replaced the directory left it under another name.
    info = read_info(directory / LAYOUT.info)
    files = {}
    if info.vectors_sha256 is not None:
        files[LAYOUT.vectors] = read_tensors(directory / LAYOUT.vectors)
    vectors: Mapping[str, Tensor] = files.get(LAYOUT.vectors, {})
    for key in vectors:
        if not key.startswith(("gate.", "mean.", "reading.")):
            raise ExpertError(
                f"{directory / LAYOUT.vectors} holds {key!r}; wanted gate.*, mean.* and reading.*."
            )
    embeddings = None
    if info.embeddings_sha256 is not None:
        held = files[LAYOUT.embeddings] = read_tensors(directory / LAYOUT.embeddings)
        if set(held) != {"embeddings"} or held["embeddings"].dim() != 2:
            raise ExpertError(
                f"{directory / LAYOUT.embeddings} must hold one matrix, 'embeddings'."
            )
        embeddings = held["embeddings"]
    adapter = adapter_files(directory)
    weights = files[adapter.weights] = adapter.read_weights(directory)
    modules = read_modules(directory, weights)
    gates, means, readings = (Group(vectors, kind) for kind in ("gate", "mean", "reading"))
    return Expert(info, directory, modules, gates, means, embeddings, readings, files)


def _problems(expert: Expert) -> Iterator[str]:
    info, directory = expert.info, expert.directory
    if not NAME.fullmatch(info.name):
        yield f"{directory}: {info.name!r} is not a valid name."
    hashes = {
        adapter_files(directory).weights: info.adapter_sha256,
        LAYOUT.vectors: info.vectors_sha256,
        LAYOUT.embeddings: info.embeddings_sha256,
    }
    for file, wanted in hashes.items():
        if wanted is None:
            if (directory / file).exists():
                yield f"Expert {info.name!r}: {file} is there, but {LAYOUT.info} does not know it."
            continue
        got = expert.files[file].sha256()
        if got != wanted:
            yield (
                f"Expert {info.name!r}: {file} was changed after the expert was made: its SHA-256 "
                f"is {got[:12]}…, wanted {wanted[:12]}…."
            )
    yield from _invocation_problems(expert)
    yield from _vector_problems(expert)


def _invocation_problems(expert: Expert) -> Iterator[str]:
    # PEFT and llama.cpp go by the adapter's own field, phatgoose by its record.
    named = invocation_of(expert.directory)
    recorded = expert.acts_on
    held = kinds()[expert.kind].holds_invocation
    if named is None and (recorded is None or not recorded.invocation or not held):
        return
    if named != recorded:
        yield (
            f"Expert {expert.name!r} acts on {recorded or 'all tokens'}, but its adapter's "
            f"alora_invocation_tokens say {named or 'all tokens'}."
        )


def _vector_problems(expert: Expert) -> Iterator[str]:
    rows = expert.embeddings
    if rows is not None and not (
        rows.dtype == torch.float32
        and 0 < len(rows) <= MOST_EMBEDDINGS
        and bool(((rows.norm(dim=-1) - 1).abs() < 1e-3).all())
    ):
        yield (
            f"Expert {expert.name!r}: embeddings of shape {tuple(rows.shape)} and type "
            f"{rows.dtype}; wanted float32, at most {MOST_EMBEDDINGS} rows, each of length 1."
        )
    for problem in readings_problems(expert.readings) if expert.readings else ():
        yield f"Expert {expert.name!r}, readings: {problem}."
    for kind, vectors in (("gate", expert.gates), ("mean", expert.means)):
        if not vectors:
            continue
        for site in sorted(vectors.keys() ^ expert.modules.keys()):
            missing = "adapter" if site in vectors else kind
            yield f"Expert {expert.name!r}, site {site}: the {missing} is missing there."
        for site in sorted(vectors.keys() & expert.modules.keys()):
            vector, n = vectors[site], expert.modules[site].in_features
            wanted = (vector.numel() if n is None else n,)  # if None, `check_fit` asks the base
            if tuple(vector.shape) != wanted or vector.dtype != torch.float32:
                yield (
                    f"Expert {expert.name!r}, site {site}: the {kind} has shape "
                    f"{tuple(vector.shape)} and type {vector.dtype}, wanted {wanted} and float32."
                )


def _not_finite(expert: Expert) -> Iterator[str]:
    for kind, vectors in (("gate", expert.gates), ("mean", expert.means)):
        for site, vector in vectors.items():
            if not is_finite(vector):
                yield f"Expert {expert.name!r}, site {site}: the {kind} is not finite."
    for part, tensor in expert.readings.items():
        if not is_finite(tensor):
            yield f"Expert {expert.name!r}, readings: {part} is not finite."
