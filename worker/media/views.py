"""How a face is seen: clear, occluded, or in an unusual pose.

From the five points and a crop of 96 pixels:
  upside down   O-Net takes the crop for a face more readily when it is turned by 180°
  pose          the nose is far beside the middle of the eyes, or the line of the eyes is steep
  mouth         the mouth has hardly any structure, or mouth and chin are of another colour than
                forehead and nose bridge: a mask, a hand
  side          both eye and cheek of one side are of another colour than those of the other

Limits chosen on 350 faces of FairFace's test split with drawn covers, and measured on 350 others,
of those that MTCNN finds: seen are 96 % of faces upside down, 69 % of masks, 54 % of half-covered
faces and half of the hands over a mouth; 0.6 % of ordinary faces are taken for one of these, 1.4 %
of strongly compressed ones.  Sunglasses and bars over the eyes are not seen: dark eyes are common.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ralf.kernels.manifest import InputContract
from ralf.kernels.networks.mtcnn import pretrained
from ralf.worker.media.crops import cut, regions
from ralf.worker.media.types import Faces, Frames

CLEAR, OCCLUDED, UNUSUAL_POSE = 0, 1, 2
Views = NDArray[np.int8]

CONTRACT = InputContract(size=96, margin=1.15)
INNER = slice(6, 90)
"""The part of such a crop that O-Net would see."""
MOST_TURNED = 1.1
"""Of the nose from the middle of the eyes, in distances of the eyes."""
MOST_ROLL = 45.0
UPSIDE_DOWN = 1.4
FLAT_MOUTH = 0.049
OTHER_MOUTH = 1.13
OTHER_SIDE = 0.42
LEAST_EYES_PX = 6.0
"""Eyes that are closer together on the crop show no pose that can be trusted."""
AT_ONCE = 256
GRID = 9


def views_of(frames: Frames, faces: Faces) -> Views:
    """The view of each face [m]."""
    if not len(faces):
        return np.zeros(0, np.int8)
    crops = cut(frames, faces, CONTRACT)
    where = regions(faces.boxes, CONTRACT).astype(np.float64)
    zoom = CONTRACT.size / (where[:, 2:] - where[:, :2])
    points = (faces.landmarks - where[:, None, :2]) * zoom[:, None]
    eyes = points[:, 1] - points[:, 0]
    apart = np.hypot(eyes[:, 0], eyes[:, 1])
    along = eyes / np.maximum(apart, 1e-6)[:, None]
    middle = (points[:, 0] + points[:, 1]) / 2
    turned = np.abs(((points[:, 2] - middle) * along).sum(1)) / np.maximum(apart, 1e-6)
    roll = np.abs(np.degrees(np.arctan2(eyes[:, 1], eyes[:, 0])))
    pose = (turned > MOST_TURNED) | (roll > MOST_ROLL) | (_turned_gain(crops) > UPSIDE_DOWN)
    covered = _covered(crops.float(), points)
    found = np.where(pose, UNUSUAL_POSE, np.where(covered, OCCLUDED, CLEAR))
    return np.where(apart >= LEAST_EYES_PX, found, CLEAR).astype(np.int8)


@torch.inference_mode()
def _turned_gain(crops: Tensor) -> NDArray[np.float32]:
    """By how much O-Net's logit of a face is higher when the crop is turned by 180°."""
    onet = pretrained(crops.device).onet
    gains = []
    for first in range(0, len(crops), AT_ONCE):
        inner = crops[first : first + AT_ONCE, :, INNER, INNER].float()
        small = F.interpolate(inner, size=(48, 48), mode="bilinear", antialias=True)
        small = (small - 127.5) / 128
        gains.append(onet(small.flip(2, 3))[0] - onet(small)[0])
    return np.asarray(torch.cat(gains).float().cpu().numpy())


def _covered(crops: Tensor, points: NDArray[np.float64]) -> NDArray[np.bool_]:
    left, right, _, mouth_left, mouth_right = (points[:, n] for n in range(5))
    eyes, mouth = (left + right) / 2, (mouth_left + mouth_right) / 2
    down, across = mouth - eyes, left - right

    def patch(centre: NDArray[np.float64], wide: float, high: float) -> NDArray[np.float32]:
        return _patch(crops, centre, across, wide, high)

    mouths, chin = patch(mouth, 0.35, 0.15), patch(mouth + 0.35 * down, 0.25, 0.12)
    bridge, brow = patch(eyes, 0.1, 0.1), patch(eyes - 0.45 * down, 0.35, 0.12)
    eye = _apart(patch(left, 0.2, 0.12), patch(right, 0.2, 0.12))
    cheek_left = patch((left + mouth_left) / 2 + 0.1 * across, 0.12, 0.12)
    cheek_right = patch((right + mouth_right) / 2 - 0.1 * across, 0.12, 0.12)
    light = mouths.mean(1)
    flat = (light.std(1) + 1) / (light.mean(1) + 8) < FLAT_MOUTH
    other = np.minimum(_apart(chin, bridge), np.minimum(_apart(mouths, bridge), _apart(chin, brow)))
    side = np.minimum(eye, _apart(cheek_left, cheek_right))
    return np.asarray(flat | (other > OTHER_MOUTH) | (side > OTHER_SIDE))


def _patch(
    crops: Tensor,
    centre: NDArray[np.float64],
    across: NDArray[np.float64],
    wide: float,
    high: float,
) -> NDArray[np.float32]:
    """[m, 3, k] pixels around a point, in the direction of the eyes and in units of their span."""
    steps = np.linspace(-1, 1, GRID)
    x, y = (part.ravel()[None, :, None] for part in np.meshgrid(steps, steps))
    below = np.stack([-across[:, 1], across[:, 0]], 1)
    at = centre[:, None] + x * wide * across[:, None] + y * high * below[:, None]
    grid = torch.from_numpy((at + 0.5) / (CONTRACT.size / 2) - 1).to(crops)[:, None]
    found = F.grid_sample(crops, grid, align_corners=False, padding_mode="border")
    return np.asarray(found[:, :, 0].cpu().numpy())


def _apart(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """How different two patches are in colour, whatever their brightness."""
    first, second = (np.log(patch.mean(2) + 8) for patch in (one, other))
    return np.asarray(np.hypot(*(
        (first[:, n] - first[:, 1]) - (second[:, n] - second[:, 1]) for n in (0, 2)
    )))  # fmt: skip
