"""What the names of values mean, and which of them belong into one chart."""

from __future__ import annotations

# The beginning of a tag -> its meaning; the longest that fits counts.
MEANINGS = {
    "loss/total": "What is minimised: loss/ntp + foresight/schedule * loss/alignment, of the step's global batch.",
    "loss/ntp": "Next-token loss of the step's global batch, nats a token, with dropout.",
    "loss/alignment": "Weighted sum over the heads of how far they are from their targets (minus the cosine).",
    "held_out/ntp_raw": "Next-token loss of held-out images with the weights that are trained, nats a token.",
    "held_out/ntp_ema": "The same with the weights' average.  It rises where training only learns by heart.",
    "quality/fid": "Frechet distance of Inception's features of drawn and real images; lower is better.",
    "quality/frechet_distance": "Frechet distance of another network's features; compare within one network only.",
    "quality/precision": "Share of drawn images that lie among the real ones.",
    "quality/recall": "Share of real images that lie among the drawn ones.",
    "quality/": "Drawn images against real ones, as `mirai-ds evaluate` has it.",
    "cosine/": "Cosine of a head's projection with the teacher's features of that neighbour: 1 is the same direction.",
    "centred_cosine/": "The same less what all features share: 0 where a head gives that common direction alone.",
    "entropy/": "Loss of a head that predicts a later token, nats a token.",
    "foresight/schedule": "What the alignment loss is multiplied by.",
    "foresight/lambda/": "This head's lambda at this step.",
    "foresight/gradient_ntp": "Norm of the next-token loss's gradient at the aligned states of a micro-batch.",
    "foresight/gradient_alignment": "Norm of the weighted alignment loss's gradient at the same states.",
    "foresight/gradient_cosine": "Cosine of these two gradients: below 0 they pull against each other.",
    "optimizer/lr": "Learning rate.",
    "optimizer/grad_norm": "Global norm of the gradients before clipping.",
    "optimizer/clip_factor": "What clipping multiplied the gradients by.",
    "optimizer/skipped_steps": "Steps left out since the start because something was not finite.",
    "speed/images_per_s": "Images a second over all ranks, without measurements and saves.",
    "speed/tokens_per_s": "Tokens a second over all ranks.",
    "speed/model_tflops_per_s_per_rank": "FLOPs of the model a second on each rank, recomputation left out.",
    "memory/peak_gib": "Peak memory of rank 0: of the allocator on a GPU, of the process on a CPU.",
    "checkpoint/stall_s": "Seconds for which training waited for a save.",
    "checkpoint/write_s": "Seconds that writing the checkpoint took.",
    "guard/spike": "A next-token loss that was taken for a spike.",
    "score/": "Share of images that a classifier trained on real ones recognises.",
}

# Charts for TensorBoard's Custom Scalars: category -> title -> patterns of tags.
CHARTS = {
    "losses": {
        "next token": [r"^loss/ntp$", r"^held_out/ntp_"],
        "total and alignment": [r"^loss/total$", r"^loss/alignment$"],
    },
    "quality": {
        "distance to real images": [r"^quality/(s?fid|frechet_distance)$"],
        "precision, recall": [r"^quality/(precision|recall)$"],
    },
    "foresight": {
        "cosine of each head": [r"^cosine/", r"^centred_cosine/"],
        "lambda of each head": [r"^foresight/lambda/"],
        "gradients where the losses meet": [r"^foresight/gradient_(ntp|alignment)$"],
    },
    "machine": {"images/s": [r"^speed/images_per_s$"], "gradient norm": [r"^optimizer/grad_norm$"]},
}


def meaning(tag: str) -> str:
    """A sentence about a tag; empty for one that others write."""
    fitting = [start for start in MEANINGS if tag.startswith(start)]
    return MEANINGS[max(fitting, key=len)] if fitting else ""
