"""What papers publish of each method, beside our MACs for the same model and schedule.

GMACs are what papers call GFLOPs: products, attention's included. Accuracies are theirs, on
ImageNet-1k, of weights that they trained with the method unless it says so.
"""

from __future__ import annotations

from typing import NamedTuple

import tomexport

_CUT = "DynamicViT's page cuts the second digit off"
_WHERE = "at which blocks, the slides do not say"
_MEAN = "theirs is a mean over images that keep different numbers"


class Paper(NamedTuple):
    """Where figures are from."""

    method: str
    title: str


class Figure(NamedTuple):
    """A published row.

    Attributes:
        method: ours, or the name of one that is refused; empty for the model as it is.
        model: its name here.
        schedule: that of the paper; empty where it cannot be said.
        gmacs: as published, in that many digits.
        top1: % as published.
        why: what explains a difference of more than 1 %, or what else there is to say.
        slides: whether GMACs count as the slides on SReT do (`Plan.flops_slides`).
    """

    method: str
    model: str
    schedule: str
    gmacs: str
    top1: str
    why: str = ""
    slides: bool = False

    @property
    def ours(self) -> float | None:
        """Our GMACs; None without a schedule."""
        if not self.schedule:
            return None
        plan = tomexport.plan(self.model, self.schedule, method=self.method or None)
        return (plan.flops_slides if self.slides else plan.macs) / 1e9

    @property
    def agrees(self) -> bool:
        """Whether ours is the published one to 1 %, as far as its digits say."""
        assert self.ours is not None
        last_digit = 10.0 ** -len(self.gmacs.partition(".")[2])
        return abs(self.ours - float(self.gmacs)) <= 0.01 * float(self.gmacs) + last_digit / 2


PAPERS = (
    Paper("tome", "Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023"),
    Paper("dtem", "Lee and Hong, Learning to Merge Tokens via Decoupled Embedding, NeurIPS 2024"),
    Paper("diffrate", "Chen et al., DiffRate, ICCV 2023"),
    Paper("evit", "Liang et al., Not All Patches are What You Need (EViT), ICLR 2022"),
    Paper("dynamicvit", "Rao et al., DynamicViT, NeurIPS 2021"),
    Paper("dtps, etps", "Wei et al., Joint Token Pruning and Squeezing, CVPR 2023"),
    Paper("evo-vit", "Xu et al., Evo-ViT, AAAI 2022"),
    Paper("ats", "Fayyaz et al., Adaptive Token Sampling, ECCV 2022"),
    Paper("a-vit", "Yin et al., A-ViT, CVPR 2022"),
    Paper("spvit", "Kong et al., SPViT, ECCV 2022"),
    Paper("ia-red2", "Pan et al., IA-RED², NeurIPS 2021"),
    Paper("tome on SReT", "the slides on SReT (Shen et al., ECCV 2022) with token merging"),
)
_T, _S, _B = (f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))
# share, GMACs, top-1 with and without the fused token
_EVIT = (
    ("0.9", "4.0", "79.8", "79.9"), ("0.8", "3.5", "79.8", "79.7"), ("0.7", "3.0", "79.5", "79.4"),
    ("0.6", "2.6", "78.9", "79.1"), ("0.5", "2.3", "78.5", "78.4"),
)  # fmt: skip
_SLIDES = (
    ("", "none", "1.91", "77.42"), ("tome", "const:10", "1.32", "71.01"),
    ("tome", "linear:10", "1.46", "74.64"), ("tome", "exp:0.25,0", "1.49", "75.95"),
    ("tome", "exp:0.1,0.6", "1.61", "76.35"),
)  # fmt: skip
FIGURES = (
    Figure("", _S, "none", "4.6", "79.8"),
    Figure("tome", _S, "const:13", "2.7", "79.4"),
    Figure(
        "dtem", _S, "const:12", "2.89", "79.85", "published as 37.2 % fewer; the r that gives it"
    ),
    Figure("diffrate", _S, "", "2.905", "79.54", "counts come with DiffRate's file"),
    *(
        Figure(method, _S, f"keep:{share}@3,6,9", gmacs, (fused, dropped)[i])
        for i, method in enumerate(("evit", "evit:fuse=no"))
        for share, gmacs, fused, dropped in _EVIT
    ),
    Figure("dynamicvit", _S, "keep:0.7@3,6,9", "2.9", "79.3", _CUT),
    Figure("dtps", _S, "keep:0.7@3,6,9", "3.0", "80.1"),
    Figure("etps", _S, "keep:0.7@3,6,9", "3.0", "79.7"),
    Figure("evo-vit", _S, "keep:0.5@4,8", "3.0", "79.4"),
    Figure("ats", _S, "keep:0.7@3,6,9", "2.9", "79.7", _MEAN),
    Figure("a-vit", _S, "", "3.6", "78.6", "refused"),
    Figure("spvit", _S, "", "2.7", "79.3", "refused"),
    Figure("ia-red2", _S, "", "–", "79.1", "refused"),
    Figure("", _T, "none", "1.3", "72.2"),
    Figure("tome", _T, "const:13", "–", "71.27"),
    Figure("evit", _T, "keep:0.7@3,6,9", "0.8", "71.9"),
    Figure("dynamicvit", _T, "keep:0.7@3,6,9", "0.8", "71.4"),
    Figure("dtps", _T, "keep:0.7@3,6,9", "0.8", "72.9"),
    Figure("etps", _T, "keep:0.7@3,6,9", "0.8", "72.3"),
    Figure("evo-vit", _T, "keep:0.5@4,8", "0.8", "72.0"),
    Figure("a-vit", _T, "", "0.8", "71.0", "refused"),
    Figure("spvit", _T, "", "0.9", "72.1", "refused"),
    Figure("dynamicvit", _B, "keep:0.7@3,6,9", "11.4", "81.43", _CUT),
    Figure("dynamicvit", "lvvit_s", "keep:0.7@4,8,12", "4.6", "83.08", _CUT),
    Figure("dynamicvit", "lvvit_s", "keep:0.5@4,8,12", "3.7", "81.97", _CUT),
    Figure("evit", "lvvit_s", "keep:0.5@4,8,12", "3.9", "82.5"),
    Figure("dtps", "lvvit_s", "keep:0.5@4,8,12", "3.8", "82.6"),
    Figure("etps", "lvvit_s", "keep:0.5@4,8,12", "3.8", "82.5"),
    Figure("dynamicvit", "lvvit_m", "keep:0.7@5,10,15", "8.5", "83.82", _CUT),
    Figure("", "pvt_tiny", "none", "1.94", "75.1"),
    Figure("dtps", "pvt_tiny", "", "1.69", "75.2", _WHERE),
    Figure("", "pvt_small", "none", "3.83", "79.8"),
    Figure("dtps", "pvt_small", "", "3.14", "79.2", _WHERE),
    Figure("", "cvt_13", "none", "4.58", "81.6"),
    Figure("dtps", "cvt_13", "", "3.04", "80.8", _WHERE),
    Figure("dtps", "cvt_21", "", "4.10", "80.9", _WHERE),
    Figure("tome", "vit_large_patch16_224", "const:8", "31.0", "85.09"),
    Figure("tome", "vit_huge_patch14_224", "const:7", "92.9", "86.46"),
    *(
        Figure(method, "sret_t_distill", schedule, gmacs, top1, slides=True)
        for method, schedule, gmacs, top1 in _SLIDES
    ),
)
