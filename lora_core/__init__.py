"""LoRA training in packs, and the law that makes alpha a gauge. Needs torch and nothing else."""

__version__ = "0.1.0"
