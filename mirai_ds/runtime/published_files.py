"""Files of others that this project reads: where they are published, how large they are, and their sha256 where it
could be looked up.  What is not known is None."""

from __future__ import annotations

from typing import NamedTuple

_LLAMAGEN = "https://huggingface.co/FoundationVision/LlamaGen/resolve/main/"
_TIMM = "https://huggingface.co/timm/"


class PublishedFile(NamedTuple):
    """One file.  about: its size in words where the exact number of bytes is not known."""

    url: str
    what: str
    sha256: str | None = None
    size: int | None = None
    about: str = ""
    saved_as: str = ""

    @property
    def name(self) -> str:
        """The file's name here."""
        return self.saved_as or self.url.rpartition("/")[2]

    @property
    def size_in_words(self) -> str:
        """Such as 288 MB."""
        if self.size is None:
            return self.about
        return f"{self.size / 1e9:.2f} GB" if self.size >= 1e9 else f"{self.size / 1e6:.0f} MB"


# Digests and sizes: the Git LFS pointers of the repositories on huggingface.co; of the Inception network its release's
# name has the first eight digits, and evaluators that check the file have all of them.
PUBLISHED: dict[str, PublishedFile] = {
    "vq16": PublishedFile(
        _LLAMAGEN + "vq_ds16_c2i.pt", "LlamaGen's tokenizer, 16 pixels a token",
        "109aa8afb2cf3761eec23cdc8644154cb498f5ab7eef2a35264d25e5e0499f7d", 287_920_306,
    ),
    "vq8": PublishedFile(
        _LLAMAGEN + "vq_ds8_c2i.pt", "LlamaGen's tokenizer, 8 pixels a token",
        "c70d2966ec012f378793214ff0755087e7c5fe6f035b469995143325dca4a4e3", about="281 MB",
    ),
    "llamagen-b-256": PublishedFile(_LLAMAGEN + "c2i_B_256.pt", "LlamaGen-B at 256 pixels", about="444 MB"),
    "llamagen-b-384": PublishedFile(
        _LLAMAGEN + "c2i_B_384.pt", "LlamaGen-B at 384 pixels",
        "7ddf3a659b180e4339e4dab8802183ede1ea8f44c5cfd4359ab27bef979c17ad", 443_736_709,
    ),
    "llamagen-l-256": PublishedFile(
        _LLAMAGEN + "c2i_L_256.pt", "LlamaGen-L at 256 pixels",
        "15fe788b9c0e8dfe36f3e3fd701b44d0c934e4fd94a0ab599b69669aa8f44a55", 1_371_712_314,
    ),
    "llamagen-l-384": PublishedFile(
        _LLAMAGEN + "c2i_L_384.pt", "LlamaGen-L at 384 pixels",
        "9b8cb63634d11e684b4a68017abffff6698752ef715058a77e5e089539ebc39a", 1_371_860_346,
    ),
    "llamagen-xl-384": PublishedFile(
        _LLAMAGEN + "c2i_XL_384.pt", "LlamaGen-XL at 384 pixels",
        "736cb92bebdcb16737dbd35210a07ae4f7fd001cdfd55b26205d89182d1807ba", 3_099_048_319,
    ),
    "llamagen-xxl-384": PublishedFile(
        _LLAMAGEN + "c2i_XXL_384.pt", "LlamaGen-XXL at 384 pixels",
        "cba5a780b9d2394386e7410c630bced3a70e109cf7107e1783c9a986e9e7754e", about="5.64 GB",
    ),
    "llamagen-3b-384": PublishedFile(
        _LLAMAGEN + "c2i_3B_384.pt", "LlamaGen-3B at 384 pixels",
        "1e9173ecbe81295b1d80b021b2bf57ed4ef089601b6745336ff20a9f382c4cac", 12_386_725_354,
    ),
    "dinov2-b": PublishedFile(
        _TIMM + "vit_base_patch14_dinov2.lvd142m/resolve/main/model.safetensors", "DINOv2-B for Mirai-I",
        "55cbb5d887b336d430e649c277b85a1429e724871f9d02ac16203235886d8c7b", about="346 MB",
        saved_as="vit_base_patch14_dinov2.lvd142m.safetensors",
    ),
    "dinov2-l": PublishedFile(
        _TIMM + "vit_large_patch14_dinov2.lvd142m/resolve/main/model.safetensors", "DINOv2-L for Mirai-I",
        about="1.22 GB", saved_as="vit_large_patch14_dinov2.lvd142m.safetensors",
    ),
    "inception": PublishedFile(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "FID's Inception network", "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", 95_628_359,
    ),
    "adm-reference": PublishedFile(
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
        "VIRTUAL_imagenet256_labeled.npz", "ADM's reference batch of ImageNet at 256 pixels", about="2 GB",
    ),
}  # fmt: skip
