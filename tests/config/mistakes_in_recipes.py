"""Typical mistakes in recipes and on the command line: (name, recipe, what the message must hold).

Field, offending value and fix, each as the user reads it.
"""

from __future__ import annotations

from tests.config.mistake import MIRAI, PAPER, TINY, given, recipe
from tests.config.mistakes_in_yaml import YAML

UNKNOWN_NAMES = {
    "section": recipe("optimiser: {lr: 1}", "optimiser: unknown key", "did you mean 'optimizer'?"),
    "top-level-nothing-near": recipe("zzz: 1", "zzz: unknown key", "use one of: base, checkpoint, data,"),
    "base-misspelt": recipe("bas: digits-baseline", "bas: unknown key", "did you mean 'base'?"),
    "field": recipe("optimizer: {weigth_decay: 0.1}", "optimizer.weigth_decay: unknown key", "'weight_decay'?"),
    "field-of-another-section": recipe("train: {lr: 1e-4}", "train.lr: unknown key", "did you mean 'optimizer.lr'?"),
    "the-papers-lambda": recipe("foresight: {lambda: 2}", "foresight.lambda: unknown key", "'foresight.weights'?"),
    "the-papers-K": recipe("foresight: {K: 3}", "foresight.K: unknown key", "did you mean 'foresight.num_heads'?"),
    "the-papers-tau": recipe("foresight: {tau: 0.99}", "foresight.tau: unknown key", "did you mean 'ema.decay'?"),
    "field-without-section": recipe("lr: 1e-4", "lr: unknown key", "did you mean 'optimizer.lr'?"),
    "llamagen-name": recipe("train: {batch_size: 8}", "train.batch_size: unknown", "'train.global_batch_size'?"),
    "deepspeed-name": recipe("gradient_clipping: 1.0", "gradient_clipping: unknown", "'optimizer.grad_clip'?"),
    "dashes": recipe("train: {global-batch-size: 8}", "train.global-batch-size: unknown", "'global_batch_size'?"),
    "upper-case": recipe("model: {Vocab_Size: 8}", "model.Vocab_Size: unknown key", "did you mean 'vocab_size'?"),
    "third-level": recipe("train: {recompute: {polcy: full}}", "train.recompute.polcy: unknown", "'policy'?"),
    "third-level-schedule": recipe(
        "foresight: {schedule: {at_epoch: [80]}}", "foresight.schedule.at_epoch: unknown", "'at_epochs'?"
    ),
    "third-level-optional": recipe(
        "foresight: {encoder: {weight: x.pth}}", "foresight.encoder.weight: unknown key", "did you mean 'weights'?"
    ),
    "set-unknown": given("optimizer.learning_rte=1", "optimizer.learning_rte: unknown key", "use one of: betas, eps,"),
    "set-unknown-section": given("sampler.top_k=1", "sampler: unknown key", "did you mean 'sampling'?"),
    "set-deeper": given("model.size.name=GPT-B", "model.size = {'name': 'GPT-B'}", "must be text", "not a section"),
    "key-is-true": recipe("train: {on: 1}", "train: the key true must be a name"),
    "size": recipe("model: {size: gpt-xl}", "model.size = 'gpt-xl'", "did you mean 'GPT-XL'?"),
    "kernel": recipe(
        "foresight: {kernel: fast}", "foresight.kernel = 'fast'", "use one of: auto, cpu, cuda, reference"
    ),
    "method": recipe("foresight: {method: mirai_e}", "foresight.method = 'mirai_e'", "did you mean 'mirai-e'?"),
    "method-null": recipe("foresight: {method: }", "foresight.method = null", "the default, 'none'"),
    "precision": recipe("train: {precision: fp8}", "train.precision = 'fp8'", "use one of: bf16, bf16-autocast, fp32"),
    "convention": recipe("foresight: {convention: papers}", "foresight.convention = 'papers'", "'paper'?"),
    "policy": recipe("train: {recompute: {policy: fulll}}", "train.recompute.policy = 'fulll'", "'full'?"),
    "encoder-weights-misspelt": recipe(
        "foresight: {encoder: {pre_trained: true}}", "foresight.encoder.pre_trained: unknown key", "'pretrained'?"
    ),
    "weights-kind": recipe("eval: {loss: {weights: [raw, avg]}}", "eval.loss.weights[1] = 'avg'", "one of: ema, raw"),
    "weights-kind-under-the-old-name": recipe(
        "evaluate: {weights: [raw, avg]}", "eval.loss.weights[1] = 'avg'", "use one of: ema, raw"
    ),
    "old-name-misspelt": recipe("evalute: {every_steps: 1}", "evalute: unknown key", "did you mean 'eval.loss'?"),
    "old-name-in-upper-case": recipe("Quality: {at_end: true}", "Quality: unknown key", "did you mean 'eval.fid'?"),
    "old-name-in-plural": given("scores.enabled=true", "scores: unknown key", "did you mean 'eval.classifier'?"),
    "old-name-in-the-new-section": recipe("eval: {score: {}}", "eval.score: unknown key", "'eval.classifier'?"),
    "near-the-new-section": recipe("evl: {}", "evl: unknown key", "did you mean 'eval'?"),
    "near-a-new-subsection": recipe("eval: {los: {}}", "eval.los: unknown key", "did you mean 'loss'?"),
    "without-the-subsection": recipe("eval: {num_samples: 9}", "eval.num_samples: unknown", "'eval.fid.num_samples'?"),
    "old-hook-misspelt": given("hooks=[log, evalate, stop]", "hooks = 'evalate'", "did you mean 'eval-loss'?"),
}

TYPES = {
    "text-for-number": recipe("optimizer: {lr: fast}", "optimizer.lr = 'fast'", "must be a number, e.g. 0.0001"),
    "list-for-number": recipe("train: {epochs: [1]}", "train.epochs = [1]", "must be a number, not a list, e.g. 300"),
    "section-for-number": recipe("optimizer: {lr: {a: 1}}", "optimizer.lr = {'a': 1}", "a number, not a section"),
    "true-for-number": recipe("optimizer: {lr: true}", "optimizer.lr = true", "must be a number, e.g. 0.0001"),
    "true-for-count": recipe("train: {max_steps: true}", "train.max_steps = true", "must be a whole number"),
    "thousands": recipe("train: {max_steps: '1,000'}", "train.max_steps = '1,000'", "whole number; write 1000"),
    "fraction-for-count": recipe("sampling: {top_k: 1.5}", "sampling.top_k = 1.5", "whole number, e.g. 0"),
    "null-for-number": recipe("optimizer: {lr: }", "optimizer.lr = null", "leave the key out for the default, 0.0001"),
    "null-for-section": recipe("model:\n", "model = null", "the section is empty", "such as size, dim, n_layer"),
    "number-for-section": recipe("model: 3", "model = 3", "must be a section with fields such as size, dim"),
    "list-for-section": recipe("train: [epochs]", "train = ['epochs']", "must be a section with fields such as"),
    "section-for-text": recipe("name: {a: 1}", "name = {'a': 1}", "must be text, not a section, e.g. 'run'"),
    "number-for-text": recipe("name: 7", "name = 7", "must be text; put it in quotes: '7'"),
    "text-for-flag": recipe("checkpoint: {at_end: 'yes'}", "checkpoint.at_end = 'yes'", "true or false; write true"),
    "number-for-flag": recipe("logging: {progress: 0}", "logging.progress = 0", "true or false; write false"),
    "number-for-list": recipe("foresight: {weights: 2}", "foresight.weights = 2", "must be a list"),
    "text-in-list": recipe("foresight: {weights: [2, a]}", "foresight.weights[1] = 'a'", "must be a number"),
    "one-beta": recipe("optimizer: {betas: [0.9]}", "optimizer.betas = [0.9]", "must have 2 values, e.g. [0.9, 0.95]"),
    "three-betas": recipe("optimizer: {betas: [0.9, 0.9, 0.9]}", "betas = [0.9, 0.9, 0.9]", "must have 2 values"),
    "number-for-betas": recipe("optimizer: {betas: 0.9}", "optimizer.betas = 0.9", "a list, e.g. [0.9, 0.95]"),
    "number-for-deepspeed": recipe("deepspeed: 2", "deepspeed = 2", "a file, the name of a shipped one (zero2)"),
    "encoder-layer-text": recipe(
        "foresight: {encoder: {layer: last}}", "foresight.encoder.layer = 'last'", "must be a whole number"
    ),
    "encoder-norm-text": recipe(
        "foresight: {encoder: {final_norm: 'no'}}", "foresight.encoder.final_norm = 'no'", "write false"
    ),
    "encoder-pretrained-file": recipe(
        "foresight: {encoder: {pretrained: a.pth}}", "foresight.encoder.pretrained = 'a.pth'", "true or false"
    ),
    "encoder-compile": recipe("foresight: {encoder: {compile: 1}}", "encoder.compile = 1", "write true"),
    "one-offset": recipe("foresight: {offsets: [0, 1]}", "foresight.offsets = [0, 1]", "e.g. [[0, 1]]"),
    "offsets-number": recipe("foresight: {offsets: 2}", "foresight.offsets = 2", "must be a list"),
    "offset-fraction": recipe("foresight: {offsets: [[0, 0.5]]}", "foresight.offsets[0][1] = 0.5", "whole number"),
    "set-section": given("optimizer=3", "optimizer = 3", "must be a section with fields such as lr, betas, eps"),
    "set-empty": given("optimizer.lr=", "optimizer.lr = null", "leave the key out for the default, 0.0001"),
}

RANGES = {
    "lr-negative": recipe("optimizer: {lr: -1}", "optimizer.lr = -1: must be greater than 0"),
    "lr-zero": given("optimizer.lr=0", "optimizer.lr = 0: must be greater than 0"),
    "lr-nan": recipe("optimizer: {lr: .nan}", "optimizer.lr = nan", "must be a finite number"),
    "lr-infinite": recipe("optimizer: {lr: .inf}", "optimizer.lr = inf", "must be a finite number"),
    "lr-nan-in-words": given("optimizer.lr=nan", "optimizer.lr = 'nan'", "must be a number, e.g. 0.0001"),
    "lr-overflow": given("optimizer.lr=1e999", "optimizer.lr = '1e999'", "must be a number, e.g. 0.0001"),
    "seed-negative": recipe("seed: -1", "seed = -1: must be at least 0"),
    "seed-large": recipe("seed: 2147483648", "seed = 2147483648: must be less than 2147483648"),
    "held-out-all": recipe("data: {held_out_fraction: 1}", "data.held_out_fraction = 1", "must be less than 1"),
    "ema-one": recipe("ema: {decay: 1.0}", "ema.decay = 1.0", "must be less than 1"),
    "batch-zero": recipe("train: {global_batch_size: 0}", "train.global_batch_size = 0", "must be at least 1"),
    "heads-zero": recipe("foresight: {num_heads: 0}", "foresight.num_heads = 0: must be at least 1"),
    "encoder-layer-zero": recipe(
        "foresight: {encoder: {layer: 0}}", "foresight.encoder.layer = 0", "must be at least 1"
    ),
    "encoder-block-zero": recipe(
        "foresight: {encoder: {block_causal: 0}}", "foresight.encoder.block_causal = 0", "must be at least 1"
    ),
    "offset-left": recipe("foresight: {offsets: [[0, -1]]}", "foresight.offsets[0] = [0, -1]", "[down, right]", "0"),
    "offset-of-three": recipe("foresight: {offsets: [[0, 1, 2]]}", "foresight.offsets[0] = [0, 1, 2]", "[down, right]"),
    "offset-empty": recipe("foresight: {offsets: [[]]}", "foresight.offsets[0] = []", "[down, right]"),
    "offsets-none": recipe("foresight: {offsets: []}", "foresight.offsets = []", "1 to 64 entries"),
    "offsets-many": recipe(
        f"foresight: {{offsets: {[[0, k] for k in range(65)]}}}", "foresight.offsets = [[0, 0]", "1 to 64 entries"
    ),
    "heads-ten-flat": recipe("foresight: {num_heads: 10, layout: 1d}", "foresight.num_heads = 10: must be at most 9"),
    "heads-ten": recipe("foresight: {num_heads: 10}", "foresight.num_heads = 10: must be at most 9"),
    "betas": recipe("optimizer: {betas: [0.9, 1.0]}", "optimizer.betas = [0.9, 1.0]", "each must be", "less than 1"),
    "name-with-slash": recipe("name: a/b", "name = 'a/b'", "may hold letters, digits", "use e.g. 'a-b'"),
    "name-starts-with-dot": recipe("name: .x", "name = '.x'", "starts with a letter or digit; use e.g. 'x'"),
    "nan-in-list": recipe("foresight: {weights: [.nan]}", "foresight.weights[0] = nan", "must be a finite number"),
}

MTP = TINY + "foresight: {method: mtp"
CROSS_FIELD = {
    "mtp-without-heads": recipe(MTP + ", num_heads: 1}", "foresight.num_heads = 1", "use 2 or more, or method: none"),
    "mtp-next-token": recipe(MTP + ", offsets: [[0, 1], [0, 0]]}", "foresight.offsets[1] = [0, 0]", "next token"),
    "mtp-offsets-and-k": recipe(
        MTP + ", offsets: [[0, 1], [1, 0]], num_heads: 2}", "foresight.num_heads = 2", "must be 3"
    ),
    "mtp-weights": recipe(
        MTP + ", weights: [1, 1, 1]}",
        "foresight.weights",
        "must have 2 values (foresight.num_heads, less the next token)",
    ),
    "mtp-input-slots": recipe(MTP + ", slots: input}", "foresight.slots = 'input'", "mtp needs predict"),
    "mtp-sees-all": recipe(
        MTP + ", head_attention: full}",
        "foresight.head_attention = 'full'",
        "read the tokens that mtp predicts; use causal",
    ),
    "mtp-teacher-layer": recipe(
        MTP + ", teacher_layer: 2}", "foresight.teacher_layer = 2", "mtp has no teacher", "remove it"
    ),
    "mtp-last-token": recipe(
        MTP + ", teacher_sees_last_token: true}", "foresight.teacher_sees_last_token = true", "mtp has no teacher"
    ),
    "mtp-teacher": recipe(MTP + ", teacher_weights: x.pt}", "foresight.teacher_weights = 'x.pt'", "method: mirai-e"),
    "mtp-encoder": recipe(MTP + ", encoder: {name: dinov2-b}}", "foresight.encoder = 'dinov2-b'", "method: mirai-i"),
    "mtp-class-slot": recipe(MTP + ", class_slot: true}", "foresight.class_slot = true", "tokens have no class slot"),
    "head-attention-of-an-mlp": given(
        "foresight.head_attention=causal", "head_attention = 'causal'", "is of head: transformer; remove it", text=MIRAI
    ),
    "head-unknown": given(
        "foresight.head=linear", "foresight.head = 'linear'", "use one of: mlp, transformer", text=MIRAI
    ),
    "teacher-of-mirai-i": recipe(
        TINY + "foresight: {method: mirai-i, teacher_weights: x.pt}",
        "foresight.teacher_weights = 'x.pt'",
        "is for method: mirai-e (an encoder gives one output); remove it",
    ),
    "n-head": recipe(
        "model: {size: custom, dim: 768, n_layer: 2, n_head: 7}", "model.n_head = 7", "768; use one of [3, 4, 6, 8]"
    ),
    "head-width": recipe(
        "model: {size: custom, dim: 12, n_layer: 1, n_head: 2}", "model.n_head = 2", "width 6", "[1, 3]"
    ),
    "odd-width": recipe(
        "model: {size: custom, dim: 9, n_layer: 1, n_head: 1}", "model.n_head = 1", "dim a multiple of 4"
    ),
    "not-square": recipe("model: {block_size: 200}", "model.block_size = 200", "not a square number; use 196 or 225"),
    "grid-size": recipe("model: {grid_size: 24}", "model.grid_size = 24", "sqrt(model.block_size) = 16"),
    "par-two": recipe(
        "model: {par_tokens: 2}", "model.par_tokens = 2", "square number of at least 4; use 4 or 16 or 64"
    ),
    "par-one": recipe("model: {par_tokens: 1}", "model.par_tokens = 1: is not a square", "at least 4", "or null"),
    "par-negative": recipe("model: {par_tokens: -4}", "model.par_tokens = -4: is not a square", "use 4 or 16"),
    "par-text": recipe("model: {par_tokens: four}", "model.par_tokens = 'four'", "must be a whole number"),
    "par-does-not-divide": recipe(
        "model: {par_tokens: 9}", "model.par_tokens = 9", "makes 3 regions a side", "the 16x16 grid; use 4 or 16 or 64"
    ),
    "par-whole-image": recipe("model: {par_tokens: 256}", "model.par_tokens = 256", "is the whole image", "use 4 or"),
    "par-prime-grid": recipe(
        "model: {block_size: 49, par_tokens: 4}", "model.par_tokens = 4", "the 7x7 grid; set it to null"
    ),
    "mask-decoded-in-raster-order": given(
        "foresight.mask_decoded_targets=true",
        "foresight.mask_decoded_targets = true",
        "in raster order (model.par_tokens is null) no target is decoded already; set it to false",
        text=MIRAI,
    ),
    "mask-decoded-in-a-line": recipe(
        "model: {par_tokens: 4}\n"
        "foresight: {method: mirai-i, convention: paper, layout: 1d, mask_decoded_targets: true}",
        "foresight.mask_decoded_targets = true",
        "in layout 1d with slots predict no target",
    ),
    "custom-incomplete": recipe("model: {size: custom, dim: 8, n_head: 2}", "model.n_layer = null", "give it a value"),
    "size-and-dim": recipe("model: {size: GPT-L, dim: 768}", "model.dim = 768", "GPT-L has 1024", "'custom'"),
    "layer": given("foresight.layer=5", "foresight.layer = 5", "must be at most the model's depth, 4", text=MIRAI),
    "teacher-layer": given("foresight.teacher_layer=9", "foresight.teacher_layer = 9", "depth, 4", text=MIRAI),
    "layer-zero": given("foresight.layer=0", "foresight.layer = 0: must be at least 1", text=MIRAI),
    "weights-length": given("foresight.weights=[2,2]", "foresight.weights = [2.0, 2.0]", "must have 3", text=MIRAI),
    "weights-negative": given(
        "foresight.weights=[2,-1,2]", "weights = [2.0, -1.0, 2.0]", "not be negative", text=MIRAI
    ),
    "class-slot-encoder": recipe(
        "foresight: {method: mirai-i, class_slot: true}", "foresight.class_slot = true", "no class slot; use false"
    ),
    "class-slot-paper": recipe(
        "foresight: {method: mirai-e, convention: paper, class_slot: true}", "class_slot = true", "use false"
    ),
    "flat-stride": given("foresight.flat_stride=4", "foresight.flat_stride = 4", "border: wrap", text=PAPER),
    "encoder-for-ema": given("foresight.encoder={name: vit}", "encoder = 'vit'", "method: mirai-i", text=MIRAI),
    "teacher-layer-for-encoder": recipe(
        "foresight: {method: mirai-i, teacher_layer: 3}", "foresight.teacher_layer = 3", "method: mirai-e", "remove it"
    ),
    "encoder-std": recipe(
        "foresight: {encoder: {std: [0, 1, 1]}}", "foresight.encoder.std = [0.0, 1.0, 1.0]", "greater than 0"
    ),
    "encoder-weights-twice": recipe(
        "foresight: {encoder: {weights: a.pth, pretrained: true}}",
        "foresight.encoder.pretrained = true",
        "foresight.encoder.weights is a file; keep one",
    ),
    "offset-twice": recipe(
        "foresight: {offsets: [[0, 1], [1, 0], [0, 1]]}", "foresight.offsets[2] = [0, 1]", "given twice; remove one"
    ),
    "offsets-in-a-line": recipe(
        "foresight: {layout: 1d, offsets: [[0, 1]]}", "foresight.offsets = [[0, 1]]", "needs layout: 2d"
    ),
    "offsets-and-order": recipe(
        "foresight: {head_order: nearest, offsets: [[0, 1]]}", "foresight.head_order = 'nearest'", "remove it"
    ),
    "offsets-and-heads": given(
        "foresight.offsets=[[0, 1]]",
        "foresight.num_heads = 3",
        "must be 1, one head an entry of foresight.offsets; remove it or set it to null",
        text="base: digits-mirai-e",
    ),
    "offsets-and-weights": recipe(
        "foresight: {method: mirai-i, offsets: [[0, 1], [1, 0]], weights: [2]}", "foresight.weights = [2.0]", "have 2"
    ),
    "offset-beyond-grid": given(
        "foresight.offsets=[[0, 1], [4, 0]]",
        "foresight.offsets[1] = [4, 0]",
        "leaves the 4x4 grid from every cell; use at most 3",
        text=MIRAI,
    ),
    "heads-beyond-grid": recipe(
        "model: {size: custom, dim: 8, n_layer: 1, n_head: 1, block_size: 4}\n"
        "foresight: {method: mirai-e, warmup_epochs: 0, num_heads: 5}",
        "foresight.num_heads = 5",
        "must be at most 4",
    ),
    "warm-up-too-long": recipe(
        "foresight: {method: mirai-e}\ntrain: {epochs: 10}",
        "foresight.warmup_epochs = 15.0",
        "epochs = 10.0",
        "lower it",
    ),
    "warm-up-as-long-as-the-run": recipe(
        "foresight: {method: mirai-e}\ntrain: {epochs: 15}",
        "foresight.warmup_epochs = 15.0",
        "epochs = 15.0",
        "lower it",
    ),
    "cosine-start": recipe(
        "foresight: {method: mirai-e, schedule: {kind: cosine, start_epoch: 300}}",
        "foresight.schedule.start_epoch = 300.0",
        "must be less than train.epochs = 300.0",
    ),
    "step-without-epochs": recipe(
        "foresight: {schedule: {kind: step}}", "foresight.schedule.at_epochs = null", "e.g. [80]"
    ),
    "step-multipliers": recipe(
        "foresight: {schedule: {kind: step, at_epochs: [80], multipliers: [1]}}",
        "foresight.schedule.multipliers = [1.0]",
        "must have 2 values",
    ),
    "step-multipliers-negative": recipe(
        "foresight: {schedule: {kind: step, at_epochs: [80], multipliers: [1, -1]}}",
        "foresight.schedule.multipliers = [1.0, -1.0]",
        "must not be negative",
    ),
    "step-epochs-falling": recipe(
        "foresight: {schedule: {kind: step, at_epochs: [80, 40]}}",
        "at_epochs = [80.0, 40.0]",
        "non-negative and rising",
    ),
    "step-epochs-negative": recipe(
        "foresight: {schedule: {kind: step, at_epochs: [-1]}}", "at_epochs = [-1.0]", "non-negative and rising"
    ),
    "epochs-for-const": recipe(
        "foresight: {schedule: {at_epochs: [80]}}", "foresight.schedule.at_epochs = [80.0]", "use kind: step"
    ),
    "final-for-step": recipe(
        "foresight: {schedule: {kind: step, at_epochs: [80], final: 0.5}}", "schedule.final = 0.5", "use kind: cosine"
    ),
    "final-lr-above": recipe(
        "optimizer: {schedule: cosine, final_lr: 1}",
        "optimizer.final_lr = 1.0",
        "must be at most optimizer.lr = 0.0001",
    ),
    "final-lr-constant": recipe("optimizer: {final_lr: 1e-5}", "optimizer.final_lr = 1e-05", "schedule: cosine"),
    "top-k": recipe(
        "model: {vocab_size: 17}\nsampling: {top_k: 18}", "sampling.top_k = 18", "at most model.vocab_size = 17"
    ),
    "grid-classes": recipe(
        "model: {num_classes: 5}\nsampling: {classes: 6}", "sampling.classes = 6", "num_classes = 5"
    ),
    "store-without-path": recipe("data: {source: store}", "data.path = null", "give the store's folder"),
    "images-for-npz": recipe(
        "data: {source: npz, path: a.npz, images: b}", "data.images = 'b'", "is for source: store; remove it"
    ),
    "more-views-for-npz": recipe(
        "data: {source: npz, path: a.npz, more_views: [b]}",
        "data.more_views = ['b']",
        "is for source: store; remove it",
    ),
    "tokenizer-for-digits": recipe("data: {tokenizer: vq.pt}", "data.tokenizer = 'vq.pt'", "is for source: store"),
    "held-out-of-digits": recipe("data: {held_out_path: a}", "data.held_out_path = 'a'", "remove held_out_path"),
    "held-out-twice": recipe(
        "data: {source: store, path: a, held_out_path: b, held_out_fraction: 0.1}",
        "data.held_out_fraction = 0.1",
        "held-out samples come from data.held_out_path = 'b'; remove one of them",
    ),
    "mirai-i-without-images": recipe(
        "{data: {source: store, path: a}, foresight: {method: mirai-i}}",
        "data.images = null",
        "give an image store or the original folder",
    ),
    "negative-workers": recipe("data: {workers: -1}", "data.workers = -1", "must be at least 0"),
    "no-prefetch": recipe("data: {prefetch: 0}", "data.prefetch = 0", "must be at least 1"),
    "npz-without-path": recipe("data: {source: npz}", "data.path = null", "give the .npz file"),
    "path-for-digits": recipe("data: {path: a.npz}", "data.path = 'a.npz'", "remove path or use source: npz"),
    "micro-batch": recipe("train: {micro_batch_size: 3}", "train.micro_batch_size = 3", "= 256; use e.g. 2"),
    "accumulation": recipe("train: {grad_accum_steps: 7}", "train.grad_accum_steps = 7", "= 256; use e.g. 4"),
    "micro-times-accumulation": recipe(
        "train: {global_batch_size: 8, micro_batch_size: 4, grad_accum_steps: 4}",
        "train.grad_accum_steps = 4",
        "16 does not divide",
        "leave one of them out",
    ),
    "budget-without-compiler": recipe(
        "train: {recompute: {policy: budget}}", "train.recompute.policy = 'budget'", "set train.compile: blocks"
    ),
    "deepspeed-recomputes-blocks": recipe(
        "train: {recompute: {policy: mlp, implementation: deepspeed}}",
        "train.recompute.implementation = 'deepspeed'",
        "leave it at torch",
    ),
    "recompute-budget": recipe(
        "train: {compile: blocks, recompute: {policy: budget, budget: 1.5}}", "train.recompute.budget = 1.5"
    ),
    "compile": recipe("train: {compile: true}", "train.compile = true", "use one of: auto, blocks, none"),
    "cross-entropy": recipe("train: {cross_entropy: chunks}", "train.cross_entropy = 'chunks'", "'chunked'?"),
    "recompute-partition": recipe(
        "train: {recompute: {partition_activations: true}}",
        "train.recompute.partition_activations = true",
        "implementation: deepspeed",
    ),
}

ALL = {**UNKNOWN_NAMES, **TYPES, **RANGES, **CROSS_FIELD, **YAML}
