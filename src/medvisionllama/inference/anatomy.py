"""SNOMED CT codes for the names of classes, from the tables of the standard that pydicom carries.

A name that is not here gets a code of our own with the name as its meaning, so every mask can be written.
"""

import hashlib
import re
from typing import Any, NamedTuple

from medvisionllama._optional import require

SCHEME = "99MVL"

_ORGANS = {
    "adrenal gland": "AdrenalGland", "aorta": "Aorta", "bladder": "Bladder", "bone": "Bone", "brain": "Brain",
    "colon": "Colon", "duodenum": "Duodenum", "esophagus": "Esophagus", "oesophagus": "Esophagus",
    "femur": "Femur", "gallbladder": "Gallbladder", "gall bladder": "Gallbladder", "heart": "Heart",
    "hepatic vein": "HepaticVein", "hepatic vessel": "BloodVessel", "vessel": "BloodVessel",
    "hippocampus": "Hippocampus", "inferior vena cava": "InferiorVenaCava", "kidney": "Kidney",
    "left atrium": "LeftAtrium", "right atrium": "RightAtrium", "left ventricle": "LeftVentricle",
    "lv": "LeftVentricle", "right ventricle": "RightVentricle", "rv": "RightVentricle", "liver": "Liver",
    "lung": "Lung", "muscle": "Muscle", "myocardium": "LeftVentricleMyocardium",
    "left ventricular myocardium": "LeftVentricleMyocardium", "pancreas": "Pancreas",
    "peripheral zone": "PeripheralZoneOfTheProstate", "pz": "PeripheralZoneOfTheProstate",
    "portal vein": "PortalVein", "prostate": "Prostate", "rectum": "Rectum", "rib": "Rib",
    "small bowel": "SmallIntestine", "small intestine": "SmallIntestine", "spinal cord": "SpinalCord",
    "spleen": "Spleen", "stomach": "Stomach", "thyroid": "Thyroid", "trachea": "Trachea",
    "urinary bladder": "Bladder", "vertebra": "Vertebra",
}  # fmt: skip
_TISSUES = {"white matter": "WhiteMatter", "gray matter": "GrayMatter", "grey matter": "GrayMatter"}
_CHANGES = {
    "cancer": "Neoplasm", "colon cancer": "Neoplasm", "cyst": "Cyst", "edema": "Edema", "oedema": "Edema",
    "lesion": "Lesion", "liver tumor": "Neoplasm", "lung tumor": "Neoplasm", "mass": "Mass",
    "necrosis": "Necrosis", "neoplasm": "Neoplasm", "nodule": "Nodule", "tumor": "Neoplasm",
}  # fmt: skip
_PLURALS = {"kidneys": "kidney", "lungs": "lung", "hippocampi": "hippocampus", "cysts": "cyst", "lesions": "lesion",
            "vertebrae": "vertebra", "ribs": "rib", "vessels": "vessel", "nodules": "nodule"}  # fmt: skip
_SIDES = {"left": "Left", "right": "Right"}


class Anatomy(NamedTuple):
    """Category and type of a segment, and the side or part that narrows the type; codes of pydicom."""

    category: Any
    kind: Any
    modifier: Any | None = None


def anatomy_of(name: str) -> Anatomy:
    """Codes for the name of a class: `Liver`, `left_kidney`, `edema`. Case and separators do not matter."""
    sct = require("pydicom.sr.codedict", extra="dicom").codes.SCT
    words = re.sub(r"[\W_]+", " ", name).casefold().replace("tumour", "tumor").split()
    words = [_PLURALS.get(word, word) for word in words]
    known = _known(sct, " ".join(words))
    if known:
        return known
    for place in (0, -1):
        side = _SIDES.get(words[place]) if len(words) > 1 else None
        rest = words[1:] if place == 0 else words[:-1]
        known = _known(sct, " ".join(rest)) if side else None
        if side and known:
            return known._replace(modifier=getattr(sct, side))
    return Anatomy(sct.Tissue, _own_code(name))


def _known(sct: Any, name: str) -> Anatomy | None:
    tables = (
        (_ORGANS, "AnatomicalStructure"),
        (_TISSUES, "Tissue"),
        (_CHANGES, "MorphologicallyAbnormalStructure"),
    )
    for table, category in tables:
        if name in table:
            return Anatomy(getattr(sct, category), getattr(sct, table[name]))
    return None


def _own_code(name: str) -> Any:
    """A code that depends on the name alone, so that equal classes of two masks have equal codes."""
    coding = require("pydicom.sr.coding", extra="dicom")
    digest = hashlib.sha256(name.encode()).hexdigest()[:12].upper()
    return coding.Code(f"C{digest}", SCHEME, name[:64] or "unnamed")
