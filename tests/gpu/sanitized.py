"""Every code path of the CUDA kernel once, small: what compute-sanitizer watches.  `python -m tests.gpu.sanitized`."""

from __future__ import annotations

import torch

from tests.kernels.cases import BF16, F16, F32, evaluate, random_case


def main() -> None:
    """Vector paths by width, cached and scalar path, both layouts, all dtypes, rescaling in and out of place."""
    calls = 0
    for width in (1, 7, 12, 65, 256, 768, 1024, 1280, 1536):
        for states, target in ((F32, F32), (BF16, BF16), (F16, F32), (BF16, F32)):
            case = random_case(2, 9, 11, 3, width, states, target).to("cuda")
            for layout in (case, case.stacked()):
                for upstream in (1.0, 3.0):
                    loss, cosine, gradient = evaluate(layout, "cuda", upstream)
                    assert bool(torch.isfinite(loss) & torch.isfinite(cosine).all() & torch.isfinite(gradient).all())
                    calls += 1
    torch.cuda.synchronize()
    print(f"{calls} forward and backward passes")


if __name__ == "__main__":
    main()
