"""The expert directory: an adapter, untouched, with gates and statistics in files beside it.

docs/format.md specifies it. Everything is safetensors or JSON; nothing is pickled. A directory is
written under another name and renamed, so that one that exists is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval, MinLen
from pydantic import StringConstraints
from safetensors.torch import save_file
from torch import Tensor

from ..base.identity import Base, BaseReference, Text
from ..base.smollm2 import SMOLLM2_ON_HUB
from ..config import TAIL, Formatting, from_mapping
from ..errors import ExpertError
from ..files import (
    TensorFile,
    new_directory,
    one_line,
    read_json,
    reading,
    regular_file,
    sha256_of,
)
from ..names import NAME, SMOLLM2, check_name, closest_beside, is_hub_id
from ..reader import Reader, ReaderReference
from ..tasks.loading import prompts_beside
from . import kinds
from .kind import ADAPTER_CONFIG, PEFT_FILES, AdapterFiles, SiteModule, check_parts, read_tensors
from .lora import LoraFactors
from .statistics import PARTS, READ, readings_of

# The adapter in a directory: of which kind it is, and what it does.


def formats() -> tuple[AdapterFiles, ...]:
    """The files that adapters of each kind have."""
    return tuple(dict.fromkeys(kind.site_module.files for kind in kinds().values()))


def adapter_files(directory: Path) -> AdapterFiles:
    """The files of the adapter in `directory`: those of a format of our own if there, else PEFT's.

    PEFT's own form of a DoRA may stand beside ours.
    """
    for files in formats():
        is_here = (directory / files.config).exists() or (directory / files.weights).exists()
        if is_here and files is not PEFT_FILES:
            return files
    return PEFT_FILES


def read_modules(
    directory: Path, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, SiteModule]:
    """What the adapter in `directory` does, by site.

    `tensors` are those of its file where that has been read already. Raises ExpertError when its
    files are missing or damaged or it is of no kind that can be routed.
    """
    files = adapter_files(directory)
    config = files.read_config(directory)
    tensors = files.read_weights(directory) if tensors is None else tensors
    peft_type = config.get("peft_type") if files is PEFT_FILES else None
    kind = next(
        kind
        for kind in kinds().values()
        if kind.site_module.files is files and kind.peft_type == peft_type
    )
    return dict(kind.site_module.read(directory, config, tensors))


def base_named_in(directory: Path) -> BaseReference | None:
    """The base that an expert or plain adapter names, if any; ExpertError when it is neither."""
    if (directory / LAYOUT.info).is_file():
        return read_info(directory / LAYOUT.info).base
    files = adapter_files(directory)
    config = files.read_config(directory)
    with reading(directory / files.config):
        named = config.get(files.base_key)
        return BaseReference(str(named), config.get("revision") or None) if named else None


# How its training inputs were formatted, which pools' records repeat.

FORM = ("chat", "max_input_tokens", "truncation")


def recorded_formatting(hyperparameters: Mapping[str, Any], where: str) -> Formatting | None:
    """The formatting recorded in hyperparameters, None without; `where` is for ConfigErrors."""
    names = {field.name for field in fields(Formatting)}
    recorded = {name: value for name, value in hyperparameters.items() if name in names}
    return from_mapping(Formatting, recorded, where) if recorded else None


def chats_recorded(records: Iterable[Mapping[str, Any]]) -> set[bool]:
    """What a pool's records say of training inputs being in a chat template; many say nothing."""
    forms = [record.get("formatting") for record in records]
    return {form["chat"] is True for form in forms if isinstance(form, Mapping) and "chat" in form}


def warn_of_other_formatting(records: Iterable[Mapping[str, Any]], formatting: Formatting) -> None:
    """Warn of experts whose training inputs were formatted otherwise than `formatting`."""
    others = []
    for record in records:
        form = record.get("formatting")
        trained = form if isinstance(form, Mapping) else {}
        # How inputs are cut says nothing of an expert whose own were whole.
        names = FORM if trained.get("inputs_cut") != 0 else FORM[:1]
        differ = [n for n in names if n in trained and trained[n] != getattr(formatting, n)]
        if differ:
            others.append((record.get("name"), differ, trained))
    if others:
        name, differ, trained = others[0]
        name = one_line(name, 80)
        here = ", ".join(f"{each} {getattr(formatting, each)}" for each in differ)
        there = ", ".join(f"{each} {one_line(trained[each], 40)}" for each in differ)
        more = f" ({len(others)} of the experts differ)" if len(others) > 1 else ""
        warnings.warn(
            f"Inputs are read with {here}, but {name} was trained with {there}{more}.", stacklevel=3
        )


# Its description.

Name = Annotated[str, StringConstraints(pattern=NAME)]
Count = Annotated[int, Interval(ge=1, le=1 << 53)]  # which a float holds
ActsOn = Annotated[Mapping[Literal["tail"], Annotated[int, TAIL]], MinLen(1)]


@dataclass(frozen=True)
class ExpertInfo:
    """What `phatgoose.json` says. `task`, `hyperparameters` and `metrics` are free-form records.

    `embedding_form` says what `embedder` embedded (`tasks.embeddings.TEXTS`). None for experts made
    before it was recorded: theirs is the paper's. `measured_in` is the `number_format` of the base
    that means were measured on. `reader` made the prompt statistics, of `prompts_read` prompts;
    None where these aren't known. `acts_on` is the `tail` of a prompt's last tokens that it
    acts on, None for experts that act on all tokens.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    name: Name
    base: BaseReference
    adapter_sha256: Text
    vectors_sha256: Text | None = None
    embeddings_sha256: Text | None = None
    format_version: Literal[1] = 1
    task: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    embedder: Text | None = None
    embedding_form: Text | None = None
    measured_in: Text | None = None
    reader: ReaderReference | None = None
    prompts_read: Count | None = None
    acts_on: ActsOn | None = None

    @property
    def tail(self) -> int | None:
        """The number of a prompt's last tokens that it acts on, None for all tokens."""
        return tail_of({"acts_on": self.acts_on})


def tail_of(record: Mapping[str, Any]) -> int | None:
    """The number of a prompt's last tokens that an expert with this record acts on, None: all."""
    return record["acts_on"]["tail"] if record.get("acts_on") else None


def read_info(path: Path) -> ExpertInfo:
    """What the `phatgoose.json` at `path` says. Raises ExpertError when it isn't as specified."""
    hint = "" if path.parent.exists() else closest_beside(path.parent)
    if (path.parent / ADAPTER_CONFIG).is_file():
        hint = f" Of a PEFT adapter, 'phatgoose import {path.parent} --out …' makes an expert."
    return read_json(path, ExpertInfo, hint=hint)


def info_json(info: ExpertInfo) -> str:
    """The content of `phatgoose.json`, with null for numbers that JSON lacks (a loss of NaN)."""
    content = json.loads(json.dumps(asdict(info)), parse_constant=lambda _: None)
    # Later than the format.
    for name in ("embedding_form", "measured_in", "reader", "prompts_read", "acts_on"):
        if content[name] is None:
            del content[name]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


# The directory.

MOST_EMBEDDINGS = 1000  # the format's limit (docs/format.md)


@dataclass(frozen=True)
class _Layout:
    """File names inside an expert directory, beside those of its adapter."""

    vectors: str = "phatgoose.safetensors"
    info: str = "phatgoose.json"
    embeddings: str = "embeddings.safetensors"
    prompts: str = "prompts.txt"  # examples, one a line; for people, and for statistics of few
    card: str = "README.md"
    signature: str = "model.sig"


LAYOUT = _Layout()
FEW, ENOUGH = 3, 5  # prompts that statistics are of
SHARED = ("means", "readings", "embeddings")  # statistics


def expert_files() -> tuple[str, ...]:
    """Every name that a file of an expert may have."""
    adapters = [name for files in formats() for name in (files.config, files.weights)]
    return (*adapters, *asdict(LAYOUT).values())


def adapters_in(place: Path) -> list[Path]:
    """`place` if it is the folder of an adapter or expert, else those of its folders that are."""
    names = (LAYOUT.info, *(files.config for files in formats()))
    inside = sorted(place.iterdir()) if place.is_dir() else []
    every = [place, *(each for each in inside if not each.name.startswith("."))]
    # Unlike Path.is_file, isfile passes over what may not be looked into, such as lost+found.
    there = [each for each in every if any(os.path.isfile(each / name) for name in names)]
    return there[:1] if place in there else there


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
        readings: Prompt statistics, by `statistics.readings_of`; empty when there are none.
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

    @cached_property
    def lora(self) -> Mapping[str, LoraFactors]:
        """The LoRA factors by site, of a DoRA too; empty for an expert of another kind."""
        modules = self.modules.items()
        return {site: module for site, module in modules if isinstance(module, LoraFactors)}

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Example prompts that it brings, in a file beside it or an adapter's card."""
        return prompts_beside(self.place)

    def has(self, part: str) -> bool:
        """True if it has the `part`: "gates", "means", "readings", "embeddings" or "lora"."""
        value = getattr(self, part)
        return value is not None and len(value) > 0

    def release(self) -> None:
        """Free the memory of bytes read from its files; they are read again when used."""
        for file in self.files.values():
            file.release()

    def with_statistics(self, **statistics: Any) -> Expert:
        """The expert with new `means` or `embeddings`, and fields of `ExpertInfo` about these.

        What isn't among `statistics` stays.
        """
        parts = {name: statistics.pop(name) for name in SHARED if name in statistics}
        result = replace(self, **parts)
        now = {name: result.has(name) for name in SHARED}
        info = replace(self.info, **statistics)
        info = replace(info, hyperparameters={**info.hyperparameters, **now})
        return replace(result, info=info)

    def with_prompts_read(self, reader: Reader, prompts: Sequence[str] = ()) -> Expert:
        """The expert with the statistics of `prompts`, or else of those that it brought.

        Warns of fewer than FEW.
        """
        texts = list(prompts or self.prompts)
        if len(texts) < FEW:
            told = f"{self.name}: few prompts ({len(texts)}); give at least {FEW}, better {ENOUGH}."
            warnings.warn(told, stacklevel=3)
        return self.with_statistics(
            readings=readings_of(reader.states(texts)),
            reader=reader.reference,
            prompts_read=len(texts),
        )

    @classmethod
    def from_peft(
        cls,
        adapter_dir: str | Path,
        gates: Mapping[str, Tensor],
        *,
        base: Base | BaseReference | None = None,
        name: str | None = None,
        **others: Any,
    ) -> Expert:
        """An expert made of an existing adapter, of any kind, and the gates trained for it.

        `base` defaults to the one that the adapter's config names, at the revision that it names
        and without a fingerprint, `name` to the name of the adapter's folder. `others` are `means`,
        `readings` and `embeddings`, and fields of `ExpertInfo`. Raises ExpertError when the adapter
        can't be used or names no base where none is given. Vectors that don't fit it are refused by
        `save`.
        """
        directory = Path(adapter_dir)
        base = base or base_named_in(directory)
        if base is None:
            raise ExpertError(f"The adapter in {directory} doesn't name its base; give base.")
        name = name or directory.resolve().name
        check_name(name)
        means, readings = (_plain(others.pop(each, None) or {}) for each in ("means", "readings"))
        embeddings = others.pop("embeddings", None)
        info = ExpertInfo(
            name=name,
            base=base.reference if isinstance(base, Base) else base,
            adapter_sha256=sha256_of(directory / adapter_files(directory).weights),
            **others,
        )
        modules = read_modules(directory)
        return cls(info, directory, modules, _plain(gates), means, embeddings, readings)

    @classmethod
    def load(cls, directory: str | Path) -> Expert:
        """The expert in `directory`, fully checked: hashes, shapes, finiteness.

        Raises ExpertError with the expert, the site, what was got and what was wanted.
        """
        directory = Path(directory)
        info = read_info(directory / LAYOUT.info)
        adapter = adapter_files(directory)
        files: dict[str, TensorFile] = {}
        for file, sha256 in (
            (adapter.weights, info.adapter_sha256),
            (LAYOUT.vectors, info.vectors_sha256),
            (LAYOUT.embeddings, info.embeddings_sha256),
        ):
            if sha256 is None and not (directory / file).exists():
                continue
            hint = adapter.hint if file == adapter.weights else ""
            files[file] = read_tensors(directory / file, hint)
            if (got := files[file].sha256()) != sha256:
                raise ExpertError(
                    f"Expert {info.name!r}: {file} isn't the one that {LAYOUT.info} describes: its "
                    f"SHA-256 is {got[:12]}…, wanted {(sha256 or 'none')[:12]}…."
                )
        vectors, groups = files.get(LAYOUT.vectors), ("gate", "mean", "reading")
        gates, means, readings = (vectors.under(k) if vectors else {} for k in groups)
        expert = cls(
            info,
            directory,
            read_modules(directory, files[adapter.weights]),
            gates,
            means,
            files[LAYOUT.embeddings].get("embeddings") if LAYOUT.embeddings in files else None,
            readings,
            files,
        )
        _check_vectors(expert)
        # Every byte was read for its hash; most aren't needed for long.
        expert.release()
        return expert

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Expert:
        """Write a complete directory or none, and return the expert as loaded from it.

        Raises ExpertError when its vectors don't fit its adapter, and when `directory` exists
        (unless `overwrite`) or can't be written.
        """
        target = Path(directory)
        with new_directory(target, ExpertError, overwrite=overwrite) as work:
            self._write(work)
            saved = Expert.load(work)
        return replace(saved, directory=target)

    def _write(self, work: Path) -> None:
        files = adapter_files(self.directory)
        brought = self.place / LAYOUT.prompts
        is_read = brought.is_file() and bool(self.prompts)  # so it isn't huge, nor a link elsewhere
        copied = [self.directory / name for name in (files.config, files.weights)]
        for path in (*copied, *[brought] * is_read):
            shutil.copyfile(regular_file(path), work / path.name)
        info = replace(self.info, vectors_sha256=None, embeddings_sha256=None)
        vectors = {
            f"{kind}.{name}": vector.clone()  # safetensors refuses tensors that share memory
            for kind in ("gate", "mean", "reading")
            for name, vector in getattr(self, f"{kind}s").items()
        }
        if vectors:
            save_file(vectors, work / LAYOUT.vectors)
            info = replace(info, vectors_sha256=sha256_of(work / LAYOUT.vectors))
        if self.embeddings is not None:
            rows = self.embeddings.float().contiguous()
            save_file({"embeddings": rows}, work / LAYOUT.embeddings)
            info = replace(info, embeddings_sha256=sha256_of(work / LAYOUT.embeddings))
        for file, text in (
            (LAYOUT.card, model_card(info, self.kind)),
            (LAYOUT.info, info_json(info)),
        ):
            # A path may hold bytes that aren't UTF-8, and JSON has no escape for them.
            (work / file).write_text(text, encoding="utf-8", errors="replace")


def _plain(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {site: v.detach().float().cpu().contiguous() for site, v in vectors.items()}


def _check_vectors(expert: Expert) -> None:
    who, exact, readings = f"Expert {expert.name!r}", (torch.float32,), expert.readings
    # A module that doesn't tell its input's size has a letter of its own: `check_fit` asks.
    sites = {site: (each.sizes.get("n", f"n of {site}"),) for site, each in expert.modules.items()}
    check_parts(f"{who}, gates", sites if expert.gates else {}, expert.gates, exact)
    check_parts(f"{who}, means", sites if expert.means else {}, expert.means, exact)
    parts = {f"{READ}.{part}": form for part, form in PARTS.items()}
    check_parts(f"{who}, readings", parts if readings else {}, readings, exact)
    rows = torch.ones(1, 1) if expert.embeddings is None else expert.embeddings
    check_parts(who, {"embeddings": "ed"}, {"embeddings": rows}, exact)
    wrong = {
        f"more than {MOST_EMBEDDINGS} embeddings": len(rows) > MOST_EMBEDDINGS,
        "embeddings of another length than 1": ((rows.norm(dim=-1) - 1).abs() >= 1e-3).any(),
        "readings of variances below 0": (readings.get(f"{READ}.rest", torch.ones(1)) < 0).any(),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ExpertError(f"{who} has {what}.")


# Its model card, which the Hub shows.

CARD = """\
---
{front}library_name: {library}
tags:
- phatgoose
- {tag}
---

# {name}

{kind} expert for `{base}`, one of a pool whose router chooses who acts: for every token and at
every module by PHATGOOSE gates (Muqeeth et al. 2024), or for a whole prompt by its statistics.
{alone}
```python
import phatgoose as pg
model = pg.compose(pg.Pool.open(["path/to/{name}", "path/to/another"]))
```

## phatgoose.json

{record}"""

ALONE = """
As an ordinary adapter: `PeftModel.from_pretrained(base_model, "path/to/{name}")` of PEFT.{warning}
"""
WARNING = " PEFT alone doesn't know where in a prompt it acts and lets it act on all tokens."


def model_card(info: ExpertInfo, kind: str) -> str:
    """The card of an expert of this `kind`, in Markdown."""
    in_peft, base = kinds()[kind].peft_type is not None, info.base.id
    warning = WARNING if info.acts_on else ""
    on_hub = SMOLLM2_ON_HUB if base == SMOLLM2 else base
    # In YAML an id without an owner might be a number.
    quoted = on_hub if "/" in on_hub else json.dumps(on_hub)
    # Indented, so that nothing in it is Markdown or HTML.
    record = "".join(f"    {one_line(each, 500)}\n" for each in info_json(info).splitlines())
    return CARD.format(
        name=info.name,
        front=f"base_model: {quoted}\n" if is_hub_id(base) else "",
        base=code(base),
        kind=kinds()[kind].label,
        tag=kind if in_peft else "adapter",
        library="peft" if in_peft else "phatgoose",
        alone=ALONE.format(name=info.name, warning=warning) if in_peft else "",
        record=record,
    )


def code(text: object) -> str:
    """`text` as it may stand between backticks, whoever wrote it."""
    return one_line(text).replace("`", "'")
