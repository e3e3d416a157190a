"""Recipe -> adapters and vector, by DPO on a frozen 4-bit base."""

from lora_prefvec.training.training import Trained, plan, train

__all__ = ["Trained", "plan", "train"]
