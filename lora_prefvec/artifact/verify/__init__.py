"""What each engine would make of an adapter: rules as data, checked without building a model."""

from lora_prefvec.artifact.verify.report import Finding, Report, verify
from lora_prefvec.artifact.verify.rules import ENGINES, RULES, Rule

__all__ = ["ENGINES", "RULES", "Finding", "Report", "Rule", "verify"]
