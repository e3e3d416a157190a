"""Methods side by side: trains what is missing, sweeps every knob, reports."""

from lora_prefvec.experiments.compare import Compared, compare, interval, table, to_dict
from lora_prefvec.experiments.report import write_report
from lora_prefvec.experiments.spec import Comparison, read_comparison

__all__ = ["Compared", "Comparison", "compare", "interval", "read_comparison", "table", "to_dict", "write_report"]
