"""A node of ComfyUI (https://github.com/comfyanonymous/ComfyUI): copy or link this folder into its `custom_nodes`.

ComfyUI's own "Load Upscale Model" then reads our model files too, at one whole factor (see `integrations.spandrel`).
In ComfyUI an IMAGE is (B, H, W, C) in [0, 1]. Imports are absolute, since a copy lies outside the package.
"""

from typing import Any

import folder_paths
import numpy as np
import torch
from comfy import model_management
from torch import Tensor

import moeisr_basicsr.integrations.spandrel  # noqa: F401  for ComfyUI's own loader
from moeisr_basicsr import shipped
from moeisr_basicsr.checkpoint import load_any
from moeisr_basicsr.cli.expert_map import ExpertMapPicture
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import target_size, upscale

FOLDER = 'upscale_models'  # of ComfyUI's models
MAX_SIZE = 16384  # pixels per side, ComfyUI's own limit


class UpscaleAnyFactor:
    """Upscale a batch of images by any factor, or to any size."""

    CATEGORY = 'image/upscaling'
    DESCRIPTION = 'Upscales by any factor, or to any size. The expert map shows which expert made each pixel.'
    RETURN_TYPES = ('IMAGE', 'IMAGE')
    RETURN_NAMES = ('image', 'expert_map')
    FUNCTION = 'run'

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs: the models that come with the package, and those in ComfyUI's folder."""
        models = [*shipped.names(), *folder_paths.get_filename_list(FOLDER)]
        size = {'default': 0, 'min': 0, 'max': MAX_SIZE, 'tooltip': '0: as the other one says, or the factor'}
        weight = {'default': 0.0, 'min': -20.0, 'max': 20.0, 'step': 0.1, 'tooltip': 'above 0 cheaper than trained'}
        tile = {'default': 640, 'min': 0, 'max': 4096, 'step': 16, 'tooltip': 'input pixels per side; 0: no tiles'}
        return {
            'required': {
                'image': ('IMAGE',),
                'model_name': (models,),
                'factor': ('FLOAT', {'default': 2.0, 'min': 1.0, 'max': 16.0, 'step': 0.01}),
                'width': ('INT', size),
                'height': ('INT', size),
                'cost_weight': ('FLOAT', weight),
                'tile': ('INT', tile),
            }
        }

    def run(
        self, image: Tensor, model_name: str, factor: float, width: int, height: int, cost_weight: float, tile: int
    ) -> tuple[Tensor, Tensor]:
        """(B, R, S, 3), and the picture of the expert map with its legend below: (B, R + legend, at least S, 3).

        Raises:
            UserError: The image has other channels, the model cannot be read, or see `inference.upscale`.
        """
        rows, cols, channels = image.shape[1:]
        if channels != 3:
            raise UserError(f'the image must have 3 channels; it has {channels}. Take its transparency off first.')
        is_shipped = model_name in shipped.names()
        path = (
            shipped.shipped_file(model_name) if is_shipped else folder_paths.get_full_path_or_raise(FOLDER, model_name)
        )
        device = model_management.get_torch_device()
        net = load_any(path, device)
        both = (height, width) if height and width else None
        scale = None if both else height / rows or width / cols or factor
        size = target_size((rows, cols), scale, both)
        result = upscale(net, image.movedim(-1, 1).to(device), size=size, cost_weight=cost_weight, tile=tile)
        maps = result.expert_map
        if maps is None:  # one expert made every pixel
            maps = torch.zeros(len(image), *size, dtype=torch.uint8)
        pictures = [draw(expert_map, net.expert_costs.tolist()) for expert_map in maps.cpu().numpy()]
        return result.image.clamp(0, 1).movedim(1, -1).cpu(), torch.stack(pictures)


def draw(expert_map: np.ndarray, costs: list[float]) -> Tensor:
    """The picture that `basicsr upscale --expert-map` writes of (R, S), as one image of ComfyUI."""
    picture = ExpertMapPicture(expert_map.shape[1], costs)
    rows = picture.rows(expert_map)  # before the legend, which says the shares
    return torch.from_numpy(np.concatenate([rows, picture.legend()])).float() / 255


NODE_CLASS_MAPPINGS: dict[str, type] = {'MoEISRUpscaleAnyFactor': UpscaleAnyFactor}
NODE_DISPLAY_NAME_MAPPINGS = {'MoEISRUpscaleAnyFactor': 'Upscale Image (any factor)'}
