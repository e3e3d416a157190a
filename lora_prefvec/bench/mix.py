"""What live mixing costs: forwards, decoding, switching and whole requests, beside the bare model and beside PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_prefvec.artifact import resolve_base
from lora_prefvec.bench.measure import Cost, Growth, Row, ratio, rounds, timed, within
from lora_prefvec.bench.shapes import LLAMA_8B, QUICK, Llama, random_vector
from lora_prefvec.inference import LiveMixer, LoadedBase, generate
from lora_prefvec.progress import progress
from lora_prefvec.vector import PreferenceVector

RANK = 16
WIDE = Llama(1024, 2816, 6, 16, 4, 4096)
ROWS, TOKENS = 8, 128  # of a forward
BARS = {1: 1.0, 4: 0.4, 16: 0.2}  # vectors -> part of PEFT's overhead
STEPS = 32  # of decoding
REQUESTS, NEW_TOKENS = 16, 64
MIXED = 4  # vectors of a request


def run(*, quick: bool = False) -> list[Row]:
    """Measure all rows, on CUDA where there is one; `quick` takes small shapes, whose figures say nothing of bars."""
    shape = QUICK if quick else WIDE
    rows = []
    with progress("bench mix", len(BARS) + 4) as bar:
        for count in BARS:
            rows.append(forward(shape, count))
            bar.advance(info=f"{count} vectors")
        for measure, info in (
            (partial(decode, shape), "decoding"),
            (partial(switching, QUICK if quick else LLAMA_8B), "switching"),
            (partial(requests, shape, 8 if quick else NEW_TOKENS), "requests"),
            (partial(unchanged, shape), "attach and detach"),
        ):
            rows.append(measure())
            bar.advance(info=info)
    return rows


def forward(shape: Llama, count: int) -> Row:
    """A forward with `count` vectors active: what it takes more than the bare model, ours beside PEFT's."""
    costs = forwards(shape, count, RANK)
    base, ours, peft = (costs[name].seconds for name in ("bare", "ours", "peft"))
    work = f"what {count} active rank-{RANK} vectors add to a forward of {ROWS} x {TOKENS} tokens, width {shape.hidden}"
    note = f"bare {1000 * base:.0f} ms; times {ours / base:.2f} with ours, times {peft / base:.2f} with PEFT's"
    return ratio(work, ours - base, peft - base, BARS[count], note=note)


def decode(shape: Llama) -> Row:
    """One row, one token at a time, with two vectors active."""
    bare, mixed = random_model(shape), random_model(shape)
    with LiveMixer(mixed, vectors(shape, 2)) as mixer, torch.inference_mode():
        mixer.set_mix(dict.fromkeys(mixer.names, 0.5))
        costs = rounds({"bare": lambda: steps(bare), "ours": lambda: steps(mixed)}, repeats=9)
    ours, base = costs["ours"].seconds, costs["bare"].seconds
    return ratio(f"a token of one row, 2 rank-{RANK} vectors active, beside the bare model", ours, base, 1.15)


def steps(model: Any) -> Cost:
    """A token, as the mean of `STEPS` behind a short prompt."""
    past = model(input_ids=some_tokens(model, 1, 16), use_cache=True).past_key_values
    token = some_tokens(model, 1, 1)

    def write() -> None:
        for _ in range(STEPS):
            model(input_ids=token, past_key_values=past, use_cache=True)

    return Cost(measured(write, model.device).seconds / STEPS)


def switching(shape: Llama) -> Row:
    """Other coefficients for 16 vectors at all modules; the slowest of three ways to change them."""
    layers = skeleton(shape)
    vector = random_vector(shape, RANK, 0)
    names = [str(number) for number in range(16)]
    ways: dict[str, Callable[[float], Any]] = {
        "a number each": lambda c: dict.fromkeys(names, c),
        "to and from 0": lambda c: {name: c for name in names if c > 0.5 or name != "7"},
        "a mix for each of 32 rows": lambda c: [dict.fromkeys(names[row % 8 :][:4], c + row) for row in range(32)],
    }
    found = {}
    with LiveMixer(layers, dict.fromkeys(names, vector), dtype=torch.bfloat16) as mixer:
        for way, mix in ways.items():
            mixer.set_mix(mix(0.1))
            mixes = [mix(0.2 + 0.1 * step) for step in range(8)]

            def change(mixes: list[Any] = mixes) -> None:
                for one in mixes:
                    mixer.set_mix(one)

            cost = rounds({way: partial(measured, change, next(layers.parameters()).device)})[way]
            found[way] = cost.seconds / len(mixes)
    modules = len(shape.linear())
    note = ", ".join(f"{way} {1000 * seconds:.2f} ms" for way, seconds in found.items())
    work = f"other coefficients for 16 vectors, {modules} modules of width {shape.hidden}"
    return within(work, max(found.values()), 0.005, "s", note=note)


def requests(shape: Llama, new_tokens: int) -> Row:
    """Greedy replies to 16 prompts with 16 mixes of four vectors: one batch, beside PEFT composing mix by mix."""
    shape = replace(shape, vocab=1024)  # the sandbox's
    mixed = loaded(random_model(shape))
    adapted = loaded(peft_model(shape, MIXED, RANK))
    prompts = [f"request {number}" for number in range(REQUESTS)]
    names = list(vectors(shape, MIXED))
    mixes = [{name: (row + 1) / REQUESTS - 0.3 * place for place, name in enumerate(names)} for row in range(REQUESTS)]
    with LiveMixer(mixed.model, vectors(shape, MIXED)) as mixer:

        def ours() -> None:
            generate(mixed, prompts, max_new_tokens=new_tokens, temperature=0, mixer=mixer, mixes=mixes)

        def peft() -> None:
            for prompt, mix in zip(prompts, mixes, strict=True):
                peft_reply(adapted, prompt, mix, new_tokens)

        device = mixed.device
        works = {"ours": partial(measured, ours, device), "peft": partial(measured, peft, device)}
        costs = rounds(works, patience=20.0)
    written = REQUESTS * new_tokens
    ours_rate, peft_rate = (written / costs[who].seconds for who in ("ours", "peft"))
    work = f"{REQUESTS} requests with {REQUESTS} mixes of {MIXED} vectors, {new_tokens} new tokens each"
    note = "ours in one batch; PEFT one by one, each mix by add_weighted_adapter (cat) and transformers' generate"
    return Row(work, ours_rate, peft_rate, "tokens/s", ours_rate / peft_rate, "at least", 5.0, note=note)


def unchanged(shape: Llama) -> Row:
    """Bytes of the model that differ, and hooks that are left, after vectors were attached, used and detached."""
    model = random_model(shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with LiveMixer(model, vectors(shape, 2)) as mixer, torch.inference_mode():
        mixer.set_mix(dict.fromkeys(mixer.names, 1.0))
        model(input_ids=some_tokens(model, 1, 16))
    after = model.state_dict()
    names = before.keys() | after.keys()
    changed = sum(
        before[name].nbytes if name not in after else int((bytes_of(before[name]) != bytes_of(after[name])).sum())
        for name in names
    )
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    work = "attach and detach: bytes of the model that differ, and hooks left"
    return within(work, changed + hooks, 0, "", note=f"of {sum(one.nbytes for one in before.values()) / 1e6:.0f} MB")


def growth(*, quick: bool = False) -> list[Growth]:
    """A forward against the number of vectors, and against their rank: bare, ours and PEFT's."""
    shape = QUICK if quick else WIDE
    counts = [1, 2, 4] if quick else [1, 2, 4, 8, 16, 32, 64]
    ranks = [4, 8] if quick else [4, 8, 16, 32, 64, 128, 256]
    names = {"bare": "bare model", "ours": "live mix", "peft": "PEFT"}
    size = f"{ROWS} x {TOKENS} tokens, width {shape.hidden}, {shape.layers} layers"
    with progress("bench mix, growth", len(counts) + len(ranks)) as bar:

        def lines(cases: Sequence[tuple[int, int]]) -> dict[str, list[float | None]]:
            found: dict[str, list[float | None]] = {shown: [] for shown in names.values()}
            for count, rank in cases:
                costs = forwards(shape, count, rank, repeats=3)
                for name, shown in names.items():
                    found[shown].append(costs[name].seconds)
                bar.advance(info=f"{count} vectors of rank {rank}")
            return found

        of_counts, of_ranks = lines([(count, RANK) for count in counts]), lines([(4, rank) for rank in ranks])
        return [
            Growth(f"Forward with rank-{RANK} vectors, {size}", "active vectors", counts, of_counts),
            Growth(f"Forward with four vectors, {size}", "rank of each vector", ranks, of_ranks),
        ]


def forwards(shape: Llama, count: int, rank: int, *, repeats: int = 9) -> dict[str, Cost]:
    """A forward of the bare model, of one with all vectors mixed live, and of one with all of them active in PEFT."""
    bare, mixed, adapted = random_model(shape), random_model(shape), peft_model(shape, count, rank)
    ids = some_tokens(bare, ROWS, TOKENS)
    with LiveMixer(mixed, vectors(shape, count, rank)) as mixer, torch.inference_mode():
        mixer.set_mix(dict.fromkeys(mixer.names, 1.0))
        models = {"bare": bare, "ours": mixed, "peft": adapted}
        works = {name: partial(one, input_ids=ids, use_cache=False) for name, one in models.items()}
        for work in works.values():  # the first call of a library sets it up
            work()
        measures = {name: partial(measured, work, ids.device) for name, work in works.items()}
        return rounds(measures, repeats=repeats)


def measured(work: Callable[[], object], device: torch.device) -> Cost:
    """The cost of a call, until the device has done what it was given."""

    def done() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return timed(done)


def random_model(shape: Llama) -> Any:
    """A Llama of this shape with random float32 weights, always the same ones."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False).eval()


def skeleton(shape: Llama) -> nn.Module:
    """The linear layers of a model by their names, with weights that take no memory: nothing runs through them."""
    root = nn.Module()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, (out, in_) in shape.linear().items():
        path, _, leaf = name.rpartition(".")
        parent = root
        for part in path.split("."):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        layer = nn.Linear(in_, out, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.zeros(1, 1, device=device).expand(out, in_), requires_grad=False)
        parent.add_module(leaf, layer)
    return root


def vectors(shape: Llama, count: int, rank: int = RANK) -> dict[str, PreferenceVector]:
    """Random vectors over all linear layers, always the same ones."""
    return {f"vector-{seed}": random_vector(shape, rank, seed) for seed in range(count)}


def peft_model(shape: Llama, count: int, rank: int) -> Any:
    """The random model in PEFT, with the same vectors as adapters, all of them active."""
    from peft import LoraConfig, get_peft_model

    leaves = sorted({module.rpartition(".")[2] for module in shape.linear()})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=leaves)
    adapters = vectors(shape, count, rank)
    first, *others = adapters
    model = get_peft_model(random_model(shape), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    for name, vector in adapters.items():
        for module, delta in vector.deltas.items():
            layer = model.base_model.model.get_submodule(module)
            layer.lora_A[name].weight.data.copy_(delta.A)
            layer.lora_B[name].weight.data.copy_(delta.B)
    model.base_model.set_adapter(list(adapters))
    return model.requires_grad_(False).eval()


def peft_reply(base: LoadedBase, prompt: str, mix: Mapping[str, float], new_tokens: int) -> str:
    """A greedy reply with a mix that PEFT makes one adapter of; of its ways, the one that writes fastest."""
    from lora_prefvec.inference.render import chat_ids

    model = base.model
    model.add_weighted_adapter(list(mix), list(mix.values()), "mix", combination_type="cat")
    model.set_adapter("mix")
    prompt_ids = chat_ids(base.tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = torch.tensor([prompt_ids], device=base.device)
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
    model.delete_adapter("mix")
    reply: str = base.tokenizer.decode(found[0, len(prompt_ids) :], skip_special_tokens=True)
    return reply


def loaded(model: Any) -> LoadedBase:
    """A model with the sandbox's tokenizer, whose replies end at nothing but their limit."""
    from transformers import AutoTokenizer

    folder = resolve_base("sandbox")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.eos_token = None
    return LoadedBase(model=model, tokenizer=tokenizer, path=folder, quantization="none")


def some_tokens(model: Any, rows: int, tokens: int) -> Tensor:
    """Random token ids, [rows, tokens]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=generator).to(model.device)


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in one row."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
