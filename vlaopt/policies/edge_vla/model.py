"""The edge-vla network: three modules that become three components. Pre- and post-processing live elsewhere."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from vlaopt.policies.edge_vla.config import Activation, BlockConfig, EdgeVLAConfig, LanguageConfig, VisionConfig

PAD = 0


class SqueezeExcite(nn.Module):  # type: ignore[misc]
    """Scales each channel by a gate computed from all channel means. [B, C, H, W] to the same shape."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeeze, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(squeeze, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.relu(self.reduce(self.pool(x)))))


class ConvNorm(nn.Sequential):  # type: ignore[misc]
    """Convolution without bias, batch normalisation, activation (or none)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: Activation | None = None
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03),
        ]
        if act is not None:
            layers.append(nn.ReLU() if act == "relu" else nn.Hardswish())
        super().__init__(*layers)


class InvertedResidual(nn.Module):  # type: ignore[misc]
    """Expand 1x1, depthwise, squeeze-excite, project 1x1; plus the input where the shapes agree."""

    def __init__(self, inputs: int, config: BlockConfig) -> None:
        super().__init__()
        self.expand = ConvNorm(inputs, config.expand, 1, act=config.act)
        self.depthwise = ConvNorm(
            config.expand, config.expand, config.kernel, config.stride, groups=config.expand, act=config.act
        )
        self.se = SqueezeExcite(config.expand, config.se) if config.se else nn.Identity()
        self.project = ConvNorm(config.expand, config.out, 1)
        self.residual = config.stride == 1 and inputs == config.out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class VisionEncoder(nn.Module):  # type: ignore[misc]
    """Images float32 [B, 3, S, S] in 0..1 to features float32 [B, features]. Normalises to -1..1 itself."""

    def __init__(self, config: VisionConfig, map_size: int) -> None:
        super().__init__()
        self.stem = ConvNorm(3, config.stem, 3, 2, act="hardswish")
        widths = [config.stem, *(block.out for block in config.blocks)]
        self.blocks = nn.Sequential(
            *(InvertedResidual(width, block) for width, block in zip(widths, config.blocks, strict=False))
        )
        self.map = ConvNorm(widths[-1], config.map_channels, 1, act="hardswish")
        self.flatten = nn.Flatten()
        self.project = nn.Linear(config.map_channels * map_size * map_size, config.features)
        self.act = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        x = self.map(self.blocks(self.stem(images * 2.0 - 1.0)))
        features: Tensor = self.act(self.project(self.flatten(x)))
        return features


class LanguageEncoder(nn.Module):  # type: ignore[misc]
    """Tokens int64 [B, L], padded on the right with 0, to features float32 [B, hidden]: the LSTM's mean over tokens.

    Padding comes after every real token, so it cannot reach their outputs; the mean leaves it out.
    """

    def __init__(self, config: LanguageConfig, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.embedding, padding_idx=PAD)
        self.lstm = nn.LSTM(config.embedding, config.hidden, config.layers, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.lstm(self.embedding(tokens))
        mask = (tokens != PAD).to(outputs.dtype).unsqueeze(-1)
        total: Tensor = (outputs * mask).sum(dim=1)
        return total / mask.sum(dim=1).clamp(min=1.0)


class ActionHead(nn.Module):  # type: ignore[misc]
    """Vision features, language features and normalised state [B, state] to a normalised chunk [B, chunk, action]."""

    def __init__(self, config: EdgeVLAConfig) -> None:
        super().__init__()
        widths = [config.vision.features + config.language.hidden + config.state_size, *config.head.hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], config.chunk_size * config.action_size)
        self.chunk_size = config.chunk_size
        self.action_size = config.action_size

    def forward(self, vision: Tensor, language: Tensor, state: Tensor) -> Tensor:
        hidden = self.layers(torch.cat([vision, language, state], dim=1))
        chunk: Tensor = self.output(hidden)
        return chunk.reshape(-1, self.chunk_size, self.action_size)


class EdgeVLA(nn.Module):  # type: ignore[misc]
    """The whole policy network; `vision`, `language` and `head` are the components."""

    def __init__(self, config: EdgeVLAConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision, config.map_size)
        self.language = LanguageEncoder(config.language, config.vocabulary)
        self.head = ActionHead(config)

    def forward(self, images: Tensor, state: Tensor, tokens: Tensor) -> Tensor:
        """Images [B, 3, S, S] in 0..1, normalised state [B, state], tokens [B, L] to normalised [B, chunk, action]."""
        chunk: Tensor = self.head(self.vision(images), self.language(tokens), state)
        return chunk


def config_of(module: EdgeVLA) -> EdgeVLAConfig:
    """The module's config with every width read from its layers, as they may have been pruned since it was made."""
    blocks = tuple(
        _block_config(block, old)
        for block, old in zip(
            (child for child in module.vision.blocks if isinstance(child, InvertedResidual)),
            module.config.vision.blocks,
            strict=True,
        )
    )
    vision = VisionConfig(
        stem=_conv(module.vision.stem).out_channels,
        blocks=blocks,
        map_channels=_conv(module.vision.map).out_channels,
        features=module.vision.project.out_features,
    )
    language = module.config.language.model_copy(
        update={"embedding": module.language.embedding.embedding_dim, "hidden": module.language.lstm.hidden_size}
    )
    hidden = tuple(layer.out_features for layer in module.head.layers if isinstance(layer, nn.Linear))
    head = module.config.head.model_copy(update={"hidden": hidden})
    return module.config.model_copy(update={"vision": vision, "language": language, "head": head})


def _block_config(block: InvertedResidual, old: BlockConfig) -> BlockConfig:
    se = block.se.reduce.out_channels if isinstance(block.se, SqueezeExcite) else 0
    return old.model_copy(
        update={"expand": _conv(block.expand).out_channels, "out": _conv(block.project).out_channels, "se": se}
    )


def _conv(layer: nn.Module) -> nn.Conv2d:
    for child in layer.children():
        if isinstance(child, nn.Conv2d):
            return child
    raise ValueError(f"{type(layer).__name__} holds no convolution")
