"""XLA flags that halve the time to compile, for what compiles for minutes and then runs for seconds."""

import importlib.metadata


def quick_compilation(flags: str) -> str:
    """XLA_FLAGS with less optimization; what `flags` hold comes after, and wins.

    LLVM's first level of optimization is enough for short runs, and without fusion emitters XLA:CPU compiles a quarter
    faster. Numbers may differ in their last digits from those of another level. Level 0 compiles in half the time again
    and is no choice: with jaxlib 0.10.2 and without fusion emitters, gradients of the 3-D convolution came out wrong.

    XLA reads XLA_FLAGS once, at the first computation.
    """
    quick = ["--xla_backend_optimization_level=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA aborts on a flag that it does not know
        quick.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join([*quick, *(flag for flag in flags.split() if flag not in quick)])
