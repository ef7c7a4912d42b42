"""One method a file; importing this package registers them all."""

from vlmprune.pruners.atp import ATP, ATPCalibrated
from vlmprune.pruners.cdpruner import CDPruner
from vlmprune.pruners.compose import Compose
from vlmprune.pruners.divprune import DivPrune
from vlmprune.pruners.fastv import FastV
from vlmprune.pruners.globalcom2 import GlobalCom2
from vlmprune.pruners.merge import Merge
from vlmprune.pruners.mmtok import MMTok
from vlmprune.pruners.pool import Pool
from vlmprune.pruners.pyramiddrop import PyramidDrop
from vlmprune.pruners.random import Random
from vlmprune.pruners.scope import PerFrame, PerTile
from vlmprune.pruners.todre import ToDRE
from vlmprune.pruners.transprune import TransPrune
from vlmprune.pruners.uniform import Uniform
from vlmprune.pruners.visiondrop import VisionDrop
from vlmprune.pruners.visionzip import VisionZip

__all__ = [
    "ATP",
    "ATPCalibrated",
    "CDPruner",
    "Compose",
    "DivPrune",
    "FastV",
    "GlobalCom2",
    "MMTok",
    "Merge",
    "PerFrame",
    "PerTile",
    "Pool",
    "PyramidDrop",
    "Random",
    "ToDRE",
    "TransPrune",
    "Uniform",
    "VisionDrop",
    "VisionZip",
]
