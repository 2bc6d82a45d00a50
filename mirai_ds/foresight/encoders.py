"""Mirai-I's teacher: a frozen timm encoder with exactly fitting weights, one block's patch features, a block mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirai_ds.config import ConfigError, EncoderConfig, UserError
from mirai_ds.config.encoder_config import ENCODERS
from mirai_ds.config.errors import nearest
from mirai_ds.foresight.teachers import Teacher
from mirai_ds.runtime.precision import float32_products
from mirai_ds.runtime.weight_files import read_weight_file


class EncoderTeacher(Teacher):
    """Patch features of a frozen timm encoder in raster order, prefix tokens dropped."""

    reads_images = capturable = True

    def __init__(self, config: EncoderConfig, grid: int, device: torch.device) -> None:
        """grid: side of the token grid, to which the patch grid is made equal.  Raises what load_encoder raises."""
        self.config, self.grid = config, grid
        self.dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        self.products: Literal["ieee", "tf32"] = "tf32" if config.dtype == "tf32" else "ieee"
        self.encoder, self.image_size = load_encoder(config, grid)
        self.encoder.to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        if config.block_causal is not None:
            restrict_attention(self.encoder, grid * grid, config)
        self.feature_dim = int(self.encoder.num_features)  # type: ignore[arg-type]
        self.mean = torch.tensor(config.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(config.std, device=device).view(1, 3, 1, 1)
        self._forward = torch.compile(patch_features) if config.compile else patch_features

    @torch.no_grad()
    def features(self, tokens: Tensor, labels: Tensor, images: Tensor | None) -> Tensor:
        """images (B, 3, H, W) uint8 -> (B, grid^2, C) in the encoder's dtype.

        Pixels to [0, 1], mean and std, *then* bicubic resize without antialias, if any (REPA's order).
        """
        if images is None:
            problem = "the data has no images; set data.images, or give npz data an `images` array"
            raise ConfigError("foresight.method", "mirai-i", problem)
        x = encoder_input(images, self.mean, self.std, self.image_size)
        with float32_products(self.products):
            return self._forward(self.encoder, self.config, x.to(self.dtype))


def encoder_input(images: Tensor, mean: Tensor, std: Tensor, size: int) -> Tensor:
    """images (B, 3, H, W) uint8, mean and std (1, 3, 1, 1) -> fp32 (B, 3, size, size)."""
    x = (images.float() / 255.0 - mean) / std
    if x.shape[-1] != size or x.shape[-2] != size:
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
    return x


def patch_features(encoder: nn.Module, config: EncoderConfig, x: Tensor) -> Tensor:
    """x (B, 3, S, S) -> (B, P, C): the patch tokens of block `config.layer`; later blocks are not run.

    `final_norm` is the timm model's `norm`; encoders that norm after pooling (timm's `fc_norm`) have none for patches.
    """
    if config.layer is None and config.final_norm:
        return encoder.forward_features(x)[:, _prefix(encoder) :]  # type: ignore[operator]
    layer = config.layer or len(encoder.blocks)  # type: ignore[arg-type]
    features: list[Tensor] = encoder.forward_intermediates(  # type: ignore[operator]
        x, indices=[layer - 1], norm=bool(config.final_norm), output_fmt="NLC", intermediates_only=True, stop_early=True
    )
    return features[0]


# --- attention within blocks of patches ----------------------------------------------------------------------------


def attention_mask(patches: int, prefix: int, block: int) -> Tensor:
    """(prefix + patches)^2 bool on CPU, true where the row's token may attend the column's (Mirai, Fig. 3).

    Patches in raster order are cut into blocks of `block`; patch i attends patch j iff j // block <= i // block.
    Patches attend all prefix tokens (class, registers).  Prefix tokens attend prefix tokens only: what they read of a
    later patch, earlier patches would read from them one layer up.
    """
    number = torch.arange(patches) // block
    allowed = torch.ones(prefix + patches, prefix + patches, dtype=torch.bool)
    allowed[:prefix, prefix:] = False
    allowed[prefix:, prefix:] = number[None, :] <= number[:, None]
    return allowed


def restrict_attention(encoder: nn.Module, patches: int, config: EncoderConfig) -> None:
    """Put `attention_mask` into every block of `encoder`, which is on its device and in its dtype, through hooks.

    block 1 is causal.  From `patches` on there is no mask at all: the encoder is the unrestricted one, whose prefix
    tokens read patches too, which they never do under a mask.  Raises ConfigError for attention without a mask.
    """
    modules = _maskable(encoder, config)
    if config.block_causal is None or config.block_causal >= patches:
        return
    weight = next(encoder.parameters())
    allowed = attention_mask(patches, _prefix(encoder), config.block_causal).to(weight.device)
    mask = torch.zeros(allowed.shape, dtype=weight.dtype, device=weight.device).masked_fill(~allowed, -torch.inf)

    def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attn_mask": mask}

    for module in modules:
        module.register_forward_pre_hook(give, with_kwargs=True)


def _maskable(encoder: nn.Module, config: EncoderConfig) -> list[nn.Module]:
    modules = [getattr(block, "attn", None) for block in encoder.blocks]  # type: ignore[union-attr]
    maskable = [m for m in modules if m is not None and "attn_mask" in inspect.signature(m.forward).parameters]
    if len(maskable) != len(modules):
        problem = f"the attention of {config.name} takes no mask; use another encoder, e.g. dinov2-b"
        raise ConfigError("foresight.encoder.block_causal", config.block_causal, problem)
    return maskable


def _prefix(encoder: nn.Module) -> int:
    return int(encoder.num_prefix_tokens)  # type: ignore[arg-type]


# --- the model and its weights -------------------------------------------------------------------------------------


def load_encoder(config: EncoderConfig, grid: int) -> tuple[nn.Module, int]:
    """The timm model on CPU with its weights, its patch grid equal to the token grid, and its input side.

    Blocks above `config.layer` are left out.  Raises ConfigError for an unknown name, no, missing or unfit weights,
    another grid, a layer that the encoder has not, or a mask that it cannot take.
    """
    import timm

    if config.weights is None and not config.pretrained:
        problem = "give the file with the encoder's weights, or set foresight.encoder.pretrained: true for timm's own"
        raise ConfigError("foresight.encoder.weights", None, problem)
    if config.weights is not None and not Path(config.weights).is_file():
        raise ConfigError("foresight.encoder.weights", config.weights, "no such file")
    plan, size = encoder_plan(config, grid)
    path = Path(config.weights) if config.weights is not None else published_weights(plan, config)
    model = timm.create_model(config.timm_name, pretrained=False, num_classes=0, img_size=size)

    def unfit(problem: str) -> ConfigError:
        field = "weights" if config.weights is not None else "pretrained"
        value = str(path) if config.weights is not None else True
        return ConfigError(f"foresight.encoder.{field}", value, f"{problem}; encoder.name is {config.name}")

    model.load_state_dict(fitting_weights(model, path, unfit))
    if config.layer is not None:
        del model.blocks[config.layer :]
    return model, size


def untrained_encoder(config: EncoderConfig, grid: int) -> tuple[nn.Module, int]:
    """The timm model with random weights from torch's generator, to be pretrained, and its input side.

    Raises what encoder_plan raises.
    """
    import timm

    _, size = encoder_plan(config, grid)
    return timm.create_model(config.timm_name, pretrained=False, num_classes=0, img_size=size), size


def encoder_plan(config: EncoderConfig, grid: int) -> tuple[nn.Module, int]:
    """The timm model on the meta device (shapes, no memory), and its input side: patch size * grid.

    Raises ConfigError for whatever is wrong about the encoder before its weights matter.
    """
    name = "foresight.encoder.name"
    _check_name(config)
    model = _on_meta(config)
    parts = ("patch_embed", "num_prefix_tokens", "blocks", "forward_intermediates")
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None or not all(hasattr(model, part) for part in parts):
        raise ConfigError(name, config.name, "is not a patch-based vision transformer")
    patch = int(patch if isinstance(patch, int) else patch[0])
    size = config.image_size or patch * grid
    if size != patch * grid:
        problem = f"patch {patch} on a {grid}x{grid} grid needs {patch * grid}"
        raise ConfigError("foresight.encoder.image_size", size, problem)
    depth = len(model.blocks)  # type: ignore[arg-type]
    if config.layer is not None and config.layer > depth:
        raise ConfigError(
            "foresight.encoder.layer", config.layer, f"must be at most {depth}, the blocks of {config.name}"
        )
    if config.block_causal is not None:
        _maskable(model, config)
    model = _on_meta(config, img_size=size)
    if model.patch_embed.num_patches != grid * grid:  # type: ignore[union-attr]
        raise ConfigError(name, config.name, "is a hybrid: its patches are not the image's; use a plain ViT")
    return model, size


def _on_meta(config: EncoderConfig, **options: Any) -> nn.Module:
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model(config.timm_name, pretrained=False, num_classes=0, **options)
    return model


def _check_name(config: EncoderConfig) -> None:
    problem = name_problem(config.timm_name)
    if problem is not None:
        known = "" if "weights" in problem else f" or use one of {', '.join(ENCODERS)}"
        raise ConfigError("foresight.encoder.name", config.name, problem + known)


def name_problem(name: str) -> str | None:
    """What is wrong about the name of a timm model, with or without the tag of its weights; None when it is known."""
    import timm

    architecture, dot, _ = name.partition(".")
    if architecture not in timm.list_models():
        return "timm has no such model; see timm.list_models('vit*')"
    tagged = timm.list_pretrained(f"{architecture}.*") if dot else [name]
    if name in tagged:
        return None
    return f"timm knows no such weights of {architecture}; {nearest(name, [architecture, *tagged])}"


def published_weights(model: nn.Module, config: EncoderConfig) -> Path:
    """The file of timm's published weights in the Hugging Face cache, downloaded unless it is there.

    Raises ConfigError when it is not there and cannot be had; without a connection after ten seconds at most.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import get_session

    published: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    repo, file = published.get("hf_hub_id"), published.get("hf_hub_filename") or "model.safetensors"
    if not repo:
        problem = f"timm has no published weights of {config.name} on Hugging Face; set foresight.encoder.weights"
        raise ConfigError("foresight.encoder.pretrained", True, problem)
    try:  # the cache first: of many ranks few should meet the network
        return Path(hf_hub_download(repo, file, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        get_session().head(hf_hub_url(repo, file), timeout=10)  # one try; the download repeats its own for minutes
        return Path(hf_hub_download(repo, file))
    except Exception as error:  # the client's exceptions are of several libraries and change with its version
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
        problem = (
            f"{repo} is not in the Hugging Face cache and cannot be downloaded ({reason}); get its {file} elsewhere and"
            " set foresight.encoder.weights to it, or set HF_HOME to a cache that has it"
        )
        raise ConfigError("foresight.encoder.pretrained", True, problem) from None


# What training programs call a network that they hold: parts of its tensors' names.
_WRAPPERS = {"module", "backbone", "encoder", "model", "teacher", "student", "timm_model", "_orig_mod"}
# Parts of published files that give no patch features: classifiers, masked tokens, decoders.
_NOT_FEATURES = ("head", "fc_norm.", "mask_token", "decoder", "pre_logits.")


def fitting_weights(
    model: nn.Module, path: Path, unfit: Callable[[str], UserError], not_features: tuple[str, ...] = _NOT_FEATURES
) -> dict[str, Tensor]:
    """The file's tensors for exactly this model, its position table resampled to its grid; raises unfit(problem).

    Only tensors named `not_features...` may be left over, nothing may be bent: a file of a relative (layer scales,
    another patch) would give wrong features.  Plain prefixes of wrappers (`module.`, `backbone.`) are taken off.
    """
    try:
        state = read_weights(path)
    except UserError as error:
        raise unfit(f"cannot be read as weights: {error}") from None
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    state = _unwrapped(state, list(wanted), unfit)
    kernel, needed = (shapes.get("patch_embed.proj.weight") for shapes in (state, wanted))
    if isinstance(kernel, Tensor) and needed is not None and kernel.ndim == 4 and kernel.shape[-1] != needed[-1]:
        raise unfit(f"is of an encoder with patch {kernel.shape[-1]}, not {needed[-1]}")
    convert = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)  # timm's own, for published files
    if convert is not None:
        try:
            state = convert(state, model)
        except (KeyError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
            _refuse_transformers_names(state, model, unfit)
            raise unfit(f"is not of this encoder: {type(error).__name__} when converted by timm") from None
    counters = {n: v for n, v in model.state_dict().items() if n.endswith("num_batches_tracked")}  # unused here
    state = counters | state
    missing = sorted(set(wanted) - set(state))
    if missing:
        _refuse_transformers_names(state, model, unfit)
        raise unfit(f"lacks {len(missing)} of {len(wanted)} tensors, e.g. {missing[0]}")
    extra = sorted(name for name in set(state) - set(wanted) if not name.startswith(not_features))
    if extra:
        raise unfit(f"holds {len(extra)} tensors that this encoder has not, e.g. {extra[0]}")
    bent = [name for name, shape in wanted.items() if state[name].shape != shape]
    if bent:
        shapes = f"{tuple(state[bent[0]].shape)}, not {tuple(wanted[bent[0]])}"
        raise unfit(f"has {len(bent)} tensors of other shapes, e.g. {bent[0]} {shapes}")
    broken = [name for name in wanted if state[name].is_floating_point() and not state[name].isfinite().all()]
    if broken:
        raise unfit(
            f"holds NaN or infinity in {len(broken)} of {len(wanted)} tensors, e.g. {broken[0]}; fetch it again"
        )
    return {name: state[name] for name in wanted}


def _unwrapped(state: dict[str, Tensor], wanted: list[str], unfit: Callable[[str], UserError]) -> dict[str, Tensor]:
    """The tensors below a wrapper's plain prefix, without it; all of them where there is none.

    wanted: the network's own names.  Raises unfit for a file of two wrapped networks.
    """
    patches = "patch_embed.proj.weight"  # of a class token or a position table files have other names and shapes
    anchor = patches if patches in wanted else wanted[0]
    ends = {name.removesuffix(anchor) for name in state if name.endswith(f".{anchor}")}
    prefixes = sorted(prefix for prefix in ends if set(prefix.split(".")[:-1]) <= _WRAPPERS)
    if anchor in state or not prefixes:
        return state
    if len(prefixes) > 1:
        raise unfit(f"holds {len(prefixes)} networks ({', '.join(prefixes)}); save the one to be used by itself")
    return {n.removeprefix(prefixes[0]): value for n, value in state.items() if n.startswith(prefixes[0])}


def _refuse_transformers_names(state: dict[str, Tensor], model: nn.Module, unfit: Callable[[str], UserError]) -> None:
    """Raises unfit with the file to take, where the tensors have the names of Hugging Face's transformers."""
    theirs = next((name for name in sorted(state) if "embeddings.patch_embeddings" in name), None)
    if theirs is not None:
        published: dict[str, Any] = getattr(model, "pretrained_cfg", {})
        repo = published.get("hf_hub_id")
        better = f"take model.safetensors of {repo}" if repo else "take a file with timm's names"
        raise unfit(f"has the names of Hugging Face's transformers (e.g. {theirs}), not timm's; {better}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a weights file, unwrapped; raises UserError when the file cannot be read or holds none."""
    data = read_weight_file(path)
    for key in ("state_dict", "model", "teacher"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, not a state dict")
    return {name: value for name, value in data.items() if isinstance(value, Tensor)}
