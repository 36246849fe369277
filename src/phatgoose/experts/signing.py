"""Signatures of expert directories: who published exactly these files.

They are OpenSSF Model Signing's (`model-signing`, the extra 'sign'), made with a key of one's own:
`model.sig` beside the files that it covers, which are all others. Hashes in `phatgoose.json` tell
that files belong together; a signature tells whose they are.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import ConfigError, ExpertError
from ..files.atomic import write_text
from ..files.strict import (
    MOST_JSON_BYTES,
    distinct_keys,
    first_line,
    reason,
    regular_file,
    shortened,
)
from .expert import LAYOUT, expert_files

OF_GIT = {".git", ".gitattributes", ".github", ".gitignore"}  # which the library leaves out


def sign(directory: Path, private_key: Path) -> None:
    """Sign every file of the expert in `directory`; the signature is written beside them.

    `private_key` is a PEM file of an elliptic curve key (P-256, P-384 or P-521), not encrypted.
    Raises ExpertError when the folder holds anything but an expert's files, the key can't be used
    or the signature can't be written; ConfigError without model-signing.
    """
    library = _library()
    _signed_names(directory)
    _check_key(private_key)
    with (
        _reported(f"{directory} can't be signed with {private_key}"),
        TemporaryDirectory() as place,
    ):
        made = Path(place) / LAYOUT.signature
        config = library.signing.Config().use_elliptic_key_signer(private_key=private_key)
        config.set_hashing_config(_hashing(library)).sign(directory, made)
        signature = made.read_text(encoding="utf-8")
    write_text(directory / LAYOUT.signature, signature, ExpertError)


def check_signature(directory: Path, signers: Sequence[Path], label: object = None) -> None:
    """Raise ExpertError unless one of `signers` signed every file of the expert in `directory`.

    `signers` are PEM files of public keys, `label` what messages call the expert. Nothing of the
    expert is read but to hash it. Raises ConfigError without model-signing.
    """
    library, label = _library(), label or directory
    for signer in signers:
        _check_key(signer)
    signature = directory / LAYOUT.signature
    try:
        size = regular_file(signature).stat().st_size
    except FileNotFoundError as error:
        raise ExpertError(f"{label} isn't signed: {LAYOUT.signature} is missing.") from error
    if size > MOST_JSON_BYTES:
        raise ExpertError(f"{signature} has {size} bytes; at most {MOST_JSON_BYTES} are read.")
    names, refusals = _signed_names(directory), []
    for signer in signers:
        try:
            with _reported(str(signer)):
                config = library.verifying.Config().use_elliptic_key_verifier(public_key=signer)
                config.set_hashing_config(_hashing(library)).verify(directory, signature)
                _check_covered(signature, names)
            return
        except ExpertError as error:
            refusals.append(str(error))
    raise ExpertError(
        f"{label} isn't what a required signer signed; don't use it. {'; '.join(refusals)}"
    )


def _check_covered(signature: Path, names: set[str]) -> None:
    bundle = json.loads(signature.read_bytes(), object_pairs_hook=distinct_keys)
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
    signed = {resource["name"] for resource in payload["predicate"]["resources"]}
    # The library leaves out what the signer told it to leave out.
    if signed != names:
        raise ValueError(f"it covers {shortened(sorted(signed))}, not {sorted(names)}")


def _signed_names(directory: Path) -> set[str]:
    try:
        there = {path.name for path in directory.iterdir()} - OF_GIT - {LAYOUT.signature}
        for name in sorted(there):
            if name not in expert_files():
                raise ExpertError(
                    f"{directory} holds {shortened(name)}, which is no part of an expert, so no "
                    f"signature can cover it; move it elsewhere."
                )
            regular_file(directory / name)
    except OSError as error:
        raise ExpertError(f"{directory} can't be read: {reason(error)}.") from error
    return there


def _check_key(key: Path) -> None:
    try:
        # The library's own words for a key that can't be read name no file.
        key.read_bytes()
    except OSError as error:
        raise ExpertError(f"Key {key} can't be read: {reason(error)}.") from error


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise ConfigError(
            "Signatures need model-signing: pip install 'phatgoose[sign]'."
        ) from error
    return model_signing


def _hashing(library: Any) -> Any:
    config = library.hashing.Config().use_file_serialization(max_workers=1)
    return config.set_ignored_paths(paths=[LAYOUT.signature])


@contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # InvalidSignature is one of its own, and a ParseError another
        raise ExpertError(f"{what}: {first_line(error)}.") from error
