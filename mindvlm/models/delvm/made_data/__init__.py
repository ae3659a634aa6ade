"""`mindvlm-make-data` for DeLVM: drawn scenes, and pictures and codes from public downloads."""

from mindvlm.models.delvm.made_data.scene_pairs import SCENES

MADE_DATA = {"scenes": SCENES}
