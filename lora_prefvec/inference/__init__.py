"""A base in memory: loading it, mixing vectors into it live, generating, and scoring replies."""

from lora_prefvec.inference.base import LoadedBase, load_base
from lora_prefvec.inference.continuous import ContinuousBatch
from lora_prefvec.inference.generate import encode, generate, stream
from lora_prefvec.inference.hidden import final_states, last_states
from lora_prefvec.inference.log_probs import PreferenceAccuracy, pair_log_probs, preference_accuracy
from lora_prefvec.inference.mixer import LiveMixer
from lora_prefvec.inference.render import RenderedPair, RenderedPairs, render_pairs
from lora_prefvec.inference.reply import Reply, Request, TokenLogProb
from lora_prefvec.inference.sampling import Sampling
from lora_prefvec.inference.worker import Event, QueueFull, Ticket, Worker, apieces, pieces

__all__ = [
    "ContinuousBatch",
    "Event",
    "LiveMixer",
    "LoadedBase",
    "PreferenceAccuracy",
    "QueueFull",
    "RenderedPair",
    "RenderedPairs",
    "Reply",
    "Request",
    "Sampling",
    "Ticket",
    "TokenLogProb",
    "Worker",
    "apieces",
    "encode",
    "final_states",
    "generate",
    "last_states",
    "load_base",
    "pair_log_probs",
    "pieces",
    "preference_accuracy",
    "render_pairs",
    "stream",
]
