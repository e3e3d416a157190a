"""Recipe -> adapters and vector, by DPO on a frozen 4-bit base."""

from lora_prefvec.training.methods.preference_vector import Trained, train

__all__ = ["Trained", "train"]
