"""One of the compared systems on the generated phantom data, with as many parameters as DILBERT.

python train.py --config=configs/systems.py:hero --workdir=runs/hero

Systems: bert, videobert, cbt, hero, mmft_bert, actbert, dilbert (docs/reproduction.md), or a module of your own
(docs/extending.md). All of them, with intervals and tests:
python -m dilbert_jax.reproduce.
"""

from dilbert_jax.models import find_system
from dilbert_jax.reproduce.grid import MAIN_SHAPE, Cell, cell_config


def get_config(system: str = "dilbert"):
    size = MAIN_SHAPE if find_system(system).distilled else "matched"
    return cell_config(Cell("phantom", system, size, 0), "cpu")
