"""Networks that timm has not, one file each; they join timm's registry under names of their own."""

from tomexport.exporter.models import ast, lvvit, sret, videomae

MODELS = (sret, lvvit, videomae, ast)
