"""A base in memory: loading it, mixing vectors into it live, generating, and scoring replies."""

from lora_prefvec.inference.base import LoadedBase, load_base
from lora_prefvec.inference.generate import generate, stream
from lora_prefvec.inference.log_probs import PreferenceAccuracy, pair_log_probs, preference_accuracy
from lora_prefvec.inference.mixer import LiveMixer
from lora_prefvec.inference.render import RenderedPair, RenderedPairs, render_pairs

__all__ = [
    "LiveMixer",
    "LoadedBase",
    "PreferenceAccuracy",
    "RenderedPair",
    "RenderedPairs",
    "generate",
    "load_base",
    "pair_log_probs",
    "preference_accuracy",
    "render_pairs",
    "stream",
]
