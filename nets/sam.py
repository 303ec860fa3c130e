"""Segment Anything (Kirillov et al. 2023, arXiv:2304.02643): image and prompt encoder, mask decoder.

Keys, shapes and outputs match github.com/facebookresearch/segment-anything (commit dca509f, folder
segment_anything/modeling), whose files sam_vit_*.pth load strictly. Attention is fused, position codes
stay in float32 under autocast, and one call decodes several images with several prompts each.
Left out on purpose: options that no published build uses, and the forward pass of a batch of dicts.

Frames of coordinates: a script resizes the image so that its longest side is image_size, preprocess
pads it to a square at the right and the bottom. Points and boxes are in pixels of that square, the
decoder's masks have a quarter of its side.
Letters: B images, P prompts (each the prompt of one object), N points of a prompt or tokens, M masks,
C width of the ViT, D width of the decoder, E = image_size / 16, S side of what attention is over.
"""
import hashlib

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from nets.efficient_sam import LayerNorm2d, PositionEmbeddingRandom

PATCH_SIZE = 16
URL = "https://dl.fbaipublicfiles.com/segment_anything/"
WEIGHTS = {  # the authors publish no hashes; these, and the sizes, are those that users publish
    "vit_b": {"name": "vit_b", "url": URL + "sam_vit_b_01ec64.pth", "size": 375042383,
              "sha256": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"},
    "vit_l": {"name": "vit_l", "url": URL + "sam_vit_l_0b3195.pth", "size": 1249524607,
              "sha256": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"},
    "vit_h": {"name": "vit_h", "url": URL + "sam_vit_h_4b8939.pth", "size": 2564550879,
              "sha256": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"},
}
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, 0..255


# --- Small blocks ---

class MLPBlock(nn.Module):
    """The feed-forward part of a transformer block: (..., dim) -> (..., dim)."""

    def __init__(self, dim, hidden_dim, act):
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden_dim)
        self.lin2 = nn.Linear(hidden_dim, dim)
        self.act = act

    def forward(self, x):
        return self.lin2(self.act(self.lin1(x)))


class MLP(nn.Module):
    """Three linear layers with ReLU between them: (..., dim) -> (..., out_dim)."""

    def __init__(self, dim, hidden_dim, out_dim):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim),
                                     nn.Linear(hidden_dim, out_dim)])

    def forward(self, x):
        x = F.relu(self.layers[0](x))
        x = F.relu(self.layers[1](x))
        return self.layers[2](x)


# --- Image encoder ---

def split_windows(x, size):
    """(B, H, W, C) -> windows (B * rows * columns, size, size, C); zeros fill up the last ones."""
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
    x = x.view(b, x.shape[1] // size, size, -1, size, c)  # (B, rows, size, columns, size, C)
    return x.transpose(2, 3).reshape(-1, size, size, c)


def join_windows(windows, height, width):
    """Undoes split_windows: windows -> (B, height, width, C), without the padding."""
    size, c = windows.shape[2:]
    rows, columns = -(-height // size), -(-width // size)
    x = windows.view(-1, rows, columns, size, size, c).transpose(2, 3)
    return x.reshape(-1, rows * size, columns * size, c)[:, :height, :width]


class Attention(nn.Module):
    """Self-attention with relative positions over a square of tokens: (B, S, S, C), both in and out.

    Added to the scores: q . rel_pos_h[row of q - row of k + S - 1], and the same for columns. This q
    is not scaled.
    """

    def __init__(self, dim, num_heads, size):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads))

    def forward(self, x):
        b, s, _, c = x.shape
        qkv = self.qkv(x).view(b, s * s, 3, self.num_heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)                      # (3, B, heads, S*S, C / heads)
        i = torch.arange(s, device=x.device)
        distance = i[:, None] - i + s - 1
        rel_h = self.rel_pos_h[distance]                      # (S of q, S of k, C / heads)
        rel_w = self.rel_pos_w[distance]

        # The position scores of 12 heads are 0.8 GB at 64 x 64 tokens in float32, so only some heads
        # go at a time: on a CPU one at that size (1.3 times as fast as all), on a GPU as many as fill it.
        max_scores = 2**24 if x.device.type == "cpu" else 2**28
        heads = max(1, max_scores // (b * s**4))
        x = torch.cat([self.attend(*part, rel_h, rel_w) for part in qkv.split(heads, 2)], 1)
        return self.proj(x.transpose(1, 2).reshape(b, s, s, c))

    @staticmethod
    def attend(q, k, v, rel_h, rel_w):
        q_square = q.unflatten(2, rel_h.shape[:2])            # (B, heads, S, S, C / heads)
        rows = torch.einsum("bnhwc,hkc->bnhwk", q_square, rel_h)
        columns = torch.einsum("bnhwc,wkc->bnhwk", q_square, rel_w)
        scores = rows[..., :, None] + columns[..., None, :]   # (B, heads, S, S, S, S)
        scores = scores.flatten(4, 5).flatten(2, 3)           # (B, heads, S*S of q, S*S of k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=scores)


class Block(nn.Module):
    """Pre-norm transformer block: (B, E, E, C) -> (B, E, E, C).

    Attention is within windows, or over the whole image if window is 0. The zeros that fill up the
    last windows are not masked, as published.
    """

    def __init__(self, dim, num_heads, mlp_ratio, grid, window):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, window or grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLPBlock(dim, int(dim * mlp_ratio), nn.GELU())

    def forward(self, x):
        attended = self.norm1(x)
        if self.window:
            attended = join_windows(self.attn(split_windows(attended, self.window)), *x.shape[1:3])
        else:
            attended = self.attn(attended)
        x = x + attended
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) -> one token per patch, (B, H / 16, W / 16, C)."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_SIZE, stride=PATCH_SIZE)

    def forward(self, x):
        return self.proj(x).permute(0, 2, 3, 1)


class ImageEncoder(nn.Module):
    """Normalised image (B, 3, image_size, image_size) -> (B, D, E, E); other sizes: ValueError."""

    def __init__(self, image_size, dim, depth, num_heads, mlp_ratio, window_size,
                 global_attn_indexes, neck_dim):
        super().__init__()
        self.img_size = image_size  # the official SamPredictor reads this name
        grid = image_size // PATCH_SIZE
        self.patch_embed = PatchEmbed(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, grid, 0 if i in global_attn_indexes else window_size)
            for i in range(depth))
        self.neck = nn.Sequential(
            nn.Conv2d(dim, neck_dim, 1, bias=False), LayerNorm2d(neck_dim),
            nn.Conv2d(neck_dim, neck_dim, 3, padding=1, bias=False), LayerNorm2d(neck_dim))

    def forward(self, x):
        size = tuple(x.shape[-2:])
        if size != (self.img_size, self.img_size):
            raise ValueError(f"image must be {self.img_size} pixels square, got {size}")
        x = self.patch_embed(x) + self.pos_embed  # (B, E, E, C)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))   # (B, E, E, C) -> (B, D, E, E)


# --- Prompt encoder ---

class PromptEncoder(nn.Module):
    """Points, boxes, masks of B objects, each optional -> tokens (B, N, D), dense (B, D, E, E).

    points: (coordinates (B, N, 2), labels (B, N)), x, y in pixels of the square, labels 1 object,
    0 background, 2 and 3 the upper left and lower right corner of a box (SAM 2), -1 padding: its
    coordinates do not matter, but attention sees it, so more of it changes the masks a little (as
    published). boxes: (B, 4), x0, y0, x1, y1; without them one padding point is added, as in SAM's
    training. masks: (B, 1, 4E, 4E) logits. With none of the three, B is 1 and N is 0.
    """

    def __init__(self, dim, grid, image_size):
        super().__init__()
        self.dim, self.grid, self.image_size = dim, grid, image_size
        self.mask_input_size = (4 * grid, 4 * grid)
        self.pe_layer = PositionEmbeddingRandom(dim)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, stride=2), LayerNorm2d(4), nn.GELU(),
            nn.Conv2d(4, 16, 2, stride=2), LayerNorm2d(16), nn.GELU(), nn.Conv2d(16, dim, 1))
        self.no_mask_embed = nn.Embedding(1, dim)

    def get_dense_pe(self):
        """Position codes of the cells of the image features, (1, D, E, E)."""
        device = self.no_mask_embed.weight.device
        centres = (torch.arange(self.grid, device=device) + 0.5) / self.grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.pe_layer(torch.stack([x, y], -1)).permute(2, 0, 1)[None]

    def embed_points(self, coords, labels):
        labels = labels[..., None]
        tokens = self.pe_layer((coords + 0.5) / self.image_size)  # 0.5: centre of the pixel
        tokens = torch.where(labels == -1, self.not_a_point_embed.weight, tokens)
        for label, embedding in enumerate(self.point_embeddings):
            tokens = tokens + (labels == label) * embedding.weight
        return tokens  # (B, N, D)

    def forward(self, points=None, boxes=None, masks=None):
        no_mask = self.no_mask_embed.weight  # (1, D)
        tokens = []
        if points is not None:
            coords, labels = points
            if boxes is None:
                coords, labels = F.pad(coords, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
            tokens.append(self.embed_points(coords, labels))
        if boxes is not None:
            corners = torch.tensor([2, 3], device=boxes.device).expand(len(boxes), 2)
            tokens.append(self.embed_points(boxes.view(-1, 2, 2), corners))
        if not tokens:
            tokens.append(no_mask.new_empty(1 if masks is None else len(masks), 0, self.dim))
        tokens = torch.cat(tokens, 1)
        if masks is not None:
            return tokens, self.mask_downscaling(masks)
        dense = no_mask[..., None, None]
        return tokens, dense.expand(len(tokens), -1, self.grid, self.grid)


# --- Mask decoder ---

class DecoderAttention(nn.Module):
    """Attention of q (P, N, D) over k, v (P, K, D), in D / downsample channels -> (P, N, D).

    used (P, K) bool: whether each key counts; None: all do.
    """

    def __init__(self, dim, num_heads, downsample=1):
        super().__init__()
        inner = dim // downsample
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q, k, v, used=None):
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = None if used is None else used[:, None, None]
        x = F.scaled_dot_product_attention(q, k, v, mask)  # (P, heads, N, channels of a head)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class TwoWayAttentionBlock(nn.Module):
    """Tokens (P, N, D) look at themselves and the image (P, E*E, D), then the image at the tokens.

    The self-attention of the first layer has no position codes and no residual.
    """

    def __init__(self, dim, num_heads, make_mlp, first):
        super().__init__()
        self.first = first
        self.self_attn = DecoderAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = DecoderAttention(dim, num_heads, downsample=2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = make_mlp()
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = DecoderAttention(dim, num_heads, downsample=2)

    def forward(self, queries, keys, query_pe, key_pe, used=None):
        if self.first:
            queries = self.self_attn(queries, queries, queries, used)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries, used)
        queries = self.norm1(queries)

        q, k = queries + query_pe, keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(q, k, keys))
        queries = self.norm3(queries + self.mlp(queries))

        q = queries + query_pe
        keys = self.norm4(keys + self.cross_attn_image_to_token(k, q, queries, used))
        return queries, keys


class TwoWayTransformer(nn.Module):
    """Image (B, D, E, E), its position code, tokens (B, N, D) -> tokens, image (B, E*E, D).

    The position code is (1, D, E, E). make_mlp: a function that returns a block's feed-forward part.
    used (B, N) bool: tokens that others and the image look at; None: all.
    """

    def __init__(self, depth, dim, num_heads, make_mlp):
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(dim, num_heads, make_mlp, i == 0) for i in range(depth))
        self.final_attn_token_to_image = DecoderAttention(dim, num_heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, image, image_pe, tokens, used=None):
        keys, key_pe = image.flatten(2).transpose(1, 2), image_pe.flatten(2).transpose(1, 2)
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, key_pe, used)
        attended = self.final_attn_token_to_image(queries + tokens, keys + key_pe, keys)
        return self.norm_final_attn(queries + attended), keys


class MaskDecoder(nn.Module):
    """Embeddings of B images, prompts of P objects -> mask logits (P, M, 4E, 4E), IoU (P, M).

    image_pe is get_dense_pe() of the prompt encoder, the prompt embeddings are its output. P is a
    multiple of B: the first P / B prompts belong to the first image, and so on. If P is 1, all images
    get that prompt, as in the official code. Any other P: ValueError.
    multimask_output: True gives three masks of different extent, False the one for clear prompts.
    The IoU is the decoder's own guess of each mask's quality, not bounded.
    used (P, N) bool: the prompt's tokens that count, where objects have different kinds of prompts.
    """

    def __init__(self, dim, depth, num_heads, mlp_dim, num_multimask):
        super().__init__()
        num_masks = num_multimask + 1
        self.transformer = TwoWayTransformer(
            depth, dim, num_heads, lambda: MLPBlock(dim, mlp_dim, nn.ReLU()))
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(num_masks, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2), LayerNorm2d(dim // 4), nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2), nn.GELU())
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(dim, dim, dim // 8) for _ in range(num_masks))
        self.iou_prediction_head = MLP(dim, dim, num_masks)

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings,
                multimask_output, used=None):
        images, prompts = len(image_embeddings), len(sparse_prompt_embeddings)
        if prompts % images and prompts != 1:
            raise ValueError(f"prompts must be 1 or a multiple of {images} images, got {prompts}")
        prompts = max(images, prompts)
        sparse = sparse_prompt_embeddings.expand(prompts, -1, -1)
        dense = dense_prompt_embeddings.expand(prompts, -1, -1, -1).unflatten(0, (images, -1))

        image = (image_embeddings[:, None] + dense).flatten(0, 1)        # (P, D, E, E)
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([tokens.expand(prompts, -1, -1), sparse], 1)  # (P, 1 + masks + N, D)
        if used is not None:
            used = F.pad(used, (tokens.shape[1] - used.shape[1], 0), value=True)
        tokens, image = self.transformer(image, image_pe, tokens, used)
        image = image.transpose(1, 2).unflatten(2, image_embeddings.shape[-2:])
        upscaled = self.output_upscaling(image)                          # (P, D / 8, 4E, 4E)
        weights = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.stack(weights, 1) @ upscaled.flatten(2)            # (P, masks, 4E * 4E)
        masks = masks.unflatten(2, upscaled.shape[-2:])
        iou = self.iou_prediction_head(tokens[:, 0])
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, chosen], iou[:, chosen]


# --- The model ---

class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder, which callers call one after the other.

    The arguments build every published size and smaller ones. An image_size that is not a multiple
    of 16 raises ValueError.
    """

    mask_threshold = 0.0  # of the logits; the official SamPredictor reads this and the next
    image_format = "RGB"

    def __init__(self, image_size=1024, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 window_size=14, global_attn_indexes=(2, 5, 8, 11), neck_dim=256, decoder_depth=2,
                 decoder_num_heads=8, decoder_mlp_dim=2048, num_multimask=3):
        super().__init__()
        if image_size % PATCH_SIZE:
            raise ValueError(f"image_size must be a multiple of {PATCH_SIZE}, got {image_size}")
        self.image_size = image_size
        self.image_encoder = ImageEncoder(image_size, embed_dim, depth, num_heads, mlp_ratio,
                                          window_size, global_attn_indexes, neck_dim)
        self.prompt_encoder = PromptEncoder(neck_dim, image_size // PATCH_SIZE, image_size)
        self.mask_decoder = MaskDecoder(neck_dim, decoder_depth, decoder_num_heads, decoder_mlp_dim,
                                        num_multimask)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    @property
    def device(self):
        return self.pixel_mean.device

    def preprocess(self, x):
        """RGB in 0..255, ([B,] 3, H, W) -> normalised, then zeros at the right and the bottom.

        A side longer than image_size raises ValueError.
        """
        height, width = x.shape[-2:]
        if max(height, width) > self.image_size:
            raise ValueError(
                f"image must be at most {self.image_size} pixels long, got {(height, width)}")
        x = (x - self.pixel_mean) / self.pixel_std
        return F.pad(x, (0, self.image_size - width, 0, self.image_size - height))

    def postprocess_masks(self, masks, input_size, original_size):
        """Logits (P, M, 4E, 4E) -> (P, M, *original_size); input_size: (H, W) before padding."""
        square, (height, width) = (self.image_size, self.image_size), input_size
        masks = F.interpolate(masks, square, mode="bilinear", align_corners=False)
        masks = masks[..., :height, :width]
        return F.interpolate(masks, tuple(original_size), mode="bilinear", align_corners=False)


# --- Images in, masks out ---

POINTS, BOX, BOTH = range(3)  # kinds of prompt


def resized_size(height, width, image_size):
    """(height, width) after resizing the longest side to image_size, rounded as published."""
    scale = image_size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def preprocess(image, image_size, mirrored=False):
    """Image (3, H, W) uint8 RGB -> (3, S, S) float32: resized, normalised and padded."""
    height, width = resized_size(*image.shape[1:], image_size)
    image = v2.functional.resize(image, [height, width], antialias=True)
    image = image.flip(2) if mirrored else image
    image = v2.functional.normalize(image.float(), PIXEL_MEAN, PIXEL_STD)
    return F.pad(image, (0, image_size - width, 0, image_size - height))


def encode(model, images, dtype):
    """Images (B, 3, S, S) float32 of preprocess -> embeddings (B, D, E, E) float32."""
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return model.image_encoder(images).float()


def decode(model, embeddings, points, labels, boxes, kinds, low_logits, multimask, dtype):
    """One pass over P objects -> mask logits (P, C, M, M), predicted IoU (P, C); C is 3 or 1.

    embeddings (P, D, E, E); points (P, N, 2), labels (P, N) and boxes (P, 4) in pixels of the square;
    kinds (P,): POINTS, BOX or BOTH count; low_logits (P, 1, M, M) of an earlier pass, or None.
    boxes may be None where clicks alone count.
    """
    if boxes is None:
        boxes = torch.zeros(len(points), 4, device=points.device)
    with torch.autocast(embeddings.device.type, dtype, enabled=dtype is not None):
        clicks, _ = model.prompt_encoder(points=(points, labels))  # (P, N + 1, D): padding without box
        corners, dense = model.prompt_encoder(boxes=boxes, masks=low_logits)
        by_click, by_box = kinds != BOX, kinds != POINTS
        used = torch.stack([by_click] * points.shape[1] + [~by_box, by_box, by_box], 1)
        masks, iou = model.mask_decoder(
            image_embeddings=embeddings, image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=torch.cat([clicks, corners], 1), dense_prompt_embeddings=dense,
            multimask_output=multimask, used=used)
    return masks.float(), iou.float()


def two_passes(model, embeddings, points, labels, boxes, kinds, dtype):
    """As the article: the best of three masks, by the predicted IoU, prompts a second pass.

    Returns logits (P, 3, M, M), iou (P, 3) of the first, logits (P, 1, M, M), iou (P, 1) of the second.
    """
    prompts = (points, labels, boxes, kinds)
    first, first_iou = decode(model, embeddings, *prompts, None, True, dtype)
    best = first_iou.argmax(1)[:, None, None, None]  # of each object; the article: one for all
    chosen = torch.take_along_dim(first, best, 1).detach()
    second, second_iou = decode(model, embeddings, *prompts, chosen, False, dtype)
    return first, first_iou, second, second_iou


def enlarge(model, logits, size):
    """Mask logits (P, C, M, M) -> (P, C, *size), the image's size (H, W)."""
    return model.postprocess_masks(logits, resized_size(*size, model.image_size), size)


# --- Weights and sizes ---

def resize_positions(state_dict, model):
    """State dict of a Sam of any image_size -> one that fits model; equal sizes: the same tensors.

    Interpolation is bicubic for position codes (usual for ViTs) and linear for relative positions of
    global blocks (as in the official get_rel_pos).
    """
    resized = dict(state_dict)
    for name, parameter in model.image_encoder.named_parameters(prefix="image_encoder"):
        table = state_dict.get(name, parameter)
        if not isinstance(table, torch.Tensor) or table.ndim != parameter.ndim:  # another net's
            continue
        if table.shape == parameter.shape:
            continue
        if name.endswith("pos_embed"):
            table, size = table.permute(0, 3, 1, 2), parameter.shape[1:3]
            table = F.interpolate(table, size, mode="bicubic", align_corners=False)
            resized[name] = table.permute(0, 2, 3, 1)
        elif name.endswith(("rel_pos_h", "rel_pos_w")):
            resized[name] = F.interpolate(table.T[None], len(parameter), mode="linear")[0].T
    return resized


def hash_frozen(model):
    """16 hex digits of the weights of both encoders."""
    digest = hashlib.sha256()
    for part in (model.image_encoder, model.prompt_encoder):
        for key, value in part.state_dict().items():
            digest.update(key.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sam_vit_b(image_size=1024):
    """SAM ViT-B, 93.7 M parameters."""
    return Sam(image_size, embed_dim=768, depth=12, num_heads=12,
               global_attn_indexes=(2, 5, 8, 11))


def sam_vit_l(image_size=1024):
    """SAM ViT-L, 312.3 M parameters."""
    return Sam(image_size, embed_dim=1024, depth=24, num_heads=16,
               global_attn_indexes=(5, 11, 17, 23))


def sam_vit_h(image_size=1024):
    """SAM ViT-H, 641.1 M parameters."""
    return Sam(image_size, embed_dim=1280, depth=32, num_heads=16,
               global_attn_indexes=(7, 15, 23, 31))


def sam_demo(image_size=128):
    """A small one of 1.3 M parameters, so that everything can be tried on a laptop."""
    return Sam(image_size, embed_dim=96, depth=4, num_heads=3, window_size=4,
               global_attn_indexes=(1, 3), neck_dim=128, decoder_mlp_dim=256)


NETS = {"vit_b": sam_vit_b, "vit_l": sam_vit_l, "vit_h": sam_vit_h, "demo": sam_demo}
