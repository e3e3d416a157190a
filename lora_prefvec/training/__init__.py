"""Recipe -> adapters and vector, by DPO on a frozen 4-bit base."""

from lora_prefvec.training.grid import lattice, train_grid, with_weights
from lora_prefvec.training.training import Trained, plan, train

__all__ = ["Trained", "lattice", "plan", "train", "train_grid", "with_weights"]
