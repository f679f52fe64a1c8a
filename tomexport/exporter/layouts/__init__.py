"""Checkpoint layouts, one file each: which keys are a model's own, and which can be left."""

from tomexport.exporter.layouts.ast import AST
from tomexport.exporter.layouts.augreg import AUGREG
from tomexport.exporter.layouts.cvt import CVT
from tomexport.exporter.layouts.deit3 import DEIT3
from tomexport.exporter.layouts.dtem import DTEM
from tomexport.exporter.layouts.evo_vit import EVO_VIT
from tomexport.exporter.layouts.hf_clip import HF_CLIP
from tomexport.exporter.layouts.hf_dinov2 import HF_DINOV2
from tomexport.exporter.layouts.hf_siglip import HF_SIGLIP
from tomexport.exporter.layouts.hf_vit import HF_VIT
from tomexport.exporter.layouts.lvvit import LVVIT
from tomexport.exporter.layouts.pvt import PVT
from tomexport.exporter.layouts.sret import SRET
from tomexport.exporter.layouts.swag import SWAG
from tomexport.exporter.layouts.timm import TIMM
from tomexport.exporter.layouts.videomae import VIDEOMAE

# the first that recognises a file
LAYOUTS = (
    DTEM,
    EVO_VIT,
    LVVIT,
    VIDEOMAE,
    DEIT3,
    TIMM,
    SRET,
    PVT,
    CVT,
    HF_VIT,
    HF_DINOV2,
    HF_CLIP,
    HF_SIGLIP,
    SWAG,
    AUGREG,
    AST,
)
