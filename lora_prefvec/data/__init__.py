"""Preference pairs: published forms in, one form out; label swapping, splits and statistics."""

from lora_prefvec.data.describe import Lengths, Statistics, statistics
from lora_prefvec.data.forms import FORMS
from lora_prefvec.data.loading import load, load_rated
from lora_prefvec.data.pairs import Content, Message, Pair, PairSet, split_held_out, swap
from lora_prefvec.data.rated import RatedPair, RatedReplies, RatedReply, RatedSet, rated_pairs

__all__ = [
    "FORMS",
    "Content",
    "Lengths",
    "Message",
    "Pair",
    "PairSet",
    "RatedPair",
    "RatedReplies",
    "RatedReply",
    "RatedSet",
    "Statistics",
    "load",
    "load_rated",
    "rated_pairs",
    "split_held_out",
    "statistics",
    "swap",
]
