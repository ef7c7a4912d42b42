"""One method a file; importing this package registers them all."""

from vlmprune.pruners.atp import ATP, ATPCalibrated
from vlmprune.pruners.cdpruner import CDPruner
from vlmprune.pruners.compose import Compose
from vlmprune.pruners.corematching import CoreMatching
from vlmprune.pruners.divprune import DivPrune
from vlmprune.pruners.dycoke import DyCoke
from vlmprune.pruners.evs import EVS
from vlmprune.pruners.explain import Explain, FirstLayerAttention
from vlmprune.pruners.fastv import FastV
from vlmprune.pruners.fastvid import FastVID
from vlmprune.pruners.flashvid import FlashVID
from vlmprune.pruners.fopru import FoPru
from vlmprune.pruners.framefusion import FrameFusion
from vlmprune.pruners.free_video_llm import FreeVideoLLM
from vlmprune.pruners.globalcom2 import GlobalCom2
from vlmprune.pruners.gsearch import GSearch, PSigmoid
from vlmprune.pruners.hicom import HICom, HIComLocal
from vlmprune.pruners.holitom import HoliTom
from vlmprune.pruners.merge import Merge
from vlmprune.pruners.mmtok import MMTok
from vlmprune.pruners.mustdrop import MustDrop
from vlmprune.pruners.pitome import PiToMe
from vlmprune.pruners.pool import Pool
from vlmprune.pruners.pyramiddrop import PyramidDrop
from vlmprune.pruners.qtsplus import QTSplus, QTSplusTrainingFree
from vlmprune.pruners.random import Random
from vlmprune.pruners.scope import PerFrame, PerTile
from vlmprune.pruners.sparsevlm import SparseVLM
from vlmprune.pruners.todre import ToDRE
from vlmprune.pruners.token_correlation import TokenCorrelation
from vlmprune.pruners.tome import ToMe
from vlmprune.pruners.transprune import TransPrune
from vlmprune.pruners.uniform import Uniform
from vlmprune.pruners.vidcom2 import VidCom2
from vlmprune.pruners.visiondrop import VisionDrop
from vlmprune.pruners.visionzip import VisionZip
from vlmprune.pruners.vqtoken import KMeansTokens, VQToken
from vlmprune.pruners.yopo import YOPO

__all__ = [
    "ATP",
    "EVS",
    "YOPO",
    "ATPCalibrated",
    "CDPruner",
    "Compose",
    "CoreMatching",
    "DivPrune",
    "DyCoke",
    "Explain",
    "FastV",
    "FastVID",
    "FirstLayerAttention",
    "FlashVID",
    "FoPru",
    "FrameFusion",
    "FreeVideoLLM",
    "GSearch",
    "GlobalCom2",
    "HICom",
    "HIComLocal",
    "HoliTom",
    "KMeansTokens",
    "MMTok",
    "Merge",
    "MustDrop",
    "PSigmoid",
    "PerFrame",
    "PerTile",
    "PiToMe",
    "Pool",
    "PyramidDrop",
    "QTSplus",
    "QTSplusTrainingFree",
    "Random",
    "SparseVLM",
    "ToDRE",
    "ToMe",
    "TokenCorrelation",
    "TransPrune",
    "Uniform",
    "VQToken",
    "VidCom2",
    "VisionDrop",
    "VisionZip",
]
