"""TFDS builders of the ultrasound data sets; installed as ``dilbert_jax.data``."""
