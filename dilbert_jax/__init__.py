"""DILBERT in JAX/Flax: a distilled video-language model that annotates ultrasound cine clips."""

__version__ = "0.1.0"
