"""Networks that timm has not, one file each; they join timm's registry under names of their own."""

from tomexport.exporter.models import lvvit, sret

MODELS = (sret, lvvit)
