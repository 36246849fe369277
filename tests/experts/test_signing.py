"""Signatures: whose keys made them, which files they cover, and what is refused."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from fake_hub import contents
from paths import GOLDENS
from phatgoose.apps.cli import main
from phatgoose.errors import ConfigError, ExpertError
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.experts.hub import pull, push
from phatgoose.experts.signing import check_signature, sign

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # sigstore's, of the libraries below it
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sigstore.*"),
]
SIGNATURE = LAYOUT.signature
EVERY = 23  # a byte of so many is changed


def test_without_the_library_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call in (lambda: sign(tmp_path, tmp_path), lambda: check_signature(tmp_path, [tmp_path])):
        with pytest.raises(ConfigError, match=r"pip install 'phatgoose\[sign\]'"):
            call()


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """A folder of key pairs: mine, yours, one of another kind, one that is encrypted."""
    pytest.importorskip("model_signing", reason="needs the extra 'sign'")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    folder = tmp_path_factory.mktemp("keys")
    plain = serialization.NoEncryption()
    for name, key, encryption in (
        ("mine", ec.generate_private_key(ec.SECP256R1()), plain),
        ("yours", ec.generate_private_key(ec.SECP384R1()), plain),
        ("odd", ed25519.Ed25519PrivateKey.generate(), plain),
        (
            "locked",
            ec.generate_private_key(ec.SECP256R1()),
            serialization.BestAvailableEncryption(b"x"),
        ),
    ):
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / name).write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture(params=["expert", "bottleneck"])
def signed(request, keys, tmp_path) -> Path:
    directory = shutil.copytree(GOLDENS / request.param, tmp_path / "expert")
    sign(directory, keys / "mine")
    return directory


def refusal(directory: Path, *signers: Path) -> str:
    with pytest.raises(ExpertError) as caught:
        check_signature(directory, signers)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2000
    return message


def test_a_signed_expert_is_one_and_its_signer_is_known(signed, keys, tmp_path):
    import model_signing

    library = model_signing.verifying.Config()
    library.use_elliptic_key_verifier(public_key=keys / "mine.pub").verify(
        signed, signed / SIGNATURE
    )
    assert Expert.load(signed).name == "golden"
    check_signature(signed, [keys / "mine.pub"])
    check_signature(signed, [keys / "yours.pub", keys / "mine.pub"])
    assert "yours.pub" in refusal(signed, keys / "yours.pub")
    (signed / ".gitattributes").write_text("*.safetensors filter=lfs")  # git's, left out
    check_signature(signed, [keys / "mine.pub"])
    (signed / ".gitattributes").unlink()
    again = Expert.load(signed).save(tmp_path / "again")
    assert not (again.directory / SIGNATURE).exists()
    sign(signed, keys / "yours")
    check_signature(signed, [keys / "yours.pub"])
    refusal(signed, keys / "mine.pub")


def test_the_signature_is_of_every_file_and_of_no_path_of_the_signer(signed):
    bundle = json.loads((signed / SIGNATURE).read_text())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).decode()
    resources = {each["name"] for each in json.loads(payload)["predicate"]["resources"]}
    assert resources == {path.name for path in signed.iterdir()} - {SIGNATURE}
    assert str(signed.parent) not in payload


def test_a_change_of_any_byte_is_refused(signed, keys):
    for path in sorted(signed.iterdir()):
        if path.name == SIGNATURE:
            continue
        whole = path.read_bytes()
        for place in sorted({*range(0, len(whole), EVERY), len(whole) - 1}):
            changed = bytearray(whole)
            changed[place] ^= 1
            path.write_bytes(changed)
            assert path.name in refusal(signed, keys / "mine.pub")
        for other in (whole[:-1], whole + b"\n", b""):
            path.write_bytes(other)
            refusal(signed, keys / "mine.pub")
        path.write_bytes(whole)
    check_signature(signed, [keys / "mine.pub"])


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_signature_is_refused(signed, keys, content):
    (signed / SIGNATURE).write_bytes(content)
    refusal(signed, keys / "mine.pub")


def test_a_signature_with_any_byte_changed_is_refused_or_of_the_same_files(signed, keys):
    whole = (signed / SIGNATURE).read_bytes()
    refused = 0
    for place in range(0, len(whole), EVERY):
        changed = bytearray(whole)
        changed[place] ^= 1
        (signed / SIGNATURE).write_bytes(changed)
        try:
            check_signature(signed, [keys / "mine.pub"])
        except ExpertError:
            refused += 1
    assert refused > 0.9 * len(whole) / EVERY


@pytest.mark.parametrize("change", ["removed", "renamed", "added", "foreign", "linked"])
def test_a_file_more_or_less_is_refused(signed, keys, change):
    card = signed / LAYOUT.card
    if change == "removed":
        card.unlink()
    elif change == "renamed":
        card.rename(signed / "adapter_config.json.bak")
    elif change == "added":
        name = next(
            n
            for n in ("adapter_config.json", "bottleneck_config.json")
            if not (signed / n).exists()
        )
        (signed / name).write_text("{}")
    elif change == "foreign":
        (signed / "notes").write_text("x")
    else:
        card.rename(signed.parent / "card")
        card.symlink_to(signed.parent / "card")
    refusal(signed, keys / "mine.pub")


def test_a_signature_that_is_no_file_is_refused(signed, keys):
    (signed / SIGNATURE).unlink()
    assert "isn't signed" in refusal(signed, keys / "mine.pub")
    (signed / SIGNATURE).mkdir()
    refusal(signed, keys / "mine.pub")
    (signed / SIGNATURE).rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(signed / SIGNATURE)
        refusal(signed, keys / "mine.pub")


def test_files_that_the_signer_left_out_are_not_signed(signed, keys):
    import model_signing

    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[LAYOUT.card, SIGNATURE])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys / "mine")
    config.set_hashing_config(hashing).sign(signed, signed / SIGNATURE)
    model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys / "mine.pub").verify(
        signed, signed / SIGNATURE
    )  # the library is content
    assert "it covers" in refusal(signed, keys / "mine.pub")


@pytest.mark.parametrize("key", ["odd", "locked", "mine.pub", "nothing", "."])
def test_a_key_that_can_not_sign_is_refused_and_leaves_no_signature(signed, keys, key):
    before = contents(signed)
    with pytest.raises(ExpertError, match=r"key|Key|sign") as caught:
        sign(signed, keys / key)
    assert str(keys / key) in str(caught.value)
    assert contents(signed) == before
    (signed / "notes").write_text("x")
    with pytest.raises(ExpertError, match="holds 'notes', which is no part of an expert"):
        sign(signed, keys / "mine")


@pytest.mark.parametrize("key", ["odd.pub", "mine", "nothing", "."])
def test_a_key_that_can_not_verify_is_refused(signed, keys, key):
    assert str(keys / key) in refusal(signed, keys / key)


def test_a_pushed_signature_is_required_by_pull(hub, signed, keys, tmp_path):
    pushed = push(signed, "me/reviews", sign=keys / "yours")
    assert SIGNATURE in hub.repositories["me/reviews"].commits[pushed.revision]
    pulled = pull("me/reviews", tmp_path / "pulled", signers=[keys / "yours.pub"])
    assert contents(pulled.directory) == contents(signed)
    check_signature(pulled.directory, [keys / "yours.pub"])
    with pytest.raises(ExpertError, match=r"hub:me/reviews isn't what a required signer signed"):
        pull("me/reviews", tmp_path / "no", signers=[keys / "mine.pub"])
    assert not (tmp_path / "no").exists()


def test_files_changed_on_the_hub_are_refused_before_they_are_read(
    hub, signed, keys, tmp_path, monkeypatch
):
    files = contents(signed)
    monkeypatch.setattr(Expert, "load", lambda *_: pytest.fail("it was read"))
    for name in files.keys() - {SIGNATURE}:
        hub.add("me/changed", {**files, name: files[name] + b" "})
        with pytest.raises(ExpertError, match="isn't what a required signer signed"):
            pull("me/changed", tmp_path / "no", signers=[keys / "mine.pub"])
    hub.add("me/unsigned", {n: files[n] for n in files if n != SIGNATURE})
    with pytest.raises(ExpertError, match="hub:me/unsigned isn't signed"):
        pull("me/unsigned", tmp_path / "no", signers=[keys / "mine.pub"])
    assert not (tmp_path / "no").exists()


def test_a_push_without_a_signature_takes_an_earlier_one_away(hub, signed, keys):
    push(signed, "me/reviews")
    (signed / SIGNATURE).unlink()
    later = push(signed, "me/reviews")
    assert SIGNATURE not in hub.repositories["me/reviews"].commits[later.revision]


def run(capsys, *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0), "".join(capsys.readouterr())


def test_the_commands_sign_and_require(hub, signed, keys, tmp_path, capsys):
    required = ("--require-signer", keys / "mine.pub")
    assert run(capsys, "push", signed, "me/reviews", "--sign", keys / "mine")[0] == 0
    assert run(capsys, "pull", "me/reviews", "--out", tmp_path / "pulled", *required)[0] == 0
    assert run(capsys, "check", tmp_path / "pulled", *required)[0] == 0
    (tmp_path / "pulled" / LAYOUT.card).write_text("another card")
    assert run(capsys, "check", tmp_path / "pulled")[0] == 0
    code, text = run(capsys, "check", tmp_path / "pulled", *required)
    assert code == 2
    assert "README.md" in text
    assert text.count("\n") < 6  # rich wraps one line
