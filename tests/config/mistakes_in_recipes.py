"""Typical mistakes in recipes and on the command line: (name, recipe, what the message must hold).

Field, offending value and fix, each as the user reads it.
"""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    """A recipe's text, `--set` arguments, and parts of the one-line message."""

    text: str
    parts: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def _recipe(text: str, *parts: str) -> Mistake:
    return Mistake(text, parts)


def _set(override: str, *parts: str, text: str = "") -> Mistake:
    return Mistake(text, parts, (override,))


TINY = "model: {size: custom, dim: 32, n_layer: 4, n_head: 2, block_size: 16}\n"
MIRAI = TINY + "foresight: {method: mirai-e, warmup_epochs: 0}\n"
PAPER = TINY + "foresight: {method: mirai-e, warmup_epochs: 0, convention: paper}\n"

UNKNOWN_NAMES = {
    "section": _recipe("optimiser: {lr: 1}", "optimiser: unknown key", "did you mean 'optimizer'?"),
    "top-level-nothing-near": _recipe("zzz: 1", "zzz: unknown key", "use one of: base, checkpoint, data,"),
    "base-misspelt": _recipe("bas: digits-baseline", "bas: unknown key", "did you mean 'base'?"),
    "field": _recipe("optimizer: {weigth_decay: 0.1}", "optimizer.weigth_decay: unknown key", "'weight_decay'?"),
    "field-of-another-section": _recipe("train: {lr: 1e-4}", "train.lr: unknown key", "did you mean 'optimizer.lr'?"),
    "field-without-section": _recipe("lr: 1e-4", "lr: unknown key", "did you mean 'optimizer.lr'?"),
    "llamagen-name": _recipe("train: {batch_size: 8}", "train.batch_size: unknown", "'train.global_batch_size'?"),
    "deepspeed-name": _recipe("gradient_clipping: 1.0", "gradient_clipping: unknown", "'optimizer.grad_clip'?"),
    "dashes": _recipe("train: {global-batch-size: 8}", "train.global-batch-size: unknown", "'global_batch_size'?"),
    "upper-case": _recipe("model: {Vocab_Size: 8}", "model.Vocab_Size: unknown key", "did you mean 'vocab_size'?"),
    "third-level": _recipe("train: {recompute: {polcy: full}}", "train.recompute.polcy: unknown", "'policy'?"),
    "third-level-schedule": _recipe(
        "foresight: {schedule: {at_epoch: [80]}}", "foresight.schedule.at_epoch: unknown", "'at_epochs'?"
    ),
    "third-level-optional": _recipe(
        "foresight: {encoder: {weight: x.pth}}", "foresight.encoder.weight: unknown key", "did you mean 'weights'?"
    ),
    "set-unknown": _set("optimizer.learning_rte=1", "optimizer.learning_rte: unknown key", "use one of: betas, eps,"),
    "set-unknown-section": _set("sampler.top_k=1", "sampler: unknown key", "did you mean 'sampling'?"),
    "set-deeper": _set("model.size.name=GPT-B", "model.size = {'name': 'GPT-B'}", "must be text", "not a section"),
    "key-is-true": _recipe("train: {on: 1}", "train: the key true must be a name"),
    "size": _recipe("model: {size: gpt-xl}", "model.size = 'gpt-xl'", "did you mean 'GPT-XL'?"),
    "kernel": _recipe(
        "foresight: {kernel: fast}", "foresight.kernel = 'fast'", "use one of: auto, cpu, cuda, reference"
    ),
    "method": _recipe("foresight: {method: mirai_e}", "foresight.method = 'mirai_e'", "did you mean 'mirai-e'?"),
    "method-null": _recipe("foresight: {method: }", "foresight.method = null", "did you mean 'none'?"),
    "precision": _recipe("train: {precision: fp8}", "train.precision = 'fp8'", "use one of: bf16, bf16-autocast, fp32"),
    "convention": _recipe("foresight: {convention: papers}", "foresight.convention = 'papers'", "'paper'?"),
    "policy": _recipe("train: {recompute: {policy: fulll}}", "train.recompute.policy = 'fulll'", "'full'?"),
    "encoder-weights-misspelt": _recipe(
        "foresight: {encoder: {pre_trained: true}}", "foresight.encoder.pre_trained: unknown key", "'pretrained'?"
    ),
    "weights-kind": _recipe("evaluate: {weights: [raw, avg]}", "evaluate.weights[1] = 'avg'", "use one of: ema, raw"),
}

TYPES = {
    "text-for-number": _recipe("optimizer: {lr: fast}", "optimizer.lr = 'fast'", "must be a number, e.g. 0.0001"),
    "list-for-number": _recipe("train: {epochs: [1]}", "train.epochs = [1]", "must be a number, not a list, e.g. 300"),
    "section-for-number": _recipe("optimizer: {lr: {a: 1}}", "optimizer.lr = {'a': 1}", "a number, not a section"),
    "true-for-number": _recipe("optimizer: {lr: true}", "optimizer.lr = true", "must be a number, e.g. 0.0001"),
    "true-for-count": _recipe("train: {max_steps: true}", "train.max_steps = true", "must be a whole number"),
    "thousands": _recipe("train: {max_steps: '1,000'}", "train.max_steps = '1,000'", "whole number; write 1000"),
    "fraction-for-count": _recipe("sampling: {top_k: 1.5}", "sampling.top_k = 1.5", "whole number, e.g. 0"),
    "null-for-number": _recipe("optimizer: {lr: }", "optimizer.lr = null", "leave the key out for the default, 0.0001"),
    "null-for-section": _recipe("model:\n", "model = null", "the section is empty", "such as size, dim, n_layer"),
    "number-for-section": _recipe("model: 3", "model = 3", "must be a section with fields such as size, dim"),
    "list-for-section": _recipe("train: [epochs]", "train = ['epochs']", "must be a section with fields such as"),
    "section-for-text": _recipe("name: {a: 1}", "name = {'a': 1}", "must be text, not a section, e.g. 'run'"),
    "number-for-text": _recipe("name: 7", "name = 7", "must be text; put it in quotes: '7'"),
    "text-for-flag": _recipe("checkpoint: {at_end: 'yes'}", "checkpoint.at_end = 'yes'", "true or false; write true"),
    "number-for-flag": _recipe("logging: {progress: 0}", "logging.progress = 0", "true or false; write false"),
    "number-for-list": _recipe("foresight: {weights: 2}", "foresight.weights = 2", "must be a list"),
    "text-in-list": _recipe("foresight: {weights: [2, a]}", "foresight.weights[1] = 'a'", "must be a number"),
    "one-beta": _recipe("optimizer: {betas: [0.9]}", "optimizer.betas = [0.9]", "must have 2 values, e.g. [0.9, 0.95]"),
    "three-betas": _recipe("optimizer: {betas: [0.9, 0.9, 0.9]}", "betas = [0.9, 0.9, 0.9]", "must have 2 values"),
    "number-for-betas": _recipe("optimizer: {betas: 0.9}", "optimizer.betas = 0.9", "a list, e.g. [0.9, 0.95]"),
    "number-for-deepspeed": _recipe("deepspeed: 2", "deepspeed = 2", "a file, the name of a shipped one (zero2)"),
    "encoder-layer-text": _recipe(
        "foresight: {encoder: {layer: last}}", "foresight.encoder.layer = 'last'", "must be a whole number"
    ),
    "encoder-norm-text": _recipe(
        "foresight: {encoder: {final_norm: 'no'}}", "foresight.encoder.final_norm = 'no'", "write false"
    ),
    "encoder-pretrained-file": _recipe(
        "foresight: {encoder: {pretrained: a.pth}}", "foresight.encoder.pretrained = 'a.pth'", "true or false"
    ),
    "encoder-compile": _recipe("foresight: {encoder: {compile: 1}}", "encoder.compile = 1", "write true"),
    "one-offset": _recipe("foresight: {offsets: [0, 1]}", "foresight.offsets = [0, 1]", "e.g. [[0, 1]]"),
    "offsets-number": _recipe("foresight: {offsets: 2}", "foresight.offsets = 2", "must be a list"),
    "offset-fraction": _recipe("foresight: {offsets: [[0, 0.5]]}", "foresight.offsets[0][1] = 0.5", "whole number"),
    "set-section": _set("optimizer=3", "optimizer = 3", "must be a section with fields such as lr, betas, eps"),
    "set-empty": _set("optimizer.lr=", "optimizer.lr = null", "leave the key out for the default, 0.0001"),
}

RANGES = {
    "lr-negative": _recipe("optimizer: {lr: -1}", "optimizer.lr = -1: must be greater than 0"),
    "lr-zero": _set("optimizer.lr=0", "optimizer.lr = 0: must be greater than 0"),
    "lr-nan": _recipe("optimizer: {lr: .nan}", "optimizer.lr = nan", "must be a finite number"),
    "lr-infinite": _recipe("optimizer: {lr: .inf}", "optimizer.lr = inf", "must be a finite number"),
    "lr-nan-in-words": _set("optimizer.lr=nan", "optimizer.lr = 'nan'", "must be a number, e.g. 0.0001"),
    "lr-overflow": _set("optimizer.lr=1e999", "optimizer.lr = '1e999'", "must be a number, e.g. 0.0001"),
    "seed-negative": _recipe("seed: -1", "seed = -1: must be at least 0"),
    "seed-large": _recipe("seed: 2147483648", "seed = 2147483648: must be less than 2147483648"),
    "held-out-all": _recipe("data: {held_out_fraction: 1}", "data.held_out_fraction = 1", "must be less than 1"),
    "ema-one": _recipe("ema: {decay: 1.0}", "ema.decay = 1.0", "must be less than 1"),
    "batch-zero": _recipe("train: {global_batch_size: 0}", "train.global_batch_size = 0", "must be at least 1"),
    "heads-zero": _recipe("foresight: {num_heads: 0}", "foresight.num_heads = 0: must be at least 1"),
    "encoder-layer-zero": _recipe(
        "foresight: {encoder: {layer: 0}}", "foresight.encoder.layer = 0", "must be at least 1"
    ),
    "encoder-block-zero": _recipe(
        "foresight: {encoder: {block_causal: 0}}", "foresight.encoder.block_causal = 0", "must be at least 1"
    ),
    "offset-left": _recipe("foresight: {offsets: [[0, -1]]}", "foresight.offsets[0] = [0, -1]", "[down, right]", "0"),
    "offset-of-three": _recipe(
        "foresight: {offsets: [[0, 1, 2]]}", "foresight.offsets[0] = [0, 1, 2]", "[down, right]"
    ),
    "offset-empty": _recipe("foresight: {offsets: [[]]}", "foresight.offsets[0] = []", "[down, right]"),
    "offsets-none": _recipe("foresight: {offsets: []}", "foresight.offsets = []", "1 to 64 entries"),
    "offsets-many": _recipe(
        f"foresight: {{offsets: {[[0, k] for k in range(65)]}}}", "foresight.offsets = [[0, 0]", "1 to 64 entries"
    ),
    "heads-ten-flat": _recipe("foresight: {num_heads: 10, layout: 1d}", "foresight.num_heads = 10: must be at most 9"),
    "heads-ten": _recipe("foresight: {num_heads: 10}", "foresight.num_heads = 10: must be at most 9"),
    "betas": _recipe("optimizer: {betas: [0.9, 1.0]}", "optimizer.betas = [0.9, 1.0]", "each must be", "less than 1"),
    "name-with-slash": _recipe("name: a/b", "name = 'a/b'", "may hold letters, digits", "use e.g. 'a-b'"),
    "name-starts-with-dot": _recipe("name: .x", "name = '.x'", "starts with a letter or digit; use e.g. 'x'"),
    "nan-in-list": _recipe("foresight: {weights: [.nan]}", "foresight.weights[0] = nan", "must be a finite number"),
}

MTP = TINY + "foresight: {method: mtp"
CROSS_FIELD = {
    "mtp-without-heads": _recipe(MTP + ", num_heads: 1}", "foresight.num_heads = 1", "use 2 or more, or method: none"),
    "mtp-next-token": _recipe(MTP + ", offsets: [[0, 1], [0, 0]]}", "foresight.offsets[1] = [0, 0]", "next token"),
    "mtp-offsets-and-k": _recipe(
        MTP + ", offsets: [[0, 1], [1, 0]], num_heads: 2}", "foresight.num_heads = 2", "must be 3"
    ),
    "mtp-weights": _recipe(
        MTP + ", weights: [1, 1, 1]}",
        "foresight.weights",
        "must have 2 values (foresight.num_heads, less the next token)",
    ),
    "mtp-input-slots": _recipe(MTP + ", slots: input}", "foresight.slots = 'input'", "mtp needs predict"),
    "mtp-sees-all": _recipe(
        MTP + ", head_attention: full}",
        "foresight.head_attention = 'full'",
        "read the tokens that mtp predicts; use causal",
    ),
    "mtp-teacher-layer": _recipe(
        MTP + ", teacher_layer: 2}", "foresight.teacher_layer = 2", "mtp has no teacher", "remove it"
    ),
    "mtp-last-token": _recipe(
        MTP + ", teacher_sees_last_token: true}", "foresight.teacher_sees_last_token = true", "mtp has no teacher"
    ),
    "mtp-teacher": _recipe(MTP + ", teacher_weights: x.pt}", "foresight.teacher_weights = 'x.pt'", "method: mirai-e"),
    "mtp-encoder": _recipe(MTP + ", encoder: {name: dinov2-b}}", "foresight.encoder = 'dinov2-b'", "method: mirai-i"),
    "mtp-class-slot": _recipe(MTP + ", class_slot: true}", "foresight.class_slot = true", "tokens have no class slot"),
    "head-attention-of-an-mlp": _set(
        "foresight.head_attention=causal", "head_attention = 'causal'", "is of head: transformer; remove it", text=MIRAI
    ),
    "head-unknown": _set(
        "foresight.head=linear", "foresight.head = 'linear'", "use one of: mlp, transformer", text=MIRAI
    ),
    "teacher-of-mirai-i": _recipe(
        TINY + "foresight: {method: mirai-i, teacher_weights: x.pt}",
        "foresight.teacher_weights = 'x.pt'",
        "is for method: mirai-e (an encoder gives one output); remove it",
    ),
    "n-head": _recipe(
        "model: {size: custom, dim: 768, n_layer: 2, n_head: 7}", "model.n_head = 7", "768; use one of [3, 4, 6, 8]"
    ),
    "head-width": _recipe(
        "model: {size: custom, dim: 12, n_layer: 1, n_head: 2}", "model.n_head = 2", "width 6", "[1, 3]"
    ),
    "odd-width": _recipe(
        "model: {size: custom, dim: 9, n_layer: 1, n_head: 1}", "model.n_head = 1", "dim a multiple of 4"
    ),
    "not-square": _recipe("model: {block_size: 200}", "model.block_size = 200", "not a square number; use 196 or 225"),
    "grid-size": _recipe("model: {grid_size: 24}", "model.grid_size = 24", "sqrt(model.block_size) = 16"),
    "par-two": _recipe(
        "model: {par_tokens: 2}", "model.par_tokens = 2", "square number of at least 4; use 4 or 16 or 64"
    ),
    "par-one": _recipe("model: {par_tokens: 1}", "model.par_tokens = 1: is not a square", "at least 4", "or null"),
    "par-negative": _recipe("model: {par_tokens: -4}", "model.par_tokens = -4: is not a square", "use 4 or 16"),
    "par-text": _recipe("model: {par_tokens: four}", "model.par_tokens = 'four'", "must be a whole number"),
    "par-does-not-divide": _recipe(
        "model: {par_tokens: 9}", "model.par_tokens = 9", "makes 3 regions a side", "the 16x16 grid; use 4 or 16 or 64"
    ),
    "par-whole-image": _recipe("model: {par_tokens: 256}", "model.par_tokens = 256", "is the whole image", "use 4 or"),
    "par-prime-grid": _recipe(
        "model: {block_size: 49, par_tokens: 4}", "model.par_tokens = 4", "the 7x7 grid; set it to null"
    ),
    "mask-decoded-in-raster-order": _set(
        "foresight.mask_decoded_targets=true",
        "foresight.mask_decoded_targets = true",
        "in raster order (model.par_tokens is null) no target is decoded already; set it to false",
        text=MIRAI,
    ),
    "mask-decoded-in-a-line": _recipe(
        "model: {par_tokens: 4}\n"
        "foresight: {method: mirai-i, convention: paper, layout: 1d, mask_decoded_targets: true}",
        "foresight.mask_decoded_targets = true",
        "in layout 1d with slots predict no target",
    ),
    "custom-incomplete": _recipe("model: {size: custom, dim: 8, n_head: 2}", "model.n_layer = null", "give it a value"),
    "size-and-dim": _recipe("model: {size: GPT-L, dim: 768}", "model.dim = 768", "GPT-L has 1024", "'custom'"),
    "layer": _set("foresight.layer=5", "foresight.layer = 5", "must be at most the model's depth, 4", text=MIRAI),
    "teacher-layer": _set("foresight.teacher_layer=9", "foresight.teacher_layer = 9", "depth, 4", text=MIRAI),
    "layer-zero": _set("foresight.layer=0", "foresight.layer = 0: must be at least 1", text=MIRAI),
    "weights-length": _set("foresight.weights=[2,2]", "foresight.weights = [2.0, 2.0]", "must have 3", text=MIRAI),
    "weights-negative": _set("foresight.weights=[2,-1,2]", "weights = [2.0, -1.0, 2.0]", "not be negative", text=MIRAI),
    "class-slot-encoder": _recipe(
        "foresight: {method: mirai-i, class_slot: true}", "foresight.class_slot = true", "no class slot; use false"
    ),
    "class-slot-paper": _recipe(
        "foresight: {method: mirai-e, convention: paper, class_slot: true}", "class_slot = true", "use false"
    ),
    "flat-stride": _set("foresight.flat_stride=4", "foresight.flat_stride = 4", "border: wrap", text=PAPER),
    "encoder-for-ema": _set("foresight.encoder={name: vit}", "encoder = 'vit'", "method: mirai-i", text=MIRAI),
    "teacher-layer-for-encoder": _recipe(
        "foresight: {method: mirai-i, teacher_layer: 3}", "foresight.teacher_layer = 3", "method: mirai-e", "remove it"
    ),
    "encoder-std": _recipe(
        "foresight: {encoder: {std: [0, 1, 1]}}", "foresight.encoder.std = [0.0, 1.0, 1.0]", "greater than 0"
    ),
    "encoder-weights-twice": _recipe(
        "foresight: {encoder: {weights: a.pth, pretrained: true}}",
        "foresight.encoder.pretrained = true",
        "foresight.encoder.weights is a file; keep one",
    ),
    "offset-twice": _recipe(
        "foresight: {offsets: [[0, 1], [1, 0], [0, 1]]}", "foresight.offsets[2] = [0, 1]", "given twice; remove one"
    ),
    "offsets-in-a-line": _recipe(
        "foresight: {layout: 1d, offsets: [[0, 1]]}", "foresight.offsets = [[0, 1]]", "needs layout: 2d"
    ),
    "offsets-and-order": _recipe(
        "foresight: {head_order: nearest, offsets: [[0, 1]]}", "foresight.head_order = 'nearest'", "remove it"
    ),
    "offsets-and-heads": _set(
        "foresight.offsets=[[0, 1]]",
        "foresight.num_heads = 3",
        "must be 1, one head an entry of foresight.offsets; remove it or set it to null",
        text="base: digits-mirai-e",
    ),
    "offsets-and-weights": _recipe(
        "foresight: {method: mirai-i, offsets: [[0, 1], [1, 0]], weights: [2]}", "foresight.weights = [2.0]", "have 2"
    ),
    "offset-beyond-grid": _set(
        "foresight.offsets=[[0, 1], [4, 0]]",
        "foresight.offsets[1] = [4, 0]",
        "leaves the 4x4 grid from every cell; use at most 3",
        text=MIRAI,
    ),
    "heads-beyond-grid": _recipe(
        "model: {size: custom, dim: 8, n_layer: 1, n_head: 1, block_size: 4}\n"
        "foresight: {method: mirai-e, warmup_epochs: 0, num_heads: 5}",
        "foresight.num_heads = 5",
        "must be at most 4",
    ),
    "warm-up-too-long": _recipe(
        "foresight: {method: mirai-e}\ntrain: {epochs: 10}",
        "foresight.warmup_epochs = 15.0",
        "epochs = 10.0",
        "lower it",
    ),
    "warm-up-as-long-as-the-run": _recipe(
        "foresight: {method: mirai-e}\ntrain: {epochs: 15}",
        "foresight.warmup_epochs = 15.0",
        "epochs = 15.0",
        "lower it",
    ),
    "cosine-start": _recipe(
        "foresight: {method: mirai-e, schedule: {kind: cosine, start_epoch: 300}}",
        "foresight.schedule.start_epoch = 300.0",
        "must be less than train.epochs = 300.0",
    ),
    "step-without-epochs": _recipe(
        "foresight: {schedule: {kind: step}}", "foresight.schedule.at_epochs = null", "e.g. [80]"
    ),
    "step-multipliers": _recipe(
        "foresight: {schedule: {kind: step, at_epochs: [80], multipliers: [1]}}",
        "foresight.schedule.multipliers = [1.0]",
        "must have 2 values",
    ),
    "step-multipliers-negative": _recipe(
        "foresight: {schedule: {kind: step, at_epochs: [80], multipliers: [1, -1]}}",
        "foresight.schedule.multipliers = [1.0, -1.0]",
        "must not be negative",
    ),
    "step-epochs-falling": _recipe(
        "foresight: {schedule: {kind: step, at_epochs: [80, 40]}}",
        "at_epochs = [80.0, 40.0]",
        "non-negative and rising",
    ),
    "step-epochs-negative": _recipe(
        "foresight: {schedule: {kind: step, at_epochs: [-1]}}", "at_epochs = [-1.0]", "non-negative and rising"
    ),
    "epochs-for-const": _recipe(
        "foresight: {schedule: {at_epochs: [80]}}", "foresight.schedule.at_epochs = [80.0]", "use kind: step"
    ),
    "final-for-step": _recipe(
        "foresight: {schedule: {kind: step, at_epochs: [80], final: 0.5}}", "schedule.final = 0.5", "use kind: cosine"
    ),
    "final-lr-above": _recipe(
        "optimizer: {schedule: cosine, final_lr: 1}",
        "optimizer.final_lr = 1.0",
        "must be at most optimizer.lr = 0.0001",
    ),
    "final-lr-constant": _recipe("optimizer: {final_lr: 1e-5}", "optimizer.final_lr = 1e-05", "schedule: cosine"),
    "top-k": _recipe(
        "model: {vocab_size: 17}\nsampling: {top_k: 18}", "sampling.top_k = 18", "at most model.vocab_size = 17"
    ),
    "grid-classes": _recipe(
        "model: {num_classes: 5}\nsampling: {classes: 6}", "sampling.classes = 6", "num_classes = 5"
    ),
    "store-without-path": _recipe("data: {source: store}", "data.path = null", "give the store's folder"),
    "images-for-npz": _recipe(
        "data: {source: npz, path: a.npz, images: b}", "data.images = 'b'", "is for source: store; remove it"
    ),
    "tokenizer-for-digits": _recipe("data: {tokenizer: vq.pt}", "data.tokenizer = 'vq.pt'", "is for source: store"),
    "held-out-of-digits": _recipe("data: {held_out_path: a}", "data.held_out_path = 'a'", "remove held_out_path"),
    "held-out-twice": _recipe(
        "data: {source: store, path: a, held_out_path: b, held_out_fraction: 0.1}",
        "data.held_out_fraction = 0.1",
        "held-out samples come from data.held_out_path = 'b'; remove one of them",
    ),
    "mirai-i-without-images": _recipe(
        "{data: {source: store, path: a}, foresight: {method: mirai-i}}",
        "data.images = null",
        "give an image store or the original folder",
    ),
    "negative-workers": _recipe("data: {workers: -1}", "data.workers = -1", "must be at least 0"),
    "no-prefetch": _recipe("data: {prefetch: 0}", "data.prefetch = 0", "must be at least 1"),
    "npz-without-path": _recipe("data: {source: npz}", "data.path = null", "give the .npz file"),
    "path-for-digits": _recipe("data: {path: a.npz}", "data.path = 'a.npz'", "remove path or use source: npz"),
    "micro-batch": _recipe("train: {micro_batch_size: 3}", "train.micro_batch_size = 3", "= 256; use e.g. 2"),
    "accumulation": _recipe("train: {grad_accum_steps: 7}", "train.grad_accum_steps = 7", "= 256; use e.g. 4"),
    "micro-times-accumulation": _recipe(
        "train: {global_batch_size: 8, micro_batch_size: 4, grad_accum_steps: 4}",
        "train.grad_accum_steps = 4",
        "16 does not divide",
        "leave one of them out",
    ),
    "recompute-partition": _recipe(
        "train: {recompute: {partition_activations: true}}",
        "train.recompute.partition_activations = true",
        "implementation: deepspeed",
    ),
}

YAML = {
    "tab": _recipe("model:\n\tsize: GPT-B", ":2:1:", "a tab; indent with spaces"),
    "two-colons": _recipe("name: a: b", ":1:8:", "unexpected ':'", "check the indentation"),
    "indentation": _recipe("model:\n  size: GPT-B\n dim: 3", ":3:2:", "does not line up with the lines above"),
    "open-bracket": _recipe("optimizer: {lr: 1\n", ":2:1:", "a bracket is not closed"),
    "open-quote": _recipe("name: 'x", ":1:9:", "a quote is not closed"),
    "bad-character": _recipe("name: @x", ":1:7:", "character '@' cannot start a value; quote the text"),
    "alias": _recipe("name: *x", ":1:7:", "found undefined alias 'x'"),
    "alias-of-itself": _recipe(
        "deepspeed: &x {bf16: [*x]}", "deepspeed.bf16: an alias of the section it is in; remove it"
    ),
    "python-tag": _recipe("name: !!python/object:os.system x", ":1:7:", "tags such as !!python are not allowed"),
    "two-documents": _recipe("seed: 1\n---\nseed: 2", ":2:1:", "one recipe a file; remove the '---'"),
    "control-character": _recipe("name: \x01", "a control character; remove it"),
    "bad-binary": _recipe("seed: 0b_", "not valid YAML", "invalid literal", "quote text"),
    "list": _recipe("- model\n- train", "a recipe is a mapping, not a list", "write `section:`"),
    "text": _recipe("just words", "a recipe is a mapping, not text", "write `section:`"),
    "no-space": _recipe("seed:1", "a recipe is a mapping, not text", "write `section:`"),
    "key-is-a-number": _recipe("1: 2", "keys must be names, not 1", "quote it"),
    "duplicate-section": _recipe(
        "model: {}\ntrain: {}\nmodel: {}", ":3: model: given twice (first in line 1); keep one"
    ),
    "duplicate-field": _recipe(
        "optimizer:\n  lr: 1\n  eps: 1\n  lr: 2\n", ":4: optimizer.lr: given twice (first in line 2); keep one"
    ),
    "duplicate-in-one-line": _recipe("optimizer: {lr: 1, lr: 1}", ":1: optimizer.lr: given twice", "keep one"),
    "base-is-a-list": _recipe("base: [a, b]", "base = ['a', 'b']", "must be the name or file of one recipe"),
    "base-unknown": _recipe("base: digits-mirai", "base = 'digits-mirai'", "no such recipe", "did you mean 'digits-"),
    "base-no-file": _recipe(
        "base: none.yaml", "base = 'none.yaml'", "no such recipe file; give a .yaml file; `mirai-ds recipes"
    ),
    "base-itself": _recipe("base: recipe.yaml", "recipe.yaml: base: goes round in a circle", "remove one `base:`"),
    "set-no-sign": _set("optimizer.lr", "--set 'optimizer.lr'", "write it as section.field=value"),
    "set-empty-part": _set("optimizer..lr=1", "--set 'optimizer..lr=1'", "write it as section.field=value"),
    "set-no-key": _set("=1", "--set '=1'", "write it as section.field=value"),
    "set-bad-yaml": _set("foresight.weights=[1, 2", "foresight.weights=[1, 2'", "a bracket is not closed"),
    "set-base": _set("base=digits-baseline", "base=digits-baseline", "base belongs into the recipe file"),
    "set-into-value": _set("name.x=1", "name = 'a'", "is a value, not a section", text="name: a"),
    "set-duplicate": _set("optimizer={lr: 1, lr: 2}", "lr: given twice", "keep one"),
    "set-two-lines": _set("name=a\nb", "name = 'a b'", "use e.g. 'a-b'"),
}

ALL = {**UNKNOWN_NAMES, **TYPES, **RANGES, **CROSS_FIELD, **YAML}
