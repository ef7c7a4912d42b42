"""One method a file; importing this package registers them all."""

from vlmprune.pruners.compose import Compose
from vlmprune.pruners.divprune import DivPrune
from vlmprune.pruners.fastv import FastV
from vlmprune.pruners.pool import Pool
from vlmprune.pruners.random import Random
from vlmprune.pruners.uniform import Uniform
from vlmprune.pruners.visiondrop import VisionDrop
from vlmprune.pruners.visionzip import VisionZip

__all__ = ["Compose", "DivPrune", "FastV", "Pool", "Random", "Uniform", "VisionDrop", "VisionZip"]
