"""A CogVideoX transformer of two million parameters that restores short clips, and how it sees and paints frames."""

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel

FRAMES, HEIGHT, WIDTH = 3, 144, 176
UNSHUFFLE, TEXT_DIM = 8, 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def build_base(seed: int, layers: int = 3, heads: int = 6) -> CogVideoXTransformer3DModel:
    """Build the small transformer with seeded random weights."""
    torch.manual_seed(seed)
    channels = 3 * UNSHUFFLE**2
    return CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        time_embed_dim=32,
        text_embed_dim=TEXT_DIM,
        max_text_seq_length=1,
        patch_size=1,
        sample_width=WIDTH // UNSHUFFLE,
        sample_height=HEIGHT // UNSHUFFLE,
        sample_frames=FRAMES,
        temporal_compression_ratio=1,
        spatial_interpolation_scale=1.0,
    )


def predict(model: CogVideoXTransformer3DModel, degraded: torch.Tensor) -> torch.Tensor:
    """Restore crops `(batch, frames, 3, height, width)` in [0, 1] in one step of the transformer.

    There is no way around the model (no residual connection from input to output): its last layer, `proj_out`, paints
    every pixel, so what that layer knows about colour is all the colour that there is.
    """
    batch = len(degraded)
    # Small squares of pixels become channels, as the latents of the big CogVideoX models have many channels a place.
    latents = F.pixel_unshuffle(degraded.flatten(0, 1) * 2 - 1, UNSHUFFLE).unflatten(0, degraded.shape[:2])
    # The model was made for text to video: here the prompt is one empty token and the time always zero.
    prompt = degraded.new_zeros(batch, 1, TEXT_DIM)
    time = torch.zeros(batch, dtype=torch.long, device=degraded.device)
    painted = model(latents, prompt, time, return_dict=False)[0]
    return (F.pixel_shuffle(painted.flatten(0, 1), UNSHUFFLE).unflatten(0, degraded.shape[:2]) + 1) / 2


@torch.no_grad()
def restore(model: CogVideoXTransformer3DModel, frames: torch.Tensor) -> torch.Tensor:
    """Restore frames `(count, 3, height, width)`, a few at a time, and keep the result in [0, 1]."""
    model.eval()
    windows = frames.split(FRAMES)
    return torch.cat([predict(model, window[None])[0] for window in windows]).clamp(0, 1)
