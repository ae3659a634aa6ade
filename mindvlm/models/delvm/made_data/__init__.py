"""`mindvlm-make-data` for DeLVM: drawn scenes, and pictures and codes from public downloads."""

from mindvlm.models.delvm.made_data.joining import JOIN
from mindvlm.models.delvm.made_data.keypoints import KEYPOINTS
from mindvlm.models.delvm.made_data.pairs import PAIRS
from mindvlm.models.delvm.made_data.scene_pairs import SCENES
from mindvlm.models.delvm.made_data.segmentation import SEGMENTATION
from mindvlm.models.delvm.made_data.sequences import PICTURES, VIDEO

MADE_DATA = {
    "scenes": SCENES,
    "segmentation": SEGMENTATION,
    "keypoints": KEYPOINTS,
    "pairs": PAIRS,
    "video": VIDEO,
    "pictures": PICTURES,
    "join": JOIN,
}
