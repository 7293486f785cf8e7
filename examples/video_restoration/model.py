"""A CogVideoX transformer of 1.7 million parameters that restores short clips, and its adapter."""

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel

from peft import LoraConfig

FRAMES, CROP = 4, 64
PATCH, WIDTH, TEXT_DIM = 8, 192, 16
RANK, ADAPTER = 4, "default"


def build_base(seed: int) -> CogVideoXTransformer3DModel:
    """Build the small transformer: a token is a square of 8 x 8 pixels, and as wide as that square has values."""
    torch.manual_seed(seed)
    return CogVideoXTransformer3DModel(
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        num_layers=3,
        time_embed_dim=32,
        text_embed_dim=TEXT_DIM,
        max_text_seq_length=1,
        patch_size=1,
        sample_width=CROP // PATCH,
        sample_height=CROP // PATCH,
        sample_frames=FRAMES,
        temporal_compression_ratio=1,
        spatial_interpolation_scale=1.0,
    )


def adapter_config(copy_output_layer: bool) -> LoraConfig:
    """Return LoRA on the attention layers, with or without a fully trained copy of the output layer."""
    return LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        modules_to_save=["proj_out"] if copy_output_layer else None,
    )


def predict(model: CogVideoXTransformer3DModel, damaged: torch.Tensor) -> torch.Tensor:
    """Restore crops `(batch, frames, 3, height, width)` of values in [0, 1] in one step.

    Nothing leads around the transformer (there is no residual connection from input to output): its last layer,
    `proj_out`, paints every pixel, so the colours which that layer knows are all the colours there are.
    """
    # The model was made to turn text into video: here the prompt is one empty token, and the time always zero.
    prompt = damaged.new_zeros(len(damaged), 1, TEXT_DIM)
    time = torch.zeros(len(damaged), dtype=torch.long, device=damaged.device)
    painted = model(_to_latents(damaged), prompt, time, return_dict=False)[0]
    return (F.pixel_shuffle(painted.flatten(0, 1), PATCH).unflatten(0, damaged.shape[:2]) + 1) / 2


@torch.no_grad()
def restore(model: CogVideoXTransformer3DModel, frames: torch.Tensor) -> torch.Tensor:
    """Restore whole frames `(count, 3, height, width)` in overlapping tiles, blended so that no seam shows."""
    model.eval()
    ramp = 1 - torch.linspace(-1, 1, CROP + 2)[1:-1].abs()
    weight = ramp[:, None] * ramp[None, :]
    total, norm = torch.zeros_like(frames), torch.zeros_like(frames[:1, :1])
    for top in _tile_starts(frames.shape[2]):
        for left in _tile_starts(frames.shape[3]):
            tile = (..., slice(top, top + CROP), slice(left, left + CROP))
            total[tile] += predict(model, frames[tile].unflatten(0, (-1, FRAMES))).flatten(0, 1) * weight
            norm[tile] += weight
    return (total / norm).clamp(0, 1)


@torch.no_grad()
def start_as_copy(model: CogVideoXTransformer3DModel, clips: torch.Tensor) -> None:
    """Set the first and last layer such that the untrained model returns the clips `(batch, frames, ...)` it is given.

    From random weights it would spend most of a short training on learning to copy.
    """
    # Fine detail and colour are faint in films: boosted, they are learnt as fast as light and dark.
    model.patch_embed.proj.weight.copy_(_boosted_basis()[:, :, None, None])
    model.patch_embed.proj.bias.zero_()
    features: list[torch.Tensor] = []
    hook = model.proj_out.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(0, 1)))
    predict(model, clips)
    hook.remove()
    # The base sees black-and-white film: fit one channel and use it for all three, so that it paints pure grey.
    grey = _to_latents(clips)[:, :, : PATCH**2].permute(0, 1, 3, 4, 2).flatten(0, 3)
    inputs = torch.cat([features[0], torch.ones(len(grey), 1)], dim=1)
    gram = inputs.T @ inputs + 1e-4 * len(grey) * torch.eye(inputs.shape[1])
    fitted = torch.linalg.solve(gram, inputs.T @ grey)
    model.proj_out.weight.copy_(fitted[:-1].T.repeat(3, 1))
    model.proj_out.bias.copy_(fitted[-1].repeat(3))


def _to_latents(clips: torch.Tensor) -> torch.Tensor:
    """Turn every square of pixels into the channels of one place, `(batch, frames, 192, rows, columns)`."""
    return F.pixel_unshuffle(clips.flatten(0, 1) * 2 - 1, PATCH).unflatten(0, clips.shape[:2])


def _boosted_basis() -> torch.Tensor:
    """Return the cosine transform of a square and its colours, high frequencies and colours boosted, then rotated."""
    place = torch.arange(PATCH)
    cosine = torch.cos(torch.pi * (place + 0.5) * place[:, None] / PATCH) * (2 / PATCH) ** 0.5
    cosine[0] /= 2**0.5
    boost = (1 + place[:, None] + place).flatten()[:, None]
    colour = torch.tensor([[1.0, 1, 1], [2, 0, -2], [1, -2, 1]]) * torch.tensor([[1 / 3], [3 / 8], [3 / 6]]) ** 0.5
    basis = torch.kron(colour, boost * torch.kron(cosine, cosine))
    # The rotation spreads every pattern over all channels, and so over all heads.
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] @ basis


def _tile_starts(length: int, step: int = 28) -> list[int]:
    """Return where tiles begin: every `step` pixels, and one that ends with the frame."""
    return sorted({*range(0, length - CROP, step), length - CROP})
