"""Preference pairs: published forms in, one form out; label swapping, splits and statistics."""

from lora_prefvec.data.describe import Lengths, Statistics, statistics
from lora_prefvec.data.forms import FORMS
from lora_prefvec.data.loading import load
from lora_prefvec.data.pairs import Content, Message, Pair, PairSet, split_held_out, swap

__all__ = [
    "FORMS",
    "Content",
    "Lengths",
    "Message",
    "Pair",
    "PairSet",
    "Statistics",
    "load",
    "split_held_out",
    "statistics",
    "swap",
]
