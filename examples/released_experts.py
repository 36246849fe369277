"""The experts that the paper's authors published, as expert folders:

    python examples/released_experts.py --base google/t5-xl-lm-adapt --gates P3_Phatgoose/best.pt \
        --means P3_AverageActivation/best.pt --names names.txt --out experts

A checkpoint of theirs holds all E experts of a pool. At each linear layer ("site") of n inputs and
d outputs, with i from 0 to E - 1, it has

    <site>._addons.expert_lora.layer1__i          [n, r]  Aᵀ of expert i
    <site>._addons.expert_lora.layer2__i          [r, d]  Bᵀ; the update is B A u / r
    <site>._addons.router.expert_embeddings__i    [n]     a vector: gate or mean activation
and often the base's embeddings of tokens, which tell another base. No file says what its vectors
are: --gates (*_Phatgoose) and --means (*_AverageActivation) do, of which one is enough. *_Retrieval
has no vectors at sites, *_MergedExperts no single experts: both are refused.

A PyTorch file is a pickle, which could run code. A process of its own reads it by
`torch.load(weights_only=True)`, which refuses all but tensors, and writes safetensors. Only these
are read here. --out appears when all is checked, and needs twice the checkpoint's size meanwhile.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from phatgoose.base.loading import load_base
from phatgoose.errors import ExpertError, PhatgooseError
from phatgoose.experts.adapter_files import PEFT_FILES, check_parts, read_tensors
from phatgoose.experts.expert import Expert
from phatgoose.experts.lora import LoraFactors
from phatgoose.files import new_directory, one_line, reading, regular_file
from phatgoose.sites import FLOATS, find_sites

KEY = re.compile(r"(.+)\._addons\.(?:expert_lora|router)\.(layer[12]|expert_embeddings)__(\d+)")
TOKENS = "encoder.embed_tokens.weight"
UNUSED = re.compile(r"decoder\.embed_tokens\.weight|.+\.expert_input_gate")  # copies


def convert(checkpoint, folder):
    """Write `<i>.safetensors` for every expert into `folder`. This runs in a process of its own."""
    content = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError("wanted tensors by name")
    files = {}
    for key, value in content.items():
        if match := KEY.fullmatch(key):
            site, part, number = match.groups()
            files.setdefault(number, {})[f"{site}.{part}"] = value
        elif key == TOKENS:
            files["tokens"] = {TOKENS: value}
        elif not UNUSED.fullmatch(key):
            raise ValueError(f"it has {key!r}")
    numbers = files.keys() - {"tokens"}
    if not numbers or numbers != {str(number) for number in range(len(numbers))}:
        raise ValueError("wanted keys that end in layer1__0, layer1__1 and so on")
    left = checkpoint.stat().st_size  # a small file can repeat one number a billion times
    for name, tensors in files.items():
        for key, value in tensors.items():
            is_plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
            left -= value.nbytes if is_plain else 0
            if not is_plain or value.dtype not in FLOATS or left < 0:
                raise ValueError(f"{key} is no tensor of numbers, or larger than the file")
            tensors[key] = value.detach().clone(memory_format=torch.contiguous_format)
        save_file(tensors, folder / f"{name}.safetensors")
        tensors.clear()


def converted(checkpoint, folder, base):
    """The experts' files in `folder`, by number, made by a process that reads the `checkpoint`."""
    folder.mkdir()
    command = [sys.executable, __file__, "--convert", regular_file(checkpoint).resolve(), folder]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"its reader ended with {done.returncode}"]
        raise ExpertError(f"{checkpoint} is no checkpoint of the released experts: {told[-1]}")
    own = base.model.get_input_embeddings().weight
    if (folder / "tokens.safetensors").exists():
        got, own = read_tensors(folder / "tokens.safetensors")[TOKENS].float(), own.float()
        if got.shape != own.shape or not torch.allclose(got, own, rtol=0.01):
            raise ExpertError(f"{checkpoint} is of another base than {base.id}: tokens differ.")
    return sorted(folder.glob("[0-9]*.safetensors"), key=lambda path: int(path.stem))


def split(base, checkpoints, names, out):
    """Write experts from `checkpoints`, paths by "gates" or "means", into the new folder `out`."""
    sites, forms = find_sites(base.model), {}
    for name, site in sites.items():
        n, d, r = site.in_features, site.out_features, f"r of {name}"
        parts = {"layer1": (n, r), "layer2": (r, d), "expert_embeddings": (n,)}
        forms |= {f"{name}.{part}": form for part, form in parts.items()}
    about = PEFT_FILES.about(base, base.model.get_submodule(next(iter(sites))))
    with new_directory(out, ExpertError) as work:
        scratch = work.parent  # which goes in the end
        files = {kind: converted(path, scratch / kind, base) for kind, path in checkpoints.items()}
        counts = {kind: len(numbered) for kind, numbered in files.items()}
        names = names or [f"expert{number}" for number in range(max(counts.values()))]
        if {*counts.values(), len({*names})} != {len(names)}:
            raise ExpertError(f"Experts: {counts}, different names: {len({*names})}; wanted equal.")
        for number, name in enumerate(names):
            read = {kind: read_tensors(numbered[number]) for kind, numbered in files.items()}
            loras, vectors = {}, {"gates": {}}
            for kind, tensors in read.items():
                check_parts(f"{checkpoints[kind]}, expert {number}", forms, tensors)
                vectors[kind] = {site: tensors[f"{site}.expert_embeddings"] for site in sites}
            one, other = next(iter(read.values())), list(read.values())[-1]  # maybe the same
            for site in sites:
                A, B = one[f"{site}.layer1"].T, one[f"{site}.layer2"].T
                if not torch.allclose(A.float(), other[f"{site}.layer1"].T.float(), rtol=0.01):
                    raise ExpertError(f"Expert {number} differs between the files, at {site}.")
                loras[site] = LoraFactors(A, B, scale=1 / len(A))
            record = {"imported_from": f"{[path.name for path in checkpoints.values()]} {number}"}
            options = {"base": base, "name": name, "hyperparameters": record, **vectors}
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                adapter = LoraFactors.write(Path(folder), loras, about)
                Expert.from_peft(adapter, **options).save(work / name)
        return names


def main(words):
    """0 after what the command line `words` ask for, 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="base model, a Hub id or a folder")
    parser.add_argument("--gates", type=Path, help="checkpoint whose vectors are gates")
    parser.add_argument("--means", type=Path, help="checkpoint whose vectors are mean activations")
    parser.add_argument("--names", type=Path, help="file of names, one a line, by number")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the experts")
    try:
        if words[:1] == ["--convert"]:
            with reading("The file"):  # torch raises errors of many kinds
                return convert(*map(Path, words[1:]))
        given = parser.parse_args(words)
        checkpoints = {k: path for k in ("gates", "means") if (path := getattr(given, k))}
        if not checkpoints:
            parser.error("give --gates or --means or both")
        with reading(given.names):
            names = given.names.read_text(encoding="utf-8").split() if given.names else []
        names = split(load_base(given.base, device="cpu"), checkpoints, names, given.out)
        print(f"{len(names)} experts with {' and '.join(checkpoints)} in {given.out}")
    except PhatgooseError as problem:
        print(one_line(problem, 600), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
