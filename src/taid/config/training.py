"""The configuration of a training run."""

from taid.config.options import DataArguments, Quantization, TAIDConfig, changed, in_yaml, nearest, resolved

__all__ = ["DataArguments", "Quantization", "TAIDConfig", "changed", "in_yaml", "nearest", "resolved"]
