"""Checkpoint layouts, one file each: which keys are a model's own, and which can be left."""

from tomexport.exporter.layouts.dtem import DTEM
from tomexport.exporter.layouts.evo_vit import EVO_VIT
from tomexport.exporter.layouts.lvvit import LVVIT
from tomexport.exporter.layouts.sret import SRET
from tomexport.exporter.layouts.timm import TIMM

LAYOUTS = (DTEM, EVO_VIT, LVVIT, TIMM, SRET)  # the first that recognises a file
