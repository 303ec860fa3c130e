"""EfficientSAM (Xiong et al. 2023, arXiv:2312.00863): a small image encoder and SAM's decoder.

The encoder is distilled from SAM's. Keys, shapes and outputs match github.com/yformer/EfficientSAM
(commit d525f622), whose files {"model": ...} load strictly. Attention is fused
(F.scaled_dot_product_attention), and position codes stay in float32 under autocast.
Left out on purpose: activations, norms and paddings that the two published builds do not use.

Frames of coordinates: points are given in pixels (x, y) of the input image, whatever its size. The
image is stretched to a square of side image_size; inside the net, points are in its pixels.
Letters: B images, Q queries per image (each the prompts of one object), N points per query,
C width of the ViT, D width of the decoder, E = image_size / patch_size.
"""
import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in 0..1
URL = "https://github.com/yformer/EfficientSAM/raw/main/weights/"
WEIGHTS = {  # the authors publish no hash: the only check is that every key and shape fits
    "efficient_sam_vits": {"name": "efficient_sam_vits", "url": f"{URL}efficient_sam_vits.pt.zip"},
    "efficient_sam_vitt": {"name": "efficient_sam_vitt", "url": f"{URL}efficient_sam_vitt.pt"},
}
SAM_NAMES = [  # of its prompt encoder and decoder, as regular expressions, and ours
    (r"\.mlp\.lin1\.", ".mlp.layers.0.0."), (r"\.mlp\.lin2\.", ".mlp.fc."),
    (r"(mlps\.\d|head)\.layers\.([01])\.", r"\1.layers.\2.0."),
    (r"(mlps\.\d|head)\.layers\.2\.", r"\1.fc."),
    (r"output_upscaling\.([01])\.", r"final_output_upscaling_layers.0.\1."),
    (r"output_upscaling\.3\.", "final_output_upscaling_layers.1.0."),
    (r"not_a_point_embed\.", "invalid_points."), (r"point_embeddings\.1\.", "point_embeddings."),
    (r"point_embeddings\.2\.", "bbox_top_left_embeddings."),
    (r"point_embeddings\.3\.", "bbox_bottom_right_embeddings."),
]
PRETRAINED_GRID = 14  # the pretrained position codes are 224 / 16 x 224 / 16


# --- Small blocks ---

class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = 1e-6

    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class MLP(nn.Module):
    """Linear and GELU for each hidden width, then Linear: (..., in) -> (..., out)."""

    def __init__(self, in_dim, hidden_dims, out_dim):
        super().__init__()
        dims = [in_dim, *hidden_dims]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in zip(dims, dims[1:]))
        self.fc = nn.Linear(dims[-1], out_dim)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.fc(x)


# --- Image encoder ---

class Attention(nn.Module):
    """Self-attention over all tokens: (B, N, C) -> (B, N, C)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, C / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class TransformerMLP(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, C) -> (B, N, C)."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TransformerMLP(dim, int(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x)


class ImageEncoder(nn.Module):
    """Normalised image (B, 3, image_size, image_size) -> embedding (B, neck_dim, E, E).

    Other sizes raise ValueError. With gradient_checkpointing = True, each block is computed again
    in the backward pass: less memory, a third more time.
    """

    def __init__(self, image_size, patch_size, dim, depth, num_heads, mlp_ratio, neck_dim):
        super().__init__()
        self.image_size, self.grid = image_size, image_size // patch_size
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(patch_size, dim)
        tokens = PRETRAINED_GRID**2 + 1  # the first is never used
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.neck = nn.Sequential(
            nn.Conv2d(dim, neck_dim, 1, bias=False), LayerNorm2d(neck_dim),
            nn.Conv2d(neck_dim, neck_dim, 3, padding=1, bias=False), LayerNorm2d(neck_dim))

    def position(self):
        """Position codes (1, C, E, E), resized from those of the pretraining."""
        codes = self.pos_embed[:, 1:].unflatten(1, (PRETRAINED_GRID, PRETRAINED_GRID))
        codes = codes.permute(0, 3, 1, 2)
        if self.grid == PRETRAINED_GRID:
            return codes
        return F.interpolate(codes, (self.grid, self.grid), mode="bicubic", align_corners=False)

    def forward(self, image):
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"image must be {self.image_size} pixels square, got {tuple(image.shape[-2:])}")
        x = self.patch_embed(image) + self.position()  # (B, C, E, E)
        x = x.flatten(2).transpose(1, 2)               # (B, E*E, C)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.neck(x)                            # (B, neck_dim, E, E)


# --- Prompt encoder ---

class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features: coordinates (..., 2) in 0..1, x first -> (..., D)."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, coords):
        # Not a matrix product: autocast would do it in bfloat16, which cannot tell pixels apart
        matrix, coords = self.positional_encoding_gaussian_matrix, 2 * coords - 1
        angle = 2 * math.pi * (coords[..., :1] * matrix[0] + coords[..., 1:] * matrix[1])
        return torch.cat([angle.sin(), angle.cos()], -1)


class PromptEncoder(nn.Module):
    """Points (B*Q, N, 2) in pixels of the square image, labels (B*Q, N) -> tokens (B*Q, N, D).

    Labels: 1 object, 0 background, 2 and 3 top left and bottom right of a box, -1 padding.
    As published, label 0 adds nothing to the position code of its point (the authors did not train
    it), and a padding point keeps its position code.
    """

    def __init__(self, dim, grid, image_size):
        super().__init__()
        self.grid, self.image_size = grid, image_size
        self.pe_layer = PositionEmbeddingRandom(dim)
        self.invalid_points = nn.Embedding(1, dim)
        self.point_embeddings = nn.Embedding(1, dim)
        self.bbox_top_left_embeddings = nn.Embedding(1, dim)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, dim)

    def get_dense_pe(self):
        """Position codes of the cells of the image embedding, (1, D, E, E)."""
        device = self.invalid_points.weight.device
        centres = (torch.arange(self.grid, device=device) + 0.5) / self.grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.pe_layer(torch.stack([x, y], -1)).permute(2, 0, 1)[None]

    def forward(self, coords, labels):
        tokens = self.pe_layer((coords + 0.5) / self.image_size)
        embeddings = {-1: self.invalid_points, 1: self.point_embeddings,
                      2: self.bbox_top_left_embeddings, 3: self.bbox_bottom_right_embeddings}
        for label, embedding in embeddings.items():
            tokens = tokens + (labels == label)[..., None] * embedding.weight
        return tokens


# --- Mask decoder ---

class DecoderAttention(nn.Module):
    """Attention of q (B, N, D) over k, v (B, M, D), in D / downsample channels -> (B, N, D)."""

    def __init__(self, dim, num_heads, downsample=1):
        super().__init__()
        inner = dim // downsample
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            bound = math.sqrt(6 / (dim + 3 * inner))
            nn.init.uniform_(layer.weight, -bound, bound)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.zeros_(layer.bias)

    def forward(self, q, k, v):
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, inner / heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class TwoWayAttentionBlock(nn.Module):
    """Tokens (B, N, D) look at themselves and the image (B, E*E, D), then the image at the tokens.

    Different from SAM's block: from the second layer on, the position code is added to the tokens
    and stays in them; the first layer has a residual too.
    """

    def __init__(self, dim, num_heads, mlp_dim, first):
        super().__init__()
        self.first = first
        self.self_attn = DecoderAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = DecoderAttention(dim, num_heads, downsample=2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, [mlp_dim], dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = DecoderAttention(dim, num_heads, downsample=2)

    def forward(self, queries, keys, query_pe, key_pe):
        if not self.first:
            queries = queries + query_pe
        queries = self.norm1(queries + self.self_attn(queries, queries, queries))

        q, k = queries + query_pe, keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(q, k, keys))
        queries = self.norm3(queries + self.mlp(queries))

        q, k = queries + query_pe, keys + key_pe
        keys = self.norm4(keys + self.cross_attn_image_to_token(k, q, queries))
        return queries, keys


class TwoWayTransformer(nn.Module):
    """Image (B, D, E, E), its position code, tokens (B, N, D) -> tokens, image (B, E*E, D).

    The position code is (1, D, E, E).
    """

    def __init__(self, depth, dim, num_heads, mlp_dim):
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(dim, num_heads, mlp_dim, i == 0) for i in range(depth))
        self.final_attn_token_to_image = DecoderAttention(dim, num_heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, image, image_pe, tokens):
        keys, key_pe = image.flatten(2).transpose(1, 2), image_pe.flatten(2).transpose(1, 2)
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, key_pe)
        attended = self.final_attn_token_to_image(queries + tokens, keys + key_pe, keys)
        return self.norm_final_attn(queries + attended), keys


class MaskDecoder(nn.Module):
    """Image embeddings and prompt tokens of B*Q queries -> masks (B*Q, M, 4E, 4E), IoU (B*Q, M).

    In: embeddings (B*Q, D, E, E), their position code (1, D, E, E), prompt tokens (B*Q, N, D).
    multimask_output: True gives the three masks of different extent (M = 3), False the one that is
    meant to be used alone (M = 1).
    """

    def __init__(self, dim, num_multimask, depth, num_heads, mlp_dim, upscaling_dims, iou_hidden,
                 iou_layers):
        super().__init__()
        num_masks = num_multimask + 1
        self.transformer = TwoWayTransformer(depth, dim, num_heads, mlp_dim)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(num_masks, dim)
        first, second = upscaling_dims
        self.final_output_upscaling_layers = nn.ModuleList([
            nn.Sequential(
                nn.ConvTranspose2d(dim, first, 2, stride=2), nn.GroupNorm(1, first), nn.GELU()),
            nn.Sequential(
                nn.ConvTranspose2d(first, second, 2, stride=2), nn.Identity(), nn.GELU())])
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(dim, [dim, dim], second) for _ in range(num_masks))
        self.iou_prediction_head = MLP(dim, [iou_hidden] * iou_layers, num_masks)

    def forward(self, image_embeddings, image_pe, prompt_tokens, multimask_output):
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        output_tokens = output_tokens.expand(len(prompt_tokens), -1, -1)
        tokens = torch.cat([output_tokens, prompt_tokens], 1)  # (B*Q, 1 + masks + N, D)
        tokens, image = self.transformer(image_embeddings, image_pe, tokens)
        upscaled = image.transpose(1, 2).unflatten(2, image_embeddings.shape[-2:])
        for layer in self.final_output_upscaling_layers:
            upscaled = layer(upscaled)                         # at last (B*Q, D / 8, 4E, 4E)
        weights = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.stack(weights, 1) @ upscaled.flatten(2)  # (B*Q, masks, 4E * 4E)
        masks = masks.unflatten(2, upscaled.shape[-2:])
        iou = self.iou_prediction_head(tokens[:, 0])
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, chosen], iou[:, chosen]


# --- The model ---

class EfficientSam(nn.Module):
    """Images (B, 3, H, W), points (B, Q, N, 2), labels (B, Q, N) -> masks, IoU.

    Images are RGB in 0..1, of any size. Masks are logits (B, Q, 3, H, W), with 0 as the threshold;
    with scale_to_original_image_size=False they are (B, Q, 3, 4E, 4E). IoU (B, Q, 3) is the
    decoder's own guess for each mask, not bounded.
    Points are in pixels (x, y) of the image. At most max_points per query are used; pad shorter
    queries with (-1, -1) and label -1 (PromptEncoder has the other labels).
    """

    def __init__(self, image_size=1024, patch_size=16, embed_dim=192, depth=12, num_heads=3,
                 mlp_ratio=4.0, neck_dim=256, max_points=6, decoder_depth=2, decoder_mlp_dim=2048,
                 decoder_num_heads=8, upscaling_dims=(64, 32), num_multimask=3, iou_hidden=256,
                 iou_layers=2):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of {patch_size}, got {image_size}")
        self.image_size, self.max_points = image_size, max_points
        self.image_encoder = ImageEncoder(image_size, patch_size, embed_dim, depth, num_heads,
                                          mlp_ratio, neck_dim)
        self.prompt_encoder = PromptEncoder(neck_dim, image_size // patch_size, image_size)
        self.mask_decoder = MaskDecoder(neck_dim, num_multimask, decoder_depth, decoder_num_heads,
                                        decoder_mlp_dim, upscaling_dims, iou_hidden, iou_layers)
        mean = torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(PIXEL_STD).view(1, 3, 1, 1)
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    def preprocess(self, images):
        """(B, 3, H, W) in 0..1 -> stretched to the square of image_size, then normalised."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return (images - self.pixel_mean) / self.pixel_std

    def get_image_embeddings(self, batched_images):
        """(B, 3, H, W) in 0..1 -> (B, D, E, E)."""
        return self.image_encoder(self.preprocess(batched_images))

    def get_rescaled_pts(self, batched_points, input_h, input_w):
        """Pixels of the image -> pixels of the square image; negative coordinates become -1."""
        scale = [self.image_size / input_w, self.image_size / input_h]
        scale = batched_points.new_tensor(scale, dtype=torch.float32)
        return torch.where(batched_points >= 0, batched_points * scale, -1.0)

    def predict_masks(self, image_embeddings, batched_points, batched_point_labels,
                      multimask_output, input_h, input_w, output_h=-1, output_w=-1):
        """Masks and IoU from image embeddings that are already computed.

        Points are in pixels of an image of (input_h, input_w). Masks are resized to
        (output_h, output_w); with -1 they keep the decoder's low resolution.
        """
        b, q, n, _ = batched_points.shape
        points = self.get_rescaled_pts(batched_points, input_h, input_w)[:, :, :self.max_points]
        labels = batched_point_labels[:, :, :self.max_points]
        points = F.pad(points, (0, 0, 0, self.max_points - points.shape[2]), value=-1.0)
        labels = F.pad(labels, (0, self.max_points - labels.shape[2]), value=-1)
        image = image_embeddings[:, None].expand(-1, q, -1, -1, -1).flatten(0, 1)  # (B*Q, D, E, E)
        image_pe = self.prompt_encoder.get_dense_pe()
        tokens = self.prompt_encoder(points.flatten(0, 1), labels.flatten(0, 1))
        masks, iou = self.mask_decoder(image, image_pe, tokens, multimask_output)
        if output_h > 0 and output_w > 0:
            masks = F.interpolate(masks, (output_h, output_w), mode="bicubic", align_corners=False)
        return masks.unflatten(0, (b, q)), iou.unflatten(0, (b, q))

    def forward(self, batched_images, batched_points, batched_point_labels,
                scale_to_original_image_size=True):
        height, width = batched_images.shape[-2:]
        output = (height, width) if scale_to_original_image_size else (-1, -1)
        embeddings = self.get_image_embeddings(batched_images)
        return self.predict_masks(embeddings, batched_points, batched_point_labels, True,
                                  height, width, *output)


# --- Images in, masks out ---
# mode is train_efficientsam.py's --preprocess: "official" stretches the image to the square; "article"
# keeps its ratio, pads it at the right and the bottom and stretches its contrast

def content_size(size, image_size, mode):
    """[height, width] of the part of the net's square that an image of this size (H, W) fills."""
    if mode == "official":
        return [image_size, image_size]
    return [max(1, round(side * image_size / max(size))) for side in size]


def preprocess(image, image_size, mode):
    """Image (3, H, W) uint8 -> (3, S, S) float32 in 0..1; the net subtracts ImageNet's mean."""
    size = content_size(image.shape[1:], image_size, mode)
    image = image / 255
    if [*image.shape[1:]] != size:
        image = F.interpolate(image[None], size, mode="bilinear")[0]
    if mode == "official":
        return image
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-8)
    return F.pad(image, (0, image_size - size[1], 0, image_size - size[0]))


def encode(model, image, dtype):
    """Image (1, 3, S, S) float32 in 0..1 -> its embedding, which serves any number of queries."""
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        return model.get_image_embeddings(image)


def decode(model, embedding, points, labels, dtype):
    """Points (q, N, 2) in the square, labels (q, N) -> mask logits (q, 3, M, M), predicted IoU (q, 3)."""
    side = model.image_size
    with torch.autocast(embedding.device.type, dtype, enabled=dtype is not None):
        logits, iou = model.predict_masks(embedding, points[None], labels[None], True, side, side)
    return logits[0].float(), iou[0].float()


def enlarge(logits, size, image_size, mode):
    """Mask logits (q, C, M, M) -> (q, C, *size), the image's size."""
    if mode == "article":  # the padding is cropped, at the net's own size
        height, width = content_size(size, image_size, mode)
        logits = F.interpolate(logits, (image_size, image_size), mode="bicubic")[..., :height, :width]
    return F.interpolate(logits, size, mode="bicubic")


def predict_masks(model, embedding, points, labels, size, mode, dtype):
    """Points (Q, N, 2), labels (Q, N) -> yields first, logits (q, 3, *size), predicted IoU (q, 3).

    size (H, W) is the image's own. q = 8 queries at a time, from index `first` on, to limit memory.
    """
    for first in range(0, len(points), 8):
        chosen = slice(first, first + 8)
        logits, iou = decode(model, embedding, points[chosen], labels[chosen], dtype)
        yield first, enlarge(logits, size, model.image_size, mode), iou


# --- Weights and sizes ---

def rename_sam(state_dict):
    """State dict of a Sam -> its prompt encoder's and decoder's tensors, by EfficientSAM's names.

    Activations, one norm and two residuals differ between the nets: they are weights to start from.
    """
    renamed = {}
    for key, value in state_dict.items():
        for pattern, name in SAM_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return {key: value for key, value in renamed.items() if not key.startswith("image_encoder.")}


def efficient_sam_vitt(image_size=1024):
    """EfficientSAM-Ti, 10.2 M parameters."""
    return EfficientSam(image_size, embed_dim=192, num_heads=3)


def efficient_sam_vits(image_size=1024):
    """EfficientSAM-S, 26.4 M parameters."""
    return EfficientSam(image_size, embed_dim=384, num_heads=6)


def efficient_sam_demo(image_size=128):
    """0.6 M parameters, patches of 8 pixels: everything can be tried with it on a laptop."""
    return EfficientSam(image_size, patch_size=8, embed_dim=96, depth=3, num_heads=3, neck_dim=64,
                        decoder_mlp_dim=256, upscaling_dims=(32, 16), iou_hidden=64)


NETS = {
    "efficient_sam_vits": efficient_sam_vits,
    "efficient_sam_vitt": efficient_sam_vitt,
    "demo": efficient_sam_demo,
}
