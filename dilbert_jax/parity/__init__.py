"""PyTorch counterpart of the model: weights in and out, and the agreement of both implementations.

Needs the extra `torch`; nothing outside of this package imports PyTorch. `names` works without it.
"""

MISSING_EXTRA = "dilbert_jax.parity needs PyTorch and safetensors: pip install 'dilbert-jax[torch]'"
