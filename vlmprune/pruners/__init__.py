"""One method a file; importing this package registers them all."""

from vlmprune.pruners.divprune import DivPrune
from vlmprune.pruners.pool import Pool
from vlmprune.pruners.random import Random
from vlmprune.pruners.uniform import Uniform

__all__ = ["DivPrune", "Pool", "Random", "Uniform"]
