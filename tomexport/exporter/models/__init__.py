"""Networks that timm has not, one file each; they join timm's registry under names of their own."""

from tomexport.exporter.models import ast, cvt, lvvit, pvt, sret, videomae

MODELS = (sret, lvvit, pvt, cvt, videomae, ast)
