"""Writes the report of a planned study, in English or Chinese, as sonographers phrase it.

A report never contradicts the labels. Like a real one it may pass over a finding (``OMISSION``), hedge a
conclusion, and states what was looked for and not seen.
"""

from __future__ import annotations

import numpy as np

from dilbert_jax.data.phantom.plan import LESION_WORD, LINEAR_ORGANS, Lesion, StudyPlan

OMISSION = 0.05

_ORGAN_ZH = {
    "breast": "乳腺",
    "thyroid": "甲状腺",
    "liver": "肝脏",
    "gallbladder": "胆囊",
    "pancreas": "胰腺",
    "spleen": "脾脏",
    "kidney": "肾脏",
}
_SIDE_ZH = {"left": "左侧", "right": "右侧"}
_WORD_ZH = {"mass": "肿块", "nodule": "结节"}
_TERMS = {
    "en": {
        "anechoic": ("anechoic",),
        "hypoechoic": ("hypoechoic",),
        "isoechoic": ("isoechoic",),
        "hyperechoic": ("hyperechoic", "echogenic"),
        "round": ("round",),
        "oval": ("oval", "ovoid"),
        "irregular": ("irregular",),
        "circumscribed_margin": ("circumscribed", "well-defined"),
        "indistinct_margin": ("indistinct", "ill-defined"),
        "spiculated_margin": ("spiculated",),
        "parallel_orientation": ("parallel orientation", "wider-than-tall"),
        "taller_than_wide": ("taller-than-wide",),
    },
    "zh": {
        "anechoic": ("无回声",),
        "hypoechoic": ("低回声",),
        "isoechoic": ("等回声",),
        "hyperechoic": ("高回声", "稍高回声"),
        "round": ("类圆形", "圆形"),
        "oval": ("椭圆形",),
        "irregular": ("形态不规则", "形态不规整"),
        "circumscribed_margin": ("边界清晰", "边界清楚"),
        "indistinct_margin": ("边界不清", "边界欠清晰"),
        "spiculated_margin": ("边缘毛刺状", "边缘毛刺"),
        "parallel_orientation": ("平行位", "纵横比小于1"),
        "taller_than_wide": ("纵横比大于1",),
    },
}
_CONCLUSION = {
    "en": {
        "cyst": ("cyst", "simple cyst"),
        "benign_lesion": ("benign lesion", "benign {word}"),
        "malignant_lesion": ("malignant lesion", "malignancy", "malignant tumor"),
        "stone": ("calculus", "stone"),
        "diffuse_disease": ("diffuse disease", "diffuse parenchymal disease"),
    },
    "zh": {
        "cyst": ("囊肿",),
        "benign_lesion": ("良性病变", "良性{word}"),
        "malignant_lesion": ("恶性病变", "恶性肿瘤"),
        "stone": ("结石",),
        "diffuse_disease": ("弥漫性病变", "弥漫性改变"),
    },
}


def write_report(plan: StudyPlan, rng: np.random.Generator) -> str:
    """Writes the report.

    Args:
      plan: the study as drawn.
      rng: chooses phrases, order and omissions.

    Returns:
      Free text in ``plan.language``.
    """
    return _Writer(plan, rng).write()


class _Writer:
    def __init__(self, plan: StudyPlan, rng: np.random.Generator):
        self.plan = plan
        self.rng = rng
        self.zh = plan.language == "zh"

    def write(self) -> str:
        findings = [text for text in (self._organ(), self._focus()) if text]
        others = [text for text in (self._motion(), self._fluid(), self._wall(), self._duct()) if text]
        others += self._negatives()
        self.rng.shuffle(others)
        sentences = findings + others
        conclusion = self._conclusion()
        if self.zh:
            heading = self._pick("超声所见:", "", "检查所见:")
            return (
                heading
                + "".join(f"{s}。" for s in sentences)
                + self._pick("超声提示:", "结论:", "")
                + conclusion
                + "。"
            )
        sentences = [s[0].upper() + s[1:] + "." for s in sentences]
        heading = self._pick("Findings: ", "", "Ultrasound of the {organ}. ").format(organ=self.plan.organ)
        return heading + " ".join(sentences) + self._pick(" Impression: ", " Conclusion: ") + conclusion + "."

    # -- helpers -------------------------------------------------------------------------------------------

    def _pick(self, *options: str) -> str:
        return options[int(self.rng.integers(len(options)))]

    def _chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def _term(self, concept: str) -> str:
        return self._pick(*_TERMS[self.plan.language][concept])

    def _organ_name(self) -> str:
        side = self.plan.side
        if self.zh:
            return _SIDE_ZH.get(side, "") + _ORGAN_ZH[self.plan.organ]
        return f"{side} {self.plan.organ}".strip()

    # -- sentences -----------------------------------------------------------------------------------------

    def _organ(self) -> str:
        plan = self.plan
        if plan.condition == "diffuse_disease":
            return self._diffuse()
        name = self._organ_name()
        if plan.organ == "gallbladder":
            if self.zh:
                return self._pick("胆囊大小正常,内透声可", "胆囊形态大小正常", "胆囊大小如常,形态正常")
            return self._pick(
                "the gallbladder is normal in size", "the gallbladder is well distended and of normal size"
            )
        even = not any(lesion.heterogeneous for lesion in plan.lesions)
        if self.zh:
            texture = self._pick(",实质回声均匀", ",内部回声分布均匀", "") if even else ""
            return self._pick(f"{name}大小正常", f"{name}形态大小正常", f"{name}大小如常,形态正常") + texture
        texture = self._pick(" with homogeneous echotexture", " and homogeneous", "") if even else ""
        return self._pick(f"the {name} is normal in size", f"the {name} is of normal size") + texture

    def _diffuse(self) -> str:
        organ, name = self.plan.organ, self._organ_name()
        if self.zh:
            return {
                "thyroid": f"{name}增大,回声减低呈低回声,分布不均匀",
                "liver": self._pick(f"{name}增大,实质回声增强呈高回声", f"{name}体积增大,呈弥漫性高回声"),
                "pancreas": f"{name}大小正常,呈稍高回声,回声不均匀",
                "spleen": self._pick(f"{name}增大,实质回声均匀", f"{name}体积增大,形态饱满"),
                "kidney": self._pick(f"{name}皮质呈高回声,皮髓质分界不清", f"{name}实质呈稍高回声"),
            }[organ]
        return {
            "thyroid": f"the {name} is enlarged, hypoechoic and heterogeneous",
            "liver": self._pick(
                f"the {name} is enlarged and diffusely hyperechoic", f"the enlarged {name} appears echogenic"
            ),
            "pancreas": f"the {name} is hyperechoic and heterogeneous",
            "spleen": self._pick(f"the {name} is enlarged", f"the {name} is markedly increased in size"),
            "kidney": self._pick(
                f"the cortex of the {name} is hyperechoic", f"the {name} shows a hyperechoic cortex"
            ),
        }[organ]

    def _size(self, lesion: Lesion) -> str:
        wide, tall = 2 * lesion.radius / np.sqrt(lesion.aspect), 2 * lesion.radius * np.sqrt(lesion.aspect)
        if lesion.kind == "stone":
            wide, tall = 2 * lesion.radius, 1.36 * lesion.radius
        if self.zh:
            return self._pick(
                f"大小约{wide:.0f}mm×{tall:.0f}mm", f"范围约{wide / 10:.1f}cm×{tall / 10:.1f}cm"
            )
        return self._pick(f"measuring {wide:.0f} x {tall:.0f} mm", f"of {wide / 10:.1f} x {tall / 10:.1f} cm")

    def _focus(self) -> str:
        if not self.plan.lesions:
            return ""
        lesion = self.plan.lesions[0]
        if lesion.kind == "stone":
            return self._stone(lesion)
        name = self._organ_name()
        keep = {
            part: not self._chance(OMISSION)
            for part in (
                "echogenicity",
                "shape",
                "margin",
                "orientation",
                "posterior",
                "calcified",
                "heterogeneous",
            )
        }
        word = LESION_WORD[self.plan.organ]
        if self.zh:
            noun = "囊性灶" if lesion.kind == "cyst" else _WORD_ZH[word]
            echo = self._term(lesion.echogenicity) if keep["echogenicity"] else ""
            details = [
                self._term(getattr(lesion, part))
                for part in ("shape", "margin", "orientation")
                if keep[part] and getattr(lesion, part)
            ]
            if lesion.heterogeneous and keep["heterogeneous"]:
                details.append(self._pick("内部回声不均匀", "回声欠均匀"))
            if lesion.calcified and keep["calcified"]:
                details.append(self._pick("内可见点状钙化", "内见钙化灶"))
            if lesion.posterior and keep["posterior"]:
                details.append(
                    "后方回声增强"
                    if lesion.posterior == "posterior_enhancement"
                    else self._pick("后方回声衰减", "后方伴声影")
                )
            self.rng.shuffle(details)
            seen = self._pick("内可见一个", "内探及一", "内见一")
            return f"{name}{seen}{echo}{noun}," + ",".join([self._size(lesion), *details])
        noun = self._pick("cyst", "cystic lesion") if lesion.kind == "cyst" else word
        words = [self._term(part) for part in (lesion.echogenicity,) if keep["echogenicity"]]
        words += [self._term(lesion.shape)] if keep["shape"] else []
        self.rng.shuffle(words)
        article = "an" if (words or [noun])[0][0] in "aeiou" else "a"
        text = f"{article} {', '.join(words)}{' ' if words else ''}{noun} {self._size(lesion)}"
        text = self._pick(
            f"{text} is seen in the {name}", f"the {name} contains {text}", f"there is {text} in the {name}"
        )
        details = []
        if keep["margin"]:
            margin = self._term(lesion.margin)
            details.append(
                self._pick(
                    f"the margin is {margin}",
                    f"it has {'an' if margin[0] in 'aeiou' else 'a'} {margin} margin",
                )
            )
        if keep["orientation"] and lesion.orientation:
            tall = lesion.orientation == "taller_than_wide"
            details.append(
                "it is taller-than-wide"
                if tall
                else self._pick("it is wider-than-tall", "parallel orientation")
            )
        if lesion.heterogeneous and keep["heterogeneous"]:
            details.append(
                self._pick("its echotexture is heterogeneous", "internal echoes are heterogeneous")
            )
        if lesion.calcified and keep["calcified"]:
            details.append(
                self._pick("internal calcification is present", "it contains punctate calcifications")
            )
        if lesion.posterior and keep["posterior"]:
            enhancement = lesion.posterior == "posterior_enhancement"
            details.append(
                f"posterior {'enhancement' if enhancement else 'shadowing'} is {self._pick('seen', 'noted')}"
            )
        self.rng.shuffle(details)
        return ". ".join([text, *(d[0].upper() + d[1:] for d in details)])

    def _stone(self, lesion: Lesion) -> str:
        name, several = self._organ_name(), len(self.plan.lesions) > 1
        shadow = not self._chance(OMISSION)
        if self.zh:
            count = "多个" if several else "一个"
            tail = self._pick(",后方伴声影", ",后伴声影") if shadow else ""
            place = "胆囊腔内" if self.plan.organ == "gallbladder" else f"{name}集合系统内"
            return f"{place}可见{count}强回声团,{'较大者' if several else ''}{self._size(lesion)}{tail}"
        place = (
            "the gallbladder lumen"
            if self.plan.organ == "gallbladder"
            else f"the collecting system of the {name}"
        )
        tail = " with posterior shadowing" if shadow else ""
        if several:
            return f"several hyperechoic foci are seen in {place}{tail}, the largest {self._size(lesion)}"
        return f"a hyperechoic focus {self._size(lesion)} is seen in {place}{tail}"

    def _motion(self) -> str:
        plan, parts = self.plan, []
        if plan.sliding is not None and not self._chance(OMISSION):
            parts.append(self._sliding(plan.sliding))
        if plan.pulsation is not None and not self._chance(OMISSION):
            parts.append(self._pulsation(plan.pulsation))
        self.rng.shuffle(parts)
        return ("。" if self.zh else ". ").join(
            p if i == 0 or self.zh else p[0].upper() + p[1:] for i, p in enumerate(parts)
        )

    def _sliding(self, free: bool) -> str:
        if self.zh:
            if free:
                return self._pick("深呼吸时脏器与腹壁间滑动征存在", "随呼吸滑动征良好", "动态观察滑动征可见")
            return self._pick("深呼吸时脏器与腹壁间滑动减弱", "随呼吸滑动减弱", "动态观察见滑动减弱")
        if free:
            return self._pick(
                "free sliding beneath the abdominal wall is seen with respiration",
                "respiratory sliding against the abdominal wall is present",
                "there is free sliding along the abdominal wall during breathing",
            )
        return self._pick(
            "reduced sliding beneath the abdominal wall is seen with respiration",
            "there is reduced sliding along the abdominal wall during breathing",
            "dynamic observation shows reduced sliding against the abdominal wall",
        )

    def _pulsation(self, present: bool) -> str:
        if self.zh:
            if present:
                return self._pick("邻近血管可见搏动", "血管搏动明显", "动态观察血管见节律性搏动")
            return self._pick("邻近血管未见搏动", "血管未见明显搏动", "动态观察血管无搏动")
        if present:
            return self._pick(
                "pulsation of the adjacent vessel is seen", "the adjacent vessel shows clear pulsation"
            )
        return self._pick(
            "no pulsation of the adjacent vessel is seen", "the adjacent vessel is without pulsation"
        )

    def _fluid(self) -> str:
        if not self.plan.free_fluid or self._chance(OMISSION):
            return ""
        if self.zh:
            return self._pick("腹腔内可见游离液体", "脏器旁可见游离液性暗区", "可见少量腹腔积液")
        return self._pick(
            "some free fluid is seen",
            "free fluid is present next to the organ",
            "there is ascites",
        )

    def _wall(self) -> str:
        if not self.plan.wall_thickening or self._chance(OMISSION):
            return ""
        if self.zh:
            return self._pick("胆囊壁增厚", "胆囊壁增厚,约5mm")
        return self._pick("gallbladder wall thickening is present", "there is wall thickening of about 5 mm")

    def _duct(self) -> str:
        if not self.plan.duct_dilatation or self._chance(OMISSION):
            return ""
        if self.zh:
            return self._pick("主胰管扩张", "胰管扩张,内径约5mm")
        return self._pick("duct dilatation is noted, about 5 mm", "the pancreatic duct is dilated")

    def _negatives(self) -> list[str]:
        """What was looked for and not seen; only what is truly absent."""
        plan, out = self.plan, []
        lesion = bool(plan.lesions)
        calcified = any(x.calcified for x in plan.lesions)
        if not lesion and self._chance(0.75):
            out.append(
                self._pick("未见明显占位", "内未见明显结节", "未见明确肿块")
                if self.zh
                else self._pick(
                    "no mass is seen", "no focal lesion is identified", "no nodule or mass is seen"
                )
            )
        if not calcified and plan.condition != "stone" and self._chance(0.3):
            out.append(
                self._pick("未见钙化", "未见明显钙化灶")
                if self.zh
                else self._pick("no calcification is seen", "there is no evidence of calcification")
            )
        if plan.organ not in LINEAR_ORGANS and not plan.free_fluid and self._chance(0.4):
            out.append(
                self._pick("未见腹水", "腹腔未见游离液体")
                if self.zh
                else self._pick("no free fluid", "there is no free fluid", "no ascites is seen")
            )
        if plan.condition != "stone" and plan.organ in ("gallbladder", "kidney") and self._chance(0.5):
            out.append("未见结石" if self.zh else self._pick("no stone is seen", "no calculus is identified"))
        if plan.organ == "gallbladder" and not plan.wall_thickening and self._chance(0.5):
            out.append("胆囊壁不厚" if self.zh else "no wall thickening")
        if plan.organ == "pancreas" and not plan.duct_dilatation and self._chance(0.5):
            out.append(
                "胰管未见扩张"
                if self.zh
                else self._pick("no duct dilatation", "the pancreatic duct is not dilated")
            )
        return out

    def _conclusion(self) -> str:
        plan, name = self.plan, self._organ_name()
        if plan.condition == "normal":
            if self.zh:
                return self._pick(f"{name}正常", f"{name}声像图正常")
            return self._pick(f"normal {name}", f"normal appearance of the {name}", f"unremarkable {name}")
        word = LESION_WORD[plan.organ]
        term = self._pick(*_CONCLUSION[plan.language][plan.condition])
        unsure = plan.condition in ("benign_lesion", "malignant_lesion", "cyst") and self._chance(0.35)
        if self.zh:
            term = term.format(word=_WORD_ZH[word])
            if unsure:
                return self._pick(f"{name}病灶,考虑{term}", f"{name}病灶,{term}可能", f"考虑{name}{term}")
            return f"{name}{term}"
        term = term.format(word=word)
        if unsure:
            return self._pick(
                f"possible {term} of the {name}",
                f"probable {term} in the {name}",
                f"suspected {term} of the {name}",
            )
        return (
            self._pick(f"{term} of the {name}", f"{name} with {term}") if plan.condition != "normal" else term
        )
