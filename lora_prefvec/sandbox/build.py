"""Builds the base model of the sandbox from its seed: `python -m lora_prefvec.sandbox.build [--out DIR]`.

A Llama of 2M parameters learns to reply as the grammar does, mediocre propensities included. It sees replies to every
task, so that a held-out task is one whose preferences were never trained, not one that the model cannot do. About four
minutes on two cores with bf16 matrix units.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_prefvec.artifact import atomic_folder
from lora_prefvec.output import out
from lora_prefvec.progress import progress, quiet_libraries
from lora_prefvec.sandbox import grammar
from lora_prefvec.sandbox.scorers import SCORERS, scores
from lora_prefvec.sandbox.world import REQUESTS, TASKS, prompts

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from lora_prefvec.inference.base import ComputeDtype, Quantization

BASE = Path(__file__).parent / "base"

SEED = 0
STEPS = 1800
BATCH = 32
LEARNING_RATE = 3e-3
WARMUP = 60
VOCABULARY = 1024
PROMPTS = 400  # held-out requests that the base is scored on
FORMS: tuple[tuple[Quantization, ComputeDtype], ...] = (("none", "float32"), ("nf4", "auto"))
BEGIN, USER, ASSISTANT, END, PAD = "<|begin|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on everything the world can say, with the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BEGIN, USER, ASSISTANT, END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer {SEED}")
    corpus = [request for task in TASKS for request in task.requests]
    corpus += [grammar.answer(task, rng).text for task in TASKS for _ in REQUESTS]
    corpus += [*grammar.REFUSALS, *grammar.ADMISSIONS] * len(REQUESTS)
    tokenizer.train_from_iterator(corpus, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained Llama; widths are multiples of 64, so that NF4's blocks fill whole rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"  # a third faster than SDPA on sentences this short
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    """Conversations and what the base should say in them.

    ids: [BATCH, length], padded on the right. `rows`, `columns`, `tokens`, `chances`: one entry for each token that can
    stand behind `ids[row, column]`; the chances at one place add up to 1.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    tokens: torch.Tensor
    chances: torch.Tensor

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Mean divergence (nats a token) of the model from the exact chances. logits: [BATCH, length, vocabulary]."""
        log_probs = logits.float().log_softmax(-1)[self.rows, self.columns, self.tokens]
        return (self.chances * (self.chances.log() - log_probs)).sum() / self.chances.sum()


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """Fresh conversations without end.

    The grammar knows what the base should say next and how often. Learning these chances, and not one sample of them,
    takes the noise out of training, and with it the odd word out of the replies.
    """
    import torch

    @functools.cache
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    rng = random.Random(f"conversations {SEED}")
    while True:
        conversations, entries = [], []
        for row in range(BATCH):
            task = rng.choice(TASKS)
            reply = grammar.reply(task, rng)
            ids = list(encode(f"{BEGIN}{USER}{rng.choice(task.requests)}{END}{ASSISTANT}"))
            pieces = reply.pieces
            for i, (piece, chances) in enumerate(zip(pieces, grammar.chances(task, reply), strict=True)):
                end = END if i == len(pieces) - 1 else ""
                said = encode(piece + end)
                possible = [(encode(text + end), chance) for text, chance in chances.items()]
                for position, token in enumerate(said):
                    possible = [(other, chance) for other, chance in possible if other[:position] == said[:position]]
                    total = sum(chance for _, chance in possible)
                    following: defaultdict[int, float] = defaultdict(float)
                    for other, chance in possible:
                        following[other[position]] += chance / total
                    entries += [(row, len(ids) - 1, other, chance) for other, chance in following.items()]
                    ids.append(token)
            conversations.append(torch.tensor(ids))
        padding = tokenizer.pad_token_id
        ids_of_rows = torch.nn.utils.rnn.pad_sequence(conversations, batch_first=True, padding_value=padding)
        yield Batch(ids_of_rows, *(torch.tensor(column) for column in zip(*entries, strict=True)))


def train(tokenizer: PreTrainedTokenizerFast, steps: int = STEPS) -> LlamaForCausalLM:
    """The base after `steps` of learning what the grammar would say, in bf16 as it is stored."""
    import torch

    model = new_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    with progress("training the base", steps) as bar:
        for _, batch in zip(range(steps), batches(tokenizer), strict=False):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=batch.ids).logits
            loss = batch.loss(logits)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            bar.advance(info=f"loss {loss.item():.4f}")
    return model.eval().to(torch.bfloat16)


def write(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put the base into `folder`, wholly or not at all; a base that is there is replaced."""
    with atomic_folder(folder, force=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def measure(folder: Path) -> list[list[Any]]:
    """Scores of the base on held-out prompts, one row each: sampled and greedy, in fp32 and in NF4."""
    from lora_prefvec.inference import generate, load_base

    requests = prompts("held_out", PROMPTS, SEED)
    columns = []
    with progress("scoring the base", 4 * len(requests)) as bar:
        for quantization, dtype in FORMS:
            base = load_base(folder, quantization=quantization, device="cpu", compute_dtype=dtype)
            for temperature in (1.0, 0.0):
                replies = generate(base, requests, max_new_tokens=64, temperature=temperature, seed=SEED, bar=bar)
                columns.append(scores(zip(requests, replies, strict=True)))
    return [[name, *(column[name] for column in columns)] for name in SCORERS]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write, measure."""
    parser = argparse.ArgumentParser(description="Build the sandbox's base model from its seed.")
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write; default: the one in the package")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps; default: {STEPS}")
    options = parser.parse_args(arguments)
    quiet_libraries()
    tokenizer = train_tokenizer()
    write(options.out, train(tokenizer, options.steps), tokenizer)
    out.table(
        ["score", "fp32", "fp32 greedy", "nf4", "nf4 greedy"],
        measure(options.out),
        title=f"{PROMPTS} held-out prompts, at temperature 1 and greedy",
    )


if __name__ == "__main__":
    main()
