"""Segment Anything 2.1 (Ravi et al. 2024, arXiv:2408.00714): prompts on some frames, masks on all.

Keys, shapes and outputs match github.com/facebookresearch/sam2 (commit 2b90b9f: sam2/modeling and
what training/model/sam2.py calls of it), whose files sam2.1_hiera_*.pt load strictly: they hold
{"model": state dict}. Attention is fused, rotary position codes stay in float32 under autocast, and
several objects of several videos go in one batch. SAM's blocks are imported from nets/sam.py.
Left out on purpose: SAM 2.0, options that no 2.1 file uses (memory strides, a limit of conditioning
frames), track_step without memory or with earlier logits, filling of holes, masks that may not overlap.

Frames are resized to a square of image_size pixels, whatever their aspect, and normalised. Points
and mask prompts are in pixels of that square; mask logits have a quarter of its side.
Letters: V images or videos, B objects, N points of an object or tokens, M masks, T frames, S image
size, E = S / 16, C width of the trunk, D width of everything else, K tokens of memory.
"""
import math
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

from nets.sam import LayerNorm2d, PromptEncoder, TwoWayTransformer, join_windows, split_windows

URL = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
WEIGHTS = {  # the authors publish no hashes; these, and the sizes, are those that users publish
    name: {"name": name, "url": f"{URL}sam2.1_hiera_{name}.pt", "size": size, "sha256": sha256}
    for name, size, sha256 in (
        ("tiny", 156008466, "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"),
        ("small", 184416285, "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"),
        ("base_plus", 323606802, "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"),
        ("large", 898083611, "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"))}
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, 0..255
NO_OBJ_SCORE = -1024.0  # logit of every pixel of an absent object
BATCH_OBJECTS = 16  # objects that `propagate` tracks at a time


# --- Small blocks ---

class MLP(nn.Module):
    """Linear layers with act between them: (..., dim) -> (..., out_dim)."""

    def __init__(self, dim, hidden_dim, out_dim, num_layers=3, act=F.relu):
        super().__init__()
        dims = [dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(dims[:-1], dims[1:]))
        self.act = act

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


def sine_position(x):
    """Returns position codes of a map (B, C, H, W), of its shape and type: half of C for y, half for x.

    Positions 1..H become 0..2 pi; sine and cosine of a frequency lie side by side.
    """
    half = x.shape[1] // 2
    frequency = 10000 ** -(2 * (torch.arange(half, device=x.device) // 2) / half)

    def along(length):
        place = torch.arange(1, length + 1, device=x.device) / (length + 1e-6) * 2 * math.pi
        angle = place[:, None] * frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1).T

    height, width = x.shape[2:]
    rows = along(height)[:, :, None].expand(-1, -1, width)
    columns = along(width)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns]).to(x.dtype).expand_as(x)


def get_1d_sine_pe(pos_inds, dim):
    """Returns position codes (N, dim) of numbers (N,): all sines, then all cosines."""
    half = dim // 2
    place = torch.arange(half, dtype=torch.float32, device=pos_inds.device)
    angle = pos_inds[:, None] / 10000 ** (2 * (place // 2) / half)
    return torch.cat([angle.sin(), angle.cos()], -1)


# --- Image encoder ---

def pool(x):
    """Takes the maximum over 2 x 2: (B, H, W, C) -> (B, H / 2, W / 2, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


class MultiScaleAttention(nn.Module):
    """Self-attention over a map: (B, H, W, dim) -> (B, H, W, dim_out).

    pooled: the maximum of every 2 x 2 queries is taken, which halves height and width.
    """

    def __init__(self, dim, dim_out, num_heads, pooled):
        super().__init__()
        self.num_heads, self.pooled = num_heads, pooled
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)  # each (B, H, W, dim_out)
        if self.pooled:
            q = pool(q)
        height, width = q.shape[1:3]
        q, k, v = (x.flatten(1, 2).unflatten(2, (self.num_heads, -1)) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, H*W, dim_out / heads)
        return self.proj(x.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


class MultiScaleBlock(nn.Module):
    """Pre-norm transformer block of Hiera: (B, H, W, dim) -> (B, H, W, dim_out).

    The first block of a stage (dim_out differs from dim) halves height and width. Attention is within
    windows, or over the whole image if window is 0; the zeros that pad the last windows are not
    masked, as published. drop_path: probability, in training, that an image skips a branch.
    """

    def __init__(self, dim, dim_out, num_heads, window, drop_path):
        super().__init__()
        pooled = dim != dim_out
        if pooled and window % 2:
            raise ValueError(f"windows before a stage change must be even, got {window}")
        self.window, self.drop_path = window, drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MultiScaleAttention(dim, dim_out, num_heads, pooled)
        self.norm2 = nn.LayerNorm(dim_out, eps=1e-6)
        self.mlp = MLP(dim_out, 4 * dim_out, dim_out, num_layers=2, act=F.gelu)
        if pooled:
            self.proj = nn.Linear(dim, dim_out)

    def skip(self, branch):
        """Returns the branch, in training without that of random images."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)

    def forward(self, x):
        attended = self.norm1(x)
        if self.attn.pooled:
            x = pool(self.proj(attended))
        if self.window:  # pooled queries make windows of half the side
            windows = self.attn(split_windows(attended, self.window))
            attended = join_windows(windows, *x.shape[1:3])
        else:
            attended = self.attn(attended)
        x = x + self.skip(attended)
        return x + self.skip(self.mlp(self.norm2(x)))


class Hiera(nn.Module):
    """Image (B, 3, H, W) -> four maps (B, 2**i C, H / 2**(i+2), W / 2**(i+2)), i = 0..3.

    Ryali et al. 2023 (arXiv:2306.00989), with the position codes of Bolya et al. 2023
    (arXiv:2311.05613): a small map resized to the image plus one that repeats in each window.
    gradient_checkpointing: the backward pass computes each block again, which needs less memory.
    """

    def __init__(self, embed_dim, num_heads, stages, global_att_blocks, window_spec, pos_embed_size,
                 drop_path_rate):
        super().__init__()
        self.gradient_checkpointing = False
        patches = nn.Conv2d(3, embed_dim, 7, stride=4, padding=3)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patches))
        self.pos_embed = nn.Parameter(torch.zeros(1, embed_dim, pos_embed_size, pos_embed_size))
        self.pos_embed_window = nn.Parameter(
            torch.zeros(1, embed_dim, window_spec[0], window_spec[0]))
        self.blocks, self.stage_ends = nn.ModuleList(), []
        dim, last = embed_dim, sum(stages) - 1
        for stage, depth in enumerate(stages):
            for i in range(depth):
                changes = stage > 0 and i == 0  # this block has the windows of the previous stage
                window = window_spec[stage - 1 if changes else stage]
                if len(self.blocks) in global_att_blocks:
                    window = 0
                dim_out, heads = embed_dim * 2**stage, num_heads * 2**stage
                drop_path = drop_path_rate * len(self.blocks) / last
                self.blocks.append(MultiScaleBlock(dim, dim_out, heads, window, drop_path))
                dim = dim_out
            self.stage_ends.append(len(self.blocks) - 1)

    def forward(self, x):
        x = self.patch_embed(x).permute(0, 2, 3, 1)  # (B, H / 4, W / 4, C)
        size, side = x.shape[1:3], self.pos_embed_window.shape[2]
        position = F.interpolate(self.pos_embed, size, mode="bicubic", align_corners=False)
        position = position + self.pos_embed_window.tile(1, 1, size[0] // side, size[1] // side)
        x = x + position.permute(0, 2, 3, 1)

        maps = []
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i in self.stage_ends:
                maps.append(x.permute(0, 3, 1, 2))
        return maps


class FpnNeck(nn.Module):
    """Four maps of the trunk, fine to coarse -> the three finest with D channels.

    Only the third is summed with the coarsest; the first of convs belongs to the coarsest map.
    """

    def __init__(self, dims, d_model):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(dim, d_model, 1))) for dim in reversed(dims))

    def forward(self, maps):
        coarsest, *maps = [conv(x) for conv, x in zip(self.convs, reversed(maps))]
        maps[0] = maps[0] + F.interpolate(coarsest, scale_factor=2.0, mode="nearest")
        return maps[::-1]


class ImageEncoder(nn.Module):
    """Normalised images (V, 3, S, S) -> dict.

    backbone_fpn: three maps (V, D, side, side), their sides S/4, S/8, S/16; vision_pos_enc: their
    position codes, same shapes; vision_features: the last map.
    """

    def __init__(self, trunk, neck):
        super().__init__()
        self.trunk, self.neck = trunk, neck

    def forward(self, sample):
        maps = self.neck(self.trunk(sample))
        positions = [sine_position(x) for x in maps]
        return {"vision_features": maps[-1], "vision_pos_enc": positions, "backbone_fpn": maps}


# --- Mask decoder ---

class MaskDecoder(nn.Module):
    """Features and prompts of B objects -> masks (B, M, 4E, 4E), IoU (B, M), tokens, score (B, 1).

    image_embeddings: (B, D, E, E), or (1, D, E, E) with repeat_image; anything else: ValueError.
    high_res_features: the two finer maps of forward_image, (B or 1, channels, 4E or 2E, same).
    multimask_output: True gives three masks of different extent and their tokens (B, 3, D); False
    the mask for clear prompts and its token (B, 1, D). IoU: the decoder's estimate of each mask's
    quality, 0..1. Score: logit of the object being in the image.
    dynamic_multimask_via_stability: in eval mode the single mask is replaced by the best of the three
    if its area above 0.05 is less than 0.98 of that above -0.05; its token stays.
    """

    def __init__(self, dim, mlp_dim, dynamic_multimask_via_stability, num_multimask=3):
        super().__init__()
        self.dynamic_multimask_via_stability = dynamic_multimask_via_stability
        num_masks = num_multimask + 1
        self.transformer = TwoWayTransformer(
            2, dim, 8, lambda: MLP(dim, mlp_dim, dim, num_layers=2))
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(num_masks, dim)
        self.obj_score_token = nn.Embedding(1, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2), LayerNorm2d(dim // 4), nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2), nn.GELU())
        self.conv_s0 = nn.Conv2d(dim, dim // 8, 1)
        self.conv_s1 = nn.Conv2d(dim, dim // 4, 1)
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(dim, dim, dim // 8) for _ in range(num_masks))
        self.iou_prediction_head = MLP(dim, 256, num_masks)
        self.pred_obj_score_head = MLP(dim, dim, 1)

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings,
                multimask_output, repeat_image, high_res_features):
        objects, images = len(sparse_prompt_embeddings), len(image_embeddings)
        if images != (1 if repeat_image else objects):
            raise ValueError(f"{objects} objects need an image each, or one with repeat_image; "
                             f"got {images} images")
        tokens = torch.cat(
            [self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([tokens.expand(objects, -1, -1), sparse_prompt_embeddings], 1)
        image = image_embeddings + dense_prompt_embeddings           # (B, D, E, E)
        tokens, image = self.transformer(image, image_pe, tokens)    # tokens (B, 2 + masks + N, D)
        image = image.transpose(1, 2).unflatten(2, image_embeddings.shape[-2:])

        double, norm, act, double_again, act_again = self.output_upscaling
        upscaled = act(norm(double(image) + high_res_features[1]))
        upscaled = act_again(double_again(upscaled) + high_res_features[0])  # (B, D / 8, 4E, 4E)
        mask_tokens = tokens[:, 2:2 + len(self.output_hypernetworks_mlps)]
        weights = [mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.stack(weights, 1) @ upscaled.flatten(2)           # (B, masks, 4E * 4E)
        masks = masks.unflatten(2, upscaled.shape[-2:])
        iou = self.iou_prediction_head(tokens[:, 1]).sigmoid()
        score = self.pred_obj_score_head(tokens[:, 0])

        if multimask_output:
            return masks[:, 1:], iou[:, 1:], mask_tokens[:, 1:], score
        if self.dynamic_multimask_via_stability and not self.training:
            masks, iou = self.replace_unstable(masks, iou)
        return masks[:, :1], iou[:, :1], mask_tokens[:, :1], score

    @staticmethod
    def replace_unstable(masks, iou):
        """Returns mask (B, 1, H, W) and IoU (B, 1): the single mask's, or the best of three if unstable."""
        inner, outer = ((masks[:, 0] > level).sum((1, 2)) for level in (0.05, -0.05))
        stable = inner >= 0.98 * outer
        chosen = torch.where(stable, 0, 1 + iou[:, 1:].argmax(1))
        rows = torch.arange(len(masks), device=masks.device)
        return masks[rows, chosen][:, None], iou[rows, chosen][:, None]


# --- Memory ---

def rotary_table(side, dim, device):
    """Returns complex numbers of length 1 (side * side, dim / 2) of a square's cells, for `rotate`.

    Su et al. 2021 (arXiv:2104.09864) in two axes: half of the angles follow x, half y.
    """
    frequency = 10000 ** -(torch.arange(0, dim, 4, dtype=torch.float32, device=device) / dim)
    cell = torch.arange(side * side, device=device)
    angle = torch.cat([(cell % side)[:, None] * frequency, (cell // side)[:, None] * frequency], 1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, table):
    """Rotates each pair of channels of x (..., H*W, D) by its angle, in float32; returns x's type."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


class RoPEAttention(nn.Module):
    """Attention of q (B, E*E, D) over k, v (B, K, kv_dim) with rotary codes -> (B, E*E, D).

    The keys are maps of E*E cells, rotated like the queries, then num_k_exclude_rope other tokens.
    """

    def __init__(self, dim, kv_dim, dropout):
        super().__init__()
        self.dropout_p = dropout
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(kv_dim, dim)
        self.v_proj = nn.Linear(kv_dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, q, k, v, table, num_k_exclude_rope=0):
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        maps, others = k.split([k.shape[1] - num_k_exclude_rope, num_k_exclude_rope], 1)
        maps = rotate(maps.unflatten(1, (-1, q.shape[1])), table).flatten(1, 2)
        q, k = rotate(q, table), torch.cat([maps, others], 1)
        dropout_p = self.dropout_p if self.training else 0.0
        x = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], dropout_p=dropout_p)
        return self.out_proj(x[:, 0])  # one head


class MemoryAttentionLayer(nn.Module):
    """Attention of the current frame (B, E*E, D) to itself, then to the memory (B, K, mem_dim)."""

    def __init__(self, dim, mem_dim, mlp_dim, dropout):
        super().__init__()
        self.self_attn = RoPEAttention(dim, dim, dropout)
        self.cross_attn_image = RoPEAttention(dim, mem_dim, dropout)
        self.linear1 = nn.Linear(dim, mlp_dim)
        self.linear2 = nn.Linear(mlp_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, memory, keys, table, num_obj_ptr_tokens):
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, y, y, table))
        y = self.cross_attn_image(self.norm2(x), keys, memory, table, num_obj_ptr_tokens)
        x = x + self.dropout(y)
        y = self.dropout(F.relu(self.linear1(self.norm3(x))))
        return x + self.dropout(self.linear2(y))


class MemoryAttention(nn.Module):
    """Conditions the current frame on the memory: curr (E*E, B, D) -> (E*E, B, D).

    memory and memory_pos: (K, B, mem_dim), maps of E*E cells, then num_obj_ptr_tokens tokens.
    """

    def __init__(self, dim, mem_dim, num_layers, mlp_dim, dropout):
        super().__init__()
        self.layers = nn.ModuleList(
            MemoryAttentionLayer(dim, mem_dim, mlp_dim, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, curr, memory, curr_pos, memory_pos, num_obj_ptr_tokens=0):
        x = (curr + 0.1 * curr_pos).transpose(0, 1)  # (E*E, B, D) -> (B, E*E, D)
        table = rotary_table(math.isqrt(x.shape[1]), x.shape[2], x.device)
        keys = (memory + memory_pos).transpose(0, 1)
        memory = memory.transpose(0, 1)
        for layer in self.layers:
            x = layer(x, memory, keys, table, num_obj_ptr_tokens)
        return self.norm(x).transpose(0, 1)


class CXBlock(nn.Module):
    """Block of ConvNeXt (Liu et al. 2022, arXiv:2201.03545): (B, D, H, W) -> (B, D, H, W)."""

    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = LayerNorm2d(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x):
        y = self.norm(self.dwconv(x)).permute(0, 2, 3, 1)  # (B, D, H, W) -> (B, H, W, D)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class MemoryEncoder(nn.Module):
    """Image features (B, D, E, E), masks (B, 1, S, S) -> dict of memory and position codes.

    masks: 20 * probability - 10. vision_features: (B, mem_dim, E, E); vision_pos_enc: [same shape].
    """

    def __init__(self, dim, mem_dim):
        super().__init__()
        encoder = nn.Sequential()  # S -> S / 16
        for channels in (1, 4, 16, 64):
            encoder.append(nn.Conv2d(channels, 4 * channels, 3, stride=2, padding=1))
            encoder.append(LayerNorm2d(4 * channels))
            encoder.append(nn.GELU())
        encoder.append(nn.Conv2d(256, dim, 1))
        self.mask_downsampler = nn.Sequential(OrderedDict(encoder=encoder))
        self.pix_feat_proj = nn.Conv2d(dim, dim, 1)
        self.fuser = nn.Sequential(OrderedDict(layers=nn.Sequential(CXBlock(dim), CXBlock(dim))))
        self.out_proj = nn.Conv2d(dim, mem_dim, 1)

    def forward(self, pix_feat, masks):
        x = self.pix_feat_proj(pix_feat) + self.mask_downsampler(masks)
        x = self.out_proj(self.fuser(x))
        return {"vision_features": x, "vision_pos_enc": [sine_position(x)]}


# --- The model ---

class SAM2(nn.Module):
    """All parts and the rules of tracking; the arguments build every published size and smaller ones.

    Scripts call `propagate` to predict; in training forward_image, _prepare_backbone_features and
    the parts of track_step. image_size must be a multiple of 32 and of four times the first window:
    else ValueError. The authors' predictors set dynamic_multimask_via_stability and, in videos,
    binarize_mask_from_pts_for_mem_enc; their training does not.
    """

    mask_threshold = 0.0  # of the logits
    directly_add_no_mem_embed = True  # the official SAM2ImagePredictor reads this

    def __init__(self, image_size=1024, embed_dim=96, num_heads=1, stages=(1, 2, 7, 2),
                 global_att_blocks=(5, 7, 9), window_spec=(8, 4, 14, 7), pos_embed_size=7,
                 drop_path_rate=0.0, d_model=256, mem_dim=64, memory_layers=4, memory_mlp_dim=2048,
                 memory_dropout=0.1, decoder_mlp_dim=2048, num_maskmem=7,
                 max_obj_ptrs_in_encoder=16, dynamic_multimask_via_stability=False,
                 binarize_mask_from_pts_for_mem_enc=False):
        super().__init__()
        multiple = math.lcm(32, 4 * window_spec[0])
        if image_size % multiple:
            raise ValueError(f"image_size must be a multiple of {multiple}, got {image_size}")
        self.image_size, self.hidden_dim, self.mem_dim = image_size, d_model, mem_dim
        self.num_maskmem, self.max_obj_ptrs_in_encoder = num_maskmem, max_obj_ptrs_in_encoder
        self.binarize_mask_from_pts_for_mem_enc = binarize_mask_from_pts_for_mem_enc

        dims = [embed_dim * 2**stage for stage in range(len(stages))]
        trunk = Hiera(embed_dim, num_heads, stages, global_att_blocks, window_spec, pos_embed_size,
                      drop_path_rate)
        self.image_encoder = ImageEncoder(trunk, FpnNeck(dims, d_model))
        self.mask_downsample = nn.Conv2d(1, 1, 4, stride=4)
        self.memory_attention = MemoryAttention(d_model, mem_dim, memory_layers, memory_mlp_dim,
                                                memory_dropout)
        self.memory_encoder = MemoryEncoder(d_model, mem_dim)
        self.sam_prompt_encoder = PromptEncoder(d_model, image_size // 16, image_size)
        self.sam_mask_decoder = MaskDecoder(d_model, decoder_mlp_dim,
                                            dynamic_multimask_via_stability)
        self.obj_ptr_proj = MLP(d_model, d_model, d_model)
        self.obj_ptr_tpos_proj = nn.Linear(d_model, mem_dim)
        self.maskmem_tpos_enc = nn.Parameter(torch.zeros(num_maskmem, 1, 1, mem_dim))
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, d_model))
        self.no_mem_pos_enc = nn.Parameter(torch.zeros(1, 1, d_model))  # in the files, never used
        self.no_obj_ptr = nn.Parameter(torch.zeros(1, d_model))
        self.no_obj_embed_spatial = nn.Parameter(torch.zeros(1, mem_dim))
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def device(self):
        return self.no_mem_embed.device

    def forward_image(self, img_batch):
        """Normalised images (V, 3, S, S) -> the image encoder's dict; other sizes: ValueError.

        The first two maps of backbone_fpn get D / 8 and D / 4 channels, as the decoder needs them.
        """
        size = tuple(img_batch.shape[-2:])
        if size != (self.image_size, self.image_size):
            raise ValueError(f"image must be {self.image_size} pixels square, got {size}")
        backbone_out = self.image_encoder(img_batch)
        maps = backbone_out["backbone_fpn"]
        maps[0] = self.sam_mask_decoder.conv_s0(maps[0])
        maps[1] = self.sam_mask_decoder.conv_s1(maps[1])
        return backbone_out

    def _prepare_backbone_features(self, backbone_out):
        """Dict of forward_image -> the same, three maps (H*W, V, channels), positions, sizes [(H, W)].

        track_step takes the last three, dimension 1 indexed by the image of each object.
        """
        maps, positions = backbone_out["backbone_fpn"], backbone_out["vision_pos_enc"]
        feat_sizes = [tuple(x.shape[-2:]) for x in maps]
        vision_feats = [x.flatten(2).permute(2, 0, 1) for x in maps]
        vision_pos_embeds = [x.flatten(2).permute(2, 0, 1) for x in positions]
        return backbone_out, vision_feats, vision_pos_embeds, feat_sizes

    def _forward_sam_heads(self, backbone_features, point_inputs=None, mask_inputs=None,
                           high_res_features=None, multimask_output=False):
        """Features (B, D, E, E) and prompts of B objects -> seven outputs.

        point_inputs: dict of point_coords (B, N, 2), point_labels (B, N); None: one padding point.
        mask_inputs: logits (B, 1, 4E, 4E); of another size they are resized.
        Out: masks (B, M, 4E, 4E) and (B, M, S, S), M = 3 with multimask_output, else 1; IoU (B, M);
        mask of highest IoU (B, 1, 4E, 4E) and (B, 1, S, S); object pointer (B, D); score (B, 1).
        If the score is not above 0, the object is absent: logits -1024, pointer no_obj_ptr.
        """
        objects, device = len(backbone_features), backbone_features.device
        if point_inputs is None:
            coords = torch.zeros(objects, 1, 2, device=device)
            labels = torch.full((objects, 1), -1, dtype=torch.int32, device=device)
        else:
            coords, labels = point_inputs["point_coords"], point_inputs["point_labels"]
        low_res_size = self.sam_prompt_encoder.mask_input_size
        if mask_inputs is not None and mask_inputs.shape[-2:] != low_res_size:
            mask_inputs = F.interpolate(mask_inputs.float(), low_res_size, mode="bilinear",
                                        align_corners=False, antialias=True)
        sparse, dense = self.sam_prompt_encoder((coords, labels), masks=mask_inputs)
        low_res, ious, tokens, score = self.sam_mask_decoder(
            backbone_features, self.sam_prompt_encoder.get_dense_pe(), sparse, dense,
            multimask_output, False, high_res_features)

        present = score > 0  # (B, 1)
        low_res = torch.where(present[..., None, None], low_res.float(), NO_OBJ_SCORE)
        high_res = F.interpolate(low_res, (self.image_size, self.image_size), mode="bilinear",
                                 align_corners=False)
        best, rows = ious.argmax(1), torch.arange(objects, device=device)
        pointer = self.obj_ptr_proj(tokens[rows, best])
        pointer = torch.where(present, pointer, self.no_obj_ptr.to(pointer.dtype))
        best_low_res, best_high_res = low_res[rows, best][:, None], high_res[rows, best][:, None]
        return low_res, high_res, ious, best_low_res, best_high_res, pointer, score

    def _use_mask_as_output(self, backbone_features, high_res_features, mask_inputs):
        """Mask prompts (B, 1, S, S) of 0 and 1 -> seven outputs, whose masks are 20 * prompt - 10.

        The decoder computes only the pointer. An empty mask is an absent object.
        """
        size = (self.image_size, self.image_size)
        if mask_inputs.shape[-2:] != size:
            raise ValueError(f"a mask prompt must be {size}, got {tuple(mask_inputs.shape[-2:])}")
        mask = mask_inputs.float()
        high_res = 20 * mask - 10
        low_res = F.interpolate(high_res, self.sam_prompt_encoder.mask_input_size, mode="bilinear",
                                align_corners=False, antialias=True)
        pointer = self._forward_sam_heads(
            backbone_features, mask_inputs=self.mask_downsample(mask),
            high_res_features=high_res_features)[5]
        present = (mask > 0).flatten(1).any(1, keepdim=True)
        pointer = torch.where(present, pointer, self.no_obj_ptr.to(pointer.dtype))
        score = 20 * present.float() - 10
        return low_res, high_res, mask.new_ones(len(mask), 1), low_res, high_res, pointer, score

    def _use_multimask(self, is_init_cond_frame, point_inputs):
        """Returns whether the decoder gives three masks: for no point or one (a box is two points)."""
        return point_inputs is None or point_inputs["point_labels"].shape[1] <= 1

    def _memory(self, frame_idx, output_dict, num_frames, track_in_reverse):
        """Returns memory and its position codes, each (K, B, mem_dim), and how many of the K are pointers.

        First the maps: all conditioning frames share the last time code, whatever their distance; each
        of the num_maskmem - 1 frames before this one has its own. Then object pointers, each cut into
        tokens: of conditioning frames (in eval mode only past ones), then of the frames before.
        Their time is divided by the largest distance, which is less in short clips, as published.
        """
        step, limit = -1 if track_in_reverse else 1, min(num_frames, self.max_obj_ptrs_in_encoder)
        conditioning = output_dict["cond_frame_outputs"]
        tracked = output_dict["non_cond_frame_outputs"]
        ages = range(1, max(self.num_maskmem, limit))
        before = [(age, tracked.get(frame_idx - step * age)) for age in ages]
        before = [(age, out) for age, out in before if out is not None]

        memory, position = [], []
        maps = [(self.num_maskmem, out) for out in conditioning.values()]
        maps += [(age, out) for age, out in before if age < self.num_maskmem]
        for age, out in maps:
            memory.append(out["maskmem_features"].flatten(2).permute(2, 0, 1))
            code = out["maskmem_pos_enc"][-1].flatten(2).permute(2, 0, 1)
            position.append(code + self.maskmem_tpos_enc[age - 1])

        pointers = [(step * (frame_idx - t), out) for t, out in conditioning.items()]
        pointers = [(age, out) for age, out in pointers if self.training or age >= 0]
        pointers += [(age, out) for age, out in before if age < limit]
        tokens = 0
        if pointers:
            time = torch.tensor([age for age, _ in pointers], device=self.device) / (limit - 1)
            time = self.obj_ptr_tpos_proj(get_1d_sine_pe(time, self.hidden_dim))
            pointers = torch.stack([out["obj_ptr"] for _, out in pointers])  # (pointers, B, D)
            pointers = pointers.unflatten(2, (-1, self.mem_dim)).transpose(1, 2)
            memory.append(pointers.flatten(0, 1))                            # (tokens, B, mem_dim)
            position.append(time[:, None, None].expand_as(pointers).flatten(0, 1))
            tokens = len(memory[-1])
        return torch.cat(memory), torch.cat(position), tokens

    def _prepare_memory_conditioned_features(
            self, frame_idx, is_init_cond_frame, current_vision_feats, current_vision_pos_embeds,
            feat_sizes, output_dict, num_frames, track_in_reverse=False):
        """Conditions the current frame's last map (E*E, B, D) on the memory -> (B, D, E, E)."""
        feats = current_vision_feats[-1]
        if is_init_cond_frame:
            feats = feats + self.no_mem_embed
        elif output_dict["cond_frame_outputs"]:
            memory, position, tokens = self._memory(
                frame_idx, output_dict, num_frames, track_in_reverse)
            feats = self.memory_attention(
                feats, memory, current_vision_pos_embeds[-1], position, tokens)
        else:
            raise ValueError(f"frame {frame_idx} has no conditioning frame to be tracked from")
        return feats.permute(1, 2, 0).unflatten(2, feat_sizes[-1])

    def _encode_new_memory(self, current_vision_feats, feat_sizes, pred_masks_high_res,
                           object_score_logits, is_mask_from_pts):
        """Maps of the frame, mask logits (B, 1, S, S) -> memory (B, mem_dim, E, E), [position codes].

        The maps are those before memory attention. is_mask_from_pts: points prompted the frame.
        """
        pix_feat = current_vision_feats[-1].permute(1, 2, 0).unflatten(2, feat_sizes[-1])
        if self.binarize_mask_from_pts_for_mem_enc and is_mask_from_pts and not self.training:
            mask = (pred_masks_high_res > 0).float()
        else:
            mask = pred_masks_high_res.sigmoid()
        out = self.memory_encoder(pix_feat, 20 * mask - 10)
        features, absent = out["vision_features"], (object_score_logits <= 0)[..., None, None]
        marked = features + self.no_obj_embed_spatial[..., None, None].to(features.dtype)
        return torch.where(absent, marked, features), out["vision_pos_enc"]

    def _track_step(self, frame_idx, is_init_cond_frame, current_vision_feats,
                    current_vision_pos_embeds, feat_sizes, point_inputs, mask_inputs, output_dict,
                    num_frames, track_in_reverse=False):
        """Does what track_step does before the memory encoder, so that training can add clicks.

        Out: a dict of the prompts, the seven outputs of the heads, the two finer maps
        (B, channels, H, W) and the features that the heads received.
        """
        current_out = {"point_inputs": point_inputs, "mask_inputs": mask_inputs}
        *high_res_features, pix_feat = [x.permute(1, 2, 0).unflatten(2, size)
                                        for x, size in zip(current_vision_feats, feat_sizes)]
        if mask_inputs is not None:
            outputs = self._use_mask_as_output(pix_feat, high_res_features, mask_inputs)
        else:
            pix_feat = self._prepare_memory_conditioned_features(
                frame_idx, is_init_cond_frame, current_vision_feats, current_vision_pos_embeds,
                feat_sizes, output_dict, num_frames, track_in_reverse)
            outputs = self._forward_sam_heads(
                pix_feat, point_inputs, None, high_res_features,
                self._use_multimask(is_init_cond_frame, point_inputs))
        return current_out, outputs, high_res_features, pix_feat

    def track_step(self, frame_idx, is_init_cond_frame, current_vision_feats,
                   current_vision_pos_embeds, feat_sizes, point_inputs, mask_inputs, output_dict,
                   num_frames, track_in_reverse=False):
        """Segments B objects, which may be of several videos, on one frame -> dict.

        current_vision_feats, current_vision_pos_embeds (only the last is used), feat_sizes: see
        _prepare_backbone_features. is_init_cond_frame: the frame is not conditioned on the memory.
        point_inputs: dict of point_coords (B, N, 2) and point_labels (B, N), or None.
        mask_inputs: (B, 1, S, S), which then are the output, or None.
        output_dict: earlier outputs, {"cond_frame_outputs": {frame: dict},
        "non_cond_frame_outputs": {...}}; the caller adds this one. No conditioning frame: ValueError.
        Out: pred_masks (B, 1, 4E, 4E), pred_masks_high_res (B, 1, S, S), obj_ptr (B, D),
        object_score_logits (B, 1), maskmem_features (B, mem_dim, E, E), maskmem_pos_enc, the prompts.
        """
        current_out, outputs, _, _ = self._track_step(
            frame_idx, is_init_cond_frame, current_vision_feats, current_vision_pos_embeds,
            feat_sizes, point_inputs, mask_inputs, output_dict, num_frames, track_in_reverse)
        _, _, _, low_res_masks, high_res_masks, pointer, score = outputs
        memory, position = self._encode_new_memory(
            current_vision_feats, feat_sizes, high_res_masks, score, point_inputs is not None)
        current_out.update(
            pred_masks=low_res_masks, pred_masks_high_res=high_res_masks, obj_ptr=pointer,
            object_score_logits=score, maskmem_features=memory, maskmem_pos_enc=position)
        return current_out

    @torch.no_grad()
    def propagate(self, frames, prompts, videos=None, track_in_reverse=False, state=None):
        """Tracks objects through videos of T frames: yields (frame, out) in order of tracking.

        frames: T frames, (3, S, S) of one video or (V, 3, S, S) of several, uint8 RGB or normalised: a
        tensor, or anything with len and [], so that a long video need not be in memory.
        prompts: for each object {frame: prompt}; a prompt is {"mask_inputs": (1, S, S)} of 0 and 1, or
        {"point_coords": (N, 2), "point_labels": (N,)}, tensors; a box is two points labelled 2, 3.
        Anything else, an object without prompt, a frame out of range: ValueError.
        videos: index of each object's video, default 0.
        out: pred_masks (B, 1, 4E, 4E) float32 logits and object_score_logits (B, 1), objects as in
        prompts. Prompted frames come first, as conditioning frames. An object is tracked from its
        first prompt on (backwards from its last); until then it is absent: both are -1024.
        An object's masks do not depend on the others. Memory does not grow with T.
        state: {} is filled with what the remaining frames need, tensors and plain types. Saved after
        any frame and given again, on the model's device, with the same other arguments, it lets
        tracking continue with the next frame.
        """
        groups = group_prompts(prompts, len(frames), self.device)
        videos = [0] * len(prompts) if videos is None else videos
        videos = torch.as_tensor(videos, device=self.device)
        step, side = -1 if track_in_reverse else 1, self.image_size // 4
        kept = max(self.num_maskmem, self.max_obj_ptrs_in_encoder)

        def encode(t):
            images = frames[t].to(self.device)
            images = normalize(images) if images.dtype == torch.uint8 else images
            images = images[None] if images.dim() == 3 else images
            return self._prepare_backbone_features(self.forward_image(images))

        def track(t, backbone, group, outputs):
            _, feats, positions, sizes = backbone
            images, prompt = videos[group["objects"]], group["prompts"].get(t, {})
            out = self.track_step(
                t, bool(prompt), [x[:, images] for x in feats], [positions[-1][:, images]], sizes,
                prompt if "point_coords" in prompt else None, prompt.get("mask_inputs"), group,
                len(frames), track_in_reverse)
            del out["pred_masks_high_res"]
            outputs[t] = out

        state = {} if state is None else state
        if state:
            for group, outputs in zip(groups, state["outputs"]):
                group.update(outputs)
        else:
            for t in sorted({t for group in groups for t in group["prompts"]}):
                backbone = encode(t)
                for group in groups:
                    if t in group["prompts"]:
                        track(t, backbone, group, group["cond_frame_outputs"])
            names = "cond_frame_outputs", "non_cond_frame_outputs"
            state["outputs"] = [{name: group[name] for name in names} for group in groups]
            state["done"] = 0

        for t in range(len(frames))[::step][state["done"]:]:
            masks = torch.full((len(prompts), 1, side, side), NO_OBJ_SCORE, device=self.device)
            scores, backbone = masks[:, :, 0, 0].clone(), None
            for group in groups:
                if step * t < min(step * first for first in group["prompts"]):
                    continue
                outputs = group["cond_frame_outputs"]
                if t not in outputs:
                    backbone, outputs = backbone or encode(t), group["non_cond_frame_outputs"]
                    track(t, backbone, group, outputs)
                    outputs.pop(t - step * kept, None)
                masks[group["objects"]] = outputs[t]["pred_masks"]
                scores[group["objects"]] = outputs[t]["object_score_logits"].float()
            state["done"] += 1
            yield t, {"pred_masks": masks, "object_score_logits": scores}


def group_prompts(prompts, num_frames, device):
    """Prompts of `propagate` -> groups of at most BATCH_OBJECTS objects, each a batch for track_step.

    A group's objects have prompts of the same shapes on the same frames: padding would change the masks.
    """
    groups = {}
    for i, by_frame in enumerate(prompts):
        if not by_frame or not all(0 <= t < num_frames for t in by_frame):
            raise ValueError(f"object {i} needs prompts on frames 0 to {num_frames - 1}, "
                             f"got {sorted(by_frame)}")
        for prompt in by_frame.values():
            if sorted(prompt) not in (["mask_inputs"], ["point_coords", "point_labels"]):
                raise ValueError("a prompt is mask_inputs, or point_coords and point_labels, "
                                 f"got {sorted(prompt)}")
        key = tuple((t, name, x.shape) for t in sorted(by_frame)
                    for name, x in sorted(by_frame[t].items()))
        groups.setdefault(key, []).append(i)
    batches = [objects[i:i + BATCH_OBJECTS] for objects in groups.values()
               for i in range(0, len(objects), BATCH_OBJECTS)]
    return [{
        "objects": torch.tensor(objects, device=device),
        "prompts": {t: {name: torch.stack([prompts[i][t][name] for i in objects]).to(device)
                        for name in prompt} for t, prompt in prompts[objects[0]].items()},
        "cond_frame_outputs": {}, "non_cond_frame_outputs": {}} for objects in batches]


# --- Images in, masks out ---

def resize_images(images, image_size):
    """Images (H, W, 3) uint8 RGB of one size -> (T, 3, S, S) uint8, stretched to the net's square."""
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return v2.functional.resize(images, [image_size, image_size], antialias=True).contiguous()


def resize_mask(mask, image_size):
    """Mask (H, W) bool -> (1, S, S) bool: pixels at least half covered; of a tiny mask the most covered."""
    share = v2.functional.resize(mask[None].float(), [image_size, image_size], antialias=True)
    return share >= share.max().clamp(max=0.5)


def normalize(images):
    """Images (..., 3, S, S) uint8 RGB -> float32, as forward_image takes them."""
    return v2.functional.normalize(images.float(), PIXEL_MEAN, PIXEL_STD)


def encode(model, image, dtype):
    """Encodes a single image (3, S, S) uint8 -> a map (1, D, E, E), two finer maps."""
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        *finer, features = model.forward_image(normalize(image)[None])["backbone_fpn"]
        return features + model.no_mem_embed[..., None].transpose(1, 2), finer


def decode(model, embedding, points, labels, multimask, dtype):
    """Points (B, N, 2) in the square, labels (B, N) -> mask logits (B, C, M, M), predicted IoU (B, C).

    C is 3, or 1 without multimask: the mask for clear prompts.
    """
    features, finer = embedding
    with torch.autocast(features.device.type, dtype, enabled=dtype is not None):
        prompts = model.sam_prompt_encoder((points, labels))
        masks, iou, _, _ = model.sam_mask_decoder(
            features, model.sam_prompt_encoder.get_dense_pe(), *prompts, multimask, True, finer)
    return masks.float(), iou.float()


def enlarge(logits, size):
    """Mask logits (B, C, M, M) -> (B, C, *size), the image's size (H, W)."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


# --- Sizes ---

def sam2_hiera_tiny(image_size=1024, **options):
    """Builds SAM 2.1 tiny, 39.0 M parameters; options: other arguments of SAM2."""
    return SAM2(image_size, embed_dim=96, stages=(1, 2, 7, 2), global_att_blocks=(5, 7, 9),
                **options)


def sam2_hiera_small(image_size=1024, **options):
    """Builds SAM 2.1 small, 46.1 M parameters; options: other arguments of SAM2."""
    return SAM2(image_size, embed_dim=96, stages=(1, 2, 11, 2), global_att_blocks=(7, 10, 13),
                **options)


def sam2_hiera_base_plus(image_size=1024, **options):
    """Builds SAM 2.1 base plus, 80.9 M parameters; options: other arguments of SAM2."""
    return SAM2(image_size, embed_dim=112, num_heads=2, stages=(2, 3, 16, 3),
                global_att_blocks=(12, 16, 20), pos_embed_size=14, **options)


def sam2_hiera_large(image_size=1024, **options):
    """Builds SAM 2.1 large, 224.4 M parameters; options: other arguments of SAM2."""
    return SAM2(image_size, embed_dim=144, num_heads=2, stages=(2, 6, 36, 4),
                global_att_blocks=(23, 33, 43), window_spec=(8, 4, 16, 8), **options)


def sam2_demo(image_size=128, **options):
    """Builds a small net of 1.5 M parameters, so that everything can be tried on a laptop."""
    return SAM2(image_size, embed_dim=24, stages=(1, 2, 3, 1), global_att_blocks=(4,), d_model=64,
                mem_dim=16, memory_layers=2, memory_mlp_dim=128, decoder_mlp_dim=256, **options)


NETS = {"tiny": sam2_hiera_tiny, "small": sam2_hiera_small, "base_plus": sam2_hiera_base_plus,
        "large": sam2_hiera_large, "demo": sam2_demo}
